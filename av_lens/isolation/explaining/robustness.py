"""Does the finding hang on a choice that could have been made otherwise? Protocol section 8, last point.

A head's role *turned* where it is named both times, by another role. Sampled sign flips are as many as resolve half of
the first step of the false discovery rate's ladder at one site.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats

from av_lens.core.modes import in_precision, other_precision
from av_lens.errors import AvLensError
from av_lens.isolation.explaining.knowledge import Known
from av_lens.isolation.measuring.bench import Bench, in_order
from av_lens.isolation.measuring.effects import ROLE_ESTIMANDS, figures, mirrored, requests
from av_lens.isolation.measuring.engine import PRIMARY_DONORS, ModelEngine, Node
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming.evidence import Searched, hold, measured, with_means
from av_lens.isolation.naming.roles import Evidence, Named, adjust, classify, run_tests
from av_lens.isolation.sets.sets import head_names
from av_lens.results.dyadic import drawn_again
from av_lens.results.record import RELEASING

LOUDNESS = 0.05
"""Root mean square that every sound is scaled to (full scale is 1)."""
DRAWS = 50
OTHER_PHRASING = "What can you hear?"


@dataclass(frozen=True)
class Variant:
    """One other choice: further options of `Conflict.cells`, another layout, question or precision."""

    name: str
    cells: Mapping[str, Any] = field(default_factory=dict)
    layout: str | None = None
    question: str | None = None
    dtype: torch.dtype | None = None


def variants(engine: ModelEngine, questions: Sequence[str], *, phrasing: str | None = None) -> list[Variant]:
    """List the variants of a run."""
    dtype = other_precision(engine.model.dtype)
    return [
        Variant("scrambled blank", {"blank": "scrambled"}),
        Variant("noise mute", {"mute": "noise"}),
        Variant("other phrasing", question=phrasing or other_words(engine.model, questions)),
        Variant("other layout", layout="separate" if engine.layout == "in_video" else "in_video"),
        Variant("equal loudness", {"loudness": LOUDNESS}),
        Variant(f"precision {str(dtype).removeprefix('torch.')}", dtype=dtype),
    ]


def other_words(model: Any, questions: Sequence[str]) -> str:
    """Find another wording of the question."""
    asked = {question.strip().casefold() for question in questions}
    taught = ((getattr(model, "grammar", None) or {}).get("questions") or {}).get("hear") or ()
    known = (*taught, OTHER_PHRASING, "Which sound is there?")
    return next((str(words) for words in known if words.strip().casefold() not in asked), OTHER_PHRASING)


def robustness_rows(known: Known, *, phrasing: str | None = None, draws: int = DRAWS) -> list[dict[str, Any]]:
    """Search again under every variant and bootstrap of clips, and compare who is named: rows of `robustness`."""
    bench, found, site = known.bench, known.searched, known.searched.first
    main, releases = named_roles(found.named, site.site), site.evidence.largest_release
    rows: list[dict[str, Any]] = []
    questions = [str(conflict.question) for conflict in bench.conflicts]
    for variant in variants(bench.engine, questions, phrasing=phrasing):
        try:
            evidence = _measured_again(known, variant, site.site)
        except AvLensError as refused:
            rows.append({"variant": variant.name, "note": f"not measured: {refused}"})
            continue
        rho = rank_correlation(releases, evidence.largest_release)
        note = f"asked {variant.question!r}" if variant.question else ""
        row = compared(variant.name, main, named_again(found, evidence, known.seed))
        rows.append(row | {"rank_correlation": rho, "note": note})
    return [*rows, _bootstrapped(known, main, draws)]


def named_again(searched: Searched, found: Evidence, seed: int) -> dict[Node, str]:
    """Name the suppressors of the main search's first site on other evidence."""
    # 440 sampled flips a head see a p of half of the first step of the ladder at one site (.05 / 11 a head).
    n_heads, s, site = found["silenced"][0].size, searched.s, searched.first.site
    tests = run_tests(found, s=s, family=math.ceil(n_heads * 11 / 5), seed=seed)
    (q,), (release_q,) = adjust([tests], family=searched.family)
    return named_roles(classify(found, tests, q, release_q, s=s, site=site), site)


def named_roles(named: Sequence[Named], site: str) -> dict[Node, str]:
    """Collect the suppressors that a search named at a site."""
    return {row.at: row.role for row in named if row.site == site and row.role in RELEASING}


