"""`compare`: did training repair it, and in the same nodes? Two checkpoints on one manifest; protocol section 8."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from av_lens.errors import InputError, ProtocolError
from av_lens.isolation.explaining.captions import FIGURES, SHOWN
from av_lens.isolation.measuring.bench import Progress
from av_lens.isolation.naming.roles import LEVEL
from av_lens.isolation.running.dealt import Dealt
from av_lens.isolation.running.durable import PROTOCOL, differences
from av_lens.isolation.running.pipeline import isolate
from av_lens.isolation.running.preparing import EXPLORATORY
from av_lens.isolation.running.sides import Node, Side, Told, effects_of, named_in_either, place_of
from av_lens.isolation.sets.sets import head_names
from av_lens.results import dealing
from av_lens.results.comparison import OUTCOMES, Comparison, frame
from av_lens.results.dealing import CONFIRMATION, DISCOVERY, Halves, Member
from av_lens.results.dyadic import Inference
from av_lens.results.provenance import stamp
from av_lens.results.record import Isolation
from av_lens.results.statistics import holm

BOTH = "both"
SAME = ("protocol", "layout", "seed", "sites")
"""The options that two runs must have in common."""
ALIKE = {"n_layers": "numbers of layers", "n_heads": "numbers of heads", "tokenizer": "tokenizers",
         "prompt": "layouts of the prompt"}  # fmt: skip
ORIGIN = ("model", "weights", "created", "protocol_hash", "inference")
Rows = list[dict[str, Any]]


def compare(
    a: Any,
    b: Any,
    conflicts: Sequence[Any] | None = None,
    *,
    models: tuple[Any, Any] | None = None,
    sites: Sequence[str] = ("suffix",),
    s: float | None = None,
    seed: int = 0,
    layout: str = "in_video",
    captions: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
    told: Told | None = None,
) -> Comparison:
    """Compare two checkpoints on one manifest, conflict by conflict.

    Args:
        a: the first: a `HookedAVLLM`, an `Isolation`, or the folder of a saved run.
        b: the second, likewise.
        conflicts: `Conflict`s; needed where a model is given.
        models: of saved runs the two models, to measure what their records do not hold.
        sites: site sets to search, where models are given; saved runs have theirs.
        s: see `isolate`.
        seed: see `isolate`.
        layout: see `isolate`.
        captions: also let models that are given describe the clips.
        out: a folder for the runs of models (`a` and `b` in it); what it holds is not measured again.
        progress: called as `progress(stage, done, total)`.
        told: called with lines worth reading.

    Returns:
        The comparison.

    Raises:
        InputError: a model without conflicts, a folder without a record, or a record that does not name sources.
        ProtocolError: what cannot be paired (other conflicts, model sizes, tokenizers, layouts or options), too few
            conflicts that are competent in both, and what `isolate` refuses.
    """
    options: dict[str, Any] = {"sites": tuple(sites), "s": s, "seed": seed, "layout": layout, "captions": captions}
    options |= {"progress": progress, "told": told}
    one, two = (
        _side(letter, given, model, conflicts, None if out is None else Path(out) / letter.lower(), options)
        for letter, given, model in zip("AB", (a, b), models or (None, None), strict=True)
    )
    _refuse_unlike(one, two)
    both, nodes = _competent(one, two), named_in_either(one, two)
    measured = [effects_of(side, nodes, conflicts, progress, told) for side in (one, two)]
    effects, missing = [found for found, _ in measured], [said for _, said in measured if said]
    tables = {"behaviour": _behaviour(one.found, both), "nodes": _node_rows(one, two, both, nodes, effects)}
    tables["captions"] = _captions(one, two, both)
    kept = both.reset_index()[["id", "half", "C_a", "C_b", "G_a", "G_b"]]
    fewest = min(_counts(both))
    few = (
        f"{EXPLORATORY}: {fewest} conflicts of a half are competent in both; a verdict needs {dealing.FIRM_CONFLICTS}."
    )
    reasons = [few] * (fewest < dealing.FIRM_CONFLICTS) + missing
    kind, verdict = _verdict(tables, len(both), len(one.found.conflicts))
    parts: dict[str, Any] = {name: frame(name, rows) for name, rows in tables.items()} | {"conflicts": kept}
    parts |= {side.letter.lower(): str(side.found.provenance.get("model", side.letter)) for side in (one, two)}
    origin = {f"run {side.letter}": {k: side.found.provenance.get(k) for k in ORIGIN} for side in (one, two)}
    return Comparison(
        verdict=f"Exploratory, no verdict. {verdict}" if few in reasons else verdict,
        verdict_kind=kind,
        stamps=(EXPLORATORY,) * (few in reasons),
        reasons=tuple(reasons),
        provenance=stamp(**origin),
        **parts,
    )


def _side(
    letter: str, given: Any, model: Any, conflicts: Sequence[Any] | None, folder: Path | None, options: dict[str, Any]
) -> Side:
    if isinstance(given, Isolation):
        return Side(letter, given, None, model)
    if isinstance(given, str | Path):
        place = Path(given)
        return Side(letter, Isolation.load(place), place if (place / PROTOCOL).exists() else None, model)
    if conflicts is None:
        raise InputError(f"{letter} is a model: give the conflicts that it is to be compared on, or a saved run of it.")
    try:
        found = isolate(given, conflicts, quick=True, named_only=True, out=folder, **options)
    except ProtocolError as refused:
        raise ProtocolError(f"{letter} ({given.name}) cannot be compared: {refused}") from refused
    return Side(letter, found, folder, given)


def _refuse_unlike(one: Side, two: Side) -> None:
    sides = [side.found.protocol for side in (one, two)]
    mend = "Compare runs of one manifest, by the same options."
    listed = [_manifest(side.found) for side in (one, two)]
    for letter, alone in zip("AB", (listed[0] - listed[1], listed[1] - listed[0]), strict=True):
        if alone:
            raise ProtocolError(f"A and B have other conflicts: {min(alone)!r} is in {letter} alone. {mend}")
    shared = sides[0]["conflicts"].keys() & sides[1]["conflicts"].keys()  # a third clip is drawn, and is no cause
    parts = [{name: {**side["conflicts"][name], "third": ""} for name in sorted(shared)} for side in sides]
    if changed := differences({"conflicts": parts[0]}, {"conflicts": parts[1]}):
        raise ProtocolError(f"A and B have other conflicts: they differ in {'; '.join(changed)}. {mend}")
    for name in SAME:
        was, now = (side[name] for side in sides)
        if was != now:
            raise ProtocolError(f"A and B were isolated otherwise: {name} is {was!r} in A and {now!r} in B. {mend}")
    for name, what in ALIKE.items():
        was, now = (side["model"].get(name) for side in sides)
        if None not in (was, now) and was != now:
            raise ProtocolError(
                f"A and B have other {what} ({was} and {now}): a node of one is none of the other. Compare checkpoints "
                "of one architecture."
            )


def _manifest(found: Isolation) -> set[str]:
    left_out = (found.provenance.get("answers") or {}).get("left_out", {})
    return {*found.protocol["conflicts"], *found.protocol["halves"].get("doubled", ()), *left_out}


def _counts(both: Any) -> list[int]:
    return [int((both["half"] == name).sum()) for name in (DISCOVERY, CONFIRMATION)]


def _competent(one: Side, two: Side) -> Any:
    """Join the conflicts that are competent in both, by id, with A's row and half and both's figures."""
    tables: list[Any] = [side.found.conflicts.set_index("id") for side in (one, two)]
    first: Any = tables[0].assign(row=np.arange(len(tables[0])))
    joined: Any = pd.merge(first, tables[1], left_index=True, right_index=True, suffixes=("_a", "_b"))
    joined = joined.rename(columns={"half_a": "half"})
    joined = joined[joined["competent_a"] & joined["competent_b"] & (joined["half"] != dealing.LOST)]
    counts, own = _counts(joined), [int(table["competent"].sum()) for table in tables]
    if min(counts) < dealing.FEWEST:
        raise ProtocolError(
            f"refused: {counts[0]} and {counts[1]} conflicts in the halves are competent in both models ({own[0]} in "
            f"A, {own[1]} in B, of {len(first)}); a comparison needs at least {dealing.FEWEST} in each half. Add "
            "conflicts, or clips that both models know."
        )
    return joined


def _rule(found: Isolation, rows: Sequence[int], *, held_out: bool = False) -> Inference:
    """Choose what some of A's conflicts are judged by, as its deal does."""
    table: Any = found.conflicts
    sources = found.provenance.get("sources")
    if sources is None:
        raise InputError("A's record does not name its conflicts' sources: an older av_lens wrote it. Isolate A again.")
    members = [Member(name, sources[name][0], sources[name][1], "") for name in table["id"]]
    said, none = found.protocol, [""] * len(members)
    halves = Halves(tuple(table["half"]), tuple(table["component"]), said["seed"], said["halves"]["rule"])
    deal = Dealt([], members, halves, list(zip(none, none, strict=True)), none, (), said["protocol"])
    return deal.rules(rows, seed=said["seed"] + held_out)[0]


