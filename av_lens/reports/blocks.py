"""What the search found beside the heads, as sections of plain tables; one without rows is left out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from av_lens.reports.sections import MISSING, head_name, interval, number, percent
from av_lens.results.record import Isolation

LEAST_SHARE, LEAST_PATH, MOST_RECEIVERS = 0.05, 0.01, 3
_ROADS = {
    "direct": "directly",
    "write": "by its own write, MLPs held",
    "queries": "through queries",
    "keys": "through keys",
    "values": "through values",
}


def card_lines(cards: Any) -> list[dict[str, str]]:
    """Write one line for each head of the table of cards."""
    return [_line(rows) for _, rows in cards.groupby(["layer", "head"], sort=False)]


def _line(rows: Any) -> dict[str, str]:
    paths = rows[(rows["part"] == "path") & (rows["unit"] == "share of total")]
    shares = dict(zip(paths["what"], paths["value"], strict=True))
    single = sorted(
        (name for name in shares if "." in name or name.startswith("MLP")), key=lambda name: -abs(shares[name])
    )
    most = [f"{name} {percent(shares[name])}" for name in single if abs(shares[name]) >= LEAST_PATH][:MOST_RECEIVERS]
    write = _value(rows, "ov", "its write, on the sound's - picture's")
    return {
        "head": head_name(rows.iloc[0]),
        "looks at, in va": _looks(rows, "va"),
        "with nothing to see": _looks(rows, "blank_a"),
        "writes, sound's - picture's": number(write, sign=True),
        "pattern driven by queries": percent(_value(rows, "pattern", "driven by the queries (blank_muted)")),
        **{road: percent(shares.get(name, float("nan"))) for name, road in _ROADS.items()},
        "most through": ", ".join(most) or MISSING,
    }


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


Row = Mapping[Any, Any]
MAIN_ARMS = ("cut", "cut - equal mass")


@dataclass(frozen=True)
class Sheet:
    """One table; a column is its heading and whether it is a number, the first cell heads a row."""

    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False


@dataclass(frozen=True)
class Block:
    """One section of the page: id, menu link, heading, paragraphs, tables; a drawing shown first, code last."""

    name: str
    link: str
    title: str
    text: tuple[str, ...]
    sheets: tuple[Sheet, ...]
    figure: str = ""
    code: str = ""


def blocks(found: Isolation) -> list[Block]:
    """Write every section that the record has numbers for."""
    made = [_sets(found), _mechanisms(found), _knowledge(found), _routes(found), _robustness(found), _captions(found)]
    made.append(_repair(found))
    kept = [replace(block, sheets=tuple(sheet for sheet in block.sheets if sheet.rows)) for block in made]
    return [block for block in kept if block.sheets]


@dataclass(frozen=True)
class _Column:
    """How a row's cell is written, and whether it is a number."""

    write: Callable[[Row], str]
    numeric: bool = False


def _sheet(frame: Any, caption: str, columns: Mapping[str, _Column], *, folded: bool = False) -> Sheet:
    written = {name: [column.write(row) for row in frame.to_dict("records")] for name, column in columns.items()}
    used = {name: cells for name, cells in written.items() if set(cells) - {MISSING}}
    named = tuple((name, columns[name].numeric) for name in used)
    return Sheet(caption, named, tuple(zip(*used.values(), strict=True)), folded)


def _text(name: str, *, numeric: bool = False) -> _Column:
    return _Column(lambda row: str(row[name]) or MISSING, numeric)


def _texts(*names: str) -> dict[str, _Column]:
    return {name: _text(name) for name in names}


def _number(name: str) -> _Column:
    return _Column(lambda row: number(row[name], sign=True), numeric=True)


def _numbers(*names: str) -> dict[str, _Column]:
    return {name.replace("_", " "): _number(name) for name in names}


def _bounded(name: str, low: str = "low", high: str = "high") -> _Column:
    def write(row: Row) -> str:
        ends = interval(row[low], row[high], sign=True)
        return number(row[name], sign=True) + ("" if ends == MISSING else f" ({ends})")

    return _Column(write, numeric=True)


def _percent(name: str) -> _Column:
    return _Column(lambda row: percent(row[name]), numeric=True)


_HEAD = _Column(head_name)


