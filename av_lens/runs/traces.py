"""A recorded run that can be restarted anywhere: many interventions for the price of a few layers.

Question: what would the model have said, had these heads done something else? `model.trace(x)` runs the model once,
encoders and all, and keeps what every layer received: the residual stream, rotated keys and values. `trace.replay`
then computes, for each plan, only the layers from the plan's first layer on and only the positions from its first
position on; thousands of media positions before the question are never computed again. Plans that start at the same
place run together, stacked along the batch up to a memory budget.

Replays equal hooked full forwards to 1e-5 in float32 (tested for every edit kind), and every edit must fire as often
as in a full forward, or the replay raises. A trace checks on recording that a restart reproduces its own run; where it
does not (hooks put on the model by hand, a layout it does not know), and for edits at components that it cannot
restart at, it runs full hooked forwards instead and says so in `trace.hooked_because`.

A trace holds the model's answer at the moment of recording: record again after the weights changed.

Not done here: gradients, generation, traces on another device than the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.bridge.hook_names import COMPONENTS, hook_name
from av_lens.errors import BudgetError
from av_lens.interventions import CompiledPlan, Plan
from av_lens.interventions.sites import resolve_positions
from av_lens.runs.metrics import Metric, as_metric
from av_lens.runs.restart import RESTARTABLE, Layer, Taps, Window, run_layer
from av_lens.spans import Span, SpanMap

GB = 1e9
STACK_ROWS = 2000  # positions x examples x plans computed together: beyond it, stacking gains nothing


@dataclass(frozen=True, eq=False)
class Trace:
    """One recorded run and what is needed to restart it. Build it with `model.trace(x)`.

    Attributes:
        model: the model that ran.
        x: its input.
        resid: the stream that entered each layer, and the one that left the last, each `[batch, pos, d_model]`.
        keys: each layer's rotated keys, `[batch, kv_head, pos, d_head]`.
        values: each layer's values, likewise.
        tables: cosine and sine of the rotary positions, `[batch, pos, d_head]`.
        mask: additive attention mask, `[batch, 1, pos, pos]`.
        hooked_because: why replays run as full hooked forwards; empty where they restart.
    """

    model: Any
    x: Any
    resid: tuple[Float[Tensor, "batch pos d_model"], ...]
    keys: tuple[Float[Tensor, "batch kv_head pos d_head"], ...]
    values: tuple[Float[Tensor, "batch kv_head pos d_head"], ...]
    tables: tuple[Tensor, Tensor]
    mask: Float[Tensor, "..."]
    hooked_because: str = ""

    @property
    def spans(self) -> SpanMap:
        """What each position of the input is."""
        return self.x.spans

    @property
    def batch(self) -> int:
        """Examples in the recorded run."""
        return int(self.resid[0].shape[0])

    @torch.no_grad()
    def logits(self, logits_at: str | Span = "generation") -> Float[Tensor, "batch asked_pos d_vocab"]:
        """Give the recorded run's own logits.

        Args:
            logits_at: "generation", "all", another role, or a `Span`.

        Returns:
            The logits at the asked positions.
        """
        rows = asked_positions(self.spans, logits_at)
        return self._unembedded(self.resid[-1][:, rows])

    @torch.no_grad()
    def replay(
        self,
        plans: Plan | CompiledPlan | Sequence[Plan | CompiledPlan],
        *,
        logits_at: str | Span = "generation",
        budget_gb: float | int = 1.0,
    ) -> Float[Tensor, "plan batch asked_pos d_vocab"]:
        """Run plans on the recorded input.

        Args:
            plans: the plans; a compiled one (made for this model and input) has its firing record filled in.
            logits_at: "generation", "all", another role, or a `Span`.
            budget_gb: memory for the activations of plans that run together.

        Returns:
            The logits of every plan at the asked positions, in the order given.

        Raises:
            InterventionError: a plan does not fit, or an edit did not fire as often as it should have.
            BudgetError: the logits of all plans together are too large.
        """
        listed = _listed(plans)
        rows = asked_positions(self.spans, logits_at)
        d_vocab = int(self.model.spec.d_vocab)
        _refuse_huge(len(listed) * self.batch * len(rows) * d_vocab * 4, budget_gb)
        found = torch.empty(len(listed), self.batch, len(rows), d_vocab, dtype=self.resid[0].dtype)
        found = found.to(self.resid[0].device)
        for numbers, logits in self._stacks(listed, rows, budget_gb):
            found[numbers] = logits
        return found

    @torch.no_grad()
    def score(
        self,
        plans: Plan | CompiledPlan | Sequence[Plan | CompiledPlan],
        metric: Metric | Callable[[Tensor], Tensor],
        *,
        logits_at: str | Span = "generation",
        budget_gb: float | int = 1.0,
    ) -> Float[Tensor, "plan batch"]:
        """Run plans and keep one number for each plan and example, never all logits at once.

        Args:
            plans: the plans.
            metric: one of `runs.metrics`, or any callable of the logits `[batch, asked_pos, d_vocab]` of one plan to
                `[batch]`.
            logits_at: "generation", "all", another role, or a `Span`.
            budget_gb: memory for the activations of plans that run together.

        Returns:
            The metric of every plan on every example.

        Raises:
            InputError: the metric returned one number for the batch.
            InterventionError: a plan does not fit, or an edit did not fire as often as it should have.
        """
        bound = as_metric(metric, self.model.tokenizer)
        listed = _listed(plans)
        rows = asked_positions(self.spans, logits_at)
        found = torch.full((len(listed), self.batch), torch.nan, device=self.resid[0].device)
        for numbers, logits in self._stacks(listed, rows, budget_gb):
            for number, one in zip(numbers, logits, strict=True):
                found[number] = bound(one).to(found)
        return found

    def _stacks(
        self, plans: list[Plan | CompiledPlan], rows: Tensor, budget_gb: float | int
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Group plans by where they start, stack them to the budget, and run each stack."""
        compiled = [
            p if isinstance(p, CompiledPlan) else p.compile(self.model.spec, self.spans, batch=self.batch)
            for p in plans
        ]
        groups: dict[tuple[int, int], list[int]] = {}
        for number, plan in enumerate(compiled):
            groups.setdefault(self._start(plan), []).append(number)
        for (layer, position), numbers in groups.items():
            size = self._stack_size(position, len(rows), budget_gb)
            if layer < 0:
                size = 1
            for begin in range(0, len(numbers), size):
                stack = numbers[begin : begin + size]
                chosen = [compiled[number] for number in stack]
                yield stack, self._run(chosen, layer, position, rows)
                for plan in chosen:
                    plan.verify()

    def _start(self, plan: CompiledPlan) -> tuple[int, int]:
        """First layer and position of a plan; layer -1 means a full hooked forward, n_layers nothing to compute."""
        if not plan.steps:
            return len(self.keys), len(self.spans)
        if self.hooked_because or any(step.component not in RESTARTABLE for step in plan.steps):
            return -1, 0
        return plan.first_layer, plan.first_position

    def _stack_size(self, position: int, n_asked: int, budget_gb: float | int) -> int:
        spec, n_prompt = self.model.spec, len(self.spans)
        rows = self.batch * (n_prompt - position)
        width = 4 * spec.d_mlp + 8 * spec.d_model + 3 * spec.n_heads * n_prompt
        per_plan = (rows * width + self.batch * n_asked * spec.d_vocab) * self.resid[0].element_size()
        return max(1, min(int(budget_gb * GB / max(per_plan, 1)), STACK_ROWS // max(rows, 1)))

    def _run(self, plans: list[CompiledPlan], layer: int, position: int, rows: Tensor) -> Tensor:
        """Logits `[plan, batch, asked_pos, d_vocab]` of plans that start at one place."""
        if layer < 0:
            return self._run_hooked(plans[0], rows)[None]
        early = rows[rows < position]
        late = rows[rows >= position] - position
        parts = [self._unembedded(self.resid[-1][:, early])[None]] if len(early) else []
        if plans[0].steps:  # even where nothing asked for can change: the edits must prove that they fire
            parts.append(self.restarted(plans, late))
        return torch.cat([part.expand(len(plans), -1, -1, -1) for part in parts], dim=2)

    def restarted(self, plans: Sequence[CompiledPlan], rows: Tensor) -> Float[Tensor, "all_plans batch asked d_vocab"]:
        """Run plans that start at one layer and position, without hooks.

        Args:
            plans: plans with equal first layer and first position.
            rows: asked positions, counted from the first position; may be empty.

        Returns:
            Logits at the asked rows; a plan axis of 1 where no plan edits anything.
        """
        layer, position = plans[0].first_layer, plans[0].first_position
        taps = Taps(plans, position)
        window = Window.at(position, self.tables, self.mask)
        stream = self.resid[layer][None, :, position:].clone()
        last = len(self.keys) - 1
        for number in range(layer, last + 1):
            past = (self.keys[number][:, :, :position], self.values[number][:, :, :position])
            block = Layer.of(self.model.bridge.blocks[number])
            wanted = rows if number == last and len(rows) < stream.shape[2] else None
            stream = run_layer(block, number, stream, past, window, taps, wanted)
        return self._unembedded(stream if stream.shape[2] == len(rows) else stream[:, :, rows])

    def _run_hooked(self, plan: CompiledPlan, rows: Tensor) -> Tensor:
        logits = self.model.run_with_hooks(self.x, fwd_hooks=plan.fwd_hooks)
        return logits[:, rows]

    def _unembedded(self, stream: Tensor) -> Tensor:
        bridge = self.model.bridge
        return bridge.unembed.original_component(bridge.ln_final.original_component(stream))


@torch.no_grad()
def record(model: Any, x: Any, *, budget_gb: float | int = 8.0) -> Trace:
    """Run the model once and keep what is needed to restart it.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, one example or a stack of one layout.
        budget_gb: memory for the record; float32 takes about `layers x batch x pos x (d_model + 2 kv_heads d_head) x 4`
            bytes.

    Returns:
        The trace.

    Raises:
        BudgetError: the record would not fit.
    """
    spec, n = model.spec, len(x.spans)
    size = torch.empty((), dtype=next(model.bridge.parameters()).dtype).element_size()
    needed = len(x) * n * spec.n_layers * (spec.d_model + 2 * spec.n_kv_heads * spec.d_head) * size / GB
    if needed > budget_gb:
        raise BudgetError(
            f"a trace of {len(x)} examples x {n} positions x {spec.n_layers} layers needs {needed:.1f} GB, more than "
            f"budget_gb={budget_gb:g}. Trace fewer examples at a time, or raise budget_gb."
        )
    layers = range(spec.n_layers)
    streams = [*(hook_name("resid_pre", layer) for layer in layers), hook_name("resid_post", spec.n_layers - 1)]
    keys, values = ([hook_name(component, layer) for layer in layers] for component in ("rot_k", "v"))
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(activation: Tensor, hook: Any = None) -> None:
            del hook
            kept[name] = activation.detach()

        return keep

    with _entering(model.bridge.blocks[0]) as entered:
        logits = model.run_with_hooks(x, fwd_hooks=[(name, keeper(name)) for name in (*streams, *keys, *values)])
    trace = Trace(
        model=model,
        x=x,
        resid=tuple(kept[name] for name in streams),
        keys=tuple(heads_first(kept[name], "rot_k") for name in keys),
        values=tuple(heads_first(kept[name], "v") for name in values),
        tables=entered["position_embeddings"],
        mask=_additive(entered.get("attention_mask"), kept[streams[0]]),
    )
    return replace(trace, hooked_because=_fault(trace, logits[:, -1]))


def heads_first(activation: Tensor, component: str) -> Tensor:
    """Bring per-head activations to `[batch, head, pos, d_head]`.

    Args:
        activation: as its hook gives it.
        component: the component's name.

    Returns:
        The activation, heads before positions.
    """
    return activation if COMPONENTS[component].head_axis == 1 else activation.transpose(1, 2).contiguous()


@contextmanager
def _entering(block: torch.nn.Module) -> Generator[dict[str, Any]]:
    """Collect what the decoder hands its first block: rotary tables and the mask."""
    entered: dict[str, Any] = {}

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module, args
        entered.update({name: kwargs.get(name) for name in ("position_embeddings", "attention_mask")})

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield entered
    finally:
        handle.remove()


def _additive(mask: Tensor | None, stream: Tensor) -> Tensor:
    """The attention mask as numbers to add, `[batch or 1, 1, pos, pos]`; causal where the model passed none."""
    lowest, n = torch.finfo(stream.dtype).min, stream.shape[1]
    if mask is None:
        return torch.full((1, 1, n, n), lowest, dtype=stream.dtype, device=stream.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=stream.dtype).masked_fill(~mask, lowest)
    return mask


def _fault(trace: Trace, logits: Tensor) -> str:
    """Restart at the first layer and compare with the run itself; say what is wrong, or nothing."""
    last = len(trace.spans) - 1
    empty = CompiledPlan((), n_prompt=last + 1, first_layer=0, first_position=last)
    try:
        again = trace.restarted([empty], torch.zeros(1, dtype=torch.long))[0, :, 0]
    except (AttributeError, TypeError, RuntimeError) as error:
        return f"this model's layers are not of the layout that a restart knows ({type(error).__name__}: {error})"
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    gap = float((again - logits).abs().max() / logits.abs().max().clamp(min=1.0))
    if not gap <= tolerance:
        return f"a restart does not reproduce the recorded run (relative gap {gap:.1e}): a layout unknown, or hooks"
    return ""


def asked_positions(spans: SpanMap, logits_at: str | Span) -> Tensor:
    """Resolve the positions at which logits are asked for.

    Args:
        spans: the input's spans.
        logits_at: "generation", "all", another role (or several, joined by `|`), or a `Span`.

    Returns:
        The positions, ascending.

    Raises:
        InterventionError: a position is outside the input, or there is none.
        InputError: an unknown role.
    """
    asked = None if logits_at == "all" else logits_at
    return torch.tensor(resolve_positions(asked, spans, what="logits_at").index)


def _listed(plans: Plan | CompiledPlan | Sequence[Plan | CompiledPlan]) -> list[Plan | CompiledPlan]:
    return [plans] if isinstance(plans, Plan | CompiledPlan) else list(plans)


def _refuse_huge(needed: float, budget_gb: float | int) -> None:
    if needed > 16 * budget_gb * GB:
        raise BudgetError(
            f"the logits of all plans alone would need {needed / GB:.1f} GB. Use trace.score(plans, metric), which "
            "keeps one number for each plan and example, or replay fewer plans at a time."
        )