def _change(
    rule: Inference, a: Float[np.ndarray, " example"], b: Float[np.ndarray, " example"], *, test: bool = False
) -> dict[str, Any]:
    """One row: the change, and both means over the conflicts that both have (one's own where the other has none)."""
    found, known = rule.mean(b - a), ~np.isnan(a + b)
    shown = {name: of[known if known.any() else ~np.isnan(of)] for name, of in (("a", a), ("b", b))}
    means = {name: float(of.mean()) if len(of) else math.nan for name, of in shown.items()}
    out = {"n": int(known.sum()), **means, "change": float(found.value)}
    out |= {"low": float(found.low), "high": float(found.high)}
    if not test:
        return out
    return out | {"p": float(np.minimum(1.0, 2 * np.minimum(rule.test(b - a).p, rule.test(a - b).p)))}


def _behaviour(found: Isolation, both: Any) -> Rows:
    rows: Rows = []
    for half in (BOTH, DISCOVERY, CONFIRMATION):
        some: Any = both if half == BOTH else both[both["half"] == half]
        rule = _rule(found, some["row"].tolist(), held_out=half == CONFIRMATION)
        C, G = (np.stack([some[f"{name}_{side}"] for side in "ab"]) for name in ("C", "G"))
        of = {"C": C, "G": G, "gap": G - C}.items()
        rows += [{"half": half, "quantity": name} | _change(rule, *pair) for name, pair in of]
    return rows


