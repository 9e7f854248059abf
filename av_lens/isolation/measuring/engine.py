"""What does a model say when nodes' outputs at the site are replaced? Donors and recordings of one model.

A *node* is a head, `(layer, head)`, whose output is z, or an MLP, `(layer, MLP)`, whose output is what it adds to the
stream. In tables `[layer, node]` the layer's heads come first and its MLP is the last column, which -1 (`MLP`) indexes.
Plans run in two ways that must agree (a test holds them together): `how="trace"` restarts the recorded run at the first
edited layer and position; `how="hooks"` runs the whole model again for every plan, with plain hooks, as the slow
reference. With the norm frozen reading out is linear.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn import functional

from av_lens.core.calls import is_packed, is_split, require_known_layers, unembedded, watching
from av_lens.core.execution import logits_of, run
from av_lens.core.readings import incoming_mass
from av_lens.errors import ProtocolError, unknown
from av_lens.families.decoder import hook_name, weight_of
from av_lens.inputs import AVInputs
from av_lens.interventions import CompiledPlan, Edit, Plan, Site, replace
from av_lens.isolation.measuring.cells import Cells, KeptCells
from av_lens.isolation.measuring.scoring import Edited, divisor
from av_lens.metrics.forms import followed
from av_lens.replay.branches import Branches
from av_lens.replay.recording import record_bytes
from av_lens.replay.rerun import Taps, layer_of, layers, rerun, start_of
from av_lens.replay.stacks import run_streams, scheduled
from av_lens.replay.traces import Trace
from av_lens.spans import SpanMap

_MIRRORS = {
    "va": "av", "vv": "aa", "wa": "wv", "vw": "aw", "blank_a": "blank_v", "v_muted": "a_muted",
    "audio_only": "audio_only_v", "blank_muted": "blank_muted",
}  # fmt: skip
MIRROR = _MIRRORS | {two: one for one, two in _MIRRORS.items()}
MIRRORED_BASES = ("av", "blank_v")
MEAN_CELLS = (("va", "va", "ask"), ("av", "av", "ask"), ("see", "va", "see"))
W_CELLS = ("wa", "wv", "vw", "aw")
MEANS = ("mean_task", "mean_other")
PRIMARY_DONORS = ("blank_muted", "mean_other", "zero")
SECONDARY_DONORS = ("mean_task", "audio_only", "half_dose")
"""Donors of the release alone, shown beside the primary ones; half a dose is half of the run's own z."""
OTHER_LAYOUT = ("audio_only", "audio_only_v", "text_only")

AllOutputs = Float[Tensor, "layer batch site ..."]
Node = tuple[int, int]
"""(layer, head), or (layer, MLP)."""
MLP = -1
Z, MLP_OUT = "z", "mlp_out"
OUTPUTS = (Z, MLP_OUT)
LATER = "later"
"""All MLPs after the edited node."""


def part_of(node: Node) -> str:
    """Name a node's output."""
    return MLP_OUT if node[1] == MLP else Z


def site_of(node: Node, positions: Any) -> Site:
    """Write where a node's output is edited."""
    layer, head = node
    return Site(MLP_OUT, layer, positions=positions) if head == MLP else Site(Z, layer, head=head, positions=positions)


def listed_nodes(n_layers: int, n_columns: int, mlps: bool) -> list[Node]:
    """List the nodes of a table `[layer, node]` in its order."""
    columns = [*range(n_columns - 1), MLP] if mlps else range(n_columns)
    return list(product(range(n_layers), columns))


Values = Mapping[Node, Float[Tensor, "_one_or_batch site _"]]
SITES = ("suffix", "generation", "audio", "video", "sinks")
ENCODING_SITES = ("audio", "video")
MEDIA_SITES = (*ENCODING_SITES, "sinks")
"""Sites before the question: nothing that is asked can change what heads do there."""


