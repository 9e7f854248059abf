"""Every named head's mechanism card: what it reads, what it writes, what drives its pattern, where its release goes.

One row of `cards` per figure, on confirmation, with its interval. `part` is "attention", "ov", "pattern" (`cards`) or
"path" (`head_paths`). Cards are made of every head that was given a role and of every member of the chosen set; a
member without a role of its own has the set's donor.

Choices where the protocol is silent: receivers are the heads after the first that releases, named or not, since what
a gate turns away may be carried by many heads of which none is large: the named ones, then those of the largest effect
on discovery (carries, silenced, any release), `MOST_RECEIVERS` in all. A head that both releases and carries is treated
as one that releases. Where the model's layers cannot be computed by themselves (`runs.restart`), only attention
is measured, and the other parts are one NaN row that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from av_lens.isolation.explaining import cards as card
from av_lens.isolation.explaining import head_paths
from av_lens.isolation.explaining.known import Known, Row, Subject
from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.donors import W_CELLS
from av_lens.isolation.measuring.plan_effects import Measured, measured, trace_of
from av_lens.isolation.measuring.recordings import Head
from av_lens.isolation.measuring.store import Arrays
from av_lens.isolation.naming.role_tests import Evidence, head_means

MOST_RECEIVERS = 24


def receivers(evidence: Evidence, found: Sequence[Subject]) -> list[Head]:
    """Choose whose inputs may receive what a sender releases: later heads, the named ones, then the largest."""
    named = {one.at for one in found}
    jobs = [evidence["carries"], evidence["silenced"], *evidence.by_donor("release").values()]
    size = np.max([np.nan_to_num(head_means(values)) for values in jobs], axis=0)
    first = min((one.layer for one in found if one.releases), default=len(size))
    later = [(layer, head) for layer, head in np.ndindex(*size.shape) if layer > first]
    chosen = sorted(later, key=lambda head: (head not in named, -size[head], head))[:MOST_RECEIVERS]
    return sorted(chosen)


def cards(known: Known) -> list[Row]:
    """Make the cards of every named head and every member of the chosen set: rows of `cards`."""
    rows: list[Row] = []
    sinks = known.sinks()
    for site, searched in known.searched.sites.items():
        found = known.subjects(site)
        if found:
            chunks, received = known.chunks(site), receivers(searched.evidence, found)
            measure = partial(measured, chunks, known.confirmation)
            rows += [row | {"site": site} for row in _site_rows(chunks[0], sinks, found, received, measure)]
    return rows


def _site_rows(
    chunk: Chunk,
    sinks: list[list[int]],
    found: Sequence[Subject],
    received: list[Head],
    measure: Callable[..., Measured],
) -> Iterator[Row]:
    yield from _attention_rows(measure("attention by role", {"sinks": sinks}, card.attention), found)
    because = obstacle(chunk)
    if because:
        for one in found:
            for part in ("ov", "pattern", "path"):
                yield _row(one, part, "", "not measured", np.full(3, np.nan), "", because)
        return
    heads = [one.at for one in found]
    depends = {"heads": heads}
    yield from _write_rows(measure("what heads write", depends, lambda chunk: card.writes(chunk, heads)), found)
    for releases, donors in ((True, ("blank_muted", "wa")), (False, ("blank_a",))):
        mine = [one for one in found if one.releases is releases]
        for donor in donors if mine else ():
            heads = [one.at for one in mine]
            compute = partial(_driven, heads=heads, donor=donor)
            made = measure(f"queries and keys from {donor}", {"heads": heads, "donor": donor}, compute)
            yield from _pattern_rows(made, mine, donor)
    for releases, base in ((True, "va"), (False, "blank_a")):
        mine = [one for one in found if one.releases is releases]
        if mine:
            senders, ends = [(one.at, one.donor) for one in mine], received if releases else []
            compute = partial(head_paths.paths, base=base, senders=senders, heads=ends)
            depends = {"base": base, "senders": senders, "heads": ends}
            made = measure("paths" if releases else "paths of carriers", depends, compute)
            yield from _path_rows(made, mine, base, ends)


def obstacle(chunk: Chunk) -> str:
    """Say why this model's layers cannot be computed by themselves."""
    trace = trace_of(chunk, "va")
    if trace.hooked_because:
        return f"not measured: {trace.hooked_because}"
    roles = ", ".join(trace.traits.bidirectional)
    return f"not measured: {roles} read both ways" if roles else ""


def _driven(chunk: Chunk, heads: Sequence[Head], donor: str) -> Arrays:
    if donor in W_CELLS and not chunk.has_third:
        shape, n = (len(chunk.examples), len(heads), 1 + len(card.DRIVES)), len(card.LOOKS)
        return {"effect": np.full(shape, np.nan), "looks": np.full((*shape, n), np.nan)}
    found = card.drives(chunk, heads, donor)
    chunk.drop_traces(*card.donor_cells(donor))
    return found


