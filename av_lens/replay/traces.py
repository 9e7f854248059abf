"""A recorded run that can be restarted anywhere, proved against the model's own: many plans for a few layers' price.

What is proved (`fault`), and where hooked forwards are run instead: `docs/replay.md`. Answers of several tokens are run
after the prompt side by side (`branches`); where edits act on the answer too, or something keeps the answers apart,
once for each option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from av_lens.checks import require_choice
from av_lens.core.calls import asked_positions, heads_first, turn_of, unembedded, watching
from av_lens.core.decoding import Decoding
from av_lens.core.execution import places, standing_hooks
from av_lens.errors import InputError, ModelError
from av_lens.families.decoder import hook_name
from av_lens.interventions import CompiledPlan, Plan, Site
from av_lens.metrics.forms import followed
from av_lens.metrics.metric import Metric, as_metric
from av_lens.replay.branches import Branches
from av_lens.replay.continuation import continued
from av_lens.replay.recording import Record, place_of, recorded, require_record_memory
from av_lens.replay.rerun import PROVED, by_flash, layers, may_be_lean, recorded_lean
from av_lens.replay.stacks import (
    HeadRead,
    Schedule,
    refuse_huge,
    rerouted,
    restarted,
    restarts,
    routing_hooks,
    run_stacks,
    scheduled,
)
from av_lens.replay.suffix_gradients import SuffixGradients, differentiated
from av_lens.replay.trace_files import read_trace, write_trace
from av_lens.spans import Span

R = TypeVar("R", bound=Record)
PROOF_ROWS = 512  # positions that a model's first trace restarts together, to see that it can
READ_ROWS = 4  # the last positions, at which every head is read again


Reads = dict[tuple[str, int], Tensor]
"""What each layer's heads read in the hooked run at the last positions, `[batch, head, row, d_head]`: `rot_q`, `z`."""


def reading_hooks(reads: Reads, n_layers: int) -> list[tuple[str, Callable[..., None]]]:
    """The hooks that keep it."""

    def keep(component: str, layer: int, activation: Tensor) -> None:
        reads[component, layer] = heads_first(activation.detach(), component)[:, :, -READ_ROWS:]

    places = [(component, layer) for layer in range(n_layers) for component in ("rot_q", "z")]
    return [(hook_name(*place), watching(partial(keep, *place))) for place in places]


@torch.no_grad()
def fault(record: Record, logits: Tensor, reads: Reads | None, *, everywhere: bool) -> str:
    """Restart at the first layer and compare streams, logits and what heads read with the run; say what is wrong."""
    n = len(record.spans)
    size = n if record.mask is not None else PROOF_ROWS
    blocks = [(start, min(start + size, n)) for start in range(0, n, size)] if everywhere else [(n - 1, n)]
    tolerance = 1e-4 if logits.dtype == torch.float32 else 5e-2
    stream = logits
    gaps: list[float] = []
    try:
        for start, end in blocks:
            empty = CompiledPlan((), n_prompt=end, first_layer=0, first_position=start)
            # Frozen: whom a router chooses where two are as good as equal is no fault of the restart.
            part = replace(_before(record, end), routing="frozen")
            stream = restarted(part, [empty], start, range(end - start))[0][0]
            gaps.append(_gap(stream, record.stream(record.n_layers, start)[:, : end - start]))
        gaps.append(_gap(unembedded(record.model, stream[:, -1]), logits))
        if not all(gap <= tolerance for gap in gaps):
            return f"a restart does not reproduce the recorded run (relative gap {max(gaps):.1e}): a layout unknown"
        for what, gap in () if reads is None else _reread(record, reads):
            if not gap <= tolerance:
                return f"{what}, computed anew, are not those of the recorded run (relative gap {gap:.1e})"
    except (AttributeError, TypeError, RuntimeError) as error:
        return f"this model's layers are not of the layout that a restart knows ({type(error).__name__}: {error})"
    return ""


