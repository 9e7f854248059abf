"""Which colour means what, in figures, pages and strips of positions alike; no other file names a colour.

Blue is the sound and vermilion is the picture, wherever either is drawn and nowhere else. All are those of Okabe and
Ito, which stay apart under every common colour blindness. `FREE` is for what has no meaning of its own.
"""

from __future__ import annotations

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
    "silenced carrier": GREEN,
    "sound carrier": SOUND,
}
"""Of heads, by what they do."""
DONOR_COLOURS = {"blank_muted": GREEN, "mean_other": PURPLE, "zero": AMBER}
CONDITION_COLOURS = {"cut": PURPLE, "equal mass": AMBER, "other heads": GREEN, "equal count": OLIVE}

DIVERGING = ["#8F3B00", PICTURE, "#F3B48B", "#F1F1EE", "#8EC2E5", SOUND, "#004A77"]
_SOUND_ON_DARK, _PICTURE_ON_DARK = "#4FB0EC", "#F28A45"
THEMES = {
    "light": {"ink": "#3A4048", "grid": "rgba(20, 24, 30, 0.12)", "hatch": GREY, "diverging": DIVERGING, "marks": {}},
    "dark": {
        "ink": "#D3D7DD",
        "grid": "rgba(235, 238, 243, 0.14)",
        "hatch": "#7C838E",
        "diverging": ["#FFC59B", "#F0802F", "#8A4312", "#23272E", "#14598A", "#3FA2E0", "#A6DBFF"],
        "marks": {SOUND: _SOUND_ON_DARK, PICTURE: _PICTURE_ON_DARK, GREEN: "#2FBF90"},
    },
}
"""What a page that knows its reader's theme puts in place of the figures' own."""

PAGES = {
    "light": {
        "bg": "#FFFFFF",
        "panel": "#F5F6F7",
        "ink": "#1C2127",
        "soft": "#555D67",
        "line": "#D9DDE2",
        "sound": SOUND,
        "picture": PICTURE,
        "picture-text": "#B34F00",  # the same, dark enough for small letters on white
        "good": "#00734F",
        "bad": "#B3261E",
        "open": "#7A5900",
        "stamp-bg": "#FFF3D6",
        "stamp-ink": "#5E4500",
    },
    "dark": {
        "bg": "#14171C",
        "panel": "#1D2128",
        "ink": "#E6E9ED",
        "soft": "#A7AEB8",
        "line": "#343A44",
        "sound": _SOUND_ON_DARK,
        "picture": _PICTURE_ON_DARK,
        "picture-text": _PICTURE_ON_DARK,
        "good": "#4CC79D",
        "bad": "#FF8A80",
        "open": "#E3B341",
        "stamp-bg": "#3A2F12",
        "stamp-ink": "#F3D58A",
    },
}
"""The report's own, as variables of its style sheet."""
