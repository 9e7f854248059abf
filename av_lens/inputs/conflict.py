"""`Conflict`: a sound and a picture that disagree, and the grid of cells that tells their effects apart.

Cells and their names: protocol section 1. All cells of a conflict share one token layout: every source is cut to the
shortest picture or sound among them, and pictures of another size are cropped around their middle and scaled to the
size of picture v; both are said in each cell's provenance. The third clip is drawn by whoever deals the halves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from av_lens.checks import half_character
from av_lens.errors import AlignmentError, InputError, ProtocolError, UnfinishedError, unknown
from av_lens.families.media_layout import sampled_frames
from av_lens.inputs.answers import Answer, AnswerLike, synonyms_of
from av_lens.inputs.model_inputs import AVInputs, difference, shared
from av_lens.media.arrays import file_hash
from av_lens.media.clip import Clip
from av_lens.media.manifest import CONTROL, DESCRIBE, SEE, Entry, answers_fault, read_manifest, source_fault
from av_lens.media.source import ClipFile
from av_lens.memory import Memory
from av_lens.whole_files import describe

ROLES = ("sound", "picture", "third")


def clip_key(source: Any) -> str:
    """Name a source clip by its file's hash and its time window (by its content where it has no file)."""
    path, sha = source_file(source), getattr(source, "sha256", None)
    if sha is None and path is not None:
        try:
            sha = file_hash(path)
        except OSError as error:
            raise InputError(f"cannot read the clip {path}: {describe(error)}. Put it back.") from error
    if sha is None:
        return f"{getattr(source, 'picture_hash', None)}:{getattr(source, 'sound_hash', None)}"
    return _key(source, sha)


class ClipKeys:
    """The keys of a run's clips: a file is hashed once, and known to be the same while it is used."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}

    def of(self, conflict: Any, role: str) -> str:
        """The `clip_key` of a conflict's "sound", "picture" or "third"; a file that is gone is refused."""
        clip = getattr(conflict, role)
        path = source_file(clip)
        if path is None:
            return clip_key(clip)
        if path not in self._files:
            try:
                self._files[path] = file_hash(path)
            except OSError as error:
                raise InputError(
                    f"{_said(conflict, role, path)} is gone since the conflicts were listed ({describe(error)}). Put "
                    "the file back, or take the conflict out."
                ) from error
        return _key(clip, self._files[path])

    def check(self, conflict: Any) -> None:
        """Refuse to go on where a conflict's file is gone, or holds something else than when it was named."""
        for role in ROLES:
            path = source_file(getattr(conflict, role, None))
            if path is None or path not in self._files:
                continue
            try:
                why = "" if file_hash(path) == self._files[path] else "was changed"
            except OSError as error:
                why = f"is gone ({describe(error)})"
            if why:
                raise UnfinishedError(
                    f"{_said(conflict, role, path)} {why} since the run began. Put the file back as it was, and the "
                    "same command goes on from what was measured; or begin anew without it, in another folder."
                )


def source_file(source: Any) -> str | None:
    """Name the file that a clip will be read from; None of one that is in memory."""
    path = getattr(source, "path", None) if hasattr(source, "load") else None
    return None if path is None else str(path)


def clip_window(source: Any) -> tuple[float, float | None]:
    """Give the seconds of its file that a clip holds; None is the file's end."""
    return getattr(source, "window", None) or (getattr(source, "start", 0.0), getattr(source, "end", None))


def _key(source: Any, sha: str) -> str:
    start, end = clip_window(source)
    return f"{sha}:{start}:{end}"


def _said(conflict: Any, role: str, path: str) -> str:
    return f"the clip {path}, the {role} of conflict {conflict.id!r},"


