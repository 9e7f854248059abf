"""Many plans in one stack: which run together, running them; and a head of a recorded run that reads something else.

A plan that edits a component at which no restart is possible runs alone, hooked. `read_with` reads with all of a
layer's heads at once, to first order in what follows: a metric moves by `(dm/dz) . (z' - z)`, in which the softmax of
z' = softmax(q' k'^T scaling + mask) v' is exact (the QK fix of AtP*, Kramár et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from av_lens.brief import Brief
from av_lens.core.budget import GIGABYTE
from av_lens.core.calls import unembedded, watching
from av_lens.errors import BudgetError, InterventionError
from av_lens.families.decoder import ROUTER, Read, attended, given_weights, hook_name, router_hook
from av_lens.interventions import CompiledPlan, Plan
from av_lens.interventions.edges import Node
from av_lens.interventions.edits import places
from av_lens.replay.branches import Branches
from av_lens.replay.recording import Record, place_of
from av_lens.replay.rerun import EDGES, RESTARTABLE, Taps, layer_of, restarted_layers, start_of

STACK_ROWS = 2000  # positions x examples x plans computed together: beyond it, stacking gains nothing on a CPU
GPU_ROWS = 8  # times as many keep a GPU busy: worked out from its products' sizes, not measured


@dataclass(frozen=True)
class Stack:
    """Plans that run together."""

    numbers: tuple[int, ...]  # their places in the list of all plans, first layers ascending
    start: int  # the first position that is computed anew; the prompt's length where nothing is
    hooked: bool = False  # whether this is one plan that runs as a full hooked forward


@dataclass(frozen=True, eq=False, repr=False)
class Schedule(Brief):
    """A sweep's plans, compiled and stacked; its largest stack in `gigabytes`, its work in full `forwards`."""

    plans: tuple[CompiledPlan, ...]
    stacks: tuple[Stack, ...]
    gigabytes: float
    forwards: float

    def __str__(self) -> str:
        """The estimate in words."""
        full = sum(stack.hooked for stack in self.stacks)
        alone = f", {full} of them as full hooked forwards" if full else ""
        return (
            f"{len(self.plans)} plans in {len(self.stacks)} stacks{alone}: the work of about {self.forwards:.2g} "
            f"forward passes, up to {self.gigabytes:.2g} GB"
        )


