"""Is it what a head reads from the picture? Attention edges of the named heads cut, beside cuts of as much elsewhere.

    release of a cut = (change of M in va - change of M in av) / 2          positive: the model hears more

Cut are the edges from the site's queries to the picture's keys and to the sound's, in each head that releases and in
the chosen set together; where there are sinks also to the sinks alone and to the picture without them. `renormalised`
scales the remaining weights up; without it the weight is lost. Beside each renormalised cut (`runs.matched_cuts`):

    equal mass       the same edges in other heads at most one layer away that do not release themselves, with as much
                     value-weighted attention removed (within a quarter); the mean of `DRAWS` draws
    10%, 30% of keys nested shares of the keys; 100% is the cut
    equal count      as many other keys in the same heads, only where three times as many exist

`mass`: of a cut, its share of all that these heads move to these queries; of an equal-mass control, what it removes
over what the cut removes. A control that cannot be made is NaN, and its note says why.

Choices where the protocol is silent: masses are taken from `va` and the same edges are cut in `av`; controls are made
for the renormalised cut; heads that only carry are not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from av_lens.core.attention_mass import attention_mass, sinks_of
from av_lens.interventions import Plan
from av_lens.isolation.explaining.known import Known, Row
from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.plan_effects import Measured, effects_of_plans, measured
from av_lens.isolation.measuring.recordings import Head
from av_lens.isolation.measuring.store import Arrays
from av_lens.isolation.sets.sets import head_names
from av_lens.methods.shared.matched_cuts import EQUAL_COUNT, EQUAL_MASS, EdgeCut, matches
from av_lens.methods.shared.role_words import named_span

CUT, LOST = "cut", "cut, weight lost"
FRACTIONS = {"10% of keys": 0.1, "30% of keys": 0.3}
ARMS = (CUT, LOST, EQUAL_MASS, *FRACTIONS, EQUAL_COUNT)
DIFFERENCE = "cut - equal mass"
DRAWS = 3
KEYS = ("video|image", "audio")
WITH_SINKS = ("video|image - sinks", "sinks")
NO_MATCH = "no other heads at most one layer away, none of which releases, move as much along these edges"
TOO_FEW = "fewer than three times as many other keys"
Group = tuple[Head, ...]


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to cut: its plans (the outcome is their mean; none where it cannot be made) and the mass it removes."""

    plans: tuple[Plan, ...]
    mass: float = float("nan")


def cut_rows(known: Known) -> list[Row]:
    """Cut the edges of every head that releases, and of the chosen set, on confirmation: rows of `cuts`."""
    sinks, chosen = known.sinks(), known.held.chosen
    keys = KEYS + (WITH_SINKS if any(sinks) else ())
    rows: list[Row] = []
    for site in known.searched.sites:
        groups: list[Group] = [(one.at,) for one in known.subjects(site) if one.releases]
        if chosen is not None and site == known.searched.first.site and len(chosen.members) > 1:
            groups.append(chosen.members)
        if not groups:
            continue
        depends = {"groups": groups, "keys": keys, "seed": known.seed, "sinks": sinks}
        compute = partial(cut_effects, groups=groups, keys=keys, seed=known.seed)
        made = measured(known.chunks(site), known.confirmation, "edge cuts", depends, compute)
        rows += [row | {"site": site} for row in _rows(made, groups, keys, site)]
    return rows


def cut_effects(chunk: Chunk, groups: Sequence[Group], keys: Sequence[str], seed: int) -> Arrays:
    """Cut the edges of groups of heads, with controls."""
    recording, model = chunk.run("va"), chunk.bench.engine.model
    site = recording.site.tolist()
    mass = attention_mass(model, recording.inputs, {"site": site}, weight="value").mean(0).double().numpy()[:, :, 0]
    arms: list[Arm] = []
    releasing = {head for group in groups for head in group}
    for group in groups:
        others = mass.copy()
        for head in releasing - set(group):
            others[head] = 0.0  # moves nothing, so it is in no control
        heads = {layer: tuple(head for at, head in group if at == layer) for layer in sorted({at for at, _ in group})}
        for number, words in enumerate(keys):
            spans = recording.inputs.spans
            positions = tuple(named_span(words, spans, sinks_of(spans, chunk.bench.sinks)).positions.tolist())
            make = partial(EdgeCut, tuple(site), tuple(site), positions, heads, model.spec.n_heads)
            arms += list(arms_of(make, others, len(spans), (seed, number)).values())
    effect, removed = averaged(chunk, arms)
    shape = (len(effect), len(groups), len(keys), len(ARMS))
    return {"effect": effect.reshape(shape), "mass": removed.reshape(shape)}


