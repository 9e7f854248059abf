"""Does the instrument find what was put there? Isolate a model whose guilty heads are known, and compare.

The score of a head is the lower 95% bound of its release, by the donor with the largest mean on discovery; AUROC is the
chance that a planted head scores above another; precision at k is the share of planted heads among the first k, k being
how many were planted. Passed: every planted head ranks before every other. A free rider (a planted head whose reversion
changes nothing) counts neither way. Sign: positive release gives hearing back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from av_lens.errors import InputError
from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.lab.plantbench.truth import TRUTH, truth_of
from av_lens.organism.saving import shipped
from av_lens.reports import Calibration
from av_lens.results.record import Isolation
from av_lens.results.tables import SUPPRESSORS
from av_lens.whole_files import read_object

_NAMED = (*SUPPRESSORS, "undetermined")


def planted_truth(name: str = "av-tiny-planted") -> dict[tuple[int, int], str]:
    """Read which heads of a shipped model were planted."""
    path = shipped() / name / TRUTH
    if not path.is_file():
        raise InputError(f"{name} ships no {TRUTH}, so there is no truth to calibrate against.")
    return read_truth(read_object(path))


def read_truth(content: Mapping[str, Any]) -> dict[tuple[int, int], str]:
    """Bring a truth file's content to (layer, head) and kind, free riders left out."""
    kinds = dict(truth_of(content).kinds)
    if not kinds:
        raise InputError("the truth file lists no planted head under 'heads'.")
    return kinds


def best_releases(found: Isolation, site: str) -> Any:
    """Every head's row of evidence for its release on discovery, by the primary donor of the largest mean."""
    frame: Any = found.evidence
    keep = (frame["estimand"] == "release") & (frame["half"] == "discovery") & (frame["site"] == site)
    frame = frame[keep & frame["donor"].isin(PRIMARY_DONORS)]
    return frame.loc[frame.groupby(["layer", "head"])["mean"].idxmax()] if len(frame) else frame


def calibrate(
    found: Isolation, truth: Mapping[tuple[int, int], str], *, model: str = "av-tiny-planted", site: str = "suffix"
) -> Calibration:
    """Compare what was found with what was planted."""
    best = best_releases(found, site)
    if not len(best):
        why = " ".join(found.reasons) or found.verdict
        raise InputError(f"{model}: no release was measured at the site {site!r}, so nothing can be compared. {why}")
    best = best.sort_values("low", ascending=False, kind="stable")
    table: Any = found.heads
    named: dict[tuple[int, int], str] = {}
    for row in table[table["site"] == site].to_dict("records"):
        named.setdefault((int(row["layer"]), int(row["head"])), str(row["role"]))
    rows: list[dict[str, Any]] = []
    for rank, row in enumerate(best.to_dict("records"), start=1):
        at = int(row["layer"]), int(row["head"])
        rows.append({"rank": rank, "layer": at[0], "head": at[1], "release": float(row["mean"])})
        rows[-1] |= {"share": float(row["share"]), "planted": at in truth}
        rows[-1] |= {"kind": truth.get(at, ""), "role": named.get(at, "")}
    heads: Any = pd.DataFrame(rows)
    figures = {
        "auroc": auroc(best["low"].tolist(), heads["planted"].tolist()),
        "precision_at_k": float(heads["planted"].head(len(truth)).mean()),
        "planted_heads": len(truth),
        "heads_in_all": len(heads),
        "named_but_not_planted": sum(role in _NAMED and key not in truth for key, role in named.items()),
        "planted_but_not_named": sum(named.get(key, "") not in _NAMED for key in truth),
        "named_with_the_right_kind": sum(named.get(key) == kind for key, kind in truth.items()),
    }
    passed = figures["precision_at_k"] == 1.0
    sentence = _sentence(model, heads, truth, figures, passed=passed)
    return Calibration(
        sentence=sentence, passed=passed, model=model, heads=heads, figures=figures, verdict=found.verdict
    )


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The chance that a positive scores above a negative, ties counting half; NaN where one class is empty."""
    values, mask = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    above = values[mask][:, None] - values[~mask][None, :]
    return float(np.mean((above > 0) + 0.5 * (above == 0))) if above.size else float("nan")


def _sentence(
    model: str, heads: pd.DataFrame, truth: Mapping[tuple[int, int], str], figures: Mapping[str, float], *, passed: bool
) -> str:
    listed = ", ".join(f"L{layer} H{head}" for layer, head in sorted(truth))
    who = f"The {len(truth)} heads planted" if len(truth) > 1 else "The head planted"
    ranks = ", ".join(str(rank) for rank in heads.loc[heads["planted"], "rank"])
    numbers = f"AUROC {figures['auroc']:.2f} over {len(heads)} heads"
    false, missed = int(figures["named_but_not_planted"]), int(figures["planted_but_not_named"])
    named = "named all of them and no other"
    if false or missed:
        named = f"left {missed} of them unnamed and named {false} other{'s' if false != 1 else ''}"
    outcome = "came out on top" if passed else f"did not all come out on top: they rank {ranks}"
    return f"{who} in {model} ({listed}) {outcome} ({numbers}); the search {named}."
