"""`Given`: what a model's own code made of a clip and a question, as a text decoder takes it.

Everything is checked when it is made. A file is safetensors: the columns as tensors; roles, tokens and words in its
metadata, as json. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from av_lens.checks import foreign_file, near_file, parse_json
from av_lens.errors import InputError, unknown
from av_lens.families.media_layout import TensorAxes
from av_lens.spans import GROUPS, ROLES, SpanMap
from av_lens.whole_files import whole_file

SCHEMA, SCHEMA_VERSION = "av_lens.Given", "1"
LAYOUTS = ("in_video", "separate", "audio_only", "video_only", "image_audio", "image", "text")
_PICTURES = ("video", "image")
_AGAIN = "Export it again."


@dataclass(frozen=True, eq=False)
class Given:
    """One prompt: the embeddings that enter the decoder, and what each position is.

    Attributes:
        embeds: the embeddings, media and text, `[pos, d_model]`, floating and finite.
        roles: each position's role: "system", "audio", "video", "image", "boundary", "question" or "header"; the last,
            and no other, is "generation".
        ids: token ids `[pos]`; at media positions any. None for 0 everywhere.
        tokens: each position's token as text; None for what the tokenizer says, and the role at media positions.
        times: start and end in seconds of each media position, `[pos, 2]`, NaN where there is none. None for no times.
        row: rows of pictures' patches `[pos]`, -1 elsewhere; None for no patches.
        col: columns, likewise.
        position_ids: whole numbers that the decoder turns by, `[pos]` or `[stream, pos]`; None for 0, 1, 2, ...
        question: what is asked, for people.
        layout: how sound and picture lie: "in_video" (woven) or "separate", ...; None for what the roles show.

    Raises:
        InputError: something of it cannot be; the message says what and where.
    """

    embeds: Tensor
    roles: Sequence[str]
    ids: Any = None
    tokens: Sequence[str] | None = None
    times: Any = None
    row: Any = None
    col: Any = None
    position_ids: Any = None
    question: str = ""
    layout: str | None = None

    def __post_init__(self) -> None:
        embeds: Any = self.embeds
        if not isinstance(embeds, Tensor) or embeds.ndim != 2 or not embeds.is_floating_point():
            shown = f"{list(embeds.shape)} {embeds.dtype}" if isinstance(embeds, Tensor) else "no tensor"
            raise InputError(f"embeds is {shown}: give one prompt's floating-point embeddings, [pos, d_model].")
        n = len(self.embeds)
        self._set("embeds", self.embeds.detach())
        self._set("roles", _roles(self.roles, n))
        finite = torch.isfinite(self.embeds).all(dim=1)
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            raise InputError(f"embeds[{at}] ({self.roles[at]}) holds numbers that are NaN or infinite.")
        self._set("ids", _column("ids", self.ids, (n,), whole=True, least=0))
        if self.tokens is not None:
            self._set("tokens", tuple(str(token) for token in self.tokens))
            _require("tokens", len(self.tokens) == n, f"has {len(self.tokens)} of {n}")
        self._set("times", _column("times", self.times, (n, 2)))
        self._set("row", _column("row", self.row, (n,), whole=True, least=-1))
        self._set("col", _column("col", self.col, (n,), whole=True, least=-1))
        if self.position_ids is not None:
            shape = tuple(np.shape(self.position_ids))
            streams = (shape[0], n) if len(shape) == 2 else (n,)
            found = _column("position_ids", self.position_ids, streams, whole=True, least=0)
            self._set("position_ids", torch.from_numpy(np.atleast_2d(found)))
        if self.layout is None:
            self._set("layout", _layout(self.roles))
        elif self.layout not in LAYOUTS:
            raise InputError(unknown("layout", self.layout, LAYOUTS))
        self._check_places()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_places(self) -> None:
        """Times stand at media positions alone, patches at those of pictures."""
        roles = np.array(self.roles)
        media, pictures = np.isin(roles, GROUPS["media"]), np.isin(roles, _PICTURES)
        if self.times is not None:
            start, end = self.times.T
            timed = ~np.isnan(self.times)
            self._refuse("times", timed.any(axis=1) & ~media, "has a time and is no media position: NaN there")
            self._refuse("times", timed[:, 0] != timed[:, 1], "has a start or an end alone")
            self._refuse("times", timed.any(axis=1) & ~((start >= 0) & (end >= start) & np.isfinite(end)), "runs back")
        _require("row and col", (self.row is None) == (self.col is None), "come together: give both, or neither")
        if self.row is not None:
            self._refuse(
                "row", ((self.row >= 0) | (self.col >= 0)) & ~pictures, "is no position of a picture: -1 there"
            )
            self._refuse("row", (self.row >= 0) != (self.col >= 0), "has a row or a column alone")

    def _refuse(self, name: str, wrong: np.ndarray, why: str) -> None:
        at = int(np.argmax(wrong))
        _require(f"{name}[{at}] ({self.roles[at]})", not wrong.any(), why)

    def __len__(self) -> int:
        return len(self.roles)

    def __repr__(self) -> str:
        counts = ", ".join(f"{role} {self.roles.count(role)}" for role in ROLES if role in self.roles)
        return f"Given({len(self)} positions of {self.embeds.shape[1]}, {self.layout}: {counts})"

    def span_map(self, tokens: Sequence[str]) -> SpanMap:
        """The map of its positions; both clocks are the times that it gives."""
        n = len(self)
        start, end = np.full((2, n), np.nan) if self.times is None else np.ascontiguousarray(self.times.T)
        row, col = (np.full(n, -1, dtype=np.int64) if one is None else one for one in (self.row, self.col))
        return SpanMap(tuple(self.roles), tuple(tokens), start, end, start, end, row, col)

    def streams(self, n_streams: int) -> Shaped[Tensor, "stream pos"]:
        """The position ids for a decoder that turns by so many streams; a single one stands for all."""
        found = torch.arange(len(self))[None] if self.position_ids is None else self.position_ids
        if found.shape[0] not in (1, n_streams):
            raise InputError(
                f"position_ids has {found.shape[0]} streams and this decoder turns by {n_streams}: give "
                f"{'[pos]' if n_streams == 1 else f'[{n_streams}, pos]'}."
            )
        return found.expand(n_streams, -1).clone()

    def followed(self, embeds: Tensor, ids: Sequence[int], tokens: Sequence[str]) -> Given:
        """The same prompt with text of the assistant after it, at whose end the answer is asked."""
        n, new = len(self), len(ids)
        nothing = {"times": np.full((new, 2), np.nan), "row": np.full(new, -1), "col": np.full(new, -1)}
        columns = {name: getattr(self, name) for name in nothing if getattr(self, name) is not None}
        own = torch.arange(n)[None] if self.position_ids is None else self.position_ids
        return replace(
            self,
            embeds=torch.cat([self.embeds, embeds.to(self.embeds)]),
            roles=(*self.roles[:-1], *["header"] * new, "generation"),
            ids=[*([0] * n if self.ids is None else self.ids), *ids],
            tokens=None if self.tokens is None else (*self.tokens, *tokens),
            position_ids=torch.cat([own, own[:, -1:] + torch.arange(1, new + 1)], dim=1),
            **{name: np.concatenate([column, nothing[name]]) for name, column in columns.items()},
        )

    def save(self, path: str | Path) -> Path:
        """Save it as safetensors, whole or not at all.

        Args:
            path: the file; ".safetensors" is added where it has no ending.

        Returns:
            The file that was written.

        Raises:
            InputError: the folder does not exist.
        """
        target = Path(path) if Path(path).suffix else Path(path).with_suffix(".safetensors")
        if not target.parent.is_dir():
            raise InputError(f"cannot save to {target}: there is no folder {target.parent}. Make it first.")
        columns = {name: getattr(self, name) for name in _COLUMNS if getattr(self, name) is not None}
        tensors = {name: torch.as_tensor(value).cpu().contiguous() for name, value in columns.items()}
        told: dict[str, Any] = {"roles": self.roles, "question": self.question, "layout": self.layout}
        told |= {} if self.tokens is None else {"tokens": self.tokens}
        metadata = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "told": json.dumps(told)}
        with whole_file(target) as beside:
            save_file(tensors, beside, metadata=metadata)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Given:
        """Open a file that `save`, or the exporter of "Bring your own in 30 lines", wrote.

        Args:
            path: the file.

        Returns:
            What was saved, equal to the bit.

        Raises:
            InputError: no such file, something else in it, or a prompt that cannot be.
        """
        if not Path(path).is_file():
            raise InputError(f"no such file: {path}. {near_file(path)}")
        with foreign_file(path, "a saved Given", mend=_AGAIN), safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            kind, version = metadata.get("schema"), metadata.get("schema_version")
            if (kind, version) != (SCHEMA, SCHEMA_VERSION):
                raise InputError(
                    f"{path} holds {f'{kind}, version {version}' if kind else 'safetensors of something else'}; this "
                    f"av_lens reads {SCHEMA}, version {SCHEMA_VERSION}. {_AGAIN}"
                )
            told, names = dict(parse_json(metadata["told"])), set(opened.keys())
            if strange := sorted((names - set(_COLUMNS)) | (set(told) - _TOLD)):
                raise InputError(f"{path}: {unknown('field of a Given', strange[0], (*_COLUMNS, *_TOLD))} {_AGAIN}")
            told["roles"] = [str(role) for role in told["roles"]]
            columns = {name: opened.get_tensor(name).clone() for name in {*names, "embeds"}}
        try:
            return cls(**columns, **told)
        except InputError as wrong:
            raise InputError(f"{path}: {wrong}") from wrong


_COLUMNS = ("embeds", "ids", "times", "row", "col", "position_ids")
_TOLD = {"roles", "tokens", "question", "layout"}


def _require(name: str, held: bool, why: str) -> None:
    if not held:
        raise InputError(f"{name} {why}.")


def _roles(roles: Sequence[str], n: int) -> tuple[str, ...]:
    """Roles that partition a prompt."""
    named = tuple(roles)
    _require("roles", len(named) == n, f"names {len(named)} positions, and embeds has {n}")
    for at, role in enumerate(named):
        if role not in ROLES:
            raise InputError(f"roles[{at}]: {unknown('role', role, ROLES)}")
    asked = named.count("generation")
    ends = named[-1] if named else "nothing"
    why = "the last position, and no other, is where the answer is asked"
    _require("roles", asked == 1 and ends == "generation", f"has {asked} 'generation' and ends with {ends!r}: {why}")
    return named


def _column(name: str, value: Any, shape: tuple[int, ...], *, whole: bool = False, least: int | None = None) -> Any:
    """A column as an array of that shape; None stays None."""
    if value is None:
        return None
    found = value.detach().cpu() if isinstance(value, Tensor) else value
    found = found.double() if isinstance(found, Tensor) and found.is_floating_point() else found
    try:
        found = np.asarray(found)
    except ValueError as error:
        raise InputError(f"{name} is no array ({error}): give {list(shape)} numbers.") from error
    _require(name, found.shape == shape, f"has the shape {list(found.shape)} and should have {list(shape)}")
    kinds = "iu" if whole else "iuf"
    _require(name, found.dtype.kind in kinds, f"holds {found.dtype}, and takes {'whole ' if whole else ''}numbers")
    found = found.astype(np.int64 if whole else np.float64)
    _require(name, least is None or not found.size or int(found.min()) >= least, f"holds numbers below {least}")
    return found


def _layout(roles: Sequence[str]) -> str:
    """How sound and picture lie, as far as roles show it; woven where either stands between two of the other."""
    order = [role for role, _ in groupby(role for role in roles if role in GROUPS["media"])]
    kinds = set(order)
    if kinds == {"audio", "video"}:
        return "in_video" if len(order) > 2 else "separate"
    alone = {"audio": "audio_only", "video": "video_only", "image": "image"}
    return alone[order[0]] if len(kinds) == 1 else "image_audio" if kinds else "text"


@dataclass(frozen=True)
class GivenAxes(TensorAxes):
    """How tensors lie that hold embeddings and position ids beside ids."""

    embed: Callable[[Tensor], Tensor] | None = None  # ids -> their embeddings, by which decoded tokens follow

    def __deepcopy__(self, memo: dict[int, Any]) -> GivenAxes:
        """Nothing in it changes, and the embeddings are large."""
        return self

    @property
    def apart(self) -> frozenset[str]:
        """Streams of position ids come before the examples."""
        return super().apart | {"position_ids"}

    def example(self, tensors: Mapping[str, Any], i: int) -> dict[str, Any]:
        """Cut one example out of a batch."""
        return super().example(tensors, i) | {"position_ids": tensors["position_ids"][..., i : i + 1, :]}

    def joined(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Put examples into one batch."""
        return super().joined(examples) | {"position_ids": torch.cat([one["position_ids"] for one in examples], dim=-2)}

    def longer(self, tensors: Mapping[str, Any], new: Tensor) -> dict[str, Any]:
        """Append decoded ids, their embeddings, and positions that go on from the last."""
        found, positions, embeds = super().longer(tensors, new), tensors["position_ids"], tensors["inputs_embeds"]
        later = positions[..., -1:] + torch.arange(1, new.shape[1] + 1, device=positions.device)
        assert self.embed is not None
        words = self.embed(new).to(embeds)
        return found | {
            "position_ids": torch.cat([positions, later], dim=-1),
            "inputs_embeds": torch.cat([embeds, words], dim=1),
        }