def _held_out(both: Any) -> Any:
    return both[(both["half"] == CONFIRMATION) & (both["half_b"] == CONFIRMATION)]


def _node_rows(
    one: Side, two: Side, both: Any, nodes: Sequence[Node], effects: Sequence[Mapping[Node, pd.Series]]
) -> Rows:
    held = _held_out(both)
    rule = _rule(one.found, held["row"].tolist(), held_out=True)
    delta = float(one.found.summary["s"]) * float(held["G_a"].mean())
    rows: Rows = []
    for node in nodes:
        missing = pd.Series(np.nan, index=held.index)
        pair = (of.get(node, missing).reindex(held.index).to_numpy(dtype=float) for of in effects)
        row: dict[str, Any] = {"name": head_names([node.at]), **{k: v for k, v in vars(node).items() if k != "members"}}
        for side, letter in ((one, "a"), (two, "b")):
            named = [other for other in side.named if place_of(other) == place_of(row)]
            row |= {f"role_{letter}": named[0]["role"] if named else ""}
            row |= {f"confirmed_{letter}": bool(named and named[0]["confirmed"])}
        rows.append(row | {"delta": delta} | _change(rule, *pair, test=True))
    adjusted = holm(np.array([row["p"] for row in rows], dtype=float), family=len(rows))
    return [
        row | {"p_holm": float(p), "outcome": outcome(row, float(p))} for row, p in zip(rows, adjusted, strict=True)
    ]


def outcome(row: Mapping[str, Any], p: float) -> str:
    """Say what became of a node."""
    if not p < LEVEL:
        return "not measured" if math.isnan(p) else "unchanged"
    across = min(row["a"], row["b"]) <= row["delta"] < max(row["a"], row["b"])
    fallen, risen = ("gone", "new") if across else ("weaker", "stronger")
    return fallen if row["change"] < 0 else risen


def _captions(one: Side, two: Side, both: Any) -> Rows:
    held, rows = _held_out(both), Rows()
    rule = _rule(one.found, held["row"].tolist(), held_out=True)
    for arm in SHOWN:
        of = [_named_by(side, arm) for side in (one, two)]
        if all(table is not None for table in of):
            a, b = (table.reindex(held.index).to_numpy(dtype=float).T for table in of)
            rows += [{"arm": arm, "figure": name} | _change(rule, a[i], b[i]) for i, name in enumerate(FIGURES)]
    return rows


def _named_by(side: Side, arm: str) -> Any:
    arms, values = side.found.captions["arm"].tolist(), side.found.arrays.get(f"{CONFIRMATION}/captions")
    return (
        None if values is None or arm not in arms else pd.DataFrame(values[:, arms.index(arm)].T, index=side.held_out)
    )


MEANINGS = {"C": "Hearing under conflict (C)", "G": "hearing with nothing to see (G)", "gap": "the gap (G - C)"}


def _verdict(tables: Mapping[str, Rows], n: int, total: int) -> tuple[str, str]:
    rows = [row for row in tables["behaviour"] if row["half"] == BOTH]
    groups = {name: [row for row in tables["nodes"] if row["outcome"] == name] for name in OUTCOMES}
    kind = "changed" if any(map(_moved, rows)) or any(groups[name] for name in OUTCOMES[:4]) else "no change found"
    said = [f"{n} of {total} conflicts are competent in both."] + ["No change is found."] * (kind != "changed")
    said.append("; ".join(f"{MEANINGS[row['quantity']]} {_moves(row)}" for row in rows) + ".")
    parts = [f"{name}: {', '.join(map(_shown, of))}" for name, of in groups.items() if of]
    said.append(
        f"Of {len(tables['nodes'])} nodes named in either, {'; '.join(parts)}."
        if parts
        else "No node is named in either."
    )
    heard = [row for row in tables["captions"] if (row["arm"], row["figure"]) == ("none", "heard")]
    said += [f"The share of captions that name what is heard {_moves(row, unit='')}." for row in heard]
    return kind, " ".join(said)


def _moved(row: Mapping[str, Any]) -> bool:
    return row["low"] > 0 or row["high"] < 0


def _moves(row: Mapping[str, Any], unit: str = " logits") -> str:
    verb = ("rises" if row["change"] > 0 else "falls") if _moved(row) else "is not shown to change"
    bounds = f"{row['change']:+.2f}{unit} [{row['low']:+.2f}, {row['high']:+.2f}]"
    return f"{verb}, from {row['a']:.2f} to {row['b']:.2f} ({bounds})"


def _shown(row: Mapping[str, Any]) -> str:
    return f"{row['name']} ({row['role_a'] or row['role_b']}, {row['a']:.2f} to {row['b']:.2f})"
