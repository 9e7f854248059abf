"""`AVInputs`: tensors that know what each of their positions is, held once where equal, and show themselves.

One object holds one example or a stack of examples of *one* layout; different layouts are never padded together. The
pixels of a second are some MB, and a conflict's cells would hold them many times: equal tensors are known by a hash of
their content for as long as somebody holds them (weak references).
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakValueDictionary

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from av_lens.colours import ROLE_COLOURS
from av_lens.errors import AlignmentError, InputError, unknown
from av_lens.families.media_layout import TensorAxes
from av_lens.media.clip import Clip
from av_lens.spans import ROLES, SpanMap, role_runs

if TYPE_CHECKING:
    import pandas


_WIDTH, _HEIGHT = 760.0, 26.0
_MOST_RUNS = 22


def _interval(spans: SpanMap, start: int, stop: int, prefix: str) -> str:
    starts, ends = getattr(spans, f"{prefix}start_s")[start:stop], getattr(spans, f"{prefix}end_s")[start:stop]
    known = np.isfinite(starts) & np.isfinite(ends)
    return f"{starts[known].min():.2f}-{ends[known].max():.2f} s" if known.any() else ""


def _what(spans: SpanMap, start: int, stop: int) -> str:
    rows = spans.row[start:stop]
    if (rows >= 0).any():
        return f"{int(rows.max()) + 1} x {int(spans.col[start:stop].max()) + 1} patches"
    if spans.roles[start] == "audio":
        return ""
    text = repr("".join(spans.tokens[start : min(stop, start + 24)]))
    return text if len(text) <= 44 else text[:43] + "…"


def summary(x: AVInputs) -> str:
    """Summarise an input on one screen."""
    asked = list(zip(x.questions, x.clips, strict=True))[:3]
    lines = [repr(x).split(":")[0] + ")"]
    lines += [f"  question {question!r}" + (f"  clip {clip!r}" if clip is not None else "") for question, clip in asked]
    lines += [f"  ... and {len(x) - 3} more examples"] if len(x) > 3 else []
    shapes = [f"{name} {list(v.shape) if isinstance(v, Tensor) else v}" for name, v in x.tensors.items()]
    lines += [
        "  tensors: " + "; ".join(shapes),
        f"  {'positions':>12}  {'role':<10} {'count':>6}  model clock      source clock",
    ]
    runs = role_runs(x.spans.roles)
    shown = runs if len(runs) <= _MOST_RUNS else [*runs[: _MOST_RUNS - 8], None, *runs[-8:]]
    for run in shown:
        if run is None:
            lines.append(f"  {'...':>12}  {len(runs) - _MOST_RUNS} more runs")
            continue
        role, start, stop = run
        where = f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
        clocks = f"{_interval(x.spans, start, stop, ''):<15}  {_interval(x.spans, start, stop, 'source_'):<15}"
        lines.append(f"  {where:>12}  {role:<10} {stop - start:>6}  {clocks}  {_what(x.spans, start, stop)}".rstrip())
    return "\n".join(lines)


def strip(x: AVInputs) -> str:
    """Draw the positions left to right as a coloured strip: HTML with one inline SVG and a legend."""
    spans = x.spans
    scale = _WIDTH / max(1, len(spans))
    bars: list[str] = []
    for role, start, stop in role_runs(spans.roles):
        seconds = _interval(spans, start, stop, "")
        title = f"{role} {start}-{stop - 1} ({stop - start}) {seconds} {_what(spans, start, stop)}".strip()
        bars.append(
            f'<rect x="{start * scale:.2f}" y="0" width="{max((stop - start) * scale, 0.6):.2f}" height="{_HEIGHT:g}" '
            f'fill="{ROLE_COLOURS[role]}"><title>{html.escape(title)}</title></rect>'
        )
    legend = " ".join(
        f'<span style="white-space:nowrap;margin-right:1em"><span style="display:inline-block;width:.8em;height:.8em;'
        f'background:{ROLE_COLOURS[role]};margin-right:.3em"></span>{role} {spans.roles.count(role)}</span>'
        for role in ROLES
        if role in spans.roles
    )
    heading = html.escape(f"{len(spans)} positions, {x.layout}" + (f", {len(x)} examples" if len(x) > 1 else ""))
    asked = html.escape(" | ".join(dict.fromkeys(x.questions)))
    return (
        '<div style="font-family:sans-serif;font-size:13px;color:inherit;max-width:780px">'
        f'<div style="margin-bottom:4px"><b>{heading}</b> <span style="opacity:.75">{asked}</span></div>'
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" width="100%" height="{_HEIGHT:g}" preserveAspectRatio="none" '
        f'role="img" aria-label="spans">{"".join(bars)}</svg>'
        f'<div style="margin-top:4px">{legend}</div></div>'
    )


_COLUMNS = ("start_s", "end_s", "source_start_s", "source_end_s", "row", "col")


@dataclass(frozen=True, eq=False, repr=False)
class AVInputs:
    """Model-ready tensors, what each position is, and the clips and questions they came from.

    Attributes:
        tensors: the keyword arguments of the HuggingFace forward.
        spans: the map that all examples share. Where examples of a stack differ in a token, both stand there; where
            they differ in a source time, it is NaN (`x[i].spans` has each its own).
        position_ids: the streams that the model computes (time, row, column), `[stream, batch, pos]`.
        clips: the clip of each example; None for text alone.
        questions: the question of each example, as it stands in the prompt.
        layout: "in_video", "separate", "audio_only", "video_only", "image_audio", "image" or "text".
        provenance: how it was made.
        parts: each example's own map.
        axes: how the tensors of several examples lie in one batch.
    """

    tensors: Mapping[str, Any]
    spans: SpanMap
    position_ids: Shaped[Tensor, "stream batch pos"]
    clips: tuple[Clip | None, ...]
    questions: tuple[str, ...]
    layout: str
    provenance: dict[str, Any]
    parts: tuple[SpanMap, ...] = ()
    axes: TensorAxes = field(default_factory=TensorAxes)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "parts", self.parts or (self.spans,))
        batch, pos = self.ids.shape
        if pos != len(self.spans) or self.position_ids.shape[1:] != (batch, pos):
            raise InputError(
                f"ids {tuple(self.ids.shape)}, position ids {tuple(self.position_ids.shape)} and a map of "
                f"{len(self.spans)} positions do not belong together"
            )
        if not len(self.parts) == len(self.clips) == len(self.questions) == batch:
            raise InputError(f"{batch} examples need as many clips, questions and maps")
        for name, value in self.tensors.items() if batch > 1 else ():
            if isinstance(value, Tensor) and name not in self.axes.apart and value.shape[:1] != (batch,):
                raise InputError(
                    f"{name} {tuple(value.shape)} has no row for each of {batch} examples, and axes= does not say how "
                    "else it lies: make inputs with model.encode."
                )

    @property
    def ids(self) -> Int64[Tensor, "batch pos"]:
        """Token ids."""
        return self.tensors["input_ids"]

    @property
    def tokens(self) -> tuple[str, ...]:
        """Every position's token as text; in a stack, both where examples differ."""
        return self.spans.tokens

    @property
    def input_ids(self) -> Int64[Tensor, "batch pos"]:
        """Token ids, by HuggingFace's name."""
        return self.ids

    @property
    def attention_mask(self) -> Int64[Tensor, "batch pos"]:
        """1 at every position: layouts are never padded together."""
        return self.tensors["attention_mask"]

    @property
    def media_hashes(self) -> list[list[str]]:
        """Of each example the hashes of its picture and sound: examples that share any are one cluster."""
        both = [() if clip is None else (clip.picture_hash, clip.sound_hash) for clip in self.clips]
        return [[found for found in hashes if found is not None] for hashes in both]

    def keys(self) -> KeysView[str]:
        """List the names of the tensors, so that `hf_model(**x)` and `dict(x)` are its keyword arguments.

        Returns:
            The names.
        """
        return self.tensors.keys()

    def __contains__(self, item: object) -> bool:
        return item in self.tensors if isinstance(item, str) else any(item is one for one in self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made of the fields; the mapping of tensors is read-only and cannot be pickled."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return AVInputs, tuple((values | {"tensors": dict(self.tensors)}).values())

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def __iter__(self) -> Iterator[AVInputs]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, item: int | slice) -> AVInputs: ...
    @overload
    def __getitem__(self, item: str) -> Any: ...
    def __getitem__(self, item: int | slice | str) -> Any:
        """One example, or a shorter stack; or a tensor by its name."""
        if isinstance(item, str):
            if item not in self.tensors:
                raise InputError(unknown("tensor", item, self.tensors))
            return self.tensors[item]
        if isinstance(item, slice):
            chosen = [self[i] for i in range(len(self))[item]]
            if not chosen:
                raise InputError(f"{item} selects none of {len(self)} examples")
            return AVInputs.stack(chosen)
        if not -len(self) <= item < len(self):
            raise IndexError(f"example {item} of {len(self)}")
        i = item % len(self)
        if len(self) == 1:
            return self
        return replace(
            self,
            tensors=self.axes.example(self.tensors, i),
            spans=self.parts[i],
            position_ids=self.position_ids[:, i : i + 1],
            clips=(self.clips[i],),
            questions=(self.questions[i],),
            provenance=self._histories[i],
            parts=(),
        )

    @property
    def _histories(self) -> list[dict[str, Any]]:
        """How each example was made."""
        return self.provenance.get("examples", [self.provenance] * len(self))

    @classmethod
    def stack(cls, examples: Sequence[AVInputs]) -> AVInputs:
        """Stack examples of one layout into a batch.

        Args:
            examples: inputs whose positions have the same roles, model times and patches.

        Returns:
            The batch.

        Raises:
            AlignmentError: if two layouts differ; the message shows the first difference.
            InputError: for an empty list.
        """
        if not examples:
            raise InputError("a stack needs at least one example")
        if len(examples) == 1:
            return examples[0]
        first = examples[0]
        for number, other in enumerate(examples[1:], start=1):
            fault = difference(first, other, names=("example 0", f"example {number}"))
            if fault:
                raise AlignmentError(
                    f"these examples cannot be stacked: {fault}. Different layouts are never padded together."
                )
        parts = tuple(part for x in examples for part in x.parts)
        return replace(
            first,
            tensors=first.axes.joined([x.tensors for x in examples]),
            spans=_shared_map(parts),
            position_ids=torch.cat([x.position_ids for x in examples], dim=1),
            clips=tuple(clip for x in examples for clip in x.clips),
            questions=tuple(question for x in examples for question in x.questions),
            provenance={"examples": [one for x in examples for one in x._histories]},
            parts=parts,
        )

    def to(self, device: str | torch.device) -> AVInputs:
        """Move the tensors.

        Args:
            device: where to.

        Returns:
            The same inputs there.
        """
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.tensors.items()}
        return replace(self, tensors=moved, position_ids=self.position_ids.to(device))

    def continued(self, token_ids: Int64[Tensor, "batch new"], tokens: Sequence[str] | None = None) -> AVInputs:
        """Append answer tokens after the prompt, for teacher forcing; they are `generated`.

        Args:
            token_ids: the ids to append to each example.
            tokens: their text; `#id` of the first example when left out.

        Returns:
            The longer inputs. The asked position stays the prompt's last.

        Raises:
            InputError: if the number of rows is not the number of examples.
        """
        if token_ids.ndim != 2 or token_ids.shape[0] != len(self):
            raise InputError(f"continued() takes ids of shape [{len(self)}, n]; got {tuple(token_ids.shape)}")
        new = token_ids.to(self.ids.device)
        n = int(new.shape[1])
        later = self.position_ids[..., -1:] + torch.arange(1, n + 1, device=self.position_ids.device)
        texts = [tuple(tokens) if tokens is not None else tuple(f"#{int(t)}" for t in row) for row in new]
        return replace(
            self,
            tensors=self.axes.longer(self.tensors, new),
            spans=self.spans.extended(n, texts[0]),
            position_ids=torch.cat([self.position_ids, later], dim=-1),
            parts=tuple(part.extended(n, text) for part, text in zip(self.parts, texts, strict=True)),
        )

    def table(self) -> pandas.DataFrame:
        """Tabulate the positions.

        Returns:
            One row per position: `position token role start_s end_s source_start_s source_end_s row col`; times are NaN
            off media, rows and columns -1 off pictures.
        """
        import pandas

        columns = {"position": np.arange(len(self.spans)), "token": self.tokens, "role": self.spans.roles}
        return pandas.DataFrame(columns | {name: getattr(self.spans, name) for name in _COLUMNS})

    def describe(self, metric: Any = None) -> str:
        """Summarise the input on one screen.

        Args:
            metric: a metric that is bound here, `logit_diff("siren", "dog").bind(model, x)`: adds in which form its
                words are read, how likely each form is, and the tokens.

        Returns:
            Lines of text: layout, question, tensors, and the runs of positions with their times.

        Raises:
            InputError: something else than a metric.
        """
        if metric is not None and not hasattr(metric, "reading"):
            raise InputError(f"describe takes a bound metric, logit_diff(...).bind(model, x), not {metric!r}.")
        return summary(self) + ("" if metric is None else f"\n  answers: {metric.reading()}")

    def __repr__(self) -> str:
        many = f"{len(self)} examples of " if len(self) > 1 else ""
        return f"AVInputs({many}{len(self.spans)} positions, {self.layout}: {self.spans!r})"

    def _repr_html_(self) -> str:
        return strip(self)