def _sets(found: Any) -> Block:
    text = (
        "Heads that stand in for each other hide each other: edited one at a time, none does much. So sets were built "
        "on discovery: from the best head and from the pairs that do more together than apart, always adding the head "
        "that gains most, going on through small gains, then taking out what is not needed.",
        "What a member does is measured with the other members edited: “without it” is what the set loses when this "
        "one member is left as it was.",
    )
    members = found.members[found.members["chosen"]]
    columns = {
        "head": _HEAD,
        "found by": _text("screen"),
        "kind, in the set": _text("role"),
        "alone (discovery)": _number("single"),
        "gain": _number("gain"),
        "without it (discovery)": _bounded("without", "without_low", "without_high"),
        "without it (held out)": _bounded("effect"),
        **_numbers("direct_share", "reads_picture", "reads_sound"),
    }
    steps = _texts("start", "donor", "action") | {"head": _HEAD} | _numbers("release", "gain")
    pairs = {
        "pair": _Column(lambda row: f"{head_name(row)} + {head_name({'layer': row['layer2'], 'head': row['head2']})}")
    } | _texts("donor")
    pairs |= _numbers("release", "synergy") | {"share of G": _percent("share")}
    sheets = (
        _sheet(members, "The members of the chosen set", columns),
        _sheet(found.synergies.head(24), "Pairs that do most together beyond what each does", pairs, folded=True),
        _sheet(found.steps, "Every step of the search", steps, folded=True),
    )
    return Block("sets", "Sets", "Which heads hide each other", text, sheets)


def _mechanisms(found: Any) -> Block:
    text = (
        "One card per named head: where it looks (attention from the generation position, by role), what it writes for "
        "the two answers, whether its pattern is driven by its queries or its keys, and where its release goes: to the "
        "logits, or through other heads' queries, keys and values, or through MLPs.",
    )
    figures = ("writes, sound's - picture's", "pattern driven by queries", *_ROADS.values())
    short = _texts("head", "looks at, in va", "with nothing to see")
    short |= {name: _text(name, numeric=True) for name in figures} | _texts("most through")
    every = _texts("head", "part") | {"head": _HEAD, "in": _text("cell"), "what": _text("what")}
    every |= {"value": _bounded("value")} | _texts("unit", "note")
    edges = _Column(lambda row: f"{row['edges']}{', renormalised' if row['renormalised'] else ''}")
    cuts = {"heads": _text("heads"), "edges": edges, "arm": _text("arm"), "release": _bounded("release")}
    cuts |= {"of G": _percent("share"), "mass cut": _number("mass")} | _texts("note")
    unit = _Column(lambda row: f"{row['unit']} L{row['layer']}" + (f" · {row['index']}" if row["index"] >= 0 else ""))
    units = {"unit": unit} | _texts("estimand", "donor") | {"effect": _bounded("mean"), "of G": _percent("share")}
    largest = found.units.sort_values("share", ascending=False, key=abs, kind="stable").head(30)
    sheets = (
        _sheet(pd.DataFrame(card_lines(found.cards)), "Mechanism cards, in short", short),
        _sheet(found.cuts[found.cuts["arm"].isin(MAIN_ARMS)], "Edges of these heads cut", cuts),
        _sheet(found.cuts, "Every cut, beside its controls", cuts, folded=True),
        _sheet(found.cards, "Everything on the cards", every, folded=True),
        _sheet(largest, "Whole groups, MLPs and layers: the 30 largest effects", units, folded=True),
    )
    return Block("mechanisms", "Mechanisms", "How each head does it", text, sheets)


def _knowledge(found: Any) -> Block:
    text = (
        "The sound may be known inside and still not be said. The logit lens reads words off the stream at every "
        "position and layer; a probe is trained to tell the sound's class on one half of the conflicts and tested "
        "on the other. Excess is what is left above the null: the same search for other sounds' words, or labels "
        "that were shuffled.",
    )
    layer = _Column(lambda row: str(row["layer"]) if row["layer"] >= 0 else MISSING, numeric=True)
    columns = _texts("method", "word") | {"in": _text("cell"), "at": _text("span"), "layer": layer}
    columns |= {"value": _bounded("value"), "null": _number("null")}
    columns |= {"excess": _bounded("excess", "excess_low", "excess_high")} | _texts("note")
    frame = found.knowledge
    chosen = frame[frame["chosen"]]
    sheets = (
        _sheet(chosen, "At the layers that discovery chose", columns),
        _sheet(frame, "Every layer", columns, folded=True),
    )
    return Block("knowledge", "Is it known?", "Is the sound in there?", text, sheets, figure="knowledge")


