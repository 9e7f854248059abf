"""What does every method say about heads and MLPs? The same conflicts, cells and donors for all; larger is guiltier.

All scores are of discovery's competent conflicts, mirrored as in protocol section 3; edits act at the suffix. A table
is `[layer, node]`, the MLP last; NaN where a method says nothing of MLPs (attention, edge cuts, routes).

| method | score of a node |
|---|---|
| release, blank_muted or mean_other; zero ablation | its mean release by that donor |
| mean ablation | the same by `mean_task` |
| exact patching, ... | z from a cell: `blank_a`, `wa` (other picture), `vw` (other sound), `aa`, `audio_only` |
| sufficiency | protocol section 4 |
| path patching, direct | z from `blank_muted`, all later heads held |
| DLA | minus its direct share of M at the asked position |
| attention to video | attention from the asked position to the video, in `va` |
| edge cuts | effect of cutting its attention from the suffix to the video |
| AtP, AtP* | first-order guess of the exact patch from `blank_muted`; mean size over dropped layers |
| EAP, EAP-IG | sum of the sizes of its outgoing edges, donor `blank_muted`; integrated over 5 steps of the inputs |
| GIM | the same with the gradient of GIM's backward rules (`replay.held`) |
| routes, picture and rest | Causal Route Gating's estimate of what its picture's or its other keys' values do |

*Routes* (Cheng et al., 2026, 2605.24024): a head's z is the sum of what it reads at the picture and of what it reads
elsewhere (the "text" route, sound included), each a part of its attention times those values. A route's effect is l(as
it is) - l(route shut), guessed as <dl/dz, its part of z>, l being M; the score is minus the effect on C.

*CPR and CMD* (`results.circuit`) are of every method's order of nodes, m = C: a score is what the node's absence adds
to C, unscored nodes come last.

Figures that the isolation's record holds are read from it; their time is their share of its edited runs.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from av_lens.errors import InputError
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair
from av_lens.interventions import Site
from av_lens.isolation.measuring.engine import MIRROR, ModelEngine
from av_lens.methods import attention_flow, edge_attribution, knockout, patch
from av_lens.methods.circuits.finding import AREAS
from av_lens.methods.circuits.runs import CircuitRuns, Measured, Nodes
from av_lens.methods.circuits.scores import contributions, places
from av_lens.metrics import as_metric, logit_diff
from av_lens.metrics.forms import each
from av_lens.results.circuit import sizes
from av_lens.results.record import Isolation

SITE, AT = "suffix", "question|header|generation"
STEPS, STACK = 5, 64
Table = Float[np.ndarray, "layer node"]
Score = tuple[Table, float]
EXACT: Mapping[str, tuple[str, str]] = {
    "release, blank_muted": ("release", "blank_muted"),
    "release, mean_other": ("release", "mean_other"),
    "zero ablation": ("release", "zero"),
    "mean ablation": ("release", "mean_task"),
    "exact patching, other picture": ("reads picture", "wa"),
    "exact patching, other sound": ("reads sound", "vw"),
    "exact patching, audio alone": ("release", "audio_only"),
    "sufficiency": ("sufficiency", "va"),
    "path patching, direct": ("direct", "blank_muted"),
}
BLANK_PICTURE, AGREEING = "exact patching, blank picture", "exact patching, agreeing clip"
ROUTES: Mapping[str, bool] = {"route, picture": True, "route, rest": False}
IN_LOGITS = (*EXACT, BLANK_PICTURE, AGREEING, "edge cuts", "AtP", *ROUTES)
"""Methods whose score is an effect on C, so that it can be held against delta."""


class SharedEngine(ModelEngine):
    """An engine whose encoded inputs outlive the model: what enters an organism does not depend on its weights."""

    everything = True

    def __init__(self, model: Any, encoded: dict[Any, Any]) -> None:
        super().__init__(model)
        self.encoded = encoded
        self.used: dict[str, Any] = {}
        self._alike = not encoded
        self._known: dict[bytes, Any] = {}
        self.rows, self.row_seconds = 0, 0.0

    def cells(self, conflict: Any, question: str | None) -> Any:
        """Find a conflict's cells, encoded at most once."""
        third = None if conflict.third is None else str(conflict.third)
        key = (conflict.id, third, question)
        if key not in self.encoded:
            self.encoded[key] = super().cells(conflict, question)
        if question is None:
            self.used[str(conflict.id)] = conflict
        found = self.encoded[key]
        if not self._alike:
            self._alike = _equal(found["va"].tensors, super().cells(conflict, question)["va"].tensors)
            if not self._alike:
                raise InputError(
                    f"{self.model.name} reads clips otherwise than the models before it (another processor or "
                    "tokenizer), so that they cannot share conflicts: give it a bench of its own."
                )
        return found

    def changed(self, recording: Any, plans: Sequence[Any], answers: Sequence[Any] = ()) -> Any:
        """Run a recording's inputs again under each swap not met before, and note the time of single heads."""
        alone = all(sum(edit.site.head is not None for edit in plan) == 1 for plan in plans)
        base = hashlib.sha256(_bytes(recording.final) + recording.window.tobytes())
        keys = [_key(base, plan) for plan in plans] if not answers else []
        begun = time.process_time()
        new = {key: plan for key, plan in zip(keys, plans, strict=False) if key not in self._known}
        made = super().changed(recording, list(new.values()) if keys else plans, answers)
        for one, key in zip(made, new if keys else plans, strict=True):
            if alone:
                self.rows += len(one.logits)
                self.row_seconds += time.process_time() - begun
            if keys:
                self._known[key] = one
            else:
                yield one
            begun = time.process_time()
        yield from (self._known[key] for key in keys)