def _reread(record: Record, reads: Reads) -> Iterator[tuple[str, float]]:
    """How far each layer's queries, keys, values and z are from the hooked run's, whole and head by head."""
    n, tables = len(record.spans), record.window(0)
    rows = range(max(0, n - READ_ROWS), n)
    for number, layer in layers(record.model):
        window = tables.on(place_of(record.model, number))
        normed, (keys, values) = layer.ln1(record.stream(number, 0)), record.past(number, n)
        turned = layer.turned("k", layer.heads("k", normed), window.cos, window.sin)
        made = {"keys": (turned, keys), "values": (layer.heads("v", normed), values)}
        yield from ((f"layer {number}'s {what}", _gap_of_heads(a.transpose(1, 2), b)) for what, (a, b) in made.items())
        last, cos, sin = (part[:, rows.start :] for part in (normed, window.cos[:, :, 0], window.sin[:, :, 0]))
        k, v = ([layer.head(kind, one, last) for one in range(layer.n_kv_heads)] for kind in "kv")
        k = [layer.turned("k", one, cos, sin) for one in k]
        for what, alone, own in (("keys", k, keys), ("values", v, values)):
            gap = _gap_of_heads(torch.stack(alone, dim=1), own[:, :, rows.start :])
            yield f"layer {number}'s {what}, head by head", gap
        heads = [HeadRead.of(record, number, head, rows) for head in range(layer.n_heads)]
        queries = torch.stack([head.q for head in heads], dim=1)
        yield f"layer {number}'s queries", _gap_of_heads(queries, reads["rot_q", number])
        if queries.dtype == torch.float32:  # below it, scores of one head alone are rounded otherwise
            z = torch.stack([head.z for head in heads], dim=1)
            yield f"what layer {number}'s heads read (z)", _gap_of_heads(z, reads["z", number])


def _gap_of_heads(again: Tensor, once: Tensor) -> float:
    """The same for `[batch, head, pos, d_head]`, all heads of a position together."""
    return _gap(again.transpose(1, 2).flatten(2), once.transpose(1, 2).flatten(2))


def _gap(again: Tensor, once: Tensor) -> float:
    """The largest difference at any position, as a share of the largest number there."""
    again, once = again.float(), once.float()
    return float(((again - once).abs().amax(-1) / once.abs().amax(-1).clamp(min=1e-6)).max())


def _before(record: R, end: int) -> R:
    """The recorded run up to a position; under a causal mask nothing there depends on what follows."""
    if end == len(record.spans):
        return record
    keys, values = (tuple(part[:, :, :end] for part in parts) for parts in (record.keys, record.values))
    cos, sin = (table[:, :end] for table in record.tables)
    resid = tuple(one[:, :end] for one in record.resid)
    added, experts = (
        {layer: part[:, :end] for layer, part in parts.items()} for parts in (record.added, record.experts)
    )
    return replace(record, resid=resid, keys=keys, values=values, tables=(cos, sin), added=added, experts=experts)


Plans = Plan | CompiledPlan | Sequence[Plan | CompiledPlan]