def scheduled(
    record: Record, plans: Sequence[Plan | CompiledPlan], *, n_asked: int, budget_gb: float | int
) -> Schedule:
    """Compile plans for a recorded run, and decide which run together."""
    record.require_standing()
    spec, spans, batch = record.model.spec, record.spans, record.batch
    compiled = tuple(p if isinstance(p, CompiledPlan) else p.compile(spec, spans, batch=batch) for p in plans)
    n = len(spans)
    groups: dict[int, list[int]] = {}
    stacks: list[Stack] = []
    for number, plan in enumerate(compiled):
        if not restarts(record, plan):
            stacks.append(Stack((number,), 0, hooked=True))
        else:
            start = start_of(record, plan) if plan.steps else n
            if start == n - 1 and record.resid[0].dtype != torch.float32:
                start = max(n - 2, 0)  # a row alone would be multiplied by another kernel, and rounded otherwise
            groups.setdefault(start, []).append(number)
    gigabytes = forwards = 0.0
    most = STACK_ROWS if record.model.device.type == "cpu" else GPU_ROWS * STACK_ROWS
    for start, numbers in groups.items():
        numbers.sort(key=lambda number: compiled[number].first_layer)
        bytes_each = _bytes_of_plan(record, [compiled[number] for number in numbers], start, n_asked)
        rows = max(1, record.batch * (n - start))
        size = max(1, min(int(budget_gb * GIGABYTE / max(bytes_each, 1.0)), most // rows))
        chunks = [tuple(numbers[i : i + size]) for i in range(0, len(numbers), size)]
        stacks.extend(Stack(chunk, start) for chunk in chunks)
        gigabytes = max(gigabytes, max(map(len, chunks)) * bytes_each / GIGABYTE)
        layers = sum(record.n_layers - max(compiled[number].first_layer, 0) for number in numbers)
        forwards += layers * (n - start) / (record.n_layers * n)
    return Schedule(compiled, tuple(stacks), gigabytes, forwards + sum(stack.hooked for stack in stacks))


def restarts(record: Record, plan: CompiledPlan) -> bool:
    """Whether a plan can be restarted; else it runs as a full hooked forward."""
    return not record.hooked_because and all(step.component in RESTARTABLE for step in plan.steps)


def _bytes_of_plan(record: Record, plans: Sequence[CompiledPlan], start: int, n_asked: int) -> float:
    """What one plan's activations take at most, in bytes; written-out scores and pattern take 13 each."""
    spec, n = record.model.spec, len(record.spans)
    rows, itemsize = record.batch * (n - start), record.resid[0].element_size()
    edges = any(step.component in EDGES for plan in plans for step in plan.steps)
    flash = record.flash and not edges and record.model.device.type in ("cpu", "cuda")
    made = 4 * spec.d_model + 2 * (spec.n_heads + spec.n_kv_heads) * spec.d_head
    units = (made + 2 * spec.d_model + 4 * spec.widest) * itemsize
    scores = made * itemsize + 13 * spec.n_heads * n
    values = 0 if record.flash else record.batch * n * spec.n_kv_heads * spec.d_head * itemsize  # put together
    asked = record.batch * n_asked * spec.d_vocab * itemsize
    return rows * (units if flash else max(units, scores)) + values + asked


@dataclass(eq=False)
class _Frozen:
    """One layer's router, made to choose the same experts as before."""

    router: Any
    chosen: Int64[Tensor, "row chosen"]

    def logits(self, activation: Tensor, hook: Any = None) -> None:
        if len(activation) != len(self.chosen):
            raise InterventionError(
                f"{len(self.chosen)} positions have recorded experts and this run has {len(activation)}: routing_hooks "
                "are for whole runs of the recorded input, without decoding."
            )
        self._logits = activation

    def weights(self, activation: Tensor, hook: Any = None) -> Tensor:
        given = given_weights(self.router, self._logits, self.chosen)
        return torch.zeros_like(activation).scatter(-1, self.chosen, given)

    def indices(self, activation: Tensor, hook: Any = None) -> Tensor:
        return self.chosen


def routing_hooks(record: Record) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks under which a run of the recorded input sends every position through its recorded experts."""
    model = record.model
    kept = {n: experts.flatten(0, 1).to(place_of(model, n)) for n, experts in record.experts.items()}
    frozen = {n: _Frozen(layer_of(model, n).router, experts) for n, experts in kept.items()}
    return [(router_hook(part, n), getattr(one, part)) for n, one in frozen.items() for part in ROUTER]


def beside(record: Record) -> list[tuple[str, Callable[..., Any]]]:
    """The hooks that stand beside a plan's own where it runs as a hooked forward."""
    return routing_hooks(record) if record.routing == "frozen" else []


def run_stacks(
    record: Record, schedule: Schedule, rows: Tensor, tokens: Tensor | None = None, branches: Branches | None = None
) -> Iterator[tuple[tuple[int, ...], Float[Tensor, "plan batch asked d_vocab"]]]:
    """Run a schedule, stack by stack; the rows of `branches` come after the asked ones (no plan of them is hooked)."""

    def hooked(plan: CompiledPlan) -> Tensor:
        logits = record.model.run_with_hooks(record.x, fwd_hooks=[*beside(record), *plan.fwd_hooks])[:, rows]
        return logits if tokens is None else logits[..., tokens]

    return _run(record, schedule, rows, hooked, lambda stream: unembedded(record.model, stream, tokens), branches)


def run_streams(
    record: Record, schedule: Schedule, rows: Tensor, branches: Branches | None = None
) -> Iterator[tuple[tuple[int, ...], Float[Tensor, "plan batch asked d_model"]]]:
    """Run a schedule, and give the stream that leaves the last layer instead of the logits; else as `run_stacks`."""

    def hooked(plan: CompiledPlan) -> Tensor:
        kept: list[Tensor] = []
        last = (hook_name("resid_post", record.n_layers - 1), watching(lambda one: kept.append(one[:, rows].detach())))
        record.model.run_with_hooks(record.x, fwd_hooks=[*beside(record), *plan.fwd_hooks, last])
        return kept[0]

    return _run(record, schedule, rows, hooked, lambda stream: stream, branches)


def _run(
    record: Record,
    schedule: Schedule,
    rows: Tensor,
    hooked: Callable[[CompiledPlan], Tensor],
    read: Callable[[Tensor], Tensor],
    branches: Branches | None,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """What is read off each plan's last stream at the asked positions, `[plan, batch, asked, _]`."""
    asked: list[int] = rows.tolist()
    for stack in schedule.stacks:
        plans, start = [schedule.plans[number] for number in stack.numbers], stack.start
        if stack.hooked:
            found = hooked(plans[0])[None]
        else:
            early, late = parted(asked, start)
            parts: list[Tensor] = []
            if early:
                whole = record.stream(record.n_layers, 0)
                kept = whole[None, :, places(early, whole.device)]
                parts.append(read(kept).expand(len(plans), -1, -1, -1))
            # Not where edits act while decoding only; but even where nothing asked for can change: edits must fire.
            if start < len(record.spans) and any(plan.steps for plan in plans):
                stream, own = restarted(record, plans, start, late, keep=branches is not None)
                parts.append(read(stream))
                if branches is not None:
                    parts.append(read(branches.after(plans, start, own)))
            elif branches is not None:
                parts.append(read(branches.streams[-1][None]).expand(len(plans), -1, -1, -1))
            found = torch.cat(parts, dim=2)
        for plan in plans:
            plan.verify()
        yield stack.numbers, found


def parted(asked: Sequence[int], start: int) -> tuple[list[int], list[int]]:
    """The asked positions before a restart, and the rows of the restart that are asked for."""
    return [one for one in asked if one < start], [one - start for one in asked if one >= start]


def restarted(
    record: Record, plans: Sequence[CompiledPlan], start: int, rows: Sequence[int], *, keep: bool = False
) -> tuple[Float[Tensor, "plan batch asked d_model"], list[tuple[Tensor, Tensor]]]:
    """Run plans from one position on, each from its own first layer, without hooks."""
    taps, wanted = Taps(plans, start), None
    alone = record.resid[0].dtype != torch.float32 and len(plans) * record.batch * len(rows) == 1
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows) and not alone:  # one run of neighbours, never one row alone
        wanted = slice(rows[0], rows[-1] + 1)
    stream: Tensor | None = None
    kept: list[tuple[Tensor, Tensor]] = []
    for number in range(taps.first_layer if keep else 0):
        keys, values = _tail(record, number, start)
        kept.append((keys.expand(len(plans), *keys.shape), values.expand(len(plans), *values.shape)))
    for number, made in restarted_layers(record, taps, rows=wanted):
        stream = made.stream
        if keep:
            keys, values = _tail(record, number, start)
            kept.append((taps.complete(made.keys, keys), taps.complete(made.values, values)))
    assert stream is not None
    stream = stream.to(place_of(record.model, record.n_layers))
    return (stream if wanted is not None else stream[:, :, places(rows, stream.device)]), kept


@torch.no_grad()
def rerouted(
    record: Record, plans: Sequence[Plan | CompiledPlan], *, budget_gb: float | int
) -> Bool[Tensor, "plan layer batch pos"]:
    """Where routers choose another set of experts under each plan than in the recorded run."""
    schedule = scheduled(record, plans, n_asked=1, budget_gb=budget_gb)
    found = torch.zeros(len(plans), record.n_layers, record.batch, len(record.spans), dtype=torch.bool)
    for stack in schedule.stacks:
        compiled = [schedule.plans[number] for number in stack.numbers]
        for layer, own, chosen in _choices(record, compiled, stack):
            other = (chosen.sort(-1).values != own.sort(-1).values).any(-1)
            found[list(stack.numbers), layer, :, stack.start :] = other.cpu()
        for plan in compiled:
            plan.verify()
    return found


def _choices(
    record: Record, plans: Sequence[CompiledPlan], stack: Stack
) -> Iterator[tuple[int, Int64[Tensor, "batch pos chosen"], Int64[Tensor, "plan batch pos chosen"]]]:
    """Each layer with experts, those of the recorded run and of every plan, from the stack's start on."""
    if stack.hooked:
        kept: dict[int, Tensor] = {}
        looks = [(router_hook("indices", n), watching(partial(kept.__setitem__, n))) for n in record.experts]
        record.model.run_with_hooks(record.x, fwd_hooks=[*plans[0].fwd_hooks, *looks])
        for number, own in record.experts.items():
            yield number, own.to(kept[number].device), kept[number].view(1, *own.shape)
    elif stack.start < len(record.spans) and any(plan.steps for plan in plans):
        taps = Taps(plans, stack.start)
        for number, made in restarted_layers(record, taps):
            if made.experts is not None:
                own = record.experts[number][:, stack.start :].to(made.experts.device)
                yield number, own, taps.complete(made.experts, own)


def _tail(record: Record, layer: int, start: int) -> tuple[Tensor, Tensor]:
    """The recorded run's keys and values from a position on, `[batch, pos, kv_head, d_head]`, where the model is."""
    keys, values = (part[:, :, start:].transpose(1, 2) for part in record.past(layer, len(record.spans)))
    return keys, values


def refuse_huge(needed: float, budget_gb: float | int) -> None:
    """Refuse to hand back logits that would not fit."""
    if needed > 16 * budget_gb * GIGABYTE:
        raise BudgetError(
            f"the logits of all plans alone would need {needed / GIGABYTE:.1f} GB. Use trace.score(plans, metric), "
            "which keeps one number for each plan and example, or replay fewer plans at a time."
        )


@dataclass(frozen=True, eq=False)
class HeadRead:
    """What one query head reads at some rows of a recorded run."""

    q: Float[Tensor, "*_ batch row d_head"]  # its queries, rotated
    k: Float[Tensor, "*_ batch pos d_head"]  # its keys, rotated, at all positions
    v: Float[Tensor, "*_ batch pos d_head"]  # its values at all positions
    mask: Float[Tensor, "_ row pos"]  # what is added to the scores
    scaling: float  # factor of the scores

    @classmethod
    def of(cls, record: Record, layer: int, head: int, rows: Sequence[int]) -> HeadRead:
        """Read a head of a recorded run at some positions, ascending."""
        parts, device = layer_of(record.model, layer), place_of(record.model, layer)
        inside = places([row - rows[0] for row in rows], device)
        cos, sin = (table.to(device)[:, rows[0] :][:, inside] for table in record.tables)
        q = parts.head("q", head, parts.ln1(record.stream(layer, rows[0])[:, inside]))
        keys, values = record.past(layer, len(record.spans))
        mask, shared = _mask(record, rows, device)[:, 0], head // parts.group
        return cls(parts.turned("q", q, cos, sin), keys[:, shared], values[:, shared], mask, parts.scaling)

    @property
    def pattern(self) -> Float[Tensor, "*_ batch row pos"]:
        """Its attention pattern."""
        return attended(self.q, [Read(self.k, self.v, self.mask)], self.scaling)[1]

    @property
    def z(self) -> Float[Tensor, "*_ batch row d_head"]:
        """What it makes of that."""
        return attended(self.q, [Read(self.k, self.v, self.mask)], self.scaling)[0]

    def taking(self, other: HeadRead, *, q: bool = False, k: Sequence[int] = (), v: Sequence[int] = ()) -> HeadRead:
        """Take another run's queries, and its keys and values at some positions; both runs have one layout."""
        keys, values = self.k.clone(), self.v.clone()
        at_k, at_v = (places(at, keys.device) for at in (k, v))
        keys[:, at_k], values[:, at_v] = other.k[:, at_k], other.v[:, at_v]
        return replace(self, q=other.q if q else self.q, k=keys, v=values)


@torch.no_grad()
def reread(
    record: Record, number: int, read: Mapping[Node, Float[Tensor, "row batch pos d_head"]], positions: Sequence[int]
) -> dict[int, tuple[Float[Tensor, "row batch later d_head"], Float[Tensor, "batch later d_head"]]]:
    """Attend anew in one layer of a recorded run, with some queries, keys or values replaced."""
    layer, start, n = layer_of(record.model, number), positions[0], len(record.spans)
    device = place_of(record.model, number)
    cos, sin = (table.to(device) for table in record.tables)
    at = places(positions, device)
    keys, values = record.past(number, n)
    queries = layer.heads("q", layer.ln1(record.stream(number, start)))
    mask = _mask(record, range(start, n), device)[:, 0]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for head in sorted({head for node in read for head in _seen_by(node, layer.group)}):
        q, shared = layer.turned("q", queries[:, :, head], cos[:, start:], sin[:, start:]), head // layer.group
        base = HeadRead(q, keys[:, shared], values[:, shared], mask, layer.scaling)
        new = base
        for node, given in read.items():
            if head not in _seen_by(node, layer.group):
                continue
            kind = "q" if node.input not in ("k", "v") else node.input
            if kind != "v":
                given = layer.turned(kind, given.to(cos.device), cos[:, at], sin[:, at])
            there = getattr(base, kind).repeat(len(given), 1, 1, 1)
            there[:, :, at - start if kind == "q" else at] = given.to(there)
            new = replace(new, **{kind: there})
        found[head] = (new.z, base.z)
    return found


@torch.no_grad()
def read_with(
    record: Record,
    layer: int,
    rows: Sequence[int],
    queries: Float[Tensor, "batch row head d_head"],
    *,
    keys: Float[Tensor, "batch _ kv_head d_head"] | None = None,
    at: Sequence[int] = (),
) -> Float[Tensor, "batch row head d_head"]:
    """Recompute what every head of a layer reads."""
    end, modules = rows[-1] + 1, layer_of(record.model, layer)
    k, v = record.past(layer, end)
    if keys is not None:
        inside = [number for number, position in enumerate(at) if position < end]
        taken, new = places([at[number] for number in inside], k.device), places(inside, keys.device)
        k = k.clone()
        k[:, :, taken] = keys[:, new].transpose(1, 2).to(k)
    k, v = (part.repeat_interleave(modules.group, dim=1) for part in (k, v))
    read = Read(k, v, _mask(record, rows, k.device, end))
    return attended(queries.transpose(1, 2), [read], modules.scaling)[0].transpose(1, 2)


def _seen_by(node: Node, group: int) -> range:
    index = node.index or 0
    return range(index * group, (index + 1) * group) if node.kind == "kv" else range(index, index + 1)


def _mask(record: Record, rows: Sequence[int], device: torch.device, end: int | None = None) -> Tensor:
    """The additive mask of some rows, `[batch or 1, 1, row, key]`."""
    like, end = record.resid[0], len(record.spans) if end is None else end
    chosen = places(rows, device)
    if record.mask is not None:
        return record.mask.to(device)[:, :, chosen, :end]
    future = torch.arange(end, device=device)[None] > chosen[:, None]
    zeros = torch.zeros(1, 1, len(chosen), end, dtype=like.dtype, device=device)
    return zeros.masked_fill(future, torch.finfo(like.dtype).min)
