"""A recorded run that can be restarted anywhere: many interventions for the price of a few layers.

Question: what would the model have said, had these heads done something else? `model.trace(x)` runs the model once,
encoders and all, and keeps what every layer received: the residual stream, rotated keys and values. `trace.replay`
then computes, for each plan, only the layers from the plan's first layer on and only the positions from its first
position on; thousands of media positions before the question are never computed again. Plans that start at the same
position run together, each joining at its own first layer, stacked along the batch up to a memory budget.

Replays equal hooked full forwards to 1e-5 in float32 (tested for every edit kind), and every edit must fire as often
as in a full forward, or the replay raises. A model's first trace checks that a restart reproduces its own run, at every
position, and that each head by itself reads what it read (`proof`). Where it does not (a layout it does not know),
where functions of the caller's stand on the fusion stack (`standing_hooks`), and for edits at components that it cannot
restart at, it runs full hooked forwards instead and says so in `trace.hooked_because`. Later traces of the model are
recorded without hooks (`lean_recording`).

A trace is of the model as it was hooked when it was recorded: `logits` are that run's own, and all other verbs refuse
to go on under other hooks. It holds the model's answer of that moment: record again after the weights changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.activations import asked_positions
from av_lens.core.decoding import Decoding
from av_lens.core.modes import require_evaluation
from av_lens.core.standing_hooks import places, standing_hooks
from av_lens.core.turns import turn_of
from av_lens.core.unembedding import unembedded
from av_lens.errors import ModelError
from av_lens.interventions import CompiledPlan, Plan, Site
from av_lens.metrics.metric import Metric, as_metric
from av_lens.replay.continuation import continued
from av_lens.replay.lean_recording import is_proved, may_be_lean, proved, recorded_lean
from av_lens.replay.proof import HookedReads, fault
from av_lens.replay.recording import Record, recorded, require_record_memory
from av_lens.replay.stacks import Schedule, refuse_huge, run_stacks, scheduled
from av_lens.replay.suffix_gradients import SuffixGradients, differentiated
from av_lens.replay.trace_files import read_trace, write_trace
from av_lens.spans import Span

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

    @torch.no_grad()
    def replay(
        self, plans: Plans, *, logits_at: str | Span = "generation", budget_gb: float | int = 1.0
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
        shape = (len(listed), self.batch, len(rows), int(self.model.spec.d_vocab))
        refuse_huge(4.0 * shape[0] * shape[1] * shape[2] * shape[3], budget_gb)
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
        listed = _listed(plans)
        rows = asked_positions(self.spans, logits_at)
        found = torch.full((len(listed), self.batch), torch.nan) if into is None else into
        schedule = scheduled(self, listed, n_asked=len(rows), budget_gb=budget_gb)
        tokens = None if tokens is None else tokens.to(self.model.device)
        done = 0
        for numbers, logits in run_stacks(self, schedule, rows, tokens):
            for number, one in zip(numbers, logits, strict=True):
                found[number] = bound(one).to(found)
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
            metric: one of `runs.metrics` of one-token answers, or any callable of the logits
                `[batch, asked_pos, d_vocab]` to `[batch]`.
            plan: edits under which the gradient is taken.
            logits_at: "generation", "all", another role, or a `Span`.
            budget_gb: memory for the activations that the backward pass needs.

        Returns:
            For each site the gradient and the activation itself, `[batch, pos, (head,) d]`.

        Raises:
            InputError: a metric of several tokens, or one without a gradient.
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
            InputError: an unknown return type, sampling without a seed, or a way of decoding that is neither greedy nor
                sampling.
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


def record(model: Any, x: Any, *, device: torch.device | str | None = None, budget_gb: float | int = 8.0) -> Trace:
    """Run the model once and keep what is needed to restart it."""
    require_evaluation(model)
    with turn_of(model.bridge):
        standing = standing_hooks(model)
        on_stack = tuple(hook for hook in standing if not hook.in_tower)
        require_record_memory(model, x, budget_gb, logits=bool(on_stack))
        if not on_stack and may_be_lean(model):
            trace = Trace(**recorded_lean(model, x, device)[0], standing=standing)
            if not trace.obstacle() and trace.mask is None:
                return trace
        reads = None if on_stack or is_proved(model) else HookedReads()
        beside = () if reads is None else reads.hooks(model.spec.n_layers)
        fields, logits = recorded(model, x, device, keep_logits=bool(on_stack), beside=beside)
        trace = Trace(**fields, standing=standing)
        if on_stack:
            because = f"hooks stand at {places(model, on_stack)}, and a restart would pass them by"
        else:
            because = trace.obstacle() or fault(trace, logits, reads, everywhere=reads is not None)
        if not because:
            proved(model)
            if trace.mask is None and may_be_lean(model):  # bit for bit like later ones: which was first must not show
                del fields, trace
                return Trace(**recorded_lean(model, x, device)[0], standing=standing)
        return replace(trace, hooked_because=because)


def _listed(plans: Plans) -> list[Plan | CompiledPlan]:
    return [plans] if isinstance(plans, Plan | CompiledPlan) else list(plans)
