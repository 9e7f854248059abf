"""What the metric becomes when one sender's change reaches named receivers alone: the runs of path patching.

What a receiver makes of its input is known beforehand where no other receiver comes before it; elsewhere its input
itself is edited, and where a later query head alone sees a new key or value, the run so far gives what the rest of that
head reads. Answers of several tokens are run after the prompt; senders change prompt positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core import run
from av_lens.core.budget import GIGABYTE
from av_lens.families.decoder import hook_name
from av_lens.interventions import Plan, Site, replace
from av_lens.interventions.edges import Node
from av_lens.interventions.edits import resolve_positions
from av_lens.metrics import Metric, measure
from av_lens.metrics.forms import followed
from av_lens.replay.held import Change, HeldRun, replaced, require_restart
from av_lens.replay.rerun import layer_of
from av_lens.replay.traces import Trace, record

LOGITS = Node("logits")
TOTAL = Node("total")
COMPONENTS = {"head": "z", "mlp": "mlp_out", "embed": "embed"}

Nodes = tuple[Node, ...]
Written = tuple[str, int, int, Tensor, Sequence[int]]
"""A component, layer and head, what it writes more, and in which rows."""


def follows(before: Nodes, after: Nodes) -> bool:
    """Whether some of these nodes read after some of those before have written."""
    return any(late.reads_at > early.writes_at for early in before for late in after)


@dataclass(eq=False)
class PathRuns:
    """Senders and receivers on one stack of inputs; nodes of a row, hop or column are patched together.

    The column `(TOTAL,)` patches the sender, all after it free. Heads and MLPs send at the positions `at`.
    """

    model: Any
    base: Any
    donor: Any
    senders: tuple[Nodes, ...]
    via: tuple[Nodes, ...]
    columns: tuple[Nodes, ...]
    at: tuple[int, ...]
    metric: Metric
    mlps: str
    norms: str
    budget_gb: float | int

    @torch.no_grad()
    def __post_init__(self) -> None:
        """Run base and donor: one prompt, or one for each answer of several tokens, and the metric of both runs."""
        sent, asked, metric = self._sent(), int(self.base.spans.generation_position), self.metric
        longer = metric.continuations(len(self.base))
        if not longer:
            self.prompts = [_Prompt(self, self.base, sent, range(asked, asked + 1), metric)]
            self.baseline, self.given = self.prompts[0].baseline(), metric(sent.logits)
            return
        asks = [(followed(self.base, tokens), sent, range(asked, asked + tokens.shape[1])) for tokens in longer]
        self.prompts = [_Prompt(self, *one, partial(metric.reduce, number)) for number, one in enumerate(asks)]
        self.baseline = metric.combine([prompt.baseline() for prompt in self.prompts])
        self.given = measure(self.model, self.donor, metric)

    def measure(self, finished: Callable[[int], None], into: Float[Tensor, "sender column batch"]) -> None:
        """Fill in the metric of every sender and column as rows are done; where nothing can pass it stays NaN."""
        size, columns = min(prompt.together() for prompt in self.prompts), len(self.columns)
        for start in range(0, len(self.senders), size):
            senders = self.senders[start : start + size]
            parts = [prompt.chunk(senders) for prompt in self.prompts]
            if not self.metric.teacher_forced:
                into[start : start + size] = parts[0].to(into)
            else:
                for row, column in product(range(len(senders)), range(columns)):
                    scores = [values[row, column] for values in parts]
                    into[start + row, column] = self.metric.combine(scores).to(into)
            finished((start + len(senders)) * columns)

    def in_order(self, sender: Nodes, column: Nodes) -> bool:
        """Whether the sender's write comes before some input on its way, so that something can pass."""
        ways = pairwise([sender, *self.via, column])
        return column == (TOTAL,) or all(follows(before, after) for before, after in ways)

    def _sent(self) -> _Sent:
        """Run the donor's inputs once and keep what every sender wrote."""
        nodes, spans = [node for nodes in self.senders for node in nodes], self.base.spans
        named = {node.label: node.span for node in nodes if node.kind == "embed"}
        ends = {label: resolve_positions(span, spans, what=f"sender {label}").index for label, span in named.items()}
        named = dict.fromkeys((COMPONENTS[node.kind], node.layer) for node in nodes if node.kind != "embed")
        positions = sorted(set(self.at if named else ()).union(*ends.values()))
        if not self.via and {node for column in self.columns for node in column} == {LOGITS}:
            asked = int(spans.generation_position)  # the only position at which logits are read
            positions = [asked] if asked in positions else positions[-1:]
        sites = tuple(Site(component, layer, positions=positions) for component, layer in named)
        with torch.no_grad():
            found = run(self.model, self.donor, capture=[Site("embed"), *sites])
        return _Sent(tuple(positions), sites, found.cache.cache_dict, found.logits, ends, frozenset(self.at))


