"""Which colour means what, in figures, pages and strips of positions alike; no other file names a colour.

Blue is the sound, vermilion the picture. All are those of Okabe and Ito; `FREE` is for what has no meaning of its own.
"""

from typing import Any

SOUND = "#0072B2"
PICTURE = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
AMBER = "#E69F00"
OLIVE = "#A89200"
GREY = "#8A9099"
INK = "#757B84"
GRID = "rgba(128, 134, 145, 0.25)"
BAND = "rgba(128, 134, 145, 0.28)"
CLEAR = "rgba(0, 0, 0, 0)"
FREE = (GREEN, PURPLE, AMBER, OLIVE, GREY)

ROLE_COLOURS = {
    "system": "#5F6670",
    "audio": SOUND,
    "video": PICTURE,
    "image": AMBER,
    "boundary": "#B9BEC6",
    "question": GREEN,
    "header": GREY,
    "generation": PURPLE,
    "generated": OLIVE,
}
"""Of positions."""
HEAD_COLOURS = {
    "picture writer": PICTURE,
    "sound opponent": AMBER,
    "gate": PURPLE,
    "feeder": OLIVE,
    "suppresses while encoding": GREY,
    "silenced carrier": GREEN,
    "sound carrier": SOUND,
}
"""Of heads, by what they do."""
DONOR_COLOURS = {"blank_muted": GREEN, "mean_other": PURPLE, "zero": AMBER}
CONDITION_COLOURS = {"cut": PURPLE, "equal mass": AMBER, "other heads": GREEN, "equal count": OLIVE}

DIVERGING = ["#8F3B00", PICTURE, "#F3B48B", "#F1F1EE", "#8EC2E5", SOUND, "#004A77"]
_SOUND_ON_DARK, _PICTURE_ON_DARK = "#4FB0EC", "#F28A45"
_THEMED: dict[str, tuple[Any, Any]] = {
    "ink": ("#3A4048", "#D3D7DD"),
    "grid": ("rgba(20, 24, 30, 0.12)", "rgba(235, 238, 243, 0.14)"),
    "hatch": (GREY, "#7C838E"),
    "diverging": (DIVERGING, ["#FFC59B", "#F0802F", "#8A4312", "#23272E", "#14598A", "#3FA2E0", "#A6DBFF"]),
    "marks": ({}, {SOUND: _SOUND_ON_DARK, PICTURE: _PICTURE_ON_DARK, GREEN: "#2FBF90"}),
}
THEMES = {"light": {k: v for k, (v, _) in _THEMED.items()}, "dark": {k: v for k, (_, v) in _THEMED.items()}}
"""What a page that knows its reader's theme puts in place of the figures' own."""

_PAGED = {
    "bg": ("#FFFFFF", "#14171C"),
    "panel": ("#F5F6F7", "#1D2128"),
    "ink": ("#1C2127", "#E6E9ED"),
    "soft": ("#555D67", "#A7AEB8"),
    "line": ("#D9DDE2", "#343A44"),
    "sound": (SOUND, _SOUND_ON_DARK),
    "picture": (PICTURE, _PICTURE_ON_DARK),
    "picture-text": ("#B34F00", _PICTURE_ON_DARK),  # the first: the same, dark enough for small letters on white
    "good": ("#00734F", "#4CC79D"),
    "bad": ("#B3261E", "#FF8A80"),
    "open": ("#7A5900", "#E3B341"),
    "stamp-bg": ("#FFF3D6", "#3A2F12"),
    "stamp-ink": ("#5E4500", "#F3D58A"),
}
PAGES = {"light": {k: v for k, (v, _) in _PAGED.items()}, "dark": {k: v for k, (_, v) in _PAGED.items()}}
"""The report's own, as variables of its style sheet."""
