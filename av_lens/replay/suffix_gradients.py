"""How a metric would move with an activation: exact gradients through the suffix of a recorded run.

Every asked site gets a zero added to it, of which the gradient is taken. Gradients are total: what the activation does
on every path to the metric, later sites included; each example has its own. The weights get none and are not copied.

Source: attribution patching (Nanda, 2023; Syed et al., "Attribution patching outperforms automated circuit discovery",
2023).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.brief import Brief
from av_lens.core.budget import GIGABYTE
from av_lens.core.calls import asked_positions, unembedded
from av_lens.core.execution import logits_of
from av_lens.errors import BudgetError, InputError, InterventionError
from av_lens.interventions import CompiledPlan, Plan, Site, Step, add
from av_lens.interventions.edits import Positions, places, resolve_positions, width_of
from av_lens.metrics.metric import Metric, as_metric
from av_lens.replay.branches import Branches
from av_lens.replay.recording import Record
from av_lens.replay.rerun import start_of
from av_lens.replay.stacks import beside, parted, restarted, restarts
from av_lens.spans import Span


@dataclass(frozen=True, eq=False, repr=False)
class SuffixGradients(Brief):
    """Gradients of one metric at several sites.

    Attributes:
        sites: the sites, as they were asked for.
        positions: the positions of each site, ascending.
        gradient: for each site `[batch, pos, (head,) d]`; scores and pattern `[batch, query_pos, head, key_pos]`.
        value: the activation itself there, likewise.
        metric: the metric of every example.
    """

    sites: tuple[Site, ...]
    positions: tuple[tuple[int, ...], ...]
    gradient: tuple[Float[Tensor, "batch _ ..."], ...]
    value: tuple[Float[Tensor, "batch _ ..."], ...]
    metric: Float[Tensor, " batch"]


def differentiated(
    record: Record,
    sites: Site | Sequence[Site],
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    plan: Plan | None = None,
    logits_at: str | Span = "generation",
    budget_gb: float | int = 8.0,
) -> SuffixGradients:
    """Take a metric's gradient at sites of a recorded run; it is hooked where a site allows no restart (`ln1`, ...)."""
    record.require_standing()
    asked = (sites,) if isinstance(sites, Site) else tuple(sites)
    bound, tokens = _differentiable(metric, record).few_tokens()
    rows = asked_positions(record.spans, logits_at)
    probes = [_Probe.of(record, site) for site in asked]
    compiled = _with_probes(record, plan or Plan(), probes)
    hooked = not restarts(record, compiled)
    branches = _answers(record, compiled, bound, hooked) if bound.teacher_forced else None
    start = 0 if hooked else start_of(record, compiled)
    _require_memory(record, record.n_layers - (0 if hooked else max(compiled.first_layer, 0)), start, budget_gb)
    with torch.enable_grad(), _frozen(record.model):
        if hooked:
            logits = logits_of(record.model, record.x, [*beside(record), *compiled.fwd_hooks], rows)
            logits = logits if tokens is None else logits[..., tokens]
        else:
            early, late = parted(rows.tolist(), start)
            stream, own = restarted(record, [compiled], start, late, keep=branches is not None)
            whole = torch.cat((record.stream(record.n_layers, 0)[:, places(early, stream.device)], stream[0]), dim=1)
            if branches is not None:
                whole = torch.cat((whole[:, -1:], branches.after([compiled], start, own)[0]), dim=1)
            logits = unembedded(record.model, whole, tokens)
        compiled.verify()
        parts = [] if branches is None else branches.parts(logits)
        measured = bound.combine([bound.reduce(i, part) for i, part in enumerate(parts)]) if parts else bound(logits)
        gradients = _gradients(measured, logits, [probe.leaf for probe in probes], bound.name)
    return SuffixGradients(
        sites=asked,
        positions=tuple(probe.positions.index for probe in probes),
        gradient=gradients,
        value=tuple(probe.found[0] for probe in probes),
        metric=measured.detach(),
    )


def _differentiable(metric: Metric | Callable[[Tensor], Tensor], record: Record) -> Metric:
    bound = as_metric(metric, record.model, record)
    if bound.kind == "rank":
        raise InputError(f"{bound.name}: a rank has no gradient. Use logit_diff, log_prob or prob.")
    return bound


