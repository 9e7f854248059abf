"""What is known about a planted model, conflicts staged for it, and does the instrument find what was put there?

Every conflict has two source clips of its own, from a part of the world that trained no model. True heads, free riders
and decoys: protocol section 9. A model without true heads is a *null*: whoever is named in it is named falsely. A
head's score here is the lower 95% bound of its own release, by the donor with the largest mean on discovery. Passed:
every planted head ranks before every other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from av_lens.checkpoints import index
from av_lens.core.budget import Progress, silent
from av_lens.errors import InputError
from av_lens.isolation.measuring.engine import PRIMARY_DONORS
from av_lens.organism import footage
from av_lens.organism.anatomy import shipped
from av_lens.reports import Calibration
from av_lens.results.record import SUPPRESSORS, Isolation
from av_lens.whole_files import make_folder, read_object, reading, write_whole

QUESTION = "What do you hear?"


def stage(
    folder: str | Path, *, conflicts: int, seed: int, split: str = "discovery", progress: Progress | None = None
) -> Path:
    """Write the clips of some conflicts, and the manifest that names them."""
    if conflicts < 1:
        raise InputError(f"{conflicts} conflicts were asked for; at least 1 is needed, and 40 for an isolation.")
    folder, tell = make_folder(Path(folder)), progress or silent
    lines: list[dict[str, Any]] = []
    for at, (heard, seen) in enumerate(pairs(conflicts, seed=seed)):
        name = f"{at:04d}"
        first = 100_000 * (seed + 1) + 2 * at  # the clips' seeds belong to this conflict alone
        sound, picture = footage.example(split, heard, first), footage.example(split, seen, first + 1)
        files = {"sound": f"{name}-{heard}.mp4", "picture": f"{name}-{seen}.mp4"}
        sound.save(folder / files["sound"])
        picture.save(folder / files["picture"])
        picture.with_sound(sound).save(folder / conflict_file(name))
        lines.append({"id": name, **files, "question": QUESTION, "answers": [heard, seen]})
        tell("writing conflict clips", at + 1, conflicts)
    return write_manifest(folder, lines)


def write_manifest(folder: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Write a manifest of conflicts, a line each."""
    manifest = folder / "pairs.jsonl"
    write_whole(manifest, "\n".join(map(json.dumps, lines)) + "\n")
    return manifest


def conflict_file(name: str) -> str:
    """Name the file of a conflict, by its id, as it is played: its picture with its sound."""
    return f"{name}-conflict.mp4"