# Cell -> (picture, sound), in the protocol's order.
CELLS: dict[str, tuple[str | None, str | None]] = {
    "va": ("v", "a"),
    "vv": ("v", "v"),
    "aa": ("a", "a"),
    "av": ("a", "v"),
    "vw": ("v", "w"),
    "aw": ("a", "w"),
    "wa": ("w", "a"),
    "wv": ("w", "v"),
    "v_muted": ("v", "muted"),
    "a_muted": ("a", "muted"),
    "blank_a": ("blank", "a"),
    "blank_v": ("blank", "v"),
    "blank_muted": ("blank", "muted"),
    "audio_only": (None, "a"),
    "video_only": ("v", None),
}
_ALONE: dict[str, dict[str, Any]] = {
    "audio_only": {"sound": "separate", "picture": None},
    "video_only": {"sound": None},
}
"""Cells of one medium alone, which have a layout of their own."""
LAYOUTS = ("in_video", "separate")
_SAMPLE = 1e-4  # s: lengths that differ by less are equal


@dataclass(frozen=True, eq=False, kw_only=True)
class Conflict:
    """A sound, a picture, a question and the two answers.

    Attributes:
        sound: the clip whose sound is heard (a); its own picture is picture a.
        picture: the clip whose picture is seen (v); its own sound is sound v.
        question: what is asked, such as "What do you hear?".
        answers: the sound's answer, then the picture's; each a word, a token id or a list of synonyms.
        prefix: text of the assistant before the asked position.
        third: one more clip (w) whose answer differs from both.
        see: the question about the picture.
        control: a question about neither.
        describe: what is asked where captions are written, without the prefix.
        source: what the sound's and the picture's clips were cut from, such as the ids of two videos, where that is to
            be told and not found out (`inputs.sources`).
        id: a name for it in reports.
        references: a text on the sound's clip and one on the picture's, for those who judge captions.
    """

    sound: Clip | ClipFile
    picture: Clip | ClipFile
    question: str
    answers: tuple[AnswerLike | Answer, AnswerLike | Answer]
    prefix: str = ""
    third: Clip | ClipFile | None = None
    see: str = SEE
    control: str = CONTROL
    describe: str = DESCRIBE
    source: tuple[str, str] | None = None
    id: str | None = None
    references: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        synonyms = [synonyms_of(answer) for answer in self.answers]
        fault = answers_fault(synonyms)
        if fault:
            raise InputError(f"conflict {self.id or ''}: {fault}".replace(" :", ":"))
        words = [word for group in synonyms for word in group]
        if self.source is not None and (fault := source_fault(list(self.source))):
            raise InputError(f"conflict {self.id!r}: {fault}")
        asked = (self.question, self.prefix, self.see, self.control, self.describe)
        texts = (self.id, *asked, *words, *(self.source or ()))
        if half := half_character("".join(map(str, texts))):
            raise InputError(f"conflict {self.id!r}: its texts hold {half}; take it out.")
        for name, clip in (("sound", self.sound), ("picture", self.picture), ("third", self.third)):
            if isinstance(clip, Clip):
                _require_both(clip, name)

    def cells(
        self,
        model: Any,
        *,
        question: str | None = None,
        layout: str = "in_video",
        fps: float | int = 2.0,
        system: str | None = None,
        blank: str = "dark",
        mute: str = "silence",
        loudness: float | None = None,
        seed: int = 0,
        keep_clips: bool = True,
    ) -> Cells:
        """Encode the cells, each when it is first asked for.

        Args:
            model: whatever has `.encode`: a `HookedAVLLM` or an `Encoder`.
            question: another question than the conflict's, such as `conflict.see`.
            layout: "in_video" or "separate".
            fps: frames per second.
            system: the system message.
            blank: "dark" or "scrambled".
            mute: "silence" or "noise".
            loudness: the root mean square (full scale is 1) that every source's sound is scaled to; None leaves them.
            seed: of the scrambling and the noise.
            keep_clips: let each cell's inputs hold its decoded clip (some 20 MB for a second of video).

        Returns:
            A lazy mapping from the cell's name to its inputs.

        Raises:
            InputError: for an unknown layout, or a loudness that is none.
        """
        if layout not in LAYOUTS:
            raise InputError(unknown("layout", layout, LAYOUTS))
        if loudness is not None and not 0 < loudness < 1:
            raise InputError(f"loudness={loudness} is no root mean square between 0 and 1: try 0.05, or None.")
        options: dict[str, Any] = {"sound": layout, "fps": fps, "system": system, "prefix": self.prefix}
        made = {"blank": blank, "mute": mute, "loudness": loudness}
        asked = self.question if question is None else question
        return Cells(self, model, asked, options, made, seed, keep_clips)


