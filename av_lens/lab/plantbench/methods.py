"""What does every method say about the heads? The same conflicts, cells and donors for all; larger is guiltier.

All scores are of discovery's competent conflicts, mirrored as in protocol section 3; edits act at the suffix.

| method | score of a head |
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

Figures that the isolation's record holds are read from it; their time is their share of its edited runs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from av_lens.errors import InputError
from av_lens.inputs.pairs import Pair
from av_lens.isolation.measuring.engine import MIRROR, ModelEngine
from av_lens.methods import attention_flow, attribution_patch, edge_attribution, knockout, patch
from av_lens.metrics import logit_diff
from av_lens.metrics.forms import each
from av_lens.results.record import Isolation

SITE, AT = "suffix", "question|header|generation"
STEPS, STACK = 5, 64
Table = Float[np.ndarray, "layer head"]
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
IN_LOGITS = (*EXACT, BLANK_PICTURE, AGREEING, "edge cuts", "AtP")
"""Methods whose score is an effect on C, so that it can be held against delta."""


class SharedEngine(ModelEngine):
    """An engine whose encoded inputs outlive the model: what enters an organism does not depend on its weights."""

    everything = True

    def __init__(self, model: Any, encoded: dict[Any, Any]) -> None:
        super().__init__(model)
        self.encoded = encoded
        self.used: dict[str, Any] = {}
        self._alike = not encoded
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
        """Run a recording's inputs again under each swap, and note the time of single heads."""
        alone = all(sum(edit.site.head is not None for edit in plan) == 1 for plan in plans)
        begun = time.monotonic()
        for one in super().changed(recording, plans, answers):
            if alone:
                self.rows += len(one.logits)
                self.row_seconds += time.monotonic() - begun
            yield one
            begun = time.monotonic()


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
        """Read an effect `[example, layer, head]` on discovery from the isolation's record."""
        key = f"discovery/{SITE}/{estimand}/{donor}"
        if key not in self.found.arrays:
            known = sorted(name for name in self.found.arrays if name.startswith(f"discovery/{SITE}/"))
            raise InputError(f"the record has no effect {key!r}; it has {', '.join(known)}.")
        return np.asarray(self.found.arrays[key])[..., : self.found.n_heads]


def all_scores(subject: Subject) -> dict[str, Score]:
    """Score every head by every method but `isolate`: larger is guiltier, NaN where not measured; and the seconds."""
    engine = subject.engine
    each = engine.row_seconds / max(1, engine.rows)  # of one conflict in one cell with one head edited
    seconds = 2 * engine.n_layers * engine.n_heads * len(subject.conflicts) * each
    found = {name: (subject.effect(*key).mean(0), seconds) for name, key in EXACT.items()}  # measured by the isolation
    blank = subject.effect("silenced", "blank_a - blank_muted") + subject.effect("release", "blank_muted")
    found |= {BLANK_PICTURE: (blank.mean(0), seconds), "DLA": (-subject.effect("dla", "").mean(0), 0.0)}
    for name, method in MEASURED.items():
        begun = time.monotonic()
        table = method(subject)
        found[name] = table, time.monotonic() - begun
    return found


def _mirrored(measure: Callable[[str, str], np.ndarray], donor: str) -> Table:
    """Half of the mean figure in `va` minus the mean figure in `av`."""
    return 0.5 * (measure("va", donor).mean(0) - measure("av", MIRROR[donor]).mean(0))


def _agreeing(subject: Subject) -> Table:
    def run(base: str, donor: str) -> np.ndarray:
        pairs, metric = subject.pairs(base, donor), subject.metric
        return patch(subject.model, pairs, over="head", at=AT, metric=metric, stack=STACK).effects.values

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


def _guessed(figure: str, subject: Subject) -> Table:
    """AtP and AtP*: sizes are averaged over the conflict and its mirror, signed guesses mirrored."""
    sizes = figure == "atp_star"
    options: dict[str, Any] = {"over": "head", "at": AT, "drop": sizes, "top": 0, "stack": STACK}

    def run(base: str, donor: str) -> np.ndarray:
        pairs = subject.pairs(base, donor)
        grid = attribution_patch(subject.model, pairs, metric=subject.metric, **options)
        return grid.effects.sel(figure=figure).values

    if sizes:
        return 0.5 * (run("va", "blank_muted").mean(0) + run("av", "blank_muted").mean(0))
    return _mirrored(run, "blank_muted")


def _edges(variant: str, subject: Subject) -> Table:
    options: dict[str, Any] = {"variant": variant, "steps": STEPS, "at": AT, "direction": "denoise", "stack": STACK}
    va, av = (
        edge_attribution(subject.model, subject.pairs(base, "blank_muted"), metric=subject.metric, **options).mean()
        for base in ("va", "av")
    )
    sizes, engine = abs(0.5 * (va - av)).sum("receiver"), subject.engine
    names = [f"L{layer}H{head}" for layer in range(engine.n_layers) for head in range(engine.n_heads)]
    return sizes.sel(sender=names).values.reshape(engine.n_layers, engine.n_heads)


MEASURED: Mapping[str, Callable[[Subject], Table]] = {
    AGREEING: _agreeing,
    "attention to video": _attention,
    "edge cuts": _cuts,
    "AtP": partial(_guessed, "atp"),
    "AtP*": partial(_guessed, "atp_star"),
    "EAP": partial(_edges, "eap"),
    "EAP-IG": partial(_edges, "ig_inputs"),
}
METHODS = (*EXACT, BLANK_PICTURE, "DLA", *MEASURED)  # all methods but `isolate`
