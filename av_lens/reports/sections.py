"""The record's tables as rows of text, in the order and words in which the page shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from av_lens.reports import words
from av_lens.results.record import Isolation
from av_lens.results.tables import SUPPRESSORS

_SIGNED = ("effect", "reads_picture", "reads_sound", "sufficiency", "silenced", "carries", "dla")


@dataclass(frozen=True)
class Tile:
    """One large number with its name.

    Attributes:
        value: the number as text.
        name: what it is.
        note: its interval or comparison.
        tone: "sound", "picture" or "".
    """

    value: str
    name: str
    note: str = ""
    tone: str = ""


def tiles(found: Isolation) -> list[Tile]:
    """Choose the few numbers that the verdict rests on."""
    made = [_behaviour_tile(found, name, tone) for name, tone in (("G", "sound"), ("C", "picture"), ("gap", ""))]
    sets: Any = found.sets
    for row in sets[sets["chosen"]].to_dict("records")[:1]:
        ends = words.interval(row["share_low"], row["share_high"], share=True)
        heads = "1 head" if row["k"] == 1 else f"{row['k']} heads"
        made.append(Tile(words.percent(row["share"]), f"of G released by {heads}, held out", ends, "sound"))
        picture = f"the picture: {_change(row, 'says_picture')}"
        made.append(Tile(_change(row, "says_sound"), "says the sound, before → after", picture, "sound"))
        count = f"the most of {row['random_n']} sets, logits; p {words.small(row['p_random'])}"
        made.append(Tile(words.number(float(row["random_max"])), "released by random heads", count))
    return [tile for tile in made if tile.value != words.MISSING]


def _behaviour_tile(found: Isolation, name: str, tone: str) -> Tile:
    frame: Any = found.behaviour
    frame = frame[(frame["quantity"] == name) & (frame["half"] == "discovery")]
    frame = frame.sort_values("chosen", key=lambda c: c != "competent", kind="stable")
    _, meaning = words.QUANTITIES[name]
    value, note = float(found.summary.get(name, float("nan"))), "logits"
    for row in frame.to_dict("records")[:1]:
        value, note = row["value"], f"logits, {words.interval(row['low'], row['high'])}"
    return Tile(words.number(value, sign=True), f"{name}: {meaning}", note, tone)


def behaviour_rows(found: Isolation, chosen: str) -> list[dict[str, str]]:
    """Put the quantities of both halves side by side."""
    frame: Any = found.behaviour
    frame = frame[frame["chosen"] == chosen]
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    order = {name: place for place, name in enumerate(words.QUANTITIES)}
    records = sorted(frame.to_dict("records"), key=lambda r: order.get(r["quantity"], len(order)))
    for record in records:
        key = (record["quantity"], record["cell"], record["rule"])
        name, meaning = _quantity(*key)
        row = rows.setdefault(key, {"name": name, "meaning": meaning})
        rate = record["quantity"] == "accuracy" or str(record["quantity"]).startswith("says")
        value = words.percent(record["value"]) if rate else words.number(record["value"])
        row[record["half"]] = f"{value} ({words.interval(record['low'], record['high'], share=rate)})"
        row[f"n_{record['half']}"] = str(record["n"])
    return list(rows.values())


def _quantity(quantity: str, cell: str, rule: str) -> tuple[str, str]:
    if quantity in words.QUANTITIES:
        return words.QUANTITIES[quantity]
    names = {"accuracy": "right"}
    name = f"{names.get(quantity, quantity)} in {cell}" if cell else quantity
    of = {"two": "; best of the two answers", "vocabulary": "; best of all words"}.get(rule, "")
    return name, words.cell_meaning(cell) + of


def head_rows(found: Isolation) -> list[dict[str, Any]]:
    """Write the head table."""
    return [
        {
            "rank": place,
            "head": f"L{row['layer']} H{row['head']}",
            "meaning": words.ROLE_MEANINGS.get(row["role"], ""),
            "suppressor": row["role"] in SUPPRESSORS,
            "donor_meaning": words.DONOR_MEANINGS.get(row["donor"], ""),
            "interval": words.interval(row["low"], row["high"], sign=True),
            "share": words.percent(row["share"]),
            "share_interval": words.interval(row["share_low"], row["share_high"], share=True),
            "discovery": words.number(row["discovery_effect"], sign=True),
            "discovery_interval": words.interval(row["discovery_low"], row["discovery_high"], sign=True),
            "direct_share": words.number(row["direct_share"]),
            **{donor: words.number(row[f"release_{donor}"], sign=True) for donor in words.DONOR_MEANINGS},
            **{name: words.number(row[name], sign=True) for name in _SIGNED},
            **{name: words.small(row[name]) for name in ("q", "p_maxt", "p_holm")},
            "confirmed": bool(row["confirmed"]),
            **{name: row[name] for name in ("site", "role", "estimand", "donor", "member_of", "flags")},
        }
        for place, row in enumerate(found.heads.to_dict("records"), start=1)
    ]


def set_rows(found: Isolation) -> list[dict[str, Any]]:
    """Write the table of sets, the chosen one first."""
    sets: Any = found.sets
    frame = sets.sort_values("chosen", ascending=False, kind="stable")
    return [
        {
            **{name: row[name] for name in ("name", "k", "donor", "screen", "flags")},
            "members": str(row["members"]),
            "chosen": bool(row["chosen"]),
            "discovery": words.number(row["discovery_release"], sign=True),
            "release": words.number(row["release"], sign=True),
            "interval": words.interval(row["low"], row["high"], sign=True),
            "share": words.percent(row["share"]),
            "says_sound": _change(row, "says_sound"),
            "says_picture": _change(row, "says_picture"),
            "random": words.number(row["random_max"], sign=True),
            "random_note": f"mean {words.number(row['random_mean'], sign=True)}, {row['random_n']} sets",
            "p": words.small(row["p_random"]),
            "floor": words.small(row["p_floor"]),
            "random_n": int(row["random_n"]),
            "confirmed": bool(row["confirmed"]),
        }
        for row in frame.to_dict("records")
    ]


def _change(row: Mapping[Any, Any], rate: str) -> str:
    return f"{words.percent(row[f'{rate}_before'])} → {words.percent(row[rate])}"


def specificity_rows(found: Isolation) -> list[dict[str, Any]]:
    """Write the table of what else the edit breaks."""
    tones = {"specific": "good", "not specific": "bad"}
    return [
        {
            "control": row["control"],
            "meaning": words.CONTROLS.get(row["control"], ""),
            "n": row["n"],
            **{
                name: (_exactly if str(row["verdict"]).startswith("reported") else words.percent)(row[name])
                for name in ("before", "after", "fall", "bound", "margin")
            },
            "verdict": row["verdict"],
            "tone": tones.get(str(row["verdict"]), "open"),
        }
        for row in found.specificity.to_dict("records")
    ]


def _exactly(value: float) -> str:
    return words.MISSING if value != value else f"{value:.2g}".replace("-", "−")


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