@dataclass(eq=False, repr=False)
class Cells(Mapping[str, AVInputs]):
    """The cells of one conflict under one question, encoded when first asked for and then kept (`Conflict.cells`)."""

    conflict: Conflict
    model: Any
    question: str
    options: Mapping[str, Any]
    how: Mapping[str, Any]
    seed: int
    keep_clips: bool
    cut_to_s: float | None = None
    whole_s: float | None = None
    _token: object = field(default_factory=object)  # by which `_SOURCES` knows this conflict's; an id would come again
    _made: dict[str, AVInputs] = field(default_factory=dict[str, AVInputs])

    def __iter__(self) -> Iterator[str]:
        return (name for name, parts in CELLS.items() if self.conflict.third is not None or "w" not in parts)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in set(self)

    def __repr__(self) -> str:
        return f"Cells({self.conflict.id or 'conflict'}, {self.question!r}: {' '.join(self)})"

    def __getitem__(self, name: str) -> AVInputs:
        """One cell; encoded on first use."""
        if name not in CELLS:
            raise InputError(unknown("cell", name, CELLS))
        if name not in self:
            raise ProtocolError(
                f"cell {name!r} needs a third clip w and this conflict has none: give Conflict(third=...)"
            )
        if name not in self._made:
            self._made[name] = self._encoded(name)
        return self._made[name]

    @property
    def nbytes(self) -> int:
        """How much memory the tensors take of the cells that were encoded; what several share counts once."""
        tensors = (value for x in self._made.values() for value in x.tensors.values())
        return sum({id(one): one.nbytes for one in tensors if isinstance(one, torch.Tensor)}.values())

    def clip(self, name: str) -> Clip:
        """The clip of a cell, as it is encoded: its picture and sound, joined."""
        picture_name, sound_name = CELLS[name]
        if picture_name is None or sound_name is None:
            return self._source(picture_name or sound_name or "")
        sound, picture = self._source(sound_name), self._source(picture_name)
        joined = picture.with_sound(sound)
        same = joined.frames is not None and picture.frames is not None and joined.frames.shape == picture.frames.shape
        if same and np.array_equal(joined.times, picture.times):
            # The hashes are cached properties: pass them on, so that a long video is not hashed once per cell.
            joined.__dict__["picture_hash"] = picture.picture_hash
        return joined

    def _encoded(self, name: str) -> AVInputs:
        alone = _ALONE.get(name, {})
        x: AVInputs = self.model.encode(self.clip(name), self.question, **{**self.options, **alone})
        known = next((other for other in self._made if other not in _ALONE and not alone), None)
        fault = None if known is None else difference(self._made[known], x, names=(f"cell {known}", f"cell {name}"))
        if fault:
            raise AlignmentError(f"the cells of {self.conflict.id or 'this conflict'} are not aligned: {fault}")
        lengths = {"cut_to_s": self.cut_to_s, "whole_s": self.whole_s}
        said = {"conflict": self.conflict.id, "cell": name, **lengths, **self.how}
        clips = x.clips if self.keep_clips else (None,) * len(x.clips)
        return shared(replace(x, clips=clips, provenance=x.provenance | said))

    def _source(self, name: str) -> Clip:
        return _SOURCES.once(self._token, self._cut)[name]

    def _cut(self) -> dict[str, Clip]:
        given = {"a": self.conflict.sound, "v": self.conflict.picture, "w": self.conflict.third}
        clips = {name: _loaded(clip, name) for name, clip in given.items() if clip is not None}
        fps, loudness = self.options["fps"], self.how["loudness"]
        ends = [end for clip in clips.values() for end in _ends(clip)]
        self.whole_s = max(end for name in "av" for end in _ends(clips[name]))
        if max(ends) - min(ends) > _SAMPLE:
            self.cut_to_s = min(ends)
            clips = {name: _cut_to(clip, self.cut_to_s) for name, clip in clips.items()}
        counts = {len(sampled_frames(clip, fps)) for clip in clips.values()}
        if len(counts) > 1:
            self.cut_to_s = min(counts) / float(fps)
            clips = {name: _cut_to(clip, self.cut_to_s) for name, clip in clips.items()}
        clips = {name: at_loudness(fitted(clip, clips["v"]), loudness) for name, clip in clips.items()}
        clips["blank"] = clips["v"].blank(kind=self.how["blank"], seed=self.seed)
        clips["muted"] = clips["a"].muted(kind=self.how["mute"], seed=self.seed)
        return clips