def arms_of(
    make: Callable[[dict[str, bool]], EdgeCut], mass: np.ndarray, n_prompt: int, seed: tuple[int, int]
) -> dict[str, Arm]:
    """Make a cut (`make` does so with given options) and its controls: the arms by name, in the order of `ARMS`."""
    edge, lost = make({"renormalize": True}), make({"renormalize": False})
    if edge.empty or edge.backwards:
        return {name: Arm(()) for name in ARMS}
    share = edge.mass(mass)
    matched, counted = controls_of(edge, mass, (), n_prompt, seed)
    return {
        CUT: Arm((edge.plan(),), share),
        LOST: Arm((lost.plan(),), share),
        EQUAL_MASS: matched,
        **{name: Arm((edge.fraction(part, seed[0]),)) for name, part in FRACTIONS.items()},
        EQUAL_COUNT: counted,
    }


def controls_of(
    edge: EdgeCut, mass: np.ndarray, others: Sequence[int], n_prompt: int, seed: tuple[int, int]
) -> tuple[Arm, Arm]:
    """Draw a cut's controls: as much attention taken elsewhere, and as many edges."""
    drawn = [edge.equal_mass(mass, others, (seed[0], draw, seed[1])) for draw in range(DRAWS)]
    close = [(plan, ratio) for plan, ratio in drawn if matches(ratio)]
    counted = [edge.equal_count(n_prompt, (seed[0], draw, seed[1])) for draw in range(DRAWS)]
    mean = float(np.mean([ratio for _, ratio in close])) if close else np.nan
    return Arm(tuple(plan for plan, _ in close), mean), Arm(tuple(plan for plan in counted if plan is not None))


def averaged(chunk: Chunk, arms: Sequence[Arm]) -> tuple[np.ndarray, np.ndarray]:
    """Measure arms on C: the mean over each one's plans."""
    plans = [plan for arm in arms for plan in arm.plans]
    owner = np.array([number for number, arm in enumerate(arms) for _ in arm.plans])
    each = effects_of_plans(chunk, "va", lambda cell: plans) if plans else np.zeros((len(chunk.examples), 0))
    effect = np.full((len(each), len(arms)), np.nan)
    for number in np.unique(owner):
        effect[:, number] = each[:, owner == number].mean(1)
    return effect, np.broadcast_to([arm.mass for arm in arms], effect.shape).copy()


def _rows(made: Measured, groups: Sequence[Group], keys: Sequence[str], site: str) -> list[Row]:
    effect = made.arrays["effect"]
    difference = effect[..., [ARMS.index(CUT)]] - effect[..., [ARMS.index(EQUAL_MASS)]]
    made = Measured(made.half, made.arrays | {"effect": np.concatenate([effect, difference], axis=-1)})
    bounds, shares = made.bounds("effect"), made.shares("effect", made.half.G)[0]
    mass = made.bounds("mass")[0]
    rows: list[Row] = []
    for (g, group), (k, words) in ((a, b) for a in enumerate(groups) for b in enumerate(keys)):
        for number, arm in enumerate((*ARMS, DIFFERENCE)):
            value, low, high = (float(bound[g, k, number]) for bound in bounds)
            rows.append(
                {
                    "heads": head_names(group), "edges": f"{words.replace('|image', '')} -> {site}",
                    "renormalised": arm != LOST, "arm": arm, "release": value, "low": low, "high": high,
                    "share": float(shares[g, k, number]), "note": why_not(arm) if np.isnan(value) else "",
                    "mass": float(mass[g, k, number]) if number < len(ARMS) else float("nan"),
                }
            )  # fmt: skip
    return rows


def why_not(arm: str) -> str:
    """Say why an arm has no number."""
    if arm in (EQUAL_MASS, DIFFERENCE):
        return NO_MATCH
    return TOO_FEW if arm == EQUAL_COUNT else "this prompt has no such edges"