@dataclass(frozen=True, eq=False, repr=False)
class Trace(Record):
    """One recorded run and what is needed to restart it. Build it with `model.trace(x)`."""

    @torch.no_grad()
    def logits(self, logits_at: str | Span = "generation") -> Float[Tensor, "batch asked_pos d_vocab"]:
        """Give the recorded run's own logits, under the hooks that stood then.

        Args:
            logits_at: "generation", "all", another role, or a `Span`.

        Returns:
            The logits at the asked positions.
        """
        return self.logits_at(asked_positions(self.spans, logits_at))

    def schedule(self, plans: Plans, *, logits_at: str | Span = "generation", budget_gb: float | int = 1.0) -> Schedule:
        """Say what replaying plans will cost, before anything runs.

        Args:
            plans: the plans.
            logits_at: as in `replay`.
            budget_gb: as in `replay`.

        Returns:
            The schedule; `print` it for the estimate in words.

        Raises:
            InterventionError: a plan does not fit.
        """
        return scheduled(self, _listed(plans), n_asked=len(asked_positions(self.spans, logits_at)), budget_gb=budget_gb)

    def routed(self, routing: str) -> Trace:
        """This trace, with experts in its replays chosen as before or anew.

        Args:
            routing: "free": each router chooses, as in a hooked run; "frozen": every position goes through the experts
                that it went through in the recorded run, whatever the router would choose now, and the router weighs
                these alone (its softmax over all experts, of which theirs are taken, brought to a sum of one where the
                model does so). What a plan does by sending tokens to other experts is then left out.

        Returns:
            A trace of the same run, for `replay`, `score`, `gradients` and `sweep`.

        Raises:
            InputError: another word, or a model without experts.
        """
        require_routing(self.model, routing)
        return replace(self, routing=routing)

    def routing_hooks(self) -> list[tuple[str, Callable[..., Any]]]:
        """Hooks under which a run of this input sends every position through the experts of this run.

        The router still weighs them, from what it then reads: its softmax over all experts, of which those of this run
        are taken, brought to a sum of one where the model does so. As `routing="frozen"` does in a replay.

        Returns:
            Hooks for `model.run_with_hooks(x, fwd_hooks=...)`; none where the model has no experts.
        """
        return routing_hooks(self)

    def rerouted(self, plans: Plans, *, budget_gb: float | int = 1.0) -> Bool[Tensor, "plan layer batch pos"]:
        """Say which tokens are sent to another set of experts under each plan than in the recorded run.

        `trace.rerouted(plans).sum((1, 3))` counts them, `[plan, batch]`. In low precision many routers' choices are as
        good as equal, and rounding decides: `trace.replay(plans, routing="frozen")` says what the plan does without.

        Args:
            plans: the plans.
            budget_gb: memory for the activations of plans that run together.

        Returns:
            On the CPU: whether the set differs; False in layers without experts.

        Raises:
            InterventionError: a plan does not fit, or an edit did not fire as often as it should have.
        """
        return rerouted(self.routed("free"), _listed(plans), budget_gb=budget_gb)

    @torch.no_grad()
    def replay(
        self,
        plans: Plans,
        *,
        logits_at: str | Span = "generation",
        budget_gb: float | int = 1.0,
        routing: str | None = None,
    ) -> Float[Tensor, "plan batch asked_pos d_vocab"]:
        """Run plans on the recorded input.

        Args:
            plans: the plans; a compiled one (made for this model and input) has its firing record filled in.
            logits_at: "generation", "all", another role, or a `Span`.
            budget_gb: memory for the activations of plans that run together.
            routing: "free" or "frozen", as `routed` has them; None for this trace's own, which is free unless `routed`
                said otherwise.

        Returns:
            The logits of every plan at the asked positions, in the order given.

        Raises:
            InputError: an unknown routing, or a frozen one of a model without experts.
            InterventionError: a plan does not fit, or an edit did not fire as often as it should have.
            BudgetError: the logits of all plans together are too large.
        """
        if routing is not None:
            return self.routed(routing).replay(plans, logits_at=logits_at, budget_gb=budget_gb)
        listed, rows = _listed(plans), asked_positions(self.spans, logits_at)
        shape = (len(listed), self.batch, len(rows), int(self.model.spec.d_vocab))
        refuse_huge(4.0 * math.prod(shape), budget_gb)
        schedule = scheduled(self, listed, n_asked=len(rows), budget_gb=budget_gb)
        found = torch.empty(shape, dtype=self.resid[0].dtype, device=self.model.device)
        for numbers, logits in run_stacks(self, schedule, rows):
            found[list(numbers)] = logits
        return found

    @torch.no_grad()
    def score(
        self,
        plans: Plans,
        metric: Metric | Callable[[Tensor], Tensor],
        *,
        logits_at: str | Span = "generation",
        budget_gb: float | int = 1.0,
        finished: Callable[[int], None] | None = None,
        into: Float[Tensor, "plan batch"] | None = None,
    ) -> Float[Tensor, "plan batch"]:
        """Run plans and keep one number for each plan and example, never all logits at once.

        Where a metric reads a few tokens only (`logit_diff` of one-token answers), only these are unembedded.

        Args:
            plans: the plans.
            metric: one of `runs.metrics`, or any callable of the logits `[batch, asked_pos, d_vocab]` of one plan to
                `[batch]`.
            logits_at: "generation", "all", another role, or a `Span`.
            budget_gb: memory for the activations of plans that run together.
            finished: called after each stack with the number of plans done.
            into: a tensor that is filled as plans finish, so that what is done survives an interruption.

        Returns:
            The metric of every plan on every example.

        Raises:
            InputError: the metric returned one number for the batch.
            InterventionError: a plan does not fit, or an edit did not fire as often as it should have.
        """
        bound, tokens = as_metric(metric, self.model, self).few_tokens()
        listed, rows = _listed(plans), asked_positions(self.spans, logits_at)
        found = torch.full((len(listed), self.batch), torch.nan) if into is None else into
        schedule = scheduled(self, listed, n_asked=len(rows), budget_gb=budget_gb)
        bound, done = bound.on(self.model.device), 0
        tokens = None if tokens is None else tokens.to(self.model.device)
        for numbers, logits in run_stacks(self, schedule, rows, tokens):
            found[list(numbers)] = bound.of_plans(logits).to(found)  # what waits for the device, waits once for a stack
            done += len(numbers)
            if finished is not None:
                finished(done)
        return found

    def gradients(
        self,
        sites: Site | Sequence[Site],
        metric: Metric | Callable[[Tensor], Tensor],
        *,
        plan: Plan | None = None,
        logits_at: str | Span = "generation",
        budget_gb: float | int = 8.0,
    ) -> SuffixGradients:
        """Differentiate a metric with respect to activations, through the suffix only.

        Args:
            sites: where, such as `[Site("z", layer, positions="suffix") for layer in range(n_layers)]`.
            metric: one of `runs.metrics`, or any callable of the logits `[batch, asked_pos, d_vocab]` to `[batch]`;
                answers of several tokens are asked at the generation position.
            plan: edits under which the gradient is taken.
            logits_at: "generation", "all", another role, or a `Span`.
            budget_gb: memory for the activations that the backward pass needs.

        Returns:
            For each site the gradient and the activation itself, `[batch, pos, (head,) d]`.

        Raises:
            InputError: a metric without a gradient, or one of several tokens where no restart is possible.
            InterventionError: a site or the plan does not fit, or an edit did not fire.
            BudgetError: the backward pass would need more memory.
        """
        return differentiated(self, sites, metric, plan=plan, logits_at=logits_at, budget_gb=budget_gb)

    def generate(
        self,
        plans: Plan | Sequence[Plan],
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        seed: int | None = None,
        return_type: str = "result",
        budget_gb: float | int = 1.0,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Let the model answer under each of several plans, from the recorded prompt on.

        Greedy tokens equal those of `model.generate(x, plan=plan)`; the prompt is never run again. Sampling draws
        from a generator of each plan's own, so its draws differ from those of `model.generate`.

        Args:
            plans: the plans; an empty plan is the recorded run's own answer.
            max_new_tokens: at most so many.
            do_sample: draw instead of taking the likeliest token.
            seed: what sampling draws from; needed with `do_sample`.
            return_type: "tokens" (prompt included), "text" (the new text) or "result" (`.tokens .text .logits .fired`).
            budget_gb: memory for plans that run together.
            **options: further settings of HuggingFace's `generate`, such as `eos_token_id`.

        Returns:
            What `model.generate` returns, for each plan.

        Raises:
            InputError: an unknown return type, sampling without a seed, a way of decoding that is neither greedy nor
                sampling, or frozen routing.
            InterventionError: a plan does not fit, or an edit did not fire as often as it should have.
        """
        how = Decoding(max_new_tokens, do_sample, return_type, seed, options)
        return continued(self, [plans] if isinstance(plans, Plan) else list(plans), how, budget_gb=budget_gb)

    def save(self, path: str | Path) -> Path:
        """Save the trace as safetensors, with hashes of its model and its input.

        Args:
            path: the file; ".safetensors" is added where it has no ending.

        Returns:
            The file that was written.

        Raises:
            InputError: the folder does not exist.
            InterventionError: it was recorded under hooks.
        """
        return write_trace(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Any, x: Any, *, device: torch.device | str | None = None) -> Trace:
        """Open a saved trace, if it is this model's on this input.

        Args:
            path: the file.
            model: the `HookedAVLLM` that recorded it, or one with the same weights.
            x: the `AVInputs` that it was recorded on, or equal ones.
            device: where the record is kept; None for the model's device.

        Returns:
            The trace, equal to the one that was saved bit for bit.

        Raises:
            InputError: no such file, no whole trace in it, or another input's trace.
            ModelError: another model's trace; the message says what differs.
            InterventionError: hooks stand on the model.
        """
        trace = cls(**read_trace(path, model, x, device=device))
        trace = replace(trace, hooked_because=trace.hooked_because or trace.obstacle())
        last = unembedded(model, trace.stream(trace.n_layers, len(trace.spans) - 1))[:, 0]
        wrong = "" if trace.hooked_because else fault(trace, last, None, everywhere=False)
        if wrong:
            raise ModelError(f"the trace in {path} does not fit this model any more: {wrong}. Record it again.")
        return trace


def require_routing(model: Any, routing: str) -> None:
    """Refuse an unknown way to choose experts, and to hold what a model does not have."""
    require_choice("routing", routing, ("free", "frozen"))
    if routing == "frozen" and not model.spec.experts:
        raise InputError("routing='frozen' holds every position's experts, and this model has none: leave it out.")


def record(
    model: Any,
    x: Any,
    *,
    device: torch.device | str | None = None,
    budget_gb: float | int = 8.0,
    attention: str | None = None,
) -> Trace:
    """Run the model once and keep what is needed to restart it.

    `attention` is by "flash" kernels, or as the hooked run's ("eager"); None for flash, but in half precision on a CPU.
    """
    if model.training:
        raise ModelError("this model is in training mode, where dropout may act: call model.eval() before tracing.")
    require_choice("attention", attention, (None, "flash", "eager"))
    with turn_of(model.bridge):
        standing = standing_hooks(model)
        on_stack = tuple(hook for hook in standing if not hook.in_tower)
        require_record_memory(model, x, budget_gb, logits=bool(on_stack))
        if not on_stack and may_be_lean(model, attention):
            trace = Trace(**recorded_lean(model, x, device)[0], standing=standing)
            if not trace.obstacle() and trace.mask is None:
                return trace
        flash, proved = by_flash(model, attention), model.__dict__.get(PROVED, {})
        reads: Reads | None = None if on_stack or proved.get(flash) else {}
        beside = () if reads is None else reading_hooks(reads, model.spec.n_layers)
        fields, logits = recorded(model, x, device, keep_logits=bool(on_stack), beside=beside)
        trace = Trace(**fields, standing=standing, flash=flash)
        if on_stack:
            because = f"hooks stand at {places(model, on_stack)}, and a restart would pass them by"
            return replace(trace, hooked_because=because)
        because = trace.obstacle() or fault(trace, logits, reads, everywhere=reads is not None)
        if because and flash and attention is None and not trace.obstacle():  # this device's kernels may be at fault
            trace = replace(trace, flash=False)
            because = fault(trace, logits, reads, everywhere=reads is not None)
            proved, flash = {**proved, True: False}, False
        if not because:
            model.__dict__[PROVED] = {**proved, flash: True}
            if trace.mask is None and flash:  # bit for bit like later ones: which was first must not show
                del fields, trace
                return Trace(**recorded_lean(model, x, device)[0], standing=standing)
        return replace(trace, hooked_because=because)


def _listed(plans: Plans) -> list[Plan | CompiledPlan]:
    return [plans] if isinstance(plans, Plan | CompiledPlan) else list(plans)


BLOCK = 256  # plans that are measured together where an answer has several tokens


def measure_plans(
    trace: Trace,
    plans: Sequence[Plan],
    metric: Metric | Callable[..., Any],
    *,
    budget_gb: float | int = 1.0,
    finished: Callable[[int], None] | None = None,
    into: Float[Tensor, "plan batch"] | None = None,
) -> Float[Tensor, "plan batch"]:
    """Measure a metric under each of many plans, by replay."""
    model, x = trace.model, trace.x
    bound = as_metric(metric, model, trace)
    continuations = bound.continuations(len(x))
    if not continuations:
        return trace.score(plans, bound, budget_gb=budget_gb, finished=finished, into=into)
    found = torch.full((len(plans), len(x)), torch.nan) if into is None else into
    compiled = [plan.compile(model.spec, x.spans, batch=len(x)) for plan in plans]
    if all(restarts(trace, plan) and not any(step.in_decode for step in plan.steps) for plan in compiled):
        branches = Branches.of(trace, continuations)
        if branches is not None:
            return _measured_together(trace, compiled, bound, branches, found, budget_gb, finished)
    asked = x.spans.generation_position
    longer = [
        trace if t.shape[1] == 1 else replace(record(model, followed(x, t)), routing=trace.routing)
        for t in continuations
    ]
    ends = [asked + tokens.shape[1] for tokens in continuations]
    for start in range(0, len(plans), BLOCK):  # all options of a block's plans, so that it is wholly done or not at all
        block = plans[start : start + BLOCK]
        reduced = [
            one.score(block, partial(bound.reduce, i), logits_at=one.spans.span(range(asked, end)), budget_gb=budget_gb)
            for i, (one, end) in enumerate(zip(longer, ends, strict=True))
        ]
        for number, row in enumerate(zip(*reduced, strict=True), start):
            found[number] = bound.combine(list(row)).to(found)
        if finished is not None:
            finished(start + len(block))
    return found


def _measured_together(
    trace: Trace,
    plans: Sequence[CompiledPlan],
    bound: Metric,
    branches: Branches,
    found: Float[Tensor, "plan batch"],
    budget_gb: float | int,
    finished: Callable[[int], None] | None,
) -> Float[Tensor, "plan batch"]:
    """Measure plans with all answers side by side after each one's prompt."""
    schedule = scheduled(trace, plans, n_asked=1 + sum(branches.sizes), budget_gb=budget_gb)
    asked, done = torch.tensor([trace.spans.generation_position]), 0
    with torch.no_grad():
        for numbers, logits in run_stacks(trace, schedule, asked, branches=branches):
            for number, one in zip(numbers, logits, strict=True):
                reduced = [bound.reduce(i, part) for i, part in enumerate(branches.parts(one))]
                found[number] = bound.combine(reduced).to(found)
            done += len(numbers)
            if finished is not None:
                finished(done)
    return found