def pairs(n: int, *, seed: int) -> list[tuple[str, str]]:
    """Deal pairs (sound's, picture's class): twelve in a row have each once a side, the first 132 are all there are."""
    rng = np.random.default_rng([seed, 0xC0])
    names = [str(name) for name in rng.permutation(footage.classes())]
    size = len(names)
    shifts = 1 + rng.permutation(size - 1)
    return [(names[i % size], names[(i + int(shifts[i // size % (size - 1)])) % size]) for i in range(n)]


Head = tuple[int, int]
"""(layer, head); an MLP is head -1, which indexes the last column of a table `[layer, node]`."""
Mask = Bool[np.ndarray, "layer _"]
TRUTH = "planted.json"
FREE_RIDER = "free rider"
BALANCED, SUBJECT = "balanced", "subject"
KIND_NAMES = {"writer": "picture writer", "opponent": "sound opponent"}
"""A truth file's words for kinds, in the words of roles."""


def mask_of(heads: Collection[Head], shape: tuple[int, ...]) -> Mask:
    """Lay nodes out: true for these."""
    out = np.zeros(shape, dtype=bool)
    for head in heads:
        out[head] = True
    return out


@dataclass(frozen=True)
class PlantTruth:
    """What is known about one model."""

    # what was asked for ("redundant-gates", ...), "planted" where the file does not say; of models without a truth file
    # "balanced", or "subject" where nothing is known
    plant: str
    kinds: Mapping[Head, str]  # the true heads' kinds, by the names that `isolate` gives
    free_riders: tuple[Head, ...] = ()  # planted heads whose reversion changes nothing
    decoys: tuple[Head, ...] = ()  # heads trained for another behaviour
    redundant: bool = False  # whether some true head, put back alone, restores less than half of what it can add
    limits: Mapping[Head, float] = field(default_factory=dict[Head, float])  # the largest s at which each true head is
    sites: tuple[str, ...] = ("suffix",)  # where what was planted acts
    missing: tuple[str, ...] = ()  # what the model lacks of what was asked for: it falls short of its own bar

    @property
    def null(self) -> bool:
        """Whether it is known that there is nothing to find."""
        return not self.kinds and self.plant != SUBJECT

    @property
    def beside_a_decoy(self) -> bool:
        """Whether a decoy and a true head are in one layer."""
        return bool({layer for layer, _ in self.kinds} & {layer for layer, _ in self.decoys})

    def at(self, s: float) -> PlantTruth:
        """What is true at a threshold, a share of G: what adds less is minor, and counts neither way."""
        minor = {head for head in self.kinds if self.limits.get(head, 1.0) < s}
        kinds = {head: kind for head, kind in self.kinds.items() if head not in minor}
        return replace(self, kinds=kinds, free_riders=tuple(sorted({*self.free_riders, *minor})))

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data: what the bench keeps for each model."""
        heads = [[*head, kind, self.limits.get(head, 1.0)] for head, kind in sorted(self.kinds.items())]
        lists = {name: [list(head) for head in getattr(self, name)] for name in ("free_riders", "decoys")}
        words = {name: list(getattr(self, name)) for name in ("sites", "missing")}
        return {"plant": self.plant, "heads": heads, **lists, "redundant": self.redundant, **words}

    @classmethod
    def of_dict(cls, content: Mapping[str, Any]) -> PlantTruth:
        """Read what `as_dict` wrote."""
        kinds = {_place(entry): str(entry[2]) for entry in content["heads"]}
        lists: dict[str, Any] = {name: tuple(map(_place, content[name])) for name in ("free_riders", "decoys")}
        lists |= {name: tuple(content[name]) for name in ("sites", "missing")}
        lists["limits"] = {_place(entry): float(entry[3]) for entry in content["heads"]}
        return cls(str(content["plant"]), kinds, **lists, redundant=bool(content["redundant"]))


def model_folder(name: str) -> Path:
    """Find the folder of a model: a folder, or the short name of a shipped one."""
    if Path(name).is_dir():
        return Path(name)
    listed = index()
    if name not in listed:
        raise InputError(f"{name!r} is neither a folder nor a shipped model; these are: {', '.join(sorted(listed))}.")
    return shipped() / str(listed[name]["folder"])


def read_plant(name: str) -> PlantTruth:
    """Read what is known of a model: its truth file; without one "balanced" if its record says so, or "subject"."""
    path = model_folder(name) / TRUTH
    if not path.is_file():
        trained = path.with_name("training.json")
        said = read_object(trained) if trained.is_file() else {}
        return PlantTruth(BALANCED if str(said.get("name", "")).endswith(BALANCED) else SUBJECT, {})
    with reading(path):
        return truth_of(read_object(path))


def truth_of(content: Mapping[str, Any]) -> PlantTruth:
    """Bring a truth file's content to heads and kinds; `heads` may be pairs `[layer, head]` of the file's one kind."""
    decoys = tuple(sorted(_place(entry) for entry in content.get("decoys", ())))
    measured = {_place(entry): entry if isinstance(entry, Mapping) else {} for entry in content.get("heads", ())}
    kinds: dict[Head, str] = {}
    riders: list[Head] = []
    limits: dict[Head, float] = {}
    redundant = False
    g = float(content.get("G", 1.0))
    gap_share = (g - float(content.get("C", 0.0))) / g
    for head, entry in measured.items():
        kind = str(entry.get("kind", content.get("kind", "")))
        if head in decoys:
            continue
        if entry.get("free_rider", kind == FREE_RIDER):
            riders.append(head)
            continue
        kinds[head] = KIND_NAMES.get(kind, kind)
        limits[head] = float(entry.get("true_up_to_s", float(entry.get("adds", 1.0)) * gap_share))
        redundant |= float(entry.get("alone", 1.0)) < 0.5 * float(entry.get("adds", 0.0))
    sites = tuple(dict.fromkeys(("suffix", *(str(entry.get("site", "suffix")) for entry in measured.values()))))
    missing = [] if content.get("success", True) else ["it does not answer as was asked for"]
    missing += content.get("missing", [])
    asked = str(content.get("asked_for", "planted"))
    return PlantTruth(asked, kinds, tuple(sorted(riders)), decoys, redundant, limits, sites, tuple(missing))


def weights_key(name: str) -> str:
    """Hash the files of a model's folder, so that another model is never given these numbers."""
    digest = hashlib.sha256()
    folder = model_folder(name)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _place(entry: Any) -> Head:
    layer, head = (entry["layer"], entry["head"]) if isinstance(entry, Mapping) else entry[:2]
    return int(layer), int(head)


_NAMED = (*SUPPRESSORS, "undetermined")


def planted_truth(name: str = "av-tiny-planted") -> dict[tuple[int, int], str]:
    """Read which heads of a shipped model were planted."""
    path = shipped() / name / TRUTH
    if not path.is_file():
        raise InputError(f"{name} ships no {TRUTH}, so there is no truth to calibrate against.")
    return read_truth(read_object(path))


def read_truth(content: Mapping[str, Any]) -> dict[tuple[int, int], str]:
    """Bring a truth file's content to (layer, head) and kind, free riders left out."""
    kinds = dict(truth_of(content).kinds)
    if not kinds:
        raise InputError("the truth file lists no planted head under 'heads'.")
    return kinds


def best_releases(found: Isolation, site: str) -> Any:
    """Every node's row of evidence for its release on discovery, by the primary donor of the largest mean."""
    frame: Any = found.evidence
    keep = (frame["estimand"] == "release") & (frame["half"] == "discovery") & (frame["site"] == site)
    frame = frame[keep & frame["donor"].isin(PRIMARY_DONORS)]
    return frame.loc[frame.groupby(["layer", "head"])["mean"].idxmax()] if len(frame) else frame


def calibrate(
    found: Isolation, truth: Mapping[tuple[int, int], str], *, model: str = "av-tiny-planted", site: str = "suffix"
) -> Calibration:
    """Compare what was found with what was planted."""
    best = best_releases(found, site)
    best = best[best["head"] >= 0]
    if not len(best):
        why = " ".join(found.reasons) or found.verdict
        raise InputError(f"{model}: no release was measured at the site {site!r}, so nothing can be compared. {why}")
    best = best.sort_values("low", ascending=False, kind="stable")
    table: Any = found.heads
    named: dict[tuple[int, int], str] = {}
    for row in table[table["site"] == site].to_dict("records"):
        named.setdefault((int(row["layer"]), int(row["head"])), str(row["role"]))
    places = [(int(layer), int(head)) for layer, head in zip(best["layer"], best["head"], strict=True)]
    heads: Any = pd.DataFrame(places, columns=["layer", "head"])
    heads.insert(0, "rank", range(1, len(heads) + 1))
    heads["release"], heads["share"] = best["mean"].astype(float).values, best["share"].astype(float).values
    heads["planted"], heads["kind"] = [at in truth for at in places], [truth.get(at, "") for at in places]
    heads["role"] = [named.get(at, "") for at in places]
    figures = {
        "auroc": auroc(best["low"].tolist(), heads["planted"].tolist()),
        "precision_at_k": float(heads["planted"].head(len(truth)).mean()),
        "planted_heads": len(truth),
        "heads_in_all": len(heads),
        "named_but_not_planted": sum(role in _NAMED and key not in truth for key, role in named.items()),
        "planted_but_not_named": sum(named.get(key, "") not in _NAMED for key in truth),
        "named_with_the_right_kind": sum(named.get(key) == kind for key, kind in truth.items()),
    }
    passed = figures["precision_at_k"] == 1.0
    listed = ", ".join(f"L{layer} H{head}" for layer, head in sorted(truth))
    who = f"The {len(truth)} heads planted" if len(truth) > 1 else "The head planted"
    ranks = ", ".join(map(str, heads.loc[heads["planted"], "rank"]))
    outcome = "came out on top" if passed else f"did not all come out on top: they rank {ranks}"
    false, missed, said = (
        figures["named_but_not_planted"],
        figures["planted_but_not_named"],
        "named all of them and no other",
    )
    if false or missed:
        said = f"left {missed} of them unnamed and named {false} other{'s' if false != 1 else ''}"
    numbers = f"AUROC {figures['auroc']:.2f} over {len(heads)} heads"
    sentence = f"{who} in {model} ({listed}) {outcome} ({numbers}); the search {said}."
    return Calibration(
        sentence=sentence, passed=passed, model=model, heads=heads, figures=figures, verdict=found.verdict
    )


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The chance that a positive scores above a negative, ties counting half; NaN where one class is empty."""
    values, mask = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    above = values[mask][:, None] - values[~mask][None, :]
    return float(np.mean((above > 0) + 0.5 * (above == 0))) if above.size else float("nan")