@dataclass(frozen=True, eq=False)
class _Sent:
    """What senders wrote in the donor run: by hook, at `positions` (the embedding everywhere)."""

    positions: tuple[int, ...]
    sites: tuple[Site, ...]
    cache: Mapping[str, Tensor]
    logits: Tensor
    spans: Mapping[str, tuple[int, ...]]
    at: frozenset[int]

    def where(self, node: Node, since: int) -> list[int]:
        """The positions at which a node sends, from one on."""
        inside = self.spans[node.label] if node.kind == "embed" else self.at
        return [p for p in self.positions if p in inside and p >= since]

    def values(self, node: Node, cache: Mapping[str, Tensor], at: Sequence[int]) -> Tensor:
        """What one run holds of a node at some of the positions, `[batch, pos, d]`."""
        found = cache[hook_name(COMPONENTS[node.kind], node.layer)]
        found = found[:, list(at) if node.kind == "embed" else np.searchsorted(self.positions, at).tolist()]
        return found[:, :, node.index] if node.kind == "head" else found


class _Prompt:
    """One prompt (or the prompt with an answer's tokens after it): rows of numbers, a chunk of senders at a time."""

    def __init__(
        self, job: PathRuns, x: Any, sent: _Sent, asked: range, score: Callable[[Tensor], Tensor] | Metric
    ) -> None:
        self.job, self.sent, self.score = job, sent, score
        self.trace: Trace = record(job.model, x)
        require_restart(self.trace, "path patching")
        self.asked = [p for p in asked if p < len(self.trace.spans)]
        self.nodes = list(dict.fromkeys(node for column in job.columns for node in column if node != TOTAL))
        few, tokens = score.few_tokens() if isinstance(score, Metric) else (score, None)
        self.few = few, None if tokens is None else tokens.to(job.model.device)
        # Causal: before the first position that differs both runs are one run, and nothing is sent.
        streams = sent.cache["hook_embed"], self.trace.stream(0, 0)[:, : sent.cache["hook_embed"].shape[1]]
        differs = (streams[0] != streams[1]).any(-1).any(0).tolist()
        first = differs.index(True) if True in differs else 0
        self.positions = tuple(p for p in sent.positions if p >= first) or sent.positions[-1:]
        self.held, self.own = self._run()

    def baseline(self) -> Tensor:
        """The metric of the base run."""
        return self.score(self.trace.logits(self.trace.spans.span(self.asked)))

    def _run(self) -> tuple[HeldRun, Mapping[str, Tensor]]:
        """The base run with its heads held, wherever a change may come to be, and what senders wrote in it."""
        reach = self.positions
        if any(node.input in ("k", "v") for nodes in self.job.via for node in nodes):
            reach = tuple(range(reach[0], len(self.trace.spans)))
        sites = [Site("resid_mid", layer, positions=reach) for layer in range(self.trace.n_layers)]
        with torch.no_grad():
            cache = run(self.job.model, self.trace.x, capture=[*sites, *self.sent.sites]).cache
        middle = tuple(cache["resid_mid", layer] for layer in range(self.trace.n_layers))
        own = {**cache.cache_dict, "hook_embed": self.trace.stream(0, 0)}
        return HeldRun(self.trace, reach, middle, self.job.mlps, self.job.norms), own

    def together(self) -> int:
        """How many senders fit the budget."""
        spec, n, batch = self.job.model.spec, len(self.trace.spans), self.trace.batch
        wide = len(self.held.positions) * (4 * spec.d_model + 3 * spec.d_mlp + len(self.nodes) * spec.d_head)
        wide += (n - self.positions[0]) * (3 * n + len(self.job.columns) * spec.d_head)
        return max(1, int(self.job.budget_gb * GIGABYTE / (4.0 * batch * wide)))

    @torch.no_grad()
    def chunk(self, senders: Sequence[Nodes]) -> Tensor:
        """Measure some senders, `[sender, column, batch]`."""
        job, held = self.job, self.held.at(self.positions)
        found = torch.full((len(senders), len(job.columns), self.trace.batch), torch.nan)
        changes: list[Change] = [self._change(nodes, held.positions) for nodes in senders]
        for hop in job.via:
            held, changes = self._through(held, changes, hop)
        read = held.inputs(changes, self.nodes)
        plans: dict[tuple[int, int], Plan] = {}
        for number, column in enumerate(job.columns):
            rows = [row for row, sender in enumerate(senders) if job.in_order(sender, column)]
            if column == (TOTAL,):
                plans |= {(row, number): self._total(senders[row]) for row in rows}
            elif column == (LOGITS,):
                found[rows, number] = self._direct(held, read[LOGITS][rows]).to(found)
            elif rows:
                here = {node: read[node][rows] for node in column}
                plans |= {(row, number): plan for row, plan in zip(rows, replaced(held, here), strict=True)}
        if plans:
            scores = self.trace.score(
                list(plans.values()), self.score, logits_at=self.trace.spans.span(self.asked), budget_gb=job.budget_gb
            )
            for (row, number), value in zip(plans, scores, strict=True):
                found[row, number] = value.to(found)
        return found

    def _change(self, nodes: Nodes, positions: Sequence[int]) -> Change:
        """What the stream gains where these nodes write as in the donor run."""
        where, written = {position: i for i, position in enumerate(positions)}, list[Written]()
        for node in nodes:
            at = [p for p in self.sent.where(node, positions[0]) if p in where]
            difference = self.sent.values(node, self.sent.cache, at) - self.sent.values(node, self.own, at)
            rows = [where[p] for p in at]
            written.append((COMPONENTS[node.kind], node.layer or 0, node.index or 0, difference, rows))
        return self._summed(written, len(positions))

    def _summed(self, written: Iterable[Written], n: int) -> Change:
        """Add up, in the stream, what nodes write more at some of n rows."""
        found: dict[tuple[str, int], Tensor] = {}
        for component, layer, head, difference, rows in written:
            if component == "z":
                difference = difference @ layer_of(self.job.model, layer).outputs()[head]
            spread = difference.new_zeros((difference.shape[0], n, difference.shape[2]))
            spread[:, list(rows)] = difference
            place = {"z": "heads", "mlp_out": "mlp"}.get(component, component), layer
            found[place] = found[place] + spread if place in found else spread
        return found

    def _through(self, held: HeldRun, changes: Sequence[Change], hop: Nodes) -> tuple[HeldRun, list[Change]]:
        """Take one hop: what its nodes make of their new input is the next change."""
        made = held.outputs(held.inputs(changes, hop))
        positions, later = held.positions, tuple(range(held.positions[0], len(self.trace.spans)))
        if any(node.input in ("k", "v") for node in hop):
            positions, held = later, self.held.at(later)
        rows = [later.index(p) for p in positions]

        def moved(row: int) -> Iterator[Written]:
            for (kind, layer, head), (new, own) in made.items():
                difference = (new[row] - own)[:, rows] if kind == "z" else new[row] - own
                yield kind, layer, head, difference, range(difference.shape[1])

        return held, [self._summed(moved(row), len(positions)) for row in range(len(changes))]

    def _direct(self, held: HeldRun, streams: Tensor) -> Tensor:
        """The metric where only the logits' own input is changed, `[row, batch]`."""
        score, tokens = self.few
        base = self.trace.logits(self.trace.spans.span(self.asked))
        logits = (base if tokens is None else base[..., tokens]).repeat(len(streams), 1, 1, 1)
        inside = [i for i, p in enumerate(held.positions) if p in self.asked]
        if inside:
            places = [self.asked.index(held.positions[i]) for i in inside]
            logits[:, :, places] = held.at([held.positions[i] for i in inside]).logits(streams[:, :, inside], tokens)
        return torch.stack([score(one) for one in logits])

    def _total(self, nodes: Nodes) -> Plan:
        """The sender as in the donor run, everything after it free."""
        edits: list[Any] = []
        for node in nodes:
            if at := self.sent.where(node, self.positions[0]):  # else both runs are one run there
                head = node.index if node.kind == "head" else None
                site = Site(COMPONENTS[node.kind], node.layer, head, at)
                edits.append(replace(site, self.sent.values(node, self.sent.cache, at)))
        return Plan(edits)