def rank_correlation(one: Float[np.ndarray, "*head"], other: Float[np.ndarray, "*head"]) -> float:
    """Compare the order of all heads by Spearman's rank correlation."""
    known = ~(np.isnan(one) | np.isnan(other))
    first, second = one[known], other[known]
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    found: Any = stats.spearmanr(first, second)
    return float(found.statistic)


def jaccard(one: Mapping[Any, str], other: Mapping[Any, str]) -> float:
    """Compare two sets of heads."""
    either = one.keys() | other.keys()
    return len(one.keys() & other.keys()) / len(either) if either else float("nan")


def compared(name: str, main: Mapping[Node, str], again: Mapping[Node, str]) -> dict[str, Any]:
    """Write one variant's row."""
    both = sorted(main.keys() & again.keys())
    turned = [f"{head_names([h])}: {main[h]} -> {again[h]}" for h in both if main[h] != again[h]]
    heads = {"named": again.keys(), "kept": both, "lost": main.keys() - again.keys()}
    heads |= {"gained": again.keys() - main.keys()}
    listed = {column: head_names(sorted(of)) for column, of in heads.items()}
    return {"variant": name, "jaccard": jaccard(main, again), "turned": "; ".join(turned), **listed}


def _measured_again(known: Known, variant: Variant, site: str) -> Evidence:
    half, other = known.discovery, _varied(known.bench, variant)
    chunks = other.chunks(half.examples.tolist(), site)
    with_means(chunks)
    C, G = (
        in_order(chunks, half.examples, lambda one, base=base: mirrored(base, one.margin)) for base in ("va", "blank_a")
    )
    half, wanted = dataclasses.replace(half, G=G, C=C), requests(chunks, names=ROLE_ESTIMANDS)
    nodes, floor = known.searched.sites[site].evidence.measured, known.searched.s if other.mlps else None
    effects = measured(chunks, half, nodes, wanted, floor=floor, stage=f"robustness: {variant.name}")
    found = Evidence(figures(effects), half, other.mlps, chunks[0].encoding)
    mlps = known.searched.mlps.get(site, ())
    found = hold(chunks, found, mlps, dict.fromkeys(PRIMARY_DONORS, nodes if mlps else []))
    for chunk in chunks:
        chunk.forget()
    return found


def _varied(bench: Bench, variant: Variant) -> Bench:
    engine = bench.engine
    model = engine.model if variant.dtype is None else in_precision(engine.model, variant.dtype)
    made = ModelEngine(model, how=engine.how, layout=variant.layout or engine.layout, cells=variant.cells)
    conflicts = bench.conflicts
    if variant.question is not None:
        conflicts = [dataclasses.replace(conflict, question=variant.question) for conflict in conflicts]
    store = bench.store.under(str(variant))
    return dataclasses.replace(bench, engine=made, conflicts=list(conflicts), store=store, sinks=[])


def _bootstrapped(known: Known, main: Mapping[Node, str], draws: int) -> dict[str, Any]:
    """Draw discovery's components again, name again, and average the Jaccard."""
    half, found = known.discovery, known.searched.first.evidence
    values, kept = list[float](), dict.fromkeys(main, 0)
    for draw in range(draws):
        rng = np.random.default_rng([known.seed, 0xB0, draw])
        rows, renamed, boot, third = drawn_again(half.boot, half.third, half.components, rng, seed=known.seed + draw)
        taken = Half(half.name, half.examples[rows], renamed, boot, found.half.G[rows], found.half.C[rows], third)
        figures_again = {key: of[rows] for key, of in found.figures.items()}
        resampled = dataclasses.replace(found, figures=figures_again, half=taken)
        named = named_again(known.searched, resampled, known.seed + draw)
        values.append(jaccard(main, named))
        for head in main:
            kept[head] += head in named
        known.bench.progress("robustness: bootstraps of clips", draw + 1, draws)
    listed = ", ".join(f"{head_names([head])} {n / draws:.2f}" for head, n in sorted(kept.items()))
    row = {"variant": f"bootstraps of clips ({draws})", "kept": listed}
    present = np.array(values)[~np.isnan(values)]
    if len(present):
        low, high = np.percentile(present, [2.5, 97.5])
        row |= {"jaccard": float(present.mean()), "low": float(low), "high": float(high)}
    return row | {"note": "kept: how often each head is named again"}
