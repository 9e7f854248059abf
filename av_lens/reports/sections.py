"""The words and figures in which the page says what the record's tables hold; its template speaks with these."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from av_lens.results.exchanged import exchanged
from av_lens.results.record import Isolation

MISSING = "–"
ROLE_MEANINGS = {
    "picture writer": "it reads the picture and writes the picture's answer over the sound",
    "sound opponent": "it reads the sound and writes against it",
    "gate": "it turns other heads away from the sound",
    "suppresses while encoding": "edited while sound or picture are encoded, it lets the model hear, not see less",
    "picture encoder": "editing it costs seeing at least half of what it gives hearing: it encodes the picture",
    "feeder": "it tells an MLP what is seen, and the MLP suppresses",
    "breaks": "editing it damages hearing as such; it does not suppress",
    "undetermined": "its release passes, but what kind it is cannot be told from these conflicts",
    "silenced carrier": "it carries sound that is lost under conflict: a victim, no suppressor",
    "sound carrier": "it carries sound when there is nothing to see",
    "sound writer": "it reads the sound and writes the sound's answer over the picture",
    "picture opponent": "it reads the picture and writes against it",
    "picture carrier": "it carries the picture when there is nothing to hear",
}
DONOR_MEANINGS = {
    "blank_muted": "as if it had neither seen nor heard",
    "mean_other": "as if something else had been asked",
    "zero": "switched off",
}
STAMP_MEANINGS = {
    "exploratory": "What is named on this page is a lead, to be tried on more conflicts: no verdict on the set.",
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
    "reversal rate": (
        "reversal rate",
        "how often the sound's answer with nothing to see turns into the picture's under conflict",
    ),
    "dilution": ("dilution", "what the mere presence of a picture's positions does to hearing, whatever they show"),
    "I": (
        "I",
        "interaction: what the picture moves where a is heard, less what it moves where v is heard; 0 where sound and "
        "picture add up. It changes its sign when a and v change places: far from 0, the clips are not exchangeable",
    ),
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
    "hear": "the conflict, asked what is heard: the sound's answer",
    "picture-only": "the picture with no sound in the prompt: the picture's answer",
    "blank picture": "nothing to see, asked what is seen: how often some thing is named, which must not rise",
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
    "audio_only_v": "sound v alone, no picture in the prompt",
    "video_only": "picture v alone, no sound in the prompt",
    "video_only_a": "picture a alone, no sound in the prompt",
}


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
        return text.lstrip("-")
    return ("+" + text if sign and float(text) > 0 else text).replace("-", "−")


def percent(value: Any) -> str:
    """Say a share or a rate as a percentage."""
    if value is None or math.isnan(value):
        return MISSING
    text = f"{value:.0%}" if abs(value) >= 0.0995 or value == 0 else f"{value:.1%}".replace(".0%", "%")
    return "0%" if text == "-0%" else text.replace("-", "−")


def interval(low: Any, high: Any, *, share: bool = False, sign: bool = False) -> str:
    """Say an interval."""
    ends = [percent(end) if share else number(end, sign=sign) for end in (low, high)]
    return MISSING if MISSING in ends else " to ".join(ends)


def small(value: Any) -> str:
    """Say a p- or q-value."""
    if value is None or math.isnan(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def standing(row: Any) -> str:
    """Say what became of a named head or of a set on the held-out half."""
    if row.get("status"):
        return ("✓ " if row["confirmed"] else "") + str(row["status"])
    held = "✓ confirmed" if row["confirmed"] else "would hold" if row["would_confirm"] else "✗ no"
    return held if row.get("chosen", True) else MISSING


def head_name(row: Any) -> str:
    """Name the head of a row, or its MLP."""
    return f"L{row['layer']} H{row['head']}" if row["head"] >= 0 else f"MLP {row['layer']}"


@dataclass(frozen=True)
class Tile:
    """One large number with its name and a note; `tone` is "sound", "picture" or ""."""

    value: str
    name: str
    note: str = ""
    tone: str = ""


def tiles(found: Isolation) -> list[Tile]:
    """Choose the few numbers that the verdict rests on."""
    asked, other = ("picture", "sound") if mirrored(found) else ("sound", "picture")
    made = [_behaviour_tile(found, name, tone) for name, tone in (("G", asked), ("C", other), ("gap", ""))]
    sets: Any = found.sets
    for row in sets[sets["chosen"]].to_dict("records")[:1]:
        ends = interval(row["share_low"], row["share_high"], share=True)
        heads = "1 head" if row["k"] == 1 else f"{row['k']} heads"
        made.append(Tile(percent(row["share"]), f"of G released by {heads}, held out", ends, asked))
        note = f"the {other}: {change(row, f'says_{other}')}"
        made.append(Tile(change(row, f"says_{asked}"), f"says the {asked}, before → after", note, asked))
        count = f"the most of {row['random_n']} sets, logits; p {small(row['p_random'])}"
        made.append(Tile(number(float(row["random_max"])), "released by random heads", count))
    return [tile for tile in made if tile.value != MISSING]


def mirrored(found: Isolation) -> bool:
    """Say whether a finding answers the mirrored question: what keeps the picture from being said."""
    return found.protocol.get("suppressed") == "picture"


def _behaviour_tile(found: Isolation, name: str, tone: str) -> Tile:
    frame: Any = found.behaviour
    frame = frame[(frame["quantity"] == name) & (frame["half"] == "discovery")]
    frame = frame.sort_values("chosen", key=lambda c: c != "competent", kind="stable")
    value, note = float(found.summary.get(name, float("nan"))), "logits"
    for row in frame.to_dict("records")[:1]:
        value, note = row["value"], f"logits, {interval(row['low'], row['high'])}"
    meaning = exchanged(QUANTITIES[name][1]) if mirrored(found) else QUANTITIES[name][1]
    return Tile(number(value, sign=True), f"{name}: {meaning}", note, tone)


def behaviour_rows(found: Isolation, chosen: str) -> list[dict[str, str]]:
    """Put the quantities of both halves side by side."""
    frame: Any = found.behaviour
    frame = frame[frame["chosen"] == chosen]
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    order = [*QUANTITIES, *frame["quantity"]]
    for record in sorted(frame.to_dict("records"), key=lambda r: min(order.index(r["quantity"]), len(QUANTITIES))):
        key = (record["quantity"], record["cell"], record["rule"])
        name, meaning = _quantity(*key)
        if mirrored(found) and key[0] in QUANTITIES:
            meaning = exchanged(QUANTITIES[exchanged(key[0])][1])
        row = rows.setdefault(key, {"name": name, "meaning": meaning})
        rate = record["quantity"] in ("accuracy", "reversal rate") or str(record["quantity"]).startswith("says")
        value = percent(record["value"]) if rate else number(record["value"])
        row[record["half"]] = f"{value} ({interval(record['low'], record['high'], share=rate)})"
        row[f"n_{record['half']}"] = str(record["n"])
    return list(rows.values())


def _quantity(quantity: str, cell: str, rule: str) -> tuple[str, str]:
    if quantity in QUANTITIES:
        return QUANTITIES[quantity]
    name = f"{'right' if quantity == 'accuracy' else quantity} in {cell}" if cell else quantity
    of = {"two": "; best of the two answers", "vocabulary": "; best of all words"}.get(rule, "")
    where, _, other = cell.partition(" (")
    asked = {"see)": "; asked what is seen", "hear)": "; asked what is heard"}.get(other, "")
    return name, CELLS.get(where, "") + asked + of


def change(row: Any, rate: str) -> str:
    """Say a rate before and after the edit."""
    return f"{percent(row[f'{rate}_before'])} → {percent(row[rate])}"


def exactly(value: float) -> str:
    """Say what is no rate with two figures."""
    return MISSING if value != value else f"{value:.2g}".replace("-", "−")


def flat(nested: Mapping[str, Any], *, prefix: str = "") -> list[tuple[str, str]]:
    """Flatten provenance to (dotted name, text) rows, in their order."""
    rows: list[tuple[str, str]] = []
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flat(value, prefix=f"{name}.")
        elif isinstance(value, str):
            rows.append((name, value))
        elif isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
            rows.append((name, ", ".join(str(item) for item in value)))
        else:
            rows.append((name, json.dumps(value, default=str)))
    return rows