def _key(base: Any, plan: Any) -> bytes:
    """What a plan does to a recording."""
    digest = base.copy()
    for edit in plan:
        digest.update(repr((edit.kind, edit.site)).encode() + _bytes(edit.value))
    return digest.digest()


def _bytes(values: torch.Tensor) -> bytes:
    return values.float().cpu().contiguous().numpy().tobytes()


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    return set(one) == set(other) and all(same(one[name], other[name]) for name in one)


@dataclass(frozen=True, eq=False)
class Subject:
    """One model on the bench, with discovery's analysed conflicts as its isolation saw them."""

    model: Any
    engine: SharedEngine
    found: Isolation

    @property
    def conflicts(self) -> list[Any]:
        """Discovery's analysed conflicts, in the record's order."""
        frame: Any = self.found.conflicts
        chosen = frame[(frame["half"] == "discovery") & frame["analysed"]]
        return [self.engine.used[str(name)] for name in chosen["id"]]

    def inputs(self, cell: str) -> list[Any]:
        """Every conflict's cell, in order."""
        return [self.engine.cells(conflict, None)[cell] for conflict in self.conflicts]

    def pairs(self, base: str, donor: str) -> list[Pair]:
        """Pair every conflict's base cell, which is edited, with its donor cell, which is taken."""
        return [Pair(clean=d, corrupt=b) for b, d in zip(self.inputs(base), self.inputs(donor), strict=True)]

    @property
    def metric(self) -> Any:
        """M: the score of the sound's answer minus that of the picture's."""
        sound, picture = ([conflict.answers[side] for conflict in self.conflicts] for side in (0, 1))
        return logit_diff(each(sound), each(picture))

    def effect(self, estimand: str, donor: str) -> np.ndarray:
        """Read an effect `[example, layer, node]` on discovery from the isolation's record."""
        key = f"discovery/{SITE}/{estimand}/{donor}"
        if key not in self.found.arrays:
            known = sorted(name for name in self.found.arrays if name.startswith(f"discovery/{SITE}/"))
            raise InputError(f"the record has no effect {key!r}; it has {', '.join(known)}.")
        return np.asarray(self.found.arrays[key])

    @cached_property
    def circuits(self) -> CircuitRuns:
        """Runs of C with any nodes replaced, on these conflicts."""
        weights, empty = {"va": 0.5, "av": -0.5}, tuple(self.inputs("blank_muted"))
        terms = tuple((weight, tuple(self.inputs(cell)), empty) for cell, weight in weights.items())
        metric = as_metric(self.metric, self.model, list(terms[0][1]))
        measured = Measured(terms, metric, ("blank_muted", "zero"), "C", tuple(range(len(empty))))
        nodes = Nodes.of(self.model.spec, "head mlp")
        return CircuitRuns.of(self.model, measured, nodes, at=AT, stack=STACK, budget_gb=1.0, keep_gb=4.0)


def areas(runs: CircuitRuns, scores: Table) -> dict[str, float]:
    """CPR and CMD of a method's order of nodes, for each empty donor."""
    found, at = dict[str, float](), sizes(len(runs.nodes))
    for (empty, scale), (name, order) in product(runs.scales(0).items(), AREAS):
        turned = -scale.sign * scores.ravel()
        key = np.abs(turned) if order == "magnitude" else turned
        first = np.argsort(places(np.where(np.isnan(key), np.nanmin(key) - 1.0, key), "signed")).tolist()
        m = runs.measure(empty, [frozenset(first[:k]) for k in at])
        found[f"{name}, {empty}"] = scale.area(m, at, len(first), distance=name == "CMD")[0]
    return found


