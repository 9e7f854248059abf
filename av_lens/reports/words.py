"""Numbers and names as the page says them: three figures, real minus signs, a dash for what was not measured."""

from __future__ import annotations

import math
from typing import Any

MISSING = "–"
ROLE_MEANINGS = {
    "picture writer": "it reads the picture and writes the picture's answer over the sound",
    "sound opponent": "it reads the sound and writes against it",
    "gate": "it turns other heads away from the sound",
    "breaks": "editing it damages hearing as such; it does not suppress",
    "undetermined": "its release passes, but what kind it is cannot be told from these conflicts",
    "silenced carrier": "it carries sound that is lost under conflict: a victim, no suppressor",
    "sound carrier": "it carries sound when there is nothing to see",
}
DONOR_MEANINGS = {
    "blank_muted": "as if it had neither seen nor heard",
    "mean_other": "as if something else had been asked",
    "zero": "switched off",
}
STAMP_MEANINGS = {
    "exploratory": "What is named on this page is a lead, to be confirmed on more conflicts: no verdict on the set.",
    "not interpretable": "The search went on where the protocol would have stopped it: no figure of a head here has "
    "a meaning of its own.",
}
KINDS = {
    "named": "heads that suppress the sound",
    "spread": "suppression, but no single head to blame",
    "nothing named": "suppression, and no head found",
}
QUANTITIES = {
    "G": ("G", "hearing with nothing to see"),
    "C": ("C", "hearing under conflict"),
    "gap": ("gap = G − C", "what the sight of something else costs"),
    "E_A": ("E_A", "what the sound does to the answer"),
    "E_V": ("E_V", "what the picture does to the answer"),
    "I": ("I", "interaction of sound and picture"),
    "shortcut index": (
        "Shortcut Index",
        "|E_V| / (|E_A| + |E_V|): 0 where the sound alone decides, 1 where the picture does",
    ),
}
CONTROLS = {
    "see": "the conflict, asked what is seen: the picture's answer",
    "audio-only": "the sound with no picture in the prompt: the sound's answer",
    "factual heard": "sound and picture agree, asked what is heard",
    "factual seen": "sound and picture agree, asked what is seen",
    "control": "the conflict, asked for neither: the answer without the edit",
    "silent video": "nothing to hear, asked what is heard: how often some thing is named, which must not rise",
    "text-only": "the bare question: how far the answer moves",
}
COLUMNS = {
    "direct share": "how much of the effect goes by the head's own write, and not through later heads",
    "reads picture, reads sound": "the effect of another picture, or of another sound, for this head alone, in logits",
    "DLA": "direct logit attribution: what the head writes for the sound (+) or the picture (−) under conflict",
    "q": "the share of false finds to be expected among heads named at this strictness or a stricter one",
}
CELLS = {
    "va": "the conflict: picture v, sound a",
    "av": "the mirrored conflict: picture a, sound v",
    "aa": "picture and sound are both a's",
    "vv": "picture and sound are both v's",
    "blank_a": "nothing to see, sound a",
    "blank_v": "nothing to see, sound v",
    "blank_muted": "nothing to see, nothing to hear",
    "v_muted": "picture v, nothing to hear",
    "a_muted": "picture a, nothing to hear",
    "audio_only": "sound a alone, no picture in the prompt",
}
_SEE = " (see)"


def cell_meaning(cell: str) -> str:
    """Say what is seen and heard in a cell."""
    meaning = CELLS.get(cell.removesuffix(_SEE), "")
    return f"{meaning}; asked what is seen" if cell.endswith(_SEE) else meaning


def number(value: Any, *, sign: bool = False) -> str:
    """Say a number with three decimals below 0.1, two up to 10, one from 10 up."""
    if value is None or isinstance(value, str):
        return value or MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if math.isnan(value):
        return MISSING
    if isinstance(value, int):
        return f"{value:{'+' if sign else ''}d}".replace("-", "−")
    size = abs(value)
    text = f"{value:.{1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 3}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    text = "+" + text if sign and float(text) > 0 else text
    return text.replace("-", "−")


def percent(value: Any) -> str:
    """Say a share or a rate as a percentage."""
    if value is None or math.isnan(value):
        return MISSING
    text = f"{value:.0%}" if abs(value) >= 0.0995 or value == 0 else f"{value:.1%}".replace(".0%", "%")
    return "0%" if text == "-0%" else text.replace("-", "−")


def interval(low: Any, high: Any, *, share: bool = False, sign: bool = False) -> str:
    """Say an interval."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return MISSING
    if share:
        return f"{percent(low)} to {percent(high)}"
    return f"{number(low, sign=sign)} to {number(high, sign=sign)}"


def small(value: Any) -> str:
    """Say a p- or q-value."""
    if value is None or math.isnan(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
