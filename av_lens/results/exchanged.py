"""The mirrored question in words and names: sound and picture, hearing and seeing change places, both ways."""

import re
from collections.abc import Sequence
from typing import Any

from av_lens.results.record import TABLES

_PAIRS = (
    "sound/picture", "sounds/pictures", "hear/see", "hears/sees", "heard/seen", "hearing/seeing", "aa/vv", "wa/vw",
    "wv/aw", "E_A/E_V", "blank_a/v_muted", "blank_v/a_muted", "audio_only/video_only", "audio_only_v/video_only_a",
    "audio-only/picture-only", "silent video/blank picture",
)  # fmt: skip
_BOTH = [(one, two) for pair in _PAIRS for one, _, two in [pair.partition("/")]]
_OTHER = dict([*_BOTH, *((two, one) for one, two in _BOTH)])
_LONGEST_FIRST = sorted(_OTHER, key=len, reverse=True)
_WORDS = re.compile("|".join(rf"(?<![a-z]){word}(?![a-z])" for word in _LONGEST_FIRST), re.IGNORECASE)
_OWN = ("site", "id", "members", "name")
"""Columns of names that stay."""


def exchanged(text: str) -> str:
    """Let sound and picture change places in a name or a sentence."""

    def other(found: re.Match[str]) -> str:
        word = found[0]
        return _OTHER[word] if word in _OTHER else _OTHER[word.lower()].capitalize()

    return _WORDS.sub(other, text)


def exchanged_rows(name: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let sound and picture change places in a table's columns and words; a conflict's own words stay."""
    columns = {column: new if (new := exchanged(column)) in TABLES[name] else column for column in TABLES[name]}
    kept = TABLES[name] if name == "conflicts" else _OWN
    return [
        {columns[key]: exchanged(v) if isinstance(v, str) and key not in kept else v for key, v in row.items()}
        for row in rows
    ]


def exchanged_key(key: str) -> str:
    """Let sound and picture change places in an array's name, "half/site/estimand/donor"."""
    half, site, *rest = key.split("/", 2)
    return "/".join((half, site, *map(exchanged, rest)))