@dataclass(eq=False)
class Recording:
    """A run of a stack under edits: its window from the site to the asked position, its stream at the final norm."""

    inputs: AVInputs
    site: Int[np.ndarray, " site"]
    window: Int[np.ndarray, " window"]
    logits: Float[Tensor, "batch d_vocab"]
    parts: dict[str, Float[Tensor, "layer batch window ..."]]
    final: Float[Tensor, "batch d_model"]
    under: Values = field(default_factory=dict)
    trace: Trace | None = None

    def at_site(self, part: str) -> AllOutputs:
        """What is kept of a component, at the site."""
        inside = torch.from_numpy(np.searchsorted(self.window, self.site))
        return self.parts[part][:, :, inside]

    @property
    def trace_bytes(self) -> int:
        """How much memory its trace takes, where it has one."""
        trace = self.trace
        return 0 if trace is None else sum(x.nbytes for x in (*trace.resid, *trace.keys, *trace.values))

    @property
    def nbytes(self) -> int:
        """How much memory it takes, its trace included."""
        return self.trace_bytes + sum(part.nbytes for part in (*self.parts.values(), self.logits, self.final))

    def plan(self, values: Values, *, freeze: bool = False, mlps: str | Sequence[int] = ()) -> Plan:
        """Give nodes another output at the site, on top of the run's own edits (those at the restart and after)."""
        first, last = min(layer for layer, _ in values), self.site[-1:]
        if freeze and last[0] != self.window[-1]:
            return Plan()  # no node's own write at another position reaches the asked one
        restarts = self.trace is not None and not self.trace.hooked_because
        under = {h: z for h, z in self.under.items() if h not in values and (h[0] >= first or not restarts)}
        narrow = freeze and (restarts or not under)
        edits = edits_at(last if narrow else self.site, under | dict(values))
        n, held = len(self.parts[Z]), (last if freeze else self.site).tolist()
        if freeze:
            own = self.parts[Z]
            edits += [replace(Site(Z, layer, positions=held), own[layer][:, -1:]) for layer in range(first + 1, n)]
        if mlps:
            after = range(first + ((first, MLP) in values), n)
            after = after if isinstance(mlps, str) else [layer for layer in after if layer in mlps]
            own = self.parts[MLP_OUT][:, :, -1:] if freeze else self.at_site(MLP_OUT)
            edits += [replace(Site(MLP_OUT, layer, positions=held), own[layer]) for layer in after]
        return Plan(edits)


def edits_at(positions: Int[np.ndarray, " place"], values: Values) -> list[Edit]:
    """Write nodes' new outputs as edits at some of the site's last positions."""
    at, n = positions.tolist(), len(positions)
    return [replace(site_of(node, at), new[:, -n:] if new.shape[1] > 1 else new) for node, new in values.items()]


def site_positions(spans: SpanMap, site: str, sinks: Sequence[int] = ()) -> Int[np.ndarray, " site"]:
    """Find a site's positions in a prompt, ascending; an unknown site and one without positions are refused."""
    if site not in SITES:
        raise ProtocolError(unknown("site", site, SITES))
    role = "video|image" if site == "video" else site
    found = np.asarray(sinks if site == "sinks" else spans[role].positions, dtype=np.int64)
    if not len(found):
        none = (
            ": no media position of this layout gets 10 times the mean value-weighted attention from the suffix in "
            "discovery's conflicts. Search other sites."
        )
        why = none if site == "sinks" else f"; it has {spans!r}."
        raise ProtocolError(f"the site {site!r} names no position of this prompt{why}")
    return np.sort(found)


class _Keeping(Taps):
    def __init__(self, plans: Sequence[CompiledPlan], offset: int) -> None:
        super().__init__(plans, offset)
        self.kept: dict[str, dict[int, Tensor]] = {part: {} for part in OUTPUTS}

    def __call__(self, component: str, layer: int | None, activation: Tensor, rows: slice | None = None) -> Tensor:
        found = super().__call__(component, layer, activation, rows)
        if component in self.kept and layer is not None:
            self.kept[component][layer] = found[0]
        return found


STREAM_BYTES, TRACE_BYTES, KEPT_BYTES = 2.5e8, 4e9, 5e8
"""Memory for the streams of plans that run together; for the trace of one stack; for one that is not made again."""


