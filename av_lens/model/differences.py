"""A checkpoint that is a difference: a few slices of weights that take the place of another checkpoint's.

`difference.json` names the base (a short name or a folder), the hash of its weights, and the slices that differ, which
lie in `difference.safetensors`. A base with other weights is refused: what is known about planted heads would not hold.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from av_lens.checks import foreign_file, parse_json, whole_object
from av_lens.errors import ModelError
from av_lens.whole_files import whole_folder

RECORD, WEIGHTS = "difference.json", "difference.safetensors"
SCHEMA = 1
BASE_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Slice:
    """A run of rows or columns of one parameter."""

    name: str  # the parameter's HuggingFace name
    axis: int  # 0 for rows, 1 for columns
    start: int  # the first
    stop: int  # the one after the last

    def fits(self, parameter: Tensor) -> bool:
        """Say whether a parameter has such a slice."""
        return (
            all(type(n) is int for n in (self.axis, self.start, self.stop))
            and 0 <= self.axis < parameter.ndim
            and 0 <= self.start < self.stop <= parameter.shape[self.axis]
        )

    def of(self, parameter: Tensor) -> Tensor:
        """Take the slice of a parameter, a view of it."""
        return parameter.narrow(self.axis, self.start, self.stop - self.start)


def weights_hash(folder: str | os.PathLike[str]) -> str:
    """Hash the weights of a checkpoint folder by name, precision, shape and content, in hex."""
    from safetensors import safe_open

    path = Path(folder) / BASE_WEIGHTS
    if not path.is_file():
        raise ModelError(f"{os.fspath(folder)!r} holds no {BASE_WEIGHTS}, so it cannot be the base of a difference.")
    digest = hashlib.sha256()
    with foreign_file(path, "a file of weights", error=ModelError), safe_open(os.fspath(path), "pt") as file:
        for name in sorted(file.keys()):
            value: Tensor = file.get_tensor(name).contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Difference:
    """What a folder says that holds a difference."""

    folder: Path  # the folder
    base: str  # the base's short name or folder
    base_sha256: str  # the hash of the base's weights
    slices: tuple[Slice, ...]  # what differs

    def check_base(self, place: str | os.PathLike[str]) -> None:
        """Refuse a base with other weights than those the difference was made over."""
        found = weights_hash(place)
        if found != self.base_sha256:
            raise ModelError(
                f"{os.fspath(self.folder)!r} is a difference over {self.base!r} with weights "
                f"{self.base_sha256[:12]}…, but those in {os.fspath(place)!r} are {found[:12]}…. Give back the base it "
                f"was made over, or correct the base in {RECORD}."
            )

    def put_into(self, model: Any) -> None:
        """Write the slices into the base, as HuggingFace opens it; refuse those that do not fit."""
        from safetensors.torch import load_file

        path = self.folder / WEIGHTS
        if not path.is_file():
            raise ModelError(f"{os.fspath(self.folder)!r} has a {RECORD} and no {WEIGHTS}: copy the whole folder.")
        with foreign_file(path, "a file of weights", error=ModelError):
            stored = load_file(path)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for i, part in enumerate(self.slices):
                held, value = parameters.get(part.name), stored.get(str(i))
                if held is None or value is None or not part.fits(held) or part.of(held).shape != value.shape:
                    raise ModelError(
                        f"slice {i} of {os.fspath(self.folder)!r} ({part.name}, {part.start} to {part.stop}) does not "
                        f"fit the base {self.base!r}: {RECORD} and {WEIGHTS} do not belong together."
                    )
                part.of(held).copy_(value)


def read_difference(folder: str | os.PathLike[str]) -> Difference | None:
    """Read what a folder says, if it holds a difference; None where there is no `difference.json`."""
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    with foreign_file(path, "the record of a difference", error=ModelError):
        content = whole_object(parse_json(path.read_bytes()), "it")
        if content.get("schema") != SCHEMA:
            raise ModelError(f"{path} has schema {content.get('schema')!r}; this version reads {SCHEMA}.")
        slices = tuple(Slice(**entry) for entry in content["slices"])
        return Difference(Path(folder), str(content["base"]), str(content["base_sha256"]), slices)


def save_difference(
    model: Any, folder: str | os.PathLike[str], *, base: str, base_sha256: str, slices: Iterable[Slice]
) -> Path:
    """Write the slices of a model that differ from its base's, rounded to float16, as organisms are stored."""
    from safetensors.torch import save_file

    place, listed, parameters = Path(folder), list(slices), dict(model.named_parameters())
    values = {str(i): part.of(parameters[part.name]).detach().half().contiguous() for i, part in enumerate(listed)}
    content = {"schema": SCHEMA, "base": base, "base_sha256": base_sha256, "slices": [vars(part) for part in listed]}
    with whole_folder(place) as beside:
        save_file(values, beside / WEIGHTS)
        (beside / RECORD).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return place
