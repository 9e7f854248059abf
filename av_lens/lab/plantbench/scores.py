"""How good is a ranking, a naming, a kind? One model's scores against its truth (protocol section 9).

* *Damage last* is `isolate`'s score with heads that it says break behind all others.
* Named by `isolate`: heads of a releasing role, and members of the chosen set that do not break, at the site. A head's
  kind is its own, or, where that is undetermined, its kind as a member.
* Named by another method whose score is an effect on C: its mean is above delta. Others name nobody (NaN).
* *Exchanged labels*: in half of the conflicts, drawn at random, the two answers change places, which turns the sign of
  all their figures, G's too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from av_lens.isolation.measuring.engine import PRIMARY_DONORS
from av_lens.lab.calibration import Head, Mask, PlantTruth, auroc, best_releases, mask_of
from av_lens.results.record import RELEASING, SUPPRESSORS, Isolation
from av_lens.results.statistics import benjamini_hochberg, sign_flips

SITE = "suffix"
LEVEL, UNDETERMINED = 0.05, "undetermined"
DAMAGE_LAST = "isolate, damage last"
HeadTable = Float[np.ndarray, "layer head"]


def place_of(row: Mapping[str, Any]) -> Head:
    """The head that a row is about."""
    return int(row["layer"]), int(row["head"])


def isolate_score(found: Isolation) -> HeadTable:
    """Score every head as protocol section 9 says: lower bounds over delta, NaN where no release was measured."""
    out = np.full((found.n_layers, found.n_heads), np.nan)
    for row in best_releases(found, SITE).to_dict("records"):
        out[place_of(row)] = row["low"]
    for row in _chosen_members(found):
        out[place_of(row)] = np.fmax(out[place_of(row)], float(row["without_low"]))
    return out / found.summary["delta"]


def damage_last(found: Isolation) -> HeadTable:
    """Score every head as `isolate_score` does, with NaN for those whose role is that their edit breaks."""
    out = isolate_score(found)
    named = {place_of(row) for row in named_heads(found)}
    heads: Any = found.heads
    for row in heads[(heads["site"] == SITE) & (heads["role"] == "breaks")].to_dict("records"):
        if place_of(row) not in named:
            out[place_of(row)] = np.nan
    return out


def named_heads(found: Isolation) -> list[dict[str, Any]]:
    """List who is named: a head's own row, or, where its role is undetermined, its row as a member of the set."""
    out: dict[Head, dict[str, Any]] = {}
    heads: Any = found.heads
    for row in heads[(heads["site"] == SITE) & heads["role"].isin(RELEASING)].to_dict("records"):
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
    return members[members["chosen"] & (members["site"] == SITE) & (members["head"] >= 0)].to_dict("records")


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    words = {name: str(row.get(name, "")) for name in ("role", "donor", "flags")}
    holds = bool(row["confirmed"] or row["would_confirm"])  # whatever the gate forbids to say
    return {"layer": int(row["layer"]), "head": int(row["head"]), "confirmed": holds, **words}


def ranking(scores: HeadTable, truth: PlantTruth) -> dict[str, float]:
    """Judge a ranking, heads without a score last: `auroc`, `average precision`, `precision at k`; NaN for a null."""
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


def exchanged(found: Isolation, *, draws: int, seed: int) -> list[int]:
    """Count who is named in each draw of exchanged labels: release above delta and q < .05, whatever the role."""
    frame: Any = found.conflicts
    components = frame[(frame["half"] == "discovery") & frame["analysed"]]["component"].astype(int).tolist()
    effects = np.stack([found.arrays[f"discovery/{SITE}/release/{donor}"] for donor in PRIMARY_DONORS], axis=-1)
    s, family = float(found.summary["s"]), int(found.summary["family"])
    excess = effects[:, :, : found.n_heads] - s * found.arrays["discovery/G"][:, None, None, None]
    rng = np.random.default_rng(seed)
    counts: list[int] = []
    for draw in range(draws):
        above = rng.choice([-1.0, 1.0], size=len(components))[:, None, None, None] * excess
        p = sign_flips(above, components, family=family, seed=seed + draw).p
        q = benjamini_hochberg(np.repeat(p[..., None], len(SUPPRESSORS), axis=-1), family=family)[..., 0]
        counts.append(int(((q < LEVEL) & (above.mean(0) > 0)).any(-1).sum()))
    return counts
