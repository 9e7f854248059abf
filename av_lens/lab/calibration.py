"""Does the instrument find what was put there? Isolate a model whose guilty heads are known, and compare.

The score of a head is the lower 95% bound of its release, by the donor with the largest mean on discovery; AUROC is the
chance that a planted head scores above another; precision at k is the share of planted heads among the first k, k being
how many were planted. Passed: every planted head ranks before every other. A free rider (a planted head whose reversion
changes nothing) counts neither way. Sign: positive release gives hearing back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from av_lens.errors import InputError
from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.reports import Calibration
from av_lens.results.record import Isolation
from av_lens.results.tables import SUPPRESSORS

_NAMED = (*SUPPRESSORS, "undetermined")
# A truth file's words for kinds, in the words of roles.
KINDS = {"writer": "picture writer", "opponent": "sound opponent"}


def planted_truth(name: str = "av-tiny-planted") -> dict[tuple[int, int], str]:
    """Read which heads of a shipped model were planted.

    Args:
        name: the model's short name.

    Returns:
        (layer, head) to the kind of plant, free riders left out.

    Raises:
        InputError: if the model ships no truth.
    """
    path = files("av_lens") / "organism" / "checkpoints" / name / "planted.json"
    if not path.is_file():
        raise InputError(f"{name} ships no planted.json, so there is no truth to calibrate against.")
    return read_truth(json.loads(path.read_text(encoding="utf-8")))


def read_truth(content: Mapping[str, Any]) -> dict[tuple[int, int], str]:
    """Bring a truth file's content to (layer, head) and kind.

    Args:
        content: its json; `heads` lists `{"layer", "head", "kind", "free_rider"}` or pairs `[layer, head]`.

    Returns:
        (layer, head) to kind, free riders left out.

    Raises:
        InputError: if it lists no head.
    """
    truth: dict[tuple[int, int], str] = {}
    for entry in content.get("heads", []):
        if isinstance(entry, Mapping):
            kind = str(entry.get("kind", content.get("kind", "")))
            if not entry.get("free_rider", kind == "free rider"):
                truth[int(entry["layer"]), int(entry["head"])] = KINDS.get(kind, kind)
        else:
            kind = str(content.get("kind", ""))
            truth[int(entry[0]), int(entry[1])] = KINDS.get(kind, kind)
    if not truth:
        raise InputError("the truth file lists no planted head under 'heads'.")
    return truth


def calibrate(
    found: Isolation, truth: Mapping[tuple[int, int], str], *, model: str = "av-tiny-planted", site: str = "suffix"
) -> Calibration:
    """Compare what was found with what was planted.

    Args:
        found: the isolation of the planted model.
        truth: (layer, head) to kind.
        model: its name.
        site: the site set whose releases are ranked.

    Returns:
        The comparison, ready for the report.

    Raises:
        InputError: if the isolation measured no release at that site.
    """
    frame: Any = found.evidence
    frame = frame[(frame["estimand"] == "release") & (frame["half"] == "discovery") & (frame["site"] == site)]
    frame = frame[frame["donor"].isin(PRIMARY_DONORS)]
    if not len(frame):
        why = " ".join(found.reasons) or found.verdict
        raise InputError(f"{model}: no release was measured at the site {site!r}, so nothing can be compared. {why}")
    best = frame.loc[frame.groupby(["layer", "head"])["mean"].idxmax()].sort_values(
        "low", ascending=False, kind="stable"
    )
    named = _named(found, site)
    rows = [
        {
            "rank": rank,
            "layer": int(row["layer"]),
            "head": int(row["head"]),
            "release": float(row["mean"]),
            "share": float(row["share"]),
            "planted": (int(row["layer"]), int(row["head"])) in truth,
            "kind": truth.get((int(row["layer"]), int(row["head"])), ""),
            "role": named.get((int(row["layer"]), int(row["head"])), ""),
        }
        for rank, row in enumerate(best.to_dict("records"), start=1)
    ]
    heads: Any = pd.DataFrame(rows)
    false_names = sorted(key for key, role in named.items() if role in _NAMED and key not in truth)
    missed = sorted(key for key in truth if named.get(key, "") not in _NAMED)
    figures = {
        "auroc": auroc(best["low"].tolist(), heads["planted"].tolist()),
        "precision_at_k": float(heads["planted"].head(len(truth)).mean()),
        "planted_heads": len(truth),
        "heads_in_all": len(heads),
        "named_but_not_planted": len(false_names),
        "planted_but_not_named": len(missed),
        "named_with_the_right_kind": sum(named.get(key) == kind for key, kind in truth.items()),
    }
    passed = figures["precision_at_k"] == 1.0
    sentence = _sentence(model, heads, truth, figures, passed=passed)
    return Calibration(
        sentence=sentence, passed=passed, model=model, heads=heads, figures=figures, verdict=found.verdict
    )


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Measure how well scores separate: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: one per head.
        positive: whether each is planted.

    Returns:
        Between 0 and 1; NaN where one class is empty.
    """
    values, mask = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    above = values[mask][:, None] - values[~mask][None, :]
    return float(np.mean((above > 0) + 0.5 * (above == 0))) if above.size else float("nan")


def _named(found: Isolation, site: str) -> dict[tuple[int, int], str]:
    table: Any = found.heads
    rows = table[table["site"] == site].to_dict("records")
    named: dict[tuple[int, int], str] = {}
    for row in rows:
        named.setdefault((int(row["layer"]), int(row["head"])), str(row["role"]))
    return named


def _sentence(
    model: str, heads: pd.DataFrame, truth: Mapping[tuple[int, int], str], figures: Mapping[str, float], *, passed: bool
) -> str:
    listed = ", ".join(f"L{layer} H{head}" for layer, head in sorted(truth))
    count = len(truth)
    who = f"the {count} heads planted in {model} ({listed})" if count > 1 else f"the head planted in {model} ({listed})"
    ranks = ", ".join(str(rank) for rank in heads.loc[heads["planted"], "rank"])
    numbers = f"AUROC {figures['auroc']:.2f} over {len(heads)} heads"
    false, missed = int(figures["named_but_not_planted"]), int(figures["planted_but_not_named"])
    named = (
        "named all of them and no other"
        if not false and not missed
        else f"left {missed} of them unnamed and named {false} other{'s' if false != 1 else ''}"
    )
    outcome = "came out on top" if passed else f"did not all come out on top: they rank {ranks}"
    return f"{who[0].upper()}{who[1:]} {outcome} ({numbers}); the search {named}."
