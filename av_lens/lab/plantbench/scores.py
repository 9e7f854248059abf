"""How good is a ranking, a naming, a kind? One model's scores against its truth (protocol section 9).

Nodes are heads and MLPs: tables are `[layer, node]`, the layer's MLP last, which -1 indexes.

* *Damage last* is `isolate`'s score with nodes that it says break behind all others.
* Who is *named* and *confirmed*: `docs/plantbench.md`. Of the chosen set members that do not break are named, at any
  site searched; a node's kind is its own, or, where that is undetermined, its kind as a member.
* *Struck*: what would be confirmed, were it not for the rule that one donor alone does not confirm.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from av_lens.isolation.sets.confirmation import BY_QUESTION, ONE_DONOR
from av_lens.lab.calibration import Head, Mask, PlantTruth, auroc, best_releases, mask_of
from av_lens.results.record import RELEASING, SUPPRESSORS, Isolation

UNDETERMINED = "undetermined"
DAMAGE_LAST = "isolate, damage last"
NodeTable = Float[np.ndarray, "layer node"]


def place_of(row: Mapping[str, Any]) -> Head:
    """The node that a row is about."""
    return int(row["layer"]), int(row["head"])


def isolate_score(found: Isolation) -> NodeTable:
    """Score every node as protocol section 9 says: lower bounds over delta, NaN where no release was measured."""
    out = np.full((found.n_layers, found.n_heads + 1), np.nan)
    evidence: Any = found.evidence
    for row in (row for site in evidence["site"].unique() for row in best_releases(found, site).to_dict("records")):
        out[place_of(row)] = np.fmax(out[place_of(row)], row["low"])
    for row in _chosen_members(found):
        out[place_of(row)] = np.fmax(out[place_of(row)], float(row["without_low"]))
    return out / found.summary["delta"]


def damage_last(found: Isolation) -> NodeTable:
    """Score every node as `isolate_score` does, with NaN for those whose role is that their edit breaks."""
    out = isolate_score(found)
    named = {place_of(row) for row in named_nodes(found)}
    nodes: Any = found.nodes
    for row in nodes[nodes["role"] == "breaks"].to_dict("records"):
        if place_of(row) not in named:
            out[place_of(row)] = np.nan
    return out


def named_nodes(found: Isolation) -> list[dict[str, Any]]:
    """List who is named: a node's own row, or, where its role is undetermined, its row as a member of the set."""
    out: dict[Head, dict[str, Any]] = {}
    nodes: Any = found.nodes
    for row in nodes[nodes["role"].isin(RELEASING)].to_dict("records"):
        out.setdefault(place_of(row), {**_entry(row), "single": True, "member": False})
    for row in _chosen_members(found):
        mine = out.get(place_of(row))
        if mine is not None:
            turns = mine["role"] == UNDETERMINED and row["role"] in SUPPRESSORS
            mine |= {"member": True, "role": str(row["role"]) if turns else mine["role"]}
        elif row["role"] != "breaks":
            out[place_of(row)] = {**_entry(row), "single": False, "member": True}
    return [out[at] for at in sorted(out)]


def _chosen_members(found: Isolation) -> list[dict[Any, Any]]:
    members: Any = found.members
    return members[members["chosen"]].to_dict("records")


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    words = {name: str(row.get(name, "")) for name in ("role", "donor", "flags")}
    holds = bool(row["confirmed"] or row["would_confirm"])  # whatever the gate forbids to say
    struck = {"struck": row.get("status") in (ONE_DONOR, BY_QUESTION)}
    return {"layer": int(row["layer"]), "head": int(row["head"]), "confirmed": holds, **struck, **words}


def ranking(scores: NodeTable, truth: PlantTruth) -> dict[str, float]:
    """Judge a ranking, nodes without a score last: `auroc`, `average precision`, `precision at k`; NaN for a null."""
    counted = ~mask_of(truth.free_riders, scores.shape)
    values = np.where(np.isnan(scores), np.nanmin(scores, initial=0.0) - 1, scores)[counted]
    positive = mask_of(truth.kinds, scores.shape)[counted]
    if np.isnan(scores).all() or not positive.any():
        return dict.fromkeys(("auroc", "average precision", "precision at k"), math.nan)
    return {
        "auroc": auroc(values.tolist(), positive.tolist()),
        "average precision": average_precision(values, positive),
        "precision at k": precision_at(values, positive, int(positive.sum())),
    }


def average_precision(values: Float[np.ndarray, " head"], positive: Bool[np.ndarray, " head"]) -> float:
    """Average the precision at every true head, going down the ranking; heads of equal score come in together."""
    if not positive.any():
        return math.nan
    total = 0.0
    for level in np.unique(values[positive]):
        above = values >= level
        total += (values[positive] == level).sum() * positive[above].mean()
    return float(total / positive.sum())


def precision_at(values: Float[np.ndarray, " head"], positive: Bool[np.ndarray, " head"], k: int) -> float:
    """Count the true heads among the first k; where heads of equal score straddle the place, their share."""
    cut = np.sort(values)[::-1][k - 1]
    above, level = values > cut, values == cut
    return float((positive[above].sum() + (k - above.sum()) * positive[level].mean()) / k)


def naming(named: Mask, truth: PlantTruth) -> dict[str, float]:
    """Judge a named set; precision is NaN where nobody who counts is named, recall for a null; decoys are innocent."""
    guilty, riders = mask_of(truth.kinds, named.shape), mask_of(truth.free_riders, named.shape)
    hits, false = int((named & guilty).sum()), int((named & ~riders & ~guilty).sum())
    return {
        "named": float(named.sum()),
        "false": float(false),
        "false decoys": float(sum(bool(named[head]) for head in truth.decoys)),
        "precision": hits / (hits + false) if hits + false else math.nan,
        "recall": hits / int(guilty.sum()) if guilty.any() else math.nan,
    }


def kinds_right(named: Sequence[Mapping[str, Any]], truth: PlantTruth) -> dict[str, float]:
    """Compare roles with measured kinds: `kind right` over all true heads, `kind right of named` over the named."""
    roles = {place_of(row): str(row["role"]) for row in named}
    right = sum(roles.get(head) == kind for head, kind in truth.kinds.items())
    seen = sum(head in roles for head in truth.kinds)
    shares = {"kind right": len(truth.kinds), "kind right of named": seen}
    return {name: right / of if of else math.nan for name, of in shares.items()}
