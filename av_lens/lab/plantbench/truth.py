"""What is known about a model on the bench: which heads are guilty, of what kind, and which only look planted.

A planted model's folder holds `planted.json` (`planting.planted` measured it by brute force). A *true* head adds at
least 5% of the gap to some set of reversions of the other planted heads; a *free rider* does not, and counts neither
way; a *decoy* was trained for another behaviour and counts as innocent, as every other head does. A model without true
heads is a *null*: whoever is named in it is named falsely.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from av_lens.checkpoints import index
from av_lens.errors import InputError
from av_lens.organism.saving import shipped
from av_lens.whole_files import read_object, reading

Head = tuple[int, int]
Mask = Bool[np.ndarray, "layer head"]
TRUTH = "planted.json"
FREE_RIDER = "free rider"
BALANCED, SUBJECT = "balanced", "subject"
KINDS = {"writer": "picture writer", "opponent": "sound opponent"}
"""A truth file's words for kinds, in the words of roles."""


def mask_of(heads: Collection[Head], shape: tuple[int, ...]) -> Mask:
    """Lay heads out: true for these heads."""
    out = np.zeros(shape, dtype=bool)
    for head in heads:
        out[head] = True
    return out


@dataclass(frozen=True)
class PlantTruth:
    """What is known about one model.

    Attributes:
        plant: what was asked for ("redundant-gates", ...), "planted" where the file does not say; of models without a
            truth file "balanced", or "subject" where nothing is known.
        kinds: the true heads' kinds, by the names that `isolate` gives.
        free_riders: planted heads whose reversion changes nothing.
        decoys: heads trained for another behaviour.
        redundant: whether some true head, put back alone, restores less than half of what it can add.
    """

    plant: str
    kinds: Mapping[Head, str]
    free_riders: tuple[Head, ...] = ()
    decoys: tuple[Head, ...] = ()
    redundant: bool = False

    @property
    def null(self) -> bool:
        """Whether it is known that there is nothing to find."""
        return not self.kinds and self.plant != SUBJECT

    @property
    def beside_a_decoy(self) -> bool:
        """Whether a decoy and a true head are in one layer."""
        return bool({layer for layer, _ in self.kinds} & {layer for layer, _ in self.decoys})

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data: what the bench keeps for each model."""
        heads = [[*head, kind] for head, kind in sorted(self.kinds.items())]
        lists = {name: [list(head) for head in getattr(self, name)] for name in ("free_riders", "decoys")}
        return {"plant": self.plant, "heads": heads, **lists, "redundant": self.redundant}

    @classmethod
    def of_dict(cls, content: Mapping[str, Any]) -> PlantTruth:
        """Read what `as_dict` wrote."""
        kinds = {_place(entry): str(entry[2]) for entry in content["heads"]}
        lists = {name: tuple(map(_place, content[name])) for name in ("free_riders", "decoys")}
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
    """Read what is known about a model, given its folder or short name.

    A model without a truth file is "balanced" if its record of training says so (nothing is to be found in it), else a
    "subject", of which nothing is known.
    """
    path = model_folder(name) / TRUTH
    if not path.is_file():
        trained = path.with_name("training.json")
        said = read_object(trained) if trained.is_file() else {}
        return PlantTruth(BALANCED if str(said.get("name", "")).endswith(BALANCED) else SUBJECT, {})
    with reading(path):
        return truth_of(read_object(path))


def truth_of(content: Mapping[str, Any]) -> PlantTruth:
    """Bring a truth file's content to heads and kinds.

    `heads` lists what was measured of every planted head (or pairs `[layer, head]`, of the file's one kind); `decoys`
    lists heads that were trained for another behaviour; `asked_for` says what was to be planted.
    """
    decoys = tuple(sorted(_place(entry) for entry in content.get("decoys", ())))
    measured = {_place(entry): entry if isinstance(entry, Mapping) else {} for entry in content.get("heads", ())}
    kinds: dict[Head, str] = {}
    riders: list[Head] = []
    redundant = False
    for head, entry in measured.items():
        kind = str(entry.get("kind", content.get("kind", "")))
        if head in decoys:
            continue
        if entry.get("free_rider", kind == FREE_RIDER):
            riders.append(head)
            continue
        kinds[head] = KINDS.get(kind, kind)
        redundant |= float(entry.get("alone", 1.0)) < 0.5 * float(entry.get("adds", 0.0))
    return PlantTruth(str(content.get("asked_for", "planted")), kinds, tuple(sorted(riders)), decoys, redundant)


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
