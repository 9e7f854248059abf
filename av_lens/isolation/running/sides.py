"""Two checkpoints that are compared: their runs, and what is named in either, in each on held-out conflicts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from av_lens.errors import ProtocolError
from av_lens.isolation.measuring.bench import Chunk, Progress
from av_lens.isolation.measuring.effects import figures, measure_requests, requests
from av_lens.isolation.measuring.engine import PRIMARY_DONORS
from av_lens.isolation.naming.evidence import with_means
from av_lens.isolation.naming.roles import head_means
from av_lens.isolation.running.durable import watched_run
from av_lens.isolation.running.finding import IN_THE_SET
from av_lens.isolation.running.preparing import CONTROL, MEASURED, Options, prepared
from av_lens.isolation.sets.confirmation import NAMES
from av_lens.isolation.sets.sets import head_names, release_of_sets
from av_lens.model.binding import remembered_towers
from av_lens.results.dealing import CONFIRMATION, DISCOVERY
from av_lens.results.record import Isolation

Told = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Side:
    """One checkpoint: "A" or "B", its isolation, the folder of the run if it has one, the model if it is at hand."""

    letter: str
    found: Isolation
    folder: Path | None
    model: Any

    def rows(self, half: str) -> list[int]:
        """The conflicts of a half that were analysed."""
        table: Any = self.found.conflicts
        return np.flatnonzero((table["half"] == half) & table["analysed"]).tolist()

    @property
    def held_out(self) -> pd.Index:
        """The ids of the conflicts that confirmation's arrays hold, in order."""
        names: Any = self.found.conflicts["id"]
        return pd.Index(names.iloc[self.rows(CONFIRMATION)])

    @property
    def named(self) -> list[dict[Any, Any]]:
        """The rows of what has a name."""
        table: Any = self.found.heads
        return table[table["role"].isin(NAMES)].to_dict("records")


@dataclass(frozen=True)
class Node:
    """What is named in either: where, by which estimand and donor; `members` is the set that it belongs to."""

    layer: int
    head: int
    site: str
    estimand: str
    donor: str
    members: tuple[tuple[int, int], ...] = ()

    @property
    def at(self) -> tuple[int, int]:
        """Layer and head."""
        return self.layer, self.head


def place_of(row: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What makes a row the same node in both: a release alone and one in the set are of one node."""
    kind = "release" if row["estimand"] == IN_THE_SET else row["estimand"]
    return row["layer"], row["head"], row["site"], kind


def named_in_either(one: Side, two: Side) -> list[Node]:
    """List what is named in A or B, at A's donor."""
    nodes: dict[tuple[Any, ...], Node] = {}
    for side in (one, two):
        built: Any = side.found.members[side.found.members["chosen"]]
        members = tuple(zip(built["layer"].tolist(), built["head"].tolist(), strict=True))
        for row in side.named:
            place, donor = place_of(row), str(row["donor"])
            if place in nodes:
                continue
            if side is two and row["estimand"] == "release":
                donor = _first_donor(one.found, row["layer"], row["head"], row["site"]) or donor
            in_set = row["estimand"] == IN_THE_SET
            where = row["layer"], row["head"], str(row["site"])
            nodes[place] = Node(*where, str(row["estimand"]), donor, members if in_set else ())
    return list(nodes.values())


def _first_donor(found: Isolation, layer: int, head: int, site: str) -> str:
    """The donor of the largest mean release on discovery; "" where nothing was searched."""
    arrays = {donor: found.arrays.get(f"{DISCOVERY}/{site}/release/{donor}") for donor in PRIMARY_DONORS}
    means = {donor: head_means(values)[layer, head] for donor, values in arrays.items() if values is not None}
    return max(means, key=lambda donor: float(np.nan_to_num(means[donor], nan=-np.inf)), default="")


def effects_of(
    side: Side, nodes: Sequence[Node], conflicts: Sequence[Any] | None, progress: Progress | None, told: Told | None
) -> tuple[dict[Node, pd.Series], str]:
    """Give every node's effect on each held-out conflict of a side, by id, and say what is missing."""
    held = {node: values for node in nodes if (values := _recorded(side, node)) is not None}
    left = [node for node in nodes if node not in held]
    if not left:
        return held, ""
    if side.model is not None and conflicts is not None:
        return held | _measured(side, left, conflicts, progress, told), ""
    return held, (
        f"The run of {side.letter} does not hold the held-out effects of "
        f"{head_names(list(dict.fromkeys(node.at for node in left)))}. Give the conflicts and the models (`models=`), "
        "and they are measured."
    )


def _recorded(side: Side, node: Node) -> pd.Series | None:
    values = side.found.arrays.get(f"{CONFIRMATION}/{node.site}/{node.estimand}/{node.donor}")
    if values is None or np.isnan(values[:, *node.at]).all():
        return None
    return pd.Series(values[:, *node.at], index=side.held_out)


def _measured(
    side: Side, nodes: Sequence[Node], conflicts: Sequence[Any], progress: Progress | None, told: Told | None
) -> dict[Node, pd.Series]:
    said = side.found.protocol
    chosen: dict[str, Any] = {one.name: said[one.name] for one in fields(Options)} | {"sites": tuple(said["sites"])}
    chosen["s"] = {"given": said["s"], MEASURED: CONTROL}.get(said["s_rule"])
    run = prepared(side.model, conflicts, Options(**chosen), engine=None, progress=progress)
    pairs = [("weights", *(dict(p["model"]).get("weights") for p in (said, run.protocol)))]
    pairs += [(name, said[name], run.protocol[name]) for name in ("conflicts", "halves")]
    if unlike := [name for name, was, now in pairs if was != now]:
        raise ProtocolError(
            f"the run of {side.letter} was made with other {' and '.join(unlike)} than the model and conflicts that "
            "are given for it. Give its own."
        )
    out: dict[Node, pd.Series] = {}
    with watched_run(run, side.folder, budget=None, told=told), remembered_towers(side.model):
        first, held = side.rows(DISCOVERY), side.rows(CONFIRMATION)
        if any(node.site == "sinks" for node in nodes):
            run.bench.find_sinks(first)
        for site in dict.fromkeys(node.site for node in nodes):
            means, chunks = with_means(run.bench.chunks(first, site)), run.bench.chunks(held, site)
            for chunk in chunks:
                chunk.means = means
            found = _at_site(chunks, [node for node in nodes if node.site == site], np.array(held, dtype=np.int64))
            out |= {node: pd.Series(values, index=side.held_out) for node, values in found.items()}
    return out


def _at_site(chunks: list[Chunk], nodes: Sequence[Node], examples: np.ndarray) -> dict[Node, np.ndarray]:
    stage, out = "what is named in either", dict[Node, np.ndarray]()
    if single := [node for node in nodes if not node.members]:
        names, donors = (list(dict.fromkeys(getattr(one, of) for one in single)) for of in ("estimand", "donor"))
        wanted, heads = requests(chunks, names=names, donors=donors), sorted({node.at for node in single})
        found = figures(measure_requests(chunks, wanted, heads=heads, examples=examples, stage=stage))
        out |= {node: found[node.estimand, node.donor][:, *node.at] for node in single}
    for node in nodes:
        if node.members:
            sets = [node.members, tuple(one for one in node.members if one != node.at)]
            release = release_of_sets(chunks, sets, [node.donor] * 2, examples, stage).release
            out[node] = release[0] - release[1]
    return out
