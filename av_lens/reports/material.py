"""What a page shows beside the finding itself: clips to play, and how the method did where the truth was known."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from av_lens.errors import InputError
from av_lens.media import Clip, load_clip
from av_lens.media.html import data_uri

MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """How the instrument did on a model whose guilty heads were planted.

    Attributes:
        sentence: the outcome in words, with its numbers.
        passed: whether every planted head came out above every other.
        model: the planted model's name.
        heads: one row per head, best rank first: `rank layer head release share planted kind role`; `release` is the
            largest of the three donors' means on discovery in logits, `share` the same over G.
        figures: numbers such as `auroc`, `precision_at_k`, `false_names`.
        verdict: what `isolate` said of that model.
    """

    sentence: str
    passed: bool
    model: str
    heads: pd.DataFrame
    figures: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""

    def __post_init__(self) -> None:
        needed = ["rank", "layer", "head", "release", "share", "planted", "kind", "role"]
        if list(self.heads.columns) != needed:
            raise InputError(f"a calibration's heads have the columns {needed}; got {list(self.heads.columns)}.")


@dataclass(frozen=True)
class Card:
    """One clip of the gallery.

    Attributes:
        id: the conflict's id.
        sound: the sound's answer.
        picture: the picture's answer.
        says: what the unedited model says.
        half: where the conflict was dealt.
        source: the clip as a data URI.
        poster: its middle frame as a data URI.
        size: of the file, in bytes.
    """

    id: str
    sound: str
    picture: str
    says: str
    half: str
    source: str
    poster: str
    size: int


def gallery(
    conflicts: pd.DataFrame, clips: Mapping[str, Clip | str | Path], *, most: int = 12, budget_mb: float | int = 24.0
) -> tuple[Card, ...]:
    """Embed the first clips, in the table's order, as mp4 data URIs."""
    strange = sorted(set(clips) - set(conflicts["id"]))
    if strange:
        raise InputError(f"clips were given for conflicts that this record does not hold: {strange[:5]}.")
    rows: Sequence[dict[Any, Any]] = conflicts.sort_values("competent", ascending=False, kind="stable").to_dict(
        "records"
    )
    cards: list[Card] = []
    spent = 0.0
    for row in rows:
        if row["id"] not in clips or len(cards) == most:
            continue
        given = clips[row["id"]]
        clip = given if isinstance(given, Clip) else load_clip(str(given))
        ready = not isinstance(given, Clip) and Path(given).suffix.lower() == ".mp4"
        data = Path(str(given)).read_bytes() if ready else clip.to_mp4_bytes()
        spent += len(data) / MEBIBYTE
        if spent > budget_mb:
            break
        words = (str(row[name]) for name in ("id", "sound_answer", "picture_answer", "says", "half"))
        cards.append(Card(*words, source=data_uri("video/mp4", data), poster=_poster(clip), size=len(data)))
    return tuple(cards)


def _poster(clip: Clip, *, side: int = 360) -> str:
    """Encode the middle frame, so that the page shows something before anybody presses play."""
    if clip.frames is None or not len(clip.frames):
        return ""
    from PIL import Image

    frame = Image.fromarray(np.array(clip.frames[len(clip.frames) // 2]))
    frame.thumbnail((side, side))
    kept = io.BytesIO()
    frame.save(kept, format="JPEG", quality=88)
    return data_uri("image/jpeg", kept.getvalue())