def difference(x: AVInputs, y: AVInputs, *, names: tuple[str, str]) -> str | None:
    """Say where two inputs are first not aligned; text tokens may differ, where both have as many."""
    at = x.spans.layout_difference(y.spans)
    lengths = f"{names[0]} has {len(x.spans)} positions ({_seconds(x)}), {names[1]} {len(y.spans)} ({_seconds(y)})"
    if at is None and x.layout != y.layout:
        return f"{names[0]} has the layout {x.layout!r}, {names[1]} {y.layout!r}"
    if at is None:
        keys = set(x.tensors) ^ set(y.tensors)
        return f"only one of them has {sorted(keys)}" if keys else None
    shown = [_position(z.spans, at, name) for z, name in zip((x, y), names, strict=True)]
    return f"they first differ at position {at}: {shown[0]}, {shown[1]}. {lengths}"


def _position(spans: SpanMap, at: int, name: str) -> str:
    if at >= len(spans):
        return f"{name} has ended"
    place = "" if np.isnan(spans.start_s[at]) else f" at {spans.start_s[at]:.2f} s"
    patch = f", row {spans.row[at]}, col {spans.col[at]}" if spans.row[at] >= 0 else ""
    return f"{name} has {spans.tokens[at]!r} ({spans.roles[at]}{place}{patch})"