def _row(one: Subject, part: str, cell: str, what: str, bounds: np.ndarray, unit: str, note: str = "") -> Row:
    value, low, high = (float(bound) for bound in bounds)
    return {
        "layer": one.layer, "head": one.head, "part": part, "cell": cell, "what": what,
        "value": value, "low": low, "high": high, "unit": unit, "note": note,
    }  # fmt: skip


def _attention_rows(made: Measured, found: Sequence[Subject]) -> Iterator[Row]:
    for cell, question in card.CELLS:
        name = f"{cell} {question}"
        bounds = made.bounds(name)
        present = np.nansum(made.arrays[name], axis=(0, 1, 2, 3)) > 0
        for one in found:
            for query, asking in enumerate(("generation", "site")):
                for key in np.flatnonzero(present):
                    what = f"{asking} -> {card.KEYS[key]}"
                    at = bounds[:, one.layer, one.head, query, key]
                    words = cell if question == "ask" else f"{cell} ({question})"
                    yield _row(one, "attention", words, what, at, "share of attention")


def _write_rows(made: Measured, found: Sequence[Subject]) -> Iterator[Row]:
    values = made.arrays["writes"]
    whole = values[:, :, :3].sum(2, keepdims=True)
    made = Measured(made.half, {"writes": np.concatenate([whole, values], axis=2)})
    bounds = made.bounds("writes")
    for number, one in enumerate(found):
        for place, write in enumerate(("its write", *card.WRITES)):
            unit = "logit" if "evenly" not in write else "logit per unit of attention"
            for side, answer in enumerate(card.ANSWERS):
                yield _row(one, "ov", "va", f"{write}, on the {answer}", bounds[:, number, place, side], unit)


def _pattern_rows(made: Measured, found: Sequence[Subject], donor: str) -> Iterator[Row]:
    effects, looks = made.bounds("effect"), made.bounds("looks")
    whole = made.arrays["effect"][:, :, [-1]]
    shares = made.shares("effect", np.broadcast_to(whole, made.arrays["effect"].shape))
    seen = made.arrays["looks"][..., 0]
    moved = Measured(made.half, {"queries": seen[:, :, 0] - seen[:, :, 1], "both": seen[:, :, 0] - seen[:, :, 3]})
    driven, size = moved.shares("queries", moved.arrays["both"]), moved.bounds("both")
    for number, one in enumerate(found):
        for place, drive in enumerate((*card.DRIVES, card.ALL)):
            what = f"{drive} from {donor}: effect on C"
            yield _row(one, "pattern", "va", what, effects[:, number, place], "logit")
            if drive != card.ALL:
                moves = effects[1, number, -1] > 0 or effects[2, number, -1] < 0
                share = shares[:, number, place] if moves else np.full(3, np.nan)
                note = "" if moves else "z from there does nothing, so there is no share"
                yield _row(one, "pattern", "va", what, share, f"share of z from {donor}", note)
        for place, drive in enumerate(("as it is", *card.DRIVES[:3])):
            what = drive if not place else f"{drive} from {donor}"
            for look, role in enumerate(("picture", "sound")):
                at = looks[:, number, place, look]
                yield _row(one, "pattern", "va", f"{what}: attention to the {role}", at, "share of attention")
        said = drive_in_words(driven[:, number], size[:, number])
        what = f"driven by the queries ({donor})"
        yield _row(one, "pattern", "va", what, driven[:, number], "share of the moved attention to the picture", said)


def drive_in_words(share: np.ndarray, moved: np.ndarray) -> str:
    """Say what drives a pattern."""
    if not (moved[1] > 0 or moved[2] < 0):
        return "its attention to the picture does not move"
    if share[1] > 0.5:
        return "queries"
    return "keys" if share[2] < 0.5 else "undetermined"


def _path_rows(made: Measured, found: Sequence[Subject], base: str, heads: Sequence[Head]) -> Iterator[Row]:
    names = head_paths.columns(heads)
    values = made.arrays["effect"]
    joint = np.nan_to_num(values[:, :, names.index(head_paths.JOINT)]) if heads else 0.0
    rest = values[:, :, 0] - values[:, :, 1] - joint
    made = Measured(made.half, {"effect": np.concatenate([values, rest[:, :, None]], axis=2)})
    total = np.broadcast_to(values[:, :, [0]], made.arrays["effect"].shape)
    bounds, shares = made.bounds("effect"), made.shares("effect", total)
    for number, one in enumerate(found):
        note = f"donor {one.donor}; effect on {'C' if base == 'va' else 'G'}"
        for place, what in enumerate((*names, head_paths.REMAINDER)):
            yield _row(one, "path", base, what, bounds[:, number, place], "logit", note)
            if what != head_paths.TOTAL:
                yield _row(one, "path", base, what, shares[:, number, place], "share of total", note)
