"""What the metric becomes when one sender's change reaches named receivers alone: the runs of path patching.

For every sender (a row) and every set of receivers (a column), on one stack of inputs:

1. the base run is recorded, the donor run gives what the senders wrote;
2. with every other head held (`HeldRun`), each receiver's input is computed for all rows at once;
3. hops on the way are taken likewise: what they make of that input is the next change;
4. the base run is replayed with the receivers' inputs replaced and everything after them free. What a receiver makes
   of its input is known beforehand where no other receiver comes before it; elsewhere its input itself is edited, and
   where a later query head alone sees a new key or value, the run so far gives what the rest of that head reads.

Answers of several tokens are run after the prompt, as everywhere; senders change prompt positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.bridge.hook_names import hook_name
from av_lens.errors import ModelError
from av_lens.interventions import Plan, Site, replace
from av_lens.interventions.nodes import Node
from av_lens.interventions.sites import resolve_positions
from av_lens.runs.budget import GIGABYTE
from av_lens.runs.execution import run
from av_lens.runs.held import Change, HeldRun, reread, turned
from av_lens.runs.metrics import Metric
from av_lens.runs.recording import Record
from av_lens.runs.restart import Layer
from av_lens.runs.traces import Trace, record

LOGITS = Node("logits")
TOTAL = Node("total")
COMPONENTS = {"head": "z", "mlp": "mlp_out", "embed": "embed"}

Nodes = tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class PathRuns:
    """Senders and receivers on one stack of base and donor inputs.

    Attributes:
        model: a `HookedAVLLM`.
        base: the inputs of the run that is edited.
        donor: the inputs of the run that the senders' values come from.
        senders: one row each: nodes patched together.
        via: the hops in between, in order.
        columns: one column each: receivers patched together, or `(TOTAL,)`: the sender patched, all after it free.
        at: the positions at which heads and MLPs send.
        mlps: "frozen" or "free".
        norms: "recomputed" or "frozen".
        budget_gb: memory for rows that are computed together.
    """

    model: Any
    base: Any
    donor: Any
    senders: tuple[Nodes, ...]
    via: tuple[Nodes, ...]
    columns: tuple[Nodes, ...]
    at: tuple[int, ...]
    mlps: str
    norms: str
    budget_gb: float | int

    def measure(
        self, metric: Metric, finished: Callable[[int], None], into: Float[Tensor, "sender column batch"]
    ) -> None:
        """Measure the metric for every sender and column whose order allows it.

        Args:
            metric: bound.
            finished: called with the number of cells done.
            into: filled as rows are done; cells whose receivers do not come after the sender stay NaN.
        """
        sent = self._sent()
        longer = metric.continuations(len(self.base))
        asked = int(self.base.spans.generation_position)
        if not longer:
            one = _Prompt(self, self.base, sent, range(asked, asked + 1), metric)
            for rows, values in one.rows(one.together()):
                into[rows.start : rows.stop] = values.to(into)
                finished(rows.stop * len(self.columns))
            return
        prompts = [
            _Prompt(
                self,
                self.base if tokens.shape[1] == 1 else self.base.continued(tokens[:, :-1]),
                sent,
                range(asked, asked + tokens.shape[1]),
                lambda logits, number=number: metric.reduce(number, logits),
            )
            for number, tokens in enumerate(longer)
        ]
        size = min(prompt.together() for prompt in prompts)
        for parts in zip(*(prompt.rows(size) for prompt in prompts), strict=True):
            rows = parts[0][0]
            for i, row in enumerate(rows):
                for column in range(len(self.columns)):
                    into[row, column] = metric.combine([values[i, column] for _, values in parts]).to(into)
            finished(rows.stop * len(self.columns))

    def in_order(self, sender: Nodes, column: Nodes) -> bool:
        """Say whether the sender's write comes before some input on its way.

        Args:
            sender: the nodes that send.
            column: the receivers.

        Returns:
            False if nothing can pass from one to the other.
        """
        if column == (TOTAL,):
            return True
        steps = [sender, *self.via, column]
        return all(
            any(after.reads_at > before.writes_at for before in steps[i] for after in steps[i + 1])
            for i in range(len(steps) - 1)
        )

    def _sent(self) -> _Sent:
        """Run both inputs once and keep what every sender wrote."""
        nodes = [node for nodes in self.senders for node in nodes]
        spans = self.base.spans
        ends = {
            node.label: resolve_positions(node.span, spans, what=f"sender {node.label}").index
            for node in nodes
            if node.kind == "embed"
        }
        at = set(self.at) if any(node.kind != "embed" for node in nodes) else set[int]()
        positions = sorted(at.union(*ends.values()))
        with torch.no_grad():
            streams = [run(self.model, x, capture=Site("embed")).cache["hook_embed"] for x in (self.donor, self.base)]
        # Causal: before the first position that differs both runs are one run, and nothing is sent.
        differs = (streams[0] != streams[1]).any(-1).any(0).tolist()
        first = differs.index(True) if True in differs else 0
        positions = [p for p in positions if p >= first] or positions[-1:]
        named = dict.fromkeys((COMPONENTS[node.kind], node.layer) for node in nodes if node.kind != "embed")
        sites = [Site(component, layer, positions=positions) for component, layer in named]
        held: list[dict[str, Tensor]] = []
        for x, stream in zip((self.donor, self.base), streams, strict=True):
            with torch.no_grad():
                kept = run(self.model, x, capture=sites).cache.cache_dict if sites else {}
            held.append(kept | {"hook_embed": stream[:, positions]})
        return _Sent(tuple(positions), held[0], held[1], ends, tuple(self.at))


@dataclass(frozen=True, eq=False)
class _Sent:
    """What senders wrote in both runs, by hook, at `positions`; where each span and the heads send."""

    positions: tuple[int, ...]
    given: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    spans: Mapping[str, tuple[int, ...]]
    at: tuple[int, ...]

    def where(self, node: Node) -> tuple[list[int], Tensor]:
        """The rows of `positions` at which a node sends, and the positions themselves."""
        inside = set(self.spans[node.label] if node.kind == "embed" else self.at)
        rows = [i for i, p in enumerate(self.positions) if p in inside]
        return [self.positions[i] for i in rows], torch.tensor(rows)

    def values(self, node: Node, values: Mapping[str, Tensor]) -> Tensor:
        """What one run holds of a node, `[batch, pos, d]`."""
        found = values[hook_name(COMPONENTS[node.kind], node.layer)]
        return found[:, :, node.index] if node.kind == "head" else found


class _Prompt:
    """One prompt (or the prompt with an answer's tokens after it): rows of numbers, a chunk of senders at a time."""

    def __init__(
        self, job: PathRuns, x: Any, sent: _Sent, asked: range, score: Callable[[Tensor], Tensor] | Metric
    ) -> None:
        self.job, self.sent, self.score = job, sent, score
        self.trace: Trace = record(job.model, x)
        if self.trace.hooked_because:
            raise ModelError(f"path patching computes layers by themselves, and cannot: {self.trace.hooked_because}.")
        self.asked = [p for p in asked if p < len(self.trace.spans)]
        self.positions = sent.positions
        self.nodes = list(dict.fromkeys(node for column in job.columns for node in column if node != TOTAL))
        self.few: tuple[Callable[[Tensor], Tensor], Tensor | None] = (score, None)
        if isinstance(score, Metric):
            few, tokens = score.few_tokens()
            self.few = (few, None if tokens is None else tokens.to(job.model.device))
        if not job.via and (TOTAL,) not in job.columns and set(self.nodes) <= {LOGITS}:
            self.positions = tuple(p for p in sent.positions if p in self.asked) or sent.positions[-1:]
        self.held = self._whole()

    def rows(self, together: int) -> Iterator[tuple[range, Tensor]]:
        """Measure a chunk of senders at a time, `[sender, column, batch]`."""
        for start in range(0, len(self.job.senders), together):
            rows = range(start, min(start + together, len(self.job.senders)))
            yield rows, self._chunk([self.job.senders[row] for row in rows])

    def _whole(self) -> HeldRun:
        """The base run with its heads held, at the positions where a change may come to be."""
        job, n = self.job, len(self.trace.spans)
        reach = positions = self.positions
        if any(node.input in ("k", "v") for nodes in job.via for node in nodes):
            reach = tuple(range(positions[0], n))
        sites = [Site("resid_mid", layer, positions=reach) for layer in range(self.trace.n_layers)]
        with torch.no_grad():
            cache = run(job.model, self.trace.x, capture=sites).cache
        middle = tuple(cache["resid_mid", layer] for layer in range(self.trace.n_layers))
        return HeldRun(self.trace, reach, middle, job.mlps, job.norms)

    def together(self) -> int:
        """How many senders fit the budget."""
        spec, n, batch = self.job.model.spec, len(self.trace.spans), self.trace.batch
        wide = len(self.held.positions) * (4 * spec.d_model + 3 * spec.d_mlp + len(self.nodes) * spec.d_head)
        later = n - self.positions[0]
        wide += later * (3 * n + len(self.job.columns) * spec.d_head)
        return max(1, int(self.job.budget_gb * GIGABYTE / (4.0 * batch * wide)))

    @torch.no_grad()
    def _chunk(self, senders: Sequence[Nodes]) -> Tensor:
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
                plans |= {(row, number): plan for row, plan in zip(rows, self._replaced(held, here), strict=True)}
        if plans:
            scores = self.trace.score(
                list(plans.values()), self.score, logits_at=self.trace.spans.span(self.asked), budget_gb=job.budget_gb
            )
            for (row, number), value in zip(plans, scores, strict=True):
                found[row, number] = value.to(found)
        return found

    def _change(self, nodes: Nodes, positions: Sequence[int]) -> Change:
        """What the stream gains where these nodes write as in the donor run."""
        found: dict[tuple[str, int], Tensor] = {}
        for node in nodes:
            difference = self.sent.values(node, self.sent.given) - self.sent.values(node, self.sent.own)
            if node.kind == "head":
                difference = difference @ self._writing(node.layer or 0, node.index or 0)
            place = {"head": "heads", "mlp": "mlp", "embed": "embed"}[node.kind], node.layer or 0
            there = dict(
                zip(*(part if isinstance(part, list) else part.tolist() for part in self.sent.where(node)), strict=True)
            )
            rows = [there[p] for p in positions if p in there]
            spread = difference.new_zeros((difference.shape[0], len(positions), difference.shape[2]))
            spread[:, [i for i, p in enumerate(positions) if p in there]] = difference[:, rows]
            found[place] = found[place] + spread if place in found else spread
        return found

    def _writing(self, layer: int, head: int) -> Tensor:
        """A head's output weights, `[d_head, d_model]`."""
        parts = Layer.of(self.job.model.bridge.blocks[layer])
        return parts.o.weight.T[head * parts.d_head : (head + 1) * parts.d_head]

    def _through(self, held: HeldRun, changes: Sequence[Change], hop: Nodes) -> tuple[HeldRun, list[Change]]:
        """Take one hop: what its nodes make of their new input is the next change."""
        made = held.outputs(held.inputs(changes, hop))
        positions, later = held.positions, tuple(range(held.positions[0], len(self.trace.spans)))
        if any(node.input in ("k", "v") for node in hop):
            positions, held = later, self.held.at(later)
        rows = [later.index(p) for p in positions]
        following: list[Change] = []
        for row in range(len(changes)):
            change: dict[tuple[str, int], Tensor] = {}
            for (kind, layer, head), (new, own) in made.items():
                difference = new[row] - own
                if kind == "z":
                    difference = difference[:, rows] @ self._writing(layer, head)
                elif difference.shape[1] != len(positions):
                    wide = difference.new_zeros((difference.shape[0], len(positions), difference.shape[2]))
                    wide[:, : difference.shape[1]] = difference
                    difference = wide
                place = ("heads" if kind == "z" else "mlp", layer)
                change[place] = change[place] + difference if place in change else difference
            following.append(change)
        return held, following

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
            positions, rows = self.sent.where(node)
            if not positions:
                continue  # both runs are one run there
            head = node.index if node.kind == "head" else None
            value = self.sent.values(node, self.sent.given)[:, rows.to(self.job.model.device)]
            edits.append(replace(Site(COMPONENTS[node.kind], node.layer, head, positions), value))
        return Plan(edits)

    def _replaced(self, held: HeldRun, read: Mapping[Node, Tensor]) -> list[Plan]:
        """The base run with receivers' inputs replaced, one plan for each row."""
        first = min(node.reads_at for node in read)
        known = {node: given for node, given in read.items() if node.kind == "mlp" or node.reads_at == first}
        made = held.outputs(known)
        n_rows = len(next(iter(read.values())))
        later = list(range(held.positions[0], len(self.trace.spans)))
        plans: list[Plan] = []
        for row in range(n_rows):
            edits = [
                replace(Site("z", layer, head, later), new[row])
                if kind == "z"
                else replace(Site("mlp_out", layer, positions=held.positions), new[row])
                for (kind, layer, head), (new, _) in made.items()
            ]
            rest = {node: given[row] for node, given in read.items() if node not in known}
            plans.append(self._later(Plan(edits), rest, held.positions))
        return plans

    def _later(self, plan: Plan, rest: Mapping[Node, Tensor], positions: Sequence[int]) -> Plan:
        """Add receivers in layers that other receivers have changed already, the earliest first."""
        group = self.job.model.spec.n_heads // self.job.model.spec.n_kv_heads
        for number in sorted({node.layer or 0 for node in rest}):
            here = {node: given for node, given in rest.items() if node.layer == number}
            if any(node.kind == "head" and node.input != "q" and group > 1 for node in here):
                now = self._so_far(plan, number)
                z = reread(now, number, {node: given[None] for node, given in here.items()}, positions)
                span = list(range(positions[0], len(self.trace.spans)))
                plan = plan + Plan(replace(Site("z", number, head, span), new[0]) for head, (new, _) in z.items())
            else:
                plan = plan + Plan(
                    replace(Site(node.input or "q", number, node.index, positions), given)
                    for node, given in here.items()
                )
        return plan

    def _so_far(self, plan: Plan, number: int) -> Record:
        """The record of the run under a plan, as far as one layer's attention needs it."""
        with torch.no_grad():
            stream = run(self.job.model, self.trace.x, plan=plan, capture=[Site("resid_pre", number)]).cache[
                "resid_pre", number
            ]
        layer = Layer.of(self.job.model.bridge.blocks[number])
        normed = layer.ln1(stream)
        keys, values = (part(normed).unflatten(-1, (-1, layer.d_head)).transpose(1, 2) for part in (layer.k, layer.v))
        cos, sin = (table[:, None].to(stream.device) for table in self.trace.tables)
        records = {"resid": stream, "keys": turned(keys, cos, sin), "values": values}
        fields = {
            name: tuple(value if i == number else one for i, one in enumerate(getattr(self.trace, name)))
            for name, value in records.items()
        }
        return changed(self.trace, **fields)
