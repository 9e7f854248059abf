"""How good is a ranking, a naming, a kind? One model's scores against its truth (protocol section 9).

* `isolate`'s score of a head: the lower 95% bound of its release (by the primary donor of largest mean on discovery),
  or of [release of its set minus release of the set without it] if that is larger, over delta. *Damage last* is the
  same with heads that it says break (their edit is mere damage) behind all others.
* Named by `isolate`: heads of a releasing role, and members of the chosen set that do not break, at the site. A head's
  kind is its own, or, where that is undetermined, its kind as a member, with the other members edited. *Kind right* is
  counted over all true heads: unnamed and undetermined heads are wrong.
* Named by another method whose score is an effect on C: its mean is above delta. Others name nobody (NaN).
* Free riders count neither way; decoys are innocent.
* *Exchanged labels*: in half of the conflicts, drawn at random, the two answers change places, which turns the sign of
  all their figures, G's too. Whoever is named then is named by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.lab.calibration import auroc
from av_lens.lab.plantbench.truth import Head, PlantTruth
from av_lens.results.record import Isolation
from av_lens.results.statistics import benjamini_hochberg, sign_flips
from av_lens.results.tables import RELEASING, SUPPRESSORS

SITE = "suffix"
LEVEL, UNDETERMINED = 0.05, "undetermined"
DAMAGE_LAST = "isolate, damage last"
Table = Float[np.ndarray, "layer head"]
Mask = Bool[np.ndarray, "layer head"]


def isolate_score(found: Isolation) -> Table:
    """Score every head as protocol section 9 says.

    Args:
        found: the record.

    Returns:
        Lower bounds over delta, NaN where no release was measured.
    """
    frame: Any = found.evidence
    keep = (frame["estimand"] == "release") & (frame["half"] == "discovery") & (frame["site"] == SITE)
    frame = frame[keep & frame["donor"].isin(PRIMARY_DONORS)]
    out = np.full((found.n_layers, found.n_heads), np.nan)
    if len(frame):
        best = frame.loc[frame.groupby(["layer", "head"])["mean"].idxmax()]
        out[best["layer"].to_numpy(), best["head"].to_numpy()] = best["low"].to_numpy()
    members: Any = found.members
    for row in members[members["chosen"] & (members["site"] == SITE)].to_dict("records"):
        at = int(row["layer"]), int(row["head"])
        out[at] = np.fmax(out[at], float(row["without_low"]))
    return out / found.summary["delta"]


def damage_last(found: Isolation) -> Table:
    """Score every head as `isolate_score` does, but for those whose role is that their edit breaks.

    Args:
        found: the record.

    Returns:
        Lower bounds over delta, NaN where no release was measured and for heads that break.
    """
    out = isolate_score(found)
    named = {(row["layer"], row["head"]) for row in named_heads(found)}
    heads: Any = found.heads
    for row in heads[(heads["site"] == SITE) & (heads["role"] == "breaks")].to_dict("records"):
        if (row["layer"], row["head"]) not in named:
            out[int(row["layer"]), int(row["head"])] = np.nan
    return out


def named_heads(found: Isolation) -> list[dict[str, Any]]:
    """List who is named, one entry per head.

    Args:
        found: the record.

    Returns:
        `layer head role confirmed donor flags single member`: a head's own row before its row as a member, whose role
        stands where its own is undetermined.
    """
    out: dict[Head, dict[str, Any]] = {}
    heads: Any = found.heads
    for row in heads[(heads["site"] == SITE) & heads["role"].isin(RELEASING)].to_dict("records"):
        out.setdefault((int(row["layer"]), int(row["head"])), {**_entry(row), "single": True, "member": False})
    members: Any = found.members
    for row in members[members["chosen"] & (members["site"] == SITE)].to_dict("records"):
        at = int(row["layer"]), int(row["head"])
        if at in out:
            out[at]["member"] = True
            if out[at]["role"] == UNDETERMINED and row["role"] in SUPPRESSORS:
                out[at]["role"] = str(row["role"])
        elif row["role"] != "breaks":
            out[at] = {**_entry(row), "single": False, "member": True}
    return [out[at] for at in sorted(out)]


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    words = {name: str(row.get(name, "")) for name in ("role", "donor", "flags")}
    return {"layer": int(row["layer"]), "head": int(row["head"]), "confirmed": bool(row["confirmed"]), **words}


def ranking(scores: Table, truth: PlantTruth) -> dict[str, float]:
    """Judge a ranking; heads without a score come last.

    Args:
        scores: larger is guiltier.
        truth: what is known.

    Returns:
        `auroc`, `average precision`, `precision at k`; NaN for a null.
    """
    counted, guilty = truth.counted(*scores.shape), truth.guilty(*scores.shape)
    values = np.where(np.isnan(scores), np.nanmin(scores, initial=0.0) - 1, scores)[counted]
    positive = guilty[counted]
    if np.isnan(scores).all() or not positive.any():
        return dict.fromkeys(("auroc", "average precision", "precision at k"), math.nan)
    return {
        "auroc": auroc(values.tolist(), positive.tolist()),
        "average precision": average_precision(values, positive),
        "precision at k": precision_at(values, positive, int(positive.sum())),
    }


def average_precision(values: Float[np.ndarray, " head"], positive: Bool[np.ndarray, " head"]) -> float:
    """Average the precision at every true head, going down the ranking; heads of equal score come in together.

    Args:
        values: scores.
        positive: which heads are true.

    Returns:
        Between 0 and 1; NaN without a true head.
    """
    if not positive.any():
        return math.nan
    total = 0.0
    for level in np.unique(values[positive]):
        above = values >= level
        total += (values[positive] == level).sum() * positive[above].mean()
    return float(total / positive.sum())


def precision_at(values: Float[np.ndarray, " head"], positive: Bool[np.ndarray, " head"], k: int) -> float:
    """Count the true heads among the first k; where heads of equal score straddle the place, their share.

    Args:
        values: scores.
        positive: which heads are true.
        k: how many heads are looked at.

    Returns:
        The share of true heads.
    """
    cut = np.sort(values)[::-1][k - 1]
    above, level = values > cut, values == cut
    return float((positive[above].sum() + (k - above.sum()) * positive[level].mean()) / k)


def naming(named: Mask, truth: PlantTruth) -> dict[str, float]:
    """Judge a named set.

    Args:
        named: who is named.
        truth: what is known.

    Returns:
        `named`, `false` (named and innocent, decoys among them), `false decoys`, `precision` (NaN where nobody who
        counts is named), `recall` (NaN for a null).
    """
    counted, guilty = truth.counted(*named.shape), truth.guilty(*named.shape)
    hits, false = int((named & guilty).sum()), int((named & counted & ~guilty).sum())
    decoys = sum(bool(named[head]) for head in truth.decoys)
    return {
        "named": float(named.sum()),
        "false": float(false),
        "false decoys": float(decoys),
        "precision": hits / (hits + false) if hits + false else math.nan,
        "recall": hits / int(guilty.sum()) if guilty.any() else math.nan,
    }


def mask_of(heads: Sequence[Head], shape: tuple[int, int]) -> Mask:
    """Lay heads out.

    Args:
        heads: the heads.
        shape: layers and heads of a layer.

    Returns:
        `[layer, head]`, true for these heads.
    """
    out = np.zeros(shape, dtype=bool)
    for head in heads:
        out[head] = True
    return out


def kinds_right(named: Sequence[Mapping[str, Any]], truth: PlantTruth) -> dict[str, float]:
    """Compare roles with measured kinds.

    Args:
        named: from `named_heads`.
        truth: what is known.

    Returns:
        `kind right` over all true heads, `kind right of named` over those that are named; NaN where there are none.
    """
    roles = {(int(row["layer"]), int(row["head"])): str(row["role"]) for row in named}
    right = sum(roles.get(head) == kind for head, kind in truth.kinds.items())
    seen = sum(head in roles for head in truth.kinds)
    return {
        "kind right": right / len(truth.kinds) if truth.kinds else math.nan,
        "kind right of named": right / seen if seen else math.nan,
    }


def exchanged(found: Isolation, *, draws: int, seed: int) -> list[int]:
    """Count who `isolate`'s test of single releases names when labels are exchanged at random.

    Naming needs a release above delta with q < .05 over heads x sites x [3 roles x 3 donors + 2], whatever the role.

    Args:
        found: the record.
        draws: how many exchanges.
        seed: draws them.

    Returns:
        The number of heads named in each draw.
    """
    effects = np.stack([found.arrays[f"discovery/{SITE}/release/{donor}"] for donor in PRIMARY_DONORS], axis=-1)
    hearing, components = found.arrays["discovery/G"], _components(found)
    s, family = float(found.summary["s"]), int(found.summary["family"])
    per_donor = len(SUPPRESSORS)
    rng = np.random.default_rng(seed)
    counts: list[int] = []
    for draw in range(draws):
        signs = rng.choice([-1.0, 1.0], size=len(components))[:, None, None, None]
        above = signs * (effects - s * hearing[:, None, None, None])
        p = sign_flips(above, components, family=family, seed=seed + draw).p
        q = benjamini_hochberg(np.repeat(p[..., None], per_donor, axis=-1), family=family)[..., 0]
        counts.append(int(((q < LEVEL) & (above.mean(0) > 0)).any(-1).sum()))
    return counts


def _components(found: Isolation) -> list[int]:
    frame: Any = found.conflicts
    return [int(one) for one in frame[(frame["half"] == "discovery") & frame["analysed"]]["component"]]