def _routes(found: Any) -> Block:
    text = (
        "By which road does the picture win? The edges of one road at a time are cut in all heads: from the picture to "
        "the question (relay), from the picture to the position where the answer is read (generation), and through "
        "sink positions (sink). Beside each stand cuts of equal size elsewhere. Positive: the cut lets the model hear.",
    )
    columns = _texts("route", "edges", "arm") | {"effect": _bounded("effect"), "of G": _percent("share")}
    columns |= {"says the sound": _percent("says_sound"), "mass cut": _number("mass")} | _texts("note")
    edges = found.routes["edges"].str
    whole = found.routes[~edges.contains("(", regex=False) | edges.contains("all layers", regex=False)]
    sheets = (
        _sheet(whole, "Cut in all layers", columns),
        _sheet(found.routes, "In windows of layers too", columns, folded=True),
    )
    return Block("routes", "Routes", "By which road?", text, sheets)


def _robustness(found: Any) -> Block:
    text = (
        "The search for single heads was made again with another blank, another mute, other words, another layout, "
        "equal loudness, another precision, and on clips drawn again. Jaccard: heads named both times over heads named "
        "either time.",
    )
    columns = _texts("variant") | {"Jaccard": _bounded("jaccard")} | _numbers("rank_correlation")
    columns |= _texts("kept", "lost", "gained", "turned", "note")
    sheet = _sheet(found.robustness, "The same search under other choices", columns)
    return Block("robustness", "Robustness", "Does it hang on a choice?", text, (sheet,))


def _captions(found: Any) -> Block:
    zeroed = found.captions["donor"] == "zero"
    text = (
        "Asked to describe the clip, does the model name what sounds? Heard: a word of the sounding answer stands in "
        "the caption; seen: one of the shown answer; hallucinated: one of any other. Heads are zeroed at the question "
        "and in every decoding step, or edited by the set's own donor at the question alone.",
        f"Over the {int(zeroed.sum())} arms that zero heads, the release of the one-word answer and that of captions "
        f"have the rank correlation {number(found.caption_correlation())}.",
    )
    columns = _texts("arm", "members", "donor") | {"heard": _percent("heard"), "seen": _percent("seen")}
    columns |= {"hallucinated": _percent("hallucinated"), "more heard": _bounded("release")}
    columns |= {"one word, of G": _percent("one_word")}
    drawn = found.captions["arm"].isin(["random", "member"])
    sheets = (
        _sheet(found.captions[~drawn], "Captions of held-out conflicts", columns),
        _sheet(found.captions[drawn], "Single members and random sets", columns, folded=True),
        _sheet(found.caption_texts, "What it wrote", _texts("id", "cell", "arm", "caption"), folded=True),
    )
    return Block("captions", "Captions", "And in free captions?", text, sheets)


def _repair(found: Any) -> Block:
    text = (
        "The set's edit as a plan that fits any clip: each member's output is replaced by a constant. Measured on the "
        "held-out half, with what else it changes.",
    )
    columns = {
        "quantity": _text("quantity"),
        "n": _text("n", numeric=True),
        **{name: _Column(partial(_changed, name=name), numeric=True) for name in ("before", "after", "change")},
        "bound of harm": _percent("bound"),
        "verdict": _text("verdict"),
    }
    code = 'plan = av_lens.Isolation.load("numbers").plan()\nmodel.generate(x, plan=plan, return_type="text")'
    sheets = (_sheet(found.repair, "The repair plan", columns),)
    return Block("repair", "Repair", "What the edit mends", text, sheets, code=code)


def _changed(row: Row, *, name: str) -> str:
    """C is in logits, a divergence in nats, all else are rates."""
    plain = row["quantity"] == "C" or str(row["verdict"]).startswith("reported")
    return number(row[name], sign=row["quantity"] == "C") if plain else percent(row[name])