def _nbytes(sources: Mapping[str, Clip]) -> int:
    return sum({id(one.frames): one.frames.nbytes for one in sources.values() if one.frames is not None}.values())


# A second of video is some 20 MB: the conflicts encoded last keep their decoded frames (at most 256 MiB), others are
# decoded again where a further cell of theirs is asked for.
_SOURCES: Memory[dict[str, Clip]] = Memory(1 << 28, _nbytes)


def _loaded(clip: Clip | ClipFile, name: str) -> Clip:
    loaded = clip.load() if isinstance(clip, ClipFile) else clip
    _require_both(loaded, {"a": "sound", "v": "picture", "w": "third"}[name])
    return loaded


def _require_both(clip: Clip, name: str) -> None:
    missing = "audio stream" if not clip.has_sound else "picture" if not clip.has_picture else None
    if missing:
        raise InputError(
            f"{name}= is {clip!r}, which has no {missing}: each source of a conflict gives its picture and its sound "
            "to some cell; choose a clip with both"
        )


def _ends(clip: Clip) -> tuple[float, ...]:
    return (clip.sound_end,) if clip.is_image else (clip.sound_end, clip.picture_end)


def _cut_to(clip: Clip, end: float) -> Clip:
    return clip if max(_ends(clip)) - end <= _SAMPLE else clip.trimmed(0.0, end)


def at_loudness(clip: Clip, loudness: float | None) -> Clip:
    """Scale a clip's sound to a root mean square (full scale is 1), less where a peak would be cut; None leaves it."""
    if loudness is None or clip.waveform is None or not np.any(clip.waveform):
        return clip
    now = float(np.sqrt(np.mean(np.square(clip.waveform, dtype=np.float64))))
    scale = min(loudness / now, 1.0 / float(np.abs(clip.waveform).max()))
    scaled = (clip.waveform * np.float32(scale)).astype(np.float32)
    return replace(clip, waveform=scaled, notes=(*clip.notes, f"sound scaled by {scale:.3f}"))


def fitted(clip: Clip, model: Clip) -> Clip:
    """Bring a clip's picture to another's size: cropped around the middle to its aspect, then scaled; noted."""
    if clip.frames is None or model.frames is None or clip.frames.shape[1:] == model.frames.shape[1:]:
        return clip
    height, width = clip.frames.shape[1:3]
    wanted_height, wanted_width = model.frames.shape[1:3]
    scale = min(height / wanted_height, width / wanted_width)
    rows, cols = max(1, round(wanted_height * scale)), max(1, round(wanted_width * scale))
    top, left = (height - rows) // 2, (width - cols) // 2
    frames = np.empty((len(clip.frames), wanted_height, wanted_width, 3), dtype=np.uint8)
    for i, frame in enumerate(clip.frames):
        part = torch.from_numpy(np.array(frame[top : top + rows, left : left + cols])).permute(2, 0, 1)[None].float()
        scaled = torch.nn.functional.interpolate(part, (wanted_height, wanted_width), mode="bilinear", antialias=True)
        frames[i] = scaled[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    note = f"picture cropped to {cols}x{rows} of {width}x{height} and scaled to {wanted_width}x{wanted_height}"
    return replace(clip, frames=frames, notes=(*clip.notes, note))


def conflicts(path: str | os.PathLike[str]) -> list[Conflict]:
    """Read a manifest of conflicts.

    Args:
        path: a jsonl file.

    Returns:
        One conflict per line, its clips not yet decoded.

    Raises:
        ManifestError: listing every fault of every line.
    """
    return conflicts_of(read_manifest(path))


def conflicts_of(entries: Iterable[Entry]) -> list[Conflict]:
    """Make conflicts of the lines of a manifest."""
    return [Conflict(**vars(entry)) for entry in entries]
