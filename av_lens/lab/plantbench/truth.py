"""What is known about a model on the bench: which heads are guilty, of what kind, and which only look planted.

A planted model's folder holds `planted.json` (`organism.planted` measured it by brute force). A *true* head adds at
least 5% of the gap to some set of reversions of the other planted heads; a *free rider* does not, and counts neither
way; a *decoy* was trained for another behaviour and counts as innocent, as every other head does. A model without true
heads is a *null*: whoever is named in it is named falsely.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from av_lens.errors import InputError
from av_lens.lab.calibration import KINDS
from av_lens.whole_files import read_object, reading

Head = tuple[int, int]
TRUTH = "planted.json"
FREE_RIDER = "free rider"
BALANCED, SUBJECT = "balanced", "subject"


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

    def counted(self, n_layers: int, n_heads: int) -> np.ndarray:
        """Say which heads count: all but the free riders.

        Args:
            n_layers: fusion layers.
            n_heads: heads of a layer.

        Returns:
            `[layer, head]`, true where a head counts.
        """
        out = np.ones((n_layers, n_heads), dtype=bool)
        for head in self.free_riders:
            out[head] = False
        return out

    def guilty(self, n_layers: int, n_heads: int) -> np.ndarray:
        """Say which heads are true.

        Args:
            n_layers: fusion layers.
            n_heads: heads of a layer.

        Returns:
            `[layer, head]`, true for the true heads.
        """
        out = np.zeros((n_layers, n_heads), dtype=bool)
        for head in self.kinds:
            out[head] = True
        return out

    def as_dict(self) -> dict[str, Any]:
        """Write it as plain data.

        Returns:
            What the bench keeps for each model.
        """
        return {
            "plant": self.plant,
            "heads": [[*head, kind] for head, kind in sorted(self.kinds.items())],
            "free_riders": [list(head) for head in self.free_riders],
            "decoys": [list(head) for head in self.decoys],
            "redundant": self.redundant,
        }

    @classmethod
    def of_dict(cls, content: Mapping[str, Any]) -> PlantTruth:
        """Read what `as_dict` wrote.

        Args:
            content: the plain data.

        Returns:
            The truth.
        """
        return cls(
            plant=str(content["plant"]),
            kinds={(int(layer), int(head)): str(kind) for layer, head, kind in content["heads"]},
            free_riders=tuple((int(layer), int(head)) for layer, head in content["free_riders"]),
            decoys=tuple((int(layer), int(head)) for layer, head in content["decoys"]),
            redundant=bool(content["redundant"]),
        )


def model_folder(name: str) -> Path:
    """Find a model's folder.

    Args:
        name: a folder, or the short name of a shipped model.

    Returns:
        The folder.

    Raises:
        InputError: there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    shipped = Path(str(files("av_lens") / "organism" / "checkpoints"))
    index = json.loads((shipped / "index.json").read_text(encoding="utf-8"))
    if name not in index:
        raise InputError(f"{name!r} is neither a folder nor a shipped model; these are: {', '.join(sorted(index))}.")
    return shipped / str(index[name]["folder"])


def read_plant(name: str) -> PlantTruth:
    """Read what is known about a model.

    Args:
        name: a folder, or a short name.

    Returns:
        Its truth. A model without a truth file is "balanced" if its record of training says so (nothing is to be found
        in it), else a "subject", of which nothing is known.
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

    Args:
        content: its json: `heads` lists what was measured of every planted head; `decoys` lists heads that were
            trained for another behaviour; `asked_for` says what was to be planted.

    Returns:
        The truth.
    """
    decoys = tuple(_place(entry) for entry in content.get("decoys", ()))
    entries = [entry for entry in content.get("heads", ()) if _place(entry) not in decoys]
    kinds: dict[Head, str] = {}
    riders: list[Head] = []
    redundant = False
    for entry in entries:
        kind = str(entry.get("kind", ""))
        if entry.get("free_rider", kind == FREE_RIDER):
            riders.append(_place(entry))
            continue
        kinds[_place(entry)] = KINDS.get(kind, kind)
        redundant |= float(entry.get("alone", 1.0)) < 0.5 * float(entry.get("adds", 0.0))
    return PlantTruth(
        plant=str(content.get("asked_for", "planted")),
        kinds=kinds,
        free_riders=tuple(sorted(riders)),
        decoys=tuple(sorted(decoys)),
        redundant=redundant,
    )


def weights_key(name: str) -> str:
    """Hash a model's weights and its truth, so that another model is never given these numbers.

    Args:
        name: a folder, or a short name.

    Returns:
        A sha256 in hex.
    """
    digest = hashlib.sha256()
    folder = model_folder(name)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _place(entry: Any) -> Head:
    if isinstance(entry, Mapping):
        found: Any = entry
        return int(found["layer"]), int(found["head"])
    return int(entry[0]), int(entry[1])
