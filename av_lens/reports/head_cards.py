"""The mechanism cards in short: one line a head, of the many figures that the record holds for it."""

from __future__ import annotations

from typing import Any

from av_lens.reports.words import MISSING, number, percent

LEAST_SHARE, LEAST_PATH, MOST_RECEIVERS = 0.05, 0.01, 3
_FIGURES = ("writes, sound's - picture's", "pattern driven by queries", "directly")
COLUMNS = (
    *((name, False) for name in ("head", "looks at, in va", "with nothing to see")),
    *((name, True) for name in (*_FIGURES, "through queries", "through keys", "through values")),
    ("most through", False),
)


def card_lines(cards: Any) -> tuple[tuple[str, ...], ...]:
    """Write one line for each head of the table of cards."""
    heads = list(dict.fromkeys(zip(cards["layer"], cards["head"], strict=True)))
    return tuple(
        (f"L{layer} H{head}", *_line(cards[(cards["layer"] == layer) & (cards["head"] == head)]))
        for layer, head in heads
    )


def _line(rows: Any) -> tuple[str, ...]:
    paths = rows[(rows["part"] == "path") & (rows["unit"] == "share of total")]
    shares = dict(zip(paths["what"], paths["value"], strict=True))
    single = sorted((name for name in shares if "." in name), key=lambda name: -abs(shares[name]))
    most = [f"{name} {percent(shares[name])}" for name in single if abs(shares[name]) >= LEAST_PATH][:MOST_RECEIVERS]
    return (
        _looks(rows, "va"),
        _looks(rows, "blank_a"),
        number(_value(rows, "ov", "its write, on the sound's - picture's"), sign=True),
        percent(_value(rows, "pattern", "driven by the queries (blank_muted)")),
        *(percent(shares.get(name, float("nan"))) for name in ("direct", "queries", "keys", "values")),
        ", ".join(most) or MISSING,
    )


def _looks(rows: Any, cell: str) -> str:
    """Where the generation position looks, the largest first."""
    begin = "generation -> "
    found = rows[(rows["part"] == "attention") & (rows["cell"] == cell) & rows["what"].str.startswith(begin)]
    pairs = sorted(zip(found["value"], found["what"], strict=True), reverse=True)
    said = [f"{what.removeprefix(begin)} {percent(value)}" for value, what in pairs if value >= LEAST_SHARE]
    return ", ".join(said) or MISSING


def _value(rows: Any, part: str, what: str) -> float:
    found = rows[(rows["part"] == part) & (rows["what"] == what)]
    return float(found["value"].iloc[0]) if len(found) else float("nan")