class ModelEngine:
    """Recordings and edited runs of a `HookedAVLLM`; whoever sets `suppressed` hands over mirrored conflicts."""

    suppressed = "sound"
    everything = False
    """Whether every figure is run for every node, as a bench wants it that scores all nodes by each."""

    def __init__(
        self, model: Any, *, how: str = "trace", layout: str = "in_video", cells: Mapping[str, Any] | None = None
    ) -> None:
        if how not in ("trace", "hooks"):
            raise ProtocolError(unknown("engine", how, ("trace", "hooks")))
        require_known_layers(model, "isolating heads")
        self.model, self.how, self.layout = model, how, layout
        self._restarts = how == "trace"  # until a run of this model says that it cannot
        if is_packed(model.hf_model):  # heads are told by what they write
            weight_of(layer_of(model, 0).o)
        self.cell_options = dict(cells or {})
        self._cells = KeptCells()
        self.n_layers, self.n_heads = int(model.spec.n_layers), int(model.spec.n_heads)

    @cached_property
    def heads(self) -> list[Node]:
        """All heads, layer by layer."""
        return list(product(range(self.n_layers), range(self.n_heads)))

    def cells(self, conflict: Any, question: str | None) -> Cells:
        """Give a conflict's cells, asked its own question (None) or another; those used last are kept encoded."""
        options = {"question": question, "layout": self.layout, "keep_clips": False, **self.cell_options}
        return self._cells.of(self.model, conflict, options, self.suppressed)

    def together(self, inputs: AVInputs) -> int:
        """Say how many examples fit into one stack: their trace must stay within `TRACE_BYTES`."""
        return int(max(1, min(16, TRACE_BYTES * len(inputs) // record_bytes(self.model, inputs))))

    def record(self, inputs: AVInputs, positions: Int[np.ndarray, " site"], under: Values | None = None) -> Recording:
        """Run a stack, under edits of nodes or none, keeping every node's output from the site on."""
        window = np.arange(positions[0], inputs.spans.generation_position + 1)
        trace = self.model.trace(inputs) if self._restarts and not under else None
        self._restarts = self._restarts and (trace is None or not trace.hooked_because)
        if trace is not None and self._restarts:
            made, parts = self._kept(trace, Plan(), window)
            small = record_bytes(self.model, inputs) <= KEPT_BYTES
            final = made.stream(made.n_layers, int(window[-1]))[:, 0]
            return Recording(inputs, positions, window, self._read(final), parts, final, trace=trace if small else None)
        places, last = product(OUTPUTS, range(self.n_layers)), self.n_layers - 1
        sites = [Site(part, layer, positions=window.tolist()) for part, layer in places]
        sites.append(Site("resid_post", last, positions=window[-1:].tolist()))
        with torch.no_grad():  # what is kept was never bounded: it is the trace that `together` counts
            plan = Plan(edits_at(positions, under or {}))
            hooked = run(self.model, inputs, plan=plan, capture=sites, budget_gb=math.inf)
        parts = {part: torch.stack([hooked.cache[part, one] for one in range(self.n_layers)]) for part in OUTPUTS}
        logits, final = hooked.logits[:, 0].float().clone(), hooked.cache["resid_post", last][:, 0].clone()
        return Recording(inputs, positions, window, logits, parts, final, under or {})

    def record_edited(self, recording: Recording, values: Values) -> Recording:
        """Run a recording's inputs with nodes edited, once for all further edits, each restarting at its own layer."""
        whole, trace = dict(recording.under) | dict(values), self._restartable(recording)
        if trace is None:
            again = self.record(recording.inputs, recording.site, whole)
            return dataclasses.replace(again, trace=recording.trace)
        trace.require_standing()
        edited, kept = self._kept(trace, recording.plan(values), recording.window)
        final = edited.stream(edited.n_layers, int(recording.window[-1]))[:, 0]
        parts = {part: torch.cat([recording.parts[part][: -len(new)], new]) for part, new in kept.items()}
        changed = {"logits": self._read(final), "parts": parts, "final": final, "under": whole, "trace": edited}
        return dataclasses.replace(recording, **changed)

    def _kept(
        self, trace: Trace, plan: Plan, window: Int[np.ndarray, " window"]
    ) -> tuple[Trace, dict[str, Float[Tensor, "layer batch window ..."]]]:
        """Restart a recorded run under a plan: the new run, and its nodes' outputs from the first edited layer on."""
        compiled = plan.compile(self.model.spec, trace.spans, batch=trace.batch)
        if not len(plan):
            compiled = dataclasses.replace(compiled, first_layer=0, first_position=int(window[0]))
        taps = _Keeping([compiled], start_of(trace, compiled))
        made = rerun(trace, taps)
        compiled.verify()
        inside = torch.from_numpy(window - taps.offset).to(made.model.device)
        parts = {part: torch.stack([kept[one][:, inside] for one in sorted(kept)]) for part, kept in taps.kept.items()}
        return made, parts

    def _read(self, final: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_vocab"]:
        with torch.no_grad():
            return unembedded(self.model, final).float()

    def trace(self, recording: Recording) -> Trace:
        """Give the recorded run that restarts begin from, made when first needed and kept with the recording."""
        trace: Trace = self.model.trace(recording.inputs) if recording.trace is None else recording.trace
        recording.trace = trace
        return trace

    def _restartable(self, recording: Recording) -> Trace | None:
        trace = self.trace(recording) if self.how == "trace" else None
        return None if trace is None or trace.hooked_because else trace

    def capture(self, recording: Recording, part: str) -> AllOutputs:
        """Give a component of an unedited run at the site; one that is no node's output is kept from now on."""
        if part not in recording.parts:
            at, layers = recording.window.tolist(), range(self.n_layers)
            sites = [Site(part, layer, positions=at) for layer in layers]
            with torch.no_grad():
                cache = run(self.model, recording.inputs, capture=sites, budget_gb=math.inf).cache
            recording.parts[part] = torch.stack([cache[part, layer] for layer in layers])
        return recording.at_site(part)

    def incoming(self, inputs: AVInputs) -> Float[np.ndarray, "batch pos"]:
        """Sum the value-weighted attention that each position gets from the suffix, all layers and heads together."""
        return incoming_mass(self.model, inputs).double().numpy()

    def changed(
        self, recording: Recording, plans: Sequence[Plan], answers: Sequence[Int64[Tensor, "batch _"]] = ()
    ) -> Iterator[Edited]:
        """Run a recording's inputs again under each plan, in order; and answers of several tokens after them."""
        trace = self._restartable(recording)
        branches = None if trace is None or not answers else Branches.of(trace, answers)
        if trace is None or (answers and branches is None):
            # Of an edited run's restart a plan may name the new edits alone (`Recording.plan`): here all are made.
            under = Plan(edits_at(recording.site, recording.under) if answers else ())
            yield from (self._hooked(recording, under + plan, answers) for plan in plans)
            return
        asked, rows = torch.tensor([int(recording.window[-1])]), 1 if branches is None else 1 + sum(branches.sizes)
        # A stack's activations keep to their own budget; what is bounded here are the streams that are handed back.
        together = int(max(1, min(512, STREAM_BYTES // (rows * recording.final.nbytes))))
        batch, width = recording.final.shape
        for start in range(0, len(plans), together):
            some = plans[start : start + together]
            streams = recording.final.new_empty(len(some), batch, rows, width)
            with torch.no_grad():
                schedule = scheduled(trace, some, n_asked=1, budget_gb=1.0)
                for numbers, stream in run_streams(trace, schedule, asked, branches):
                    streams[list(numbers)] = stream
                for stream in streams:
                    final = stream[:, 0].contiguous()
                    later = None if branches is None else stream[:, 1:]
                    yield Edited(unembedded(self.model, final).float(), final, later)

    def _hooked(self, recording: Recording, plan: Plan, answers: Sequence[Int64[Tensor, "batch _"]]) -> Edited:
        if not len(plan) and not answers:  # the run as it was recorded, with the edits that it was made under
            return Edited(recording.logits, recording.final)
        asked, logits, found = int(recording.window[-1]), recording.logits, list[Tensor]()
        last = (hook_name("resid_post", self.n_layers - 1), watching(partial(_keep, found, asked)))
        for tokens in answers or [recording.inputs.ids[:, :1]]:
            inputs = followed(recording.inputs, tokens)
            compiled = plan.compile(self.model.spec, inputs.spans, batch=len(inputs))
            with torch.no_grad():
                logits = logits_of(self.model, inputs, [*compiled.fwd_hooks, last], torch.tensor([asked]))[:, 0]
            compiled.verify()
        later = torch.cat([stream[:, 1:] for stream in found], dim=1) if answers else None
        return Edited(logits.float().clone(), found[-1][:, 0], later)

    def linear_logits(
        self, recording: Recording, final: Float[Tensor, "*more batch d_model"], ids: Int[Tensor, " token"]
    ) -> Float[Tensor, "*more batch token"]:
        """Read tokens' logits from a stream, the final norm dividing by what it divided by in the recording."""
        norm, head = self.model.ln_final.original_component, self.model.bridge.unembed.original_component
        with torch.no_grad():
            ratio = divisor(self.model, final) / divisor(self.model, recording.final)
            normed, weight = norm(final).float() * ratio, weight_of(head)[ids].float()
            bias = None if head.bias is None else weight_of(head, "bias")[ids].float()
            return functional.linear(normed.to(weight.device), weight, bias).to(final.device)

    @cached_property
    def _output_weights(self) -> Float[Tensor, "layer head d_head d_model"]:
        if not is_split(self.model.hf_model):
            return self.model.W_O.detach()
        return torch.stack([layer.outputs().to(self.model.device) for _, layer in layers(self.model)])

    def writes(
        self, recording: Recording, ids: Int[Tensor, " token"], *, mlps: bool
    ) -> Float[Tensor, "layer node batch token"]:
        """Give `direct_attribution(by="head")` of many tokens, from what the recording keeps: nothing is run again."""
        at_end = recording.parts[Z][:, :, -1].float()
        written = torch.einsum("lbhd,lhdm->lhbm", at_end, self._output_weights.float())
        if mlps:
            added = recording.parts[MLP_OUT][:, None, :, -1].to(written)
            written = torch.cat([written, added], dim=1)
        norm = self.model.ln_final.original_component
        unembedding, scale = weight_of(self.model.bridge.unembed.original_component), weight_of(norm).detach().float()
        columns = unembedding.detach()[ids.to(unembedding.device)].T.float()
        return (written / divisor(self.model, recording.final) * scale.to(written)) @ columns.to(written)

    def write_norms(self, recording: Recording, *, mlps: bool) -> Float[np.ndarray, "layer node"]:
        """Measure how much each node writes at the site: the mean over examples and positions of |z W_O|."""
        norms = [
            torch.einsum("bshd,hdm->bshm", z.float(), output.float()).norm(dim=-1).mean((0, 1))
            for z, output in zip(recording.at_site(Z), self._output_weights, strict=True)
        ]
        found = torch.stack(norms).double().cpu()
        if mlps:
            added = recording.at_site(MLP_OUT).float().norm(dim=-1).mean((1, 2)).double().cpu()
            found = torch.cat([found, added[:, None]], dim=1)
        return found.numpy()

    def joint_norms(
        self, recording: Recording, subsets: Sequence[tuple[int, ...]]
    ) -> Float[np.ndarray, "layer subset"]:
        """Measure how much subsets of a layer's heads write together at the site: the mean of |sum of z W_O|."""
        chosen, norms = torch.zeros(len(subsets), self.n_heads, device=recording.final.device), list[Tensor]()
        for row, heads in enumerate(subsets):
            chosen[row, list(heads)] = 1.0
        for z, output in zip(recording.at_site(Z), self._output_weights, strict=True):
            written = torch.einsum("bshd,hdm->bshm", z.float(), output.float())
            together = torch.einsum("bshm,bsgm->bshg", written, written)
            squares = torch.einsum("nh,bshg,ng->nbs", chosen, together, chosen)
            norms.append(squares.clamp(min=0).sqrt().mean((1, 2)))
        return torch.stack(norms).double().cpu().numpy()


def _keep(kept: list[Tensor], position: int, stream: Tensor) -> None:
    kept.append(stream[:, position:].detach().clone())
