"""Question: which second and which patch does each position stand for, and does the model agree?

Two things are derived from the token ids alone, without asking the model: the columns of the map (times and patches),
and the three streams of position ids that the model should then compute. The second is compared with what the model
does compute, on every input: a map that the model does not share is refused.

For video token j of a block that starts at id s, on a grid of t x h x w tokens: patch t = j // (h w), row =
(j % (h w)) // w, col = j % w; its ids are s + int(t x seconds_per_grid x ids_per_second) in float32 as the model does
it, s + row, s + col. Audio token k has s + k in all three streams. So on the model's clock, patch t lasts from its own
id to the next patch's, and audio token k lasts one id (40 ms). An image is a patch of one second, as the model's own
formula has it. Text resumes after the largest id of the block's last run. Interleaved blocks share one clock;
separate ones do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from av_lens.errors import InputError
from av_lens.inputs.features import Picture, Sound
from av_lens.spans import SpanMap


@dataclass(frozen=True)
class Ids:
    """The token ids that carry the layout, and the clock's rate, from the model's config."""

    audio: int
    video: int
    image: int
    audio_start: int
    vision_start: int
    per_second: float
    chunk_s: float

    @classmethod
    def of(cls, config: Any) -> Ids:
        """Read them from a thinker's config (or a whole model's, which holds one).

        Args:
            config: the config.

        Returns:
            The ids.
        """
        thinker = getattr(config, "thinker_config", config)
        return cls(
            audio=int(thinker.audio_token_id),
            video=int(thinker.video_token_id),
            image=int(thinker.image_token_id),
            audio_start=int(thinker.audio_start_token_id),
            vision_start=int(thinker.vision_start_token_id),
            per_second=float(thinker.position_id_per_seconds),
            chunk_s=float(thinker.seconds_per_chunk),
        )


@dataclass(frozen=True)
class Media:
    """What stands behind the media positions of one prompt."""

    video: Picture | None = None
    image: Picture | None = None
    sound: Sound | None = None
    seconds_per_grid: float | None = None
    interleaved: bool = False

    @property
    def shape(self) -> tuple[object, ...]:
        """All that position ids depend on, beside the token ids."""
        grids = (None if picture is None else picture.grid for picture in (self.video, self.image))
        heard = None if self.sound is None else self.sound.mel.shape[-1]
        return (*grids, heard, self.seconds_per_grid, self.interleaved)


def media_roles(ids: np.ndarray, roles: tuple[str, ...], known: Ids) -> tuple[str, ...]:
    """Give media positions their own role, by their token.

    Args:
        ids: token ids, `[pos]`.
        roles: the roles of the text around them.
        known: the model's ids.

    Returns:
        The roles of all positions.
    """
    by_id = {known.audio: "audio", known.video: "video", known.image: "image"}
    return tuple(by_id.get(int(token), role) for token, role in zip(ids, roles, strict=True))


def _patch_ids(n: int, seconds_per_grid: float, per_second: float) -> Int64[np.ndarray, " patch_t"]:
    steps = np.arange(n).astype(np.float32) * np.float32(seconds_per_grid) * np.float32(per_second)
    return steps.astype(np.int64)


def build_map(ids: np.ndarray, roles: tuple[str, ...], tokens: tuple[str, ...], media: Media, known: Ids) -> SpanMap:
    """Give every media position its interval on both clocks and its patch.

    Args:
        ids: token ids, `[pos]`.
        roles: the role of every position.
        tokens: every position's text.
        media: what stands behind the media positions.
        known: the model's ids.

    Returns:
        The map.

    Raises:
        InputError: if the number of media tokens is not the number of their features.
    """
    n = len(ids)
    times = {name: np.full(n, np.nan) for name in ("start_s", "end_s", "source_start_s", "source_end_s")}
    row, col = np.full(n, -1, dtype=np.int64), np.full(n, -1, dtype=np.int64)
    for picture, token, step_s in ((media.video, known.video, media.seconds_per_grid), (media.image, known.image, 1.0)):
        at = _positions(ids, token, 0 if picture is None else picture.n_tokens)
        if picture is None:
            continue
        patch, row[at], col[at] = np.unravel_index(np.arange(len(at)), picture.token_grid)
        clock = _patch_ids(picture.grid[0] + 1, step_s or 0.0, known.per_second) / known.per_second
        times["start_s"][at], times["end_s"][at] = clock[patch], clock[patch + 1]
        times["source_start_s"][at] = picture.frame_start_s.min(axis=1)[patch]
        times["source_end_s"][at] = picture.frame_end_s.max(axis=1)[patch]
    at = _positions(ids, known.audio, 0 if media.sound is None else media.sound.n_tokens)
    if media.sound is not None:
        k = np.arange(len(at))
        times["start_s"][at], times["end_s"][at] = k / known.per_second, (k + 1) / known.per_second
        times["source_start_s"][at] = k * media.sound.token_s
        times["source_end_s"][at] = np.minimum((k + 1) * media.sound.token_s, media.sound.duration_s)
    return SpanMap(roles=roles, tokens=tokens, row=row, col=col, **times)


def _positions(ids: np.ndarray, token: int, expected: int) -> np.ndarray:
    at = np.flatnonzero(ids == token)
    if len(at) != expected:
        raise InputError(f"the prompt has {len(at)} media tokens of id {token} and the features are {expected}")
    return at


def expected_positions(ids: np.ndarray, media: Media, known: Ids) -> Int64[np.ndarray, "3 pos"]:
    """Derive the position ids that the model should give these tokens.

    Args:
        ids: token ids, `[pos]`.
        media: what stands behind the media positions.
        known: the model's ids.

    Returns:
        The temporal, height and width stream.
    """
    streams = np.zeros((3, len(ids)), dtype=np.int64)
    kind = np.select([ids == known.audio, ids == known.video, ids == known.image], [1, 2, 3], default=0)
    following, i = 0, 0
    while i < len(ids):
        if kind[i]:
            stop = i + int(np.argmin(np.append(kind[i:], 0) != 0))
            streams[:, i:stop] = following + _block(kind[i:stop], media, known)
            last = i + int(np.flatnonzero(kind[i:stop] != kind[stop - 1]).max(initial=-1)) + 1
            following, i = int(streams[:, last:stop].max()) + 1, stop
        else:
            opens = i + 1 < len(ids) and ids[i] == known.vision_start and ids[i + 1] == known.audio_start
            closes = i > 0 and kind[i - 1] != 0
            shared = 2 if media.interleaved and (opens or closes) else 1
            streams[:, i : i + shared] = following
            following, i = following + 1, i + shared
    return streams


def _block(kind: np.ndarray, media: Media, known: Ids) -> np.ndarray:
    streams = np.zeros((3, len(kind)), dtype=np.int64)
    streams[:, kind == 1] = np.arange(int((kind == 1).sum()))
    for code, picture, step_s in ((2, media.video, media.seconds_per_grid), (3, media.image, 1.0)):
        at = np.flatnonzero(kind == code)
        if picture is not None and len(at):
            patch, row, col = np.unravel_index(np.arange(len(at)), picture.token_grid)
            streams[:, at] = _patch_ids(picture.grid[0], step_s or 0.0, known.per_second)[patch], row, col
    return streams


def check_positions(
    expected: Int64[np.ndarray, "3 pos"], found: Int64[np.ndarray, "3 pos"], spans: SpanMap, *, fps: float | int
) -> None:
    """Compare the derived position ids with the model's own.

    Args:
        expected: derived from the map.
        found: computed by the model.
        spans: the map, for the message.
        fps: the frame rate, for the message.

    Raises:
        InputError: at the first position where they differ.
    """
    if expected.shape == found.shape and (expected == found).all():
        return
    at = int(np.flatnonzero((expected != found).any(axis=0))[0]) if expected.shape == found.shape else 0
    raise InputError(
        f"the model and this map disagree about which second and patch the positions stand for: position {at} (token "
        f"{spans.tokens[at]!r}, role {spans.roles[at]}) should have ids {expected[:, at].tolist()}, and the model "
        f"gives {found[:, at].tolist()}. With sound in the video this happens at frame rates whose chunk borders the "
        f"processor and the model round differently (fps={fps:g}): use fps=1, 2, 4 or 5, or sound='separate'."
    )


def frame_rate_fault(fps: float | int, frames_per_patch: int, known: Ids, *, interleaved: bool) -> str | None:
    """Say what is wrong with a frame rate before anything is computed.

    Args:
        fps: frames per second.
        frames_per_patch: frames in one temporal patch.
        known: the model's ids.
        interleaved: whether the sound is woven into the video.

    Returns:
        The fault with its mend, or None.
    """
    if not np.isfinite(fps) or fps < 1:
        return (
            f"fps={fps:g} is below 1: a patch of {frames_per_patch} frames would last longer than the model's chunks, "
            "whose order then breaks. Use fps=1 or more; for a long video, load a part of it with start= and end="
        )
    if interleaved and frames_per_patch / fps > known.chunk_s:
        return (
            f"fps={fps:g} makes a patch of {frames_per_patch / fps:g} s, longer than this model's chunks of "
            f"{known.chunk_s:g} s: use fps={frames_per_patch / known.chunk_s:g} or more, or sound='separate'"
        )
    return None