def _answers(record: Record, plan: CompiledPlan, metric: Metric, hooked: bool) -> Branches:
    """The metric's answers after the recorded prompt."""
    apart = hooked or any(step.in_decode for step in plan.steps)
    branches = None if apart else Branches.of(record, metric.continuations(record.batch))
    if branches is None:
        raise InputError(
            f"{metric.name}: an answer has several tokens, which are differentiated after a prompt that restarts, all "
            "at once. Here it does not (see trace.hooked_because), or a site or an edit acts where no restart is "
            "possible or on the answer itself. Use answers of one token, such as the first token of each (their ids)."
        )
    return branches


@dataclass(frozen=True, eq=False)
class _Probe:
    """A zero that is added at a site, and what the site held."""

    site: Site
    positions: Positions
    leaf: Tensor
    found: list[Tensor]

    @classmethod
    def of(cls, record: Record, site: Site) -> _Probe:
        spec, n = record.model.spec, len(record.spans)
        site.check(spec)
        positions = resolve_positions(site.positions, record.spans, what=f"gradient at {site.component}")
        if not positions.index:
            raise InterventionError(f"the gradient at {site.component} names positions that only decoding adds.")
        heads = [len(site.heads) if site.heads is not None else site.n_heads(spec)] if site.has_heads else []
        stream = record.resid[0]
        shape = (record.batch, len(positions.index), *heads, width_of(site, spec, n))
        leaf = torch.zeros(shape, dtype=stream.dtype, device=record.model.device, requires_grad=True)
        return cls(site, positions, leaf, [])

    def around(self, step: Step) -> Step:
        """The step that adds the zero, made to keep what it finds; all rows must be shown to it."""

        def apply_(activation: Tensor, offset: int) -> bool:
            fired = step.apply_(activation, offset)
            seen = activation.transpose(1, 2) if self.site.is_edges else activation
            seen = seen.detach()[:, [p - offset for p in self.positions.index]]
            self.found.append(seen if self.site.heads is None else seen[:, :, list(self.site.heads)])
            return fired

        return replace(step, apply_=apply_, rowwise=False)


def _with_probes(record: Record, plan: Plan, probes: Sequence[_Probe]) -> CompiledPlan:
    """The plan's steps, and after them one for each probe."""
    adding = Plan([add(probe.site, probe.leaf) for probe in probes])
    compiled = (plan + adding).compile(record.model.spec, record.spans, batch=record.batch)
    own = [step for step in compiled.steps if step.number < len(plan)]
    added = [probe.around(step) for probe, step in zip(probes, compiled.steps[len(own) :], strict=True)]
    return replace(compiled, steps=(*own, *added))


def _gradients(measured: Tensor, logits: Tensor, leaves: Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
    if not logits.requires_grad:  # nothing asked for comes after the sites
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    if not measured.requires_grad:
        raise InputError(f"the metric {name} has no gradient: it was taken of detached logits, or counts or compares.")
    return torch.autograd.grad(measured.sum(), leaves, allow_unused=True, materialize_grads=True)


@contextmanager
def _frozen(model: Any) -> Generator[None]:
    """Let no weight want a gradient for a while: each would make the run keep what it reads."""
    wanting = [parameter for parameter in model.hf_model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def _require_memory(record: Record, layers: int, start: int, budget_gb: float | int) -> None:
    """Refuse what would not fit: what each layer keeps of every row, and one layer's scores on the way back."""
    spec, n = record.model.spec, len(record.spans)
    scores = spec.n_heads * n
    kept = 6 * spec.d_model + 4 * spec.d_mlp + 4 * spec.n_heads * spec.d_head + 2 * scores
    rows = record.batch * (n - start)
    needed = rows * (layers * kept + 16 * scores) * max(4, record.resid[0].element_size()) / GIGABYTE
    if needed > budget_gb:
        raise BudgetError(
            f"a backward pass through {layers} layers at {n - start} positions of {record.batch} examples needs about "
            f"{needed:.2g} GB, more than budget_gb={budget_gb:g}. Trace fewer examples at a time, ask for later sites, "
            "or raise budget_gb."
        )