def _seconds(x: AVInputs) -> str:
    lasting = sorted({f"{clip.duration:.2f} s" for clip in x.clips if clip is not None})
    return " and ".join(lasting) if lasting else "no clip"


def _shared_map(parts: Sequence[SpanMap]) -> SpanMap:
    first = parts[0]
    tokens = tuple("|".join(dict.fromkeys(seen)) for seen in zip(*(part.tokens for part in parts), strict=True))
    columns = {name: np.stack([getattr(part, name) for part in parts]) for name in ("source_start_s", "source_end_s")}
    times = {name: np.where((found == found[0]).all(axis=0), found[0], np.nan) for name, found in columns.items()}
    return replace(first, tokens=tokens, **times)


SMALLEST = 1 << 17  # bytes from which on a tensor is worth hashing
_KNOWN: WeakValueDictionary[bytes, Tensor] = WeakValueDictionary()


def shared(x: AVInputs) -> AVInputs:
    """Give the same inputs with large tensors that are held elsewhere already."""
    return replace(x, tensors={name: _held(value) for name, value in x.tensors.items()})


def _held(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.nbytes < SMALLEST or value.device.type != "cpu":
        return value
    return _KNOWN.setdefault(content_hash(value), value)


def content_hash(value: Tensor) -> bytes:
    """Hash a tensor's kind, shape and content."""
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.blake2b(flat.data, digest_size=16)
    digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
    return digest.digest()