def all_scores(subject: Subject) -> dict[str, Score]:
    """Score every node by every method but `isolate`: larger is guiltier, NaN where not measured; and the seconds."""
    engine = subject.engine
    each = engine.row_seconds / max(1, engine.rows)  # of one conflict in one cell with one node edited
    seconds = 2 * engine.n_layers * (engine.n_heads + 1) * len(subject.conflicts) * each
    found = {name: (subject.effect(*key).mean(0), seconds) for name, key in EXACT.items()}  # measured by the isolation
    blank = subject.effect("silenced", "blank_a - blank_muted") + subject.effect("release", "blank_muted")
    found |= {BLANK_PICTURE: (blank.mean(0), seconds), "DLA": (-subject.effect("dla", "").mean(0), 0.0)}
    for name, method in MEASURED.items():
        begun = time.process_time()
        table = method(subject)
        unscored = np.full((engine.n_layers, engine.n_heads + 1 - table.shape[1]), np.nan)
        found[name] = np.concatenate([table, unscored], axis=1), time.process_time() - begun
    return found


def _mirrored(measure: Callable[[str, str], np.ndarray], donor: str) -> Table:
    """Half of the mean figure in `va` minus the mean figure in `av`."""
    return 0.5 * (measure("va", donor).mean(0) - measure("av", MIRROR[donor]).mean(0))


def _agreeing(subject: Subject) -> Table:
    def run(base: str, donor: str) -> np.ndarray:
        pairs = subject.pairs(base, donor)
        options: dict[str, Any] = {"at": AT, "metric": subject.metric, "stack": STACK}
        heads = patch(subject.model, pairs, over="head", **options).effects.values
        mlps = patch(subject.model, pairs, over="layer", component="mlp_out", **options).effects.values
        return np.concatenate([heads, mlps[..., None]], axis=-1)

    return _mirrored(run, "aa")


def _attention(subject: Subject) -> Table:
    flow = attention_flow(subject.model, subject.inputs("va"), queries="generation", by="head", stack=STACK)
    return flow.effects.sel(query="generation", key="video").mean("example").values


def _cuts(subject: Subject) -> Table:
    edge = f"video -> {AT}"
    options: dict[str, Any] = {"over": "head", "controls": False, "stack": STACK}

    def run(base: str, _: str) -> np.ndarray:
        grid = knockout(subject.model, subject.inputs(base), edges=edge, metric=subject.metric, **options)
        return grid.effects.sel(edge=edge, condition="cut").values

    return _mirrored(run, "aa")


def _guessed(kind: str, subject: Subject) -> Table:
    """AtP and AtP*, whose size counts."""
    contributed = contributions(subject.circuits, kind, steps=STEPS)["blank_muted"]
    guilt = np.abs(contributed) if kind == "atp_star" else -contributed
    return guilt.mean(0).reshape(subject.engine.n_layers, -1)


def _edges(variant: str, subject: Subject) -> Table:
    options: dict[str, Any] = {"variant": variant, "steps": STEPS, "at": AT, "direction": "denoise", "stack": STACK}
    va, av = (
        edge_attribution(subject.model, subject.pairs(base, "blank_muted"), metric=subject.metric, **options).mean()
        for base in ("va", "av")
    )
    scored = abs(0.5 * (va - av)).sum("receiver").sel(sender=list(subject.circuits.nodes.names))
    return scored.values.reshape(subject.engine.n_layers, -1)


def route_effects(model: Any, inputs: AVInputs, metric: Any, *, picture: bool) -> Float[np.ndarray, "batch layer head"]:
    """Guess what every head's reading of the picture, or of all else, at the suffix adds to a metric."""
    sites = [Site("pattern", layer, positions=AT) for layer in range(model.spec.n_layers)]
    found = model.trace(inputs).gradients(sites, metric)
    keys = np.isin(np.arange(len(inputs.spans)), list(inputs.spans["video|image"].positions)) == picture
    parts = zip(found.gradient, found.value, strict=True)
    return torch.stack([(slope * own)[..., keys].sum((1, 3)) for slope, own in parts], dim=1).double().cpu().numpy()


def _route(subject: Subject, *, picture: bool) -> Table:
    total = np.zeros(())
    for one in subject.circuits.runs:  # stacks of both cells, each with its metric
        found = route_effects(subject.model, one.base, one.metric, picture=picture)
        total = total - one.weight * found.sum(0) / len(subject.conflicts)
    return total


MEASURED: Mapping[str, Callable[[Subject], Table]] = {
    AGREEING: _agreeing,
    "attention to video": _attention,
    "edge cuts": _cuts,
    "AtP": partial(_guessed, "atp"),
    "AtP*": partial(_guessed, "atp_star"),
    "EAP": partial(_edges, "eap"),
    "EAP-IG": partial(_edges, "ig_inputs"),
    "GIM": partial(_edges, "gim"),
    **{name: partial(_route, picture=picture) for name, picture in ROUTES.items()},
}
METHODS = (*EXACT, BLANK_PICTURE, "DLA", *MEASURED)  # all methods but `isolate`
