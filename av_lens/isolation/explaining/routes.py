"""By which road does the picture win? Edges of named heads and of whole routes cut, beside cuts of as much elsewhere.

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

effect of a cut = (change of M in va - change of M in av) / 2           positive: the sound is said again

| route | edges | who says so |
|---|---|---|
| whole | video -> suffix | what all of the questioner reads from the picture, to compare with |
| relay | video -> question and header | the picture passes through the question (SECRET; "From Senses to Decisions") |
| generation | video -> generation | the answer's own position reads the picture (the study, arXiv 2604.02605) |
| sink | media sinks -> suffix | sink tokens hold what both media share ("Probing Cross-modal Information Hubs") |
| without sinks | video - sinks -> suffix | late attention to video is a sink, and cutting it changes nothing |
| encoding | video -> audio | the sound reads the picture while it is encoded (interleaved layouts) |

Each in all heads of a window of layers: all of them, and the depths at which the studies cut, as shares of the model's
own depth (`WINDOWS`), and around every layer with a width of 7 of 36 layers ("From Senses to Decisions"). All cuts are
renormalised. Beside the cuts in `WINDOWS` stand controls (`runs.matched_cuts`), the mean of `DRAWS` draws (how
often the sound is said is that of the first draw):

    equal mass   as much value-weighted attention of the same queries removed elsewhere: the same edges in other heads
                 at most one layer outside the window, else other keys that hold no media (within a quarter)
    equal count  as many other keys, only where three times as many exist
    the sound's  the same queries no longer read the sound: what is lost if they cannot hear

`mass` is the share of all that the cut heads move to these queries; of an equal-mass control what it removes over what
the cut removes. `says_sound`: how often the likeliest token of the whole vocabulary is the sound's answer in `va`. A
route that a prompt does not have (no sinks, no picture before the sound) is NaN, and its note says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from av_lens.core.readings import attention_mass, sinks_of
from av_lens.interventions import Plan
from av_lens.isolation.explaining.knowledge import Known, Row
from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.engine import Head
from av_lens.isolation.measuring.plan_effects import Measured, effects_of_plans, measured, says_sound
from av_lens.isolation.measuring.store import Arrays
from av_lens.isolation.sets.sets import head_names
from av_lens.methods.shared.matched_cuts import EQUAL_COUNT, EQUAL_MASS, EdgeCut, matches
from av_lens.methods.shared.places import named_span

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


ROUTES = {
    "whole": ("video|image", "suffix"),
    "relay": ("video|image", "question|header"),
    "generation": ("video|image", "generation"),
    "sink": ("sinks", "suffix"),
    "without sinks": ("video|image - sinks", "suffix"),
    "encoding": ("video|image", "audio"),
}
WINDOWS = {  # shares of the model's depth; layers of 36 in the studies
    "all layers": (0.0, 1.0),
    "early": (0.0, 10 / 36),
    "relay's": (10 / 36, 20 / 36),
    "deep fusion": (15 / 36, 30 / 36),
    "late": (26 / 36, 1.0),
}
WIDTH = 7 / 36
SOUNDS = "the sound's"
ROUTE_ARMS = (CUT, EQUAL_MASS, EQUAL_COUNT, SOUNDS)


@dataclass(frozen=True)
class Window:
    """Some layers, and whether controls stand beside them."""

    name: str
    layers: tuple[int, ...]
    controlled: bool


def windows(n_layers: int) -> list[Window]:
    """List the windows of a model's layers."""
    found: list[Window] = []
    for name, (low, high) in WINDOWS.items():
        layers = tuple(layer for layer in range(n_layers) if low <= layer / n_layers < high)
        found += [Window(name, layers, True)] if layers else []
    width = max(1, round(WIDTH * n_layers))
    for layer in range(n_layers):
        start = layer - width // 2
        inside = tuple(range(max(0, start), min(n_layers, start + width)))
        found.append(Window(f"around {layer}", inside, False))
    return found


def route_rows(known: Known) -> list[Row]:
    """Cut every route on confirmation: rows of `routes`."""
    sinks, half = known.sinks(), known.confirmation
    chunks = known.bench.chunks(half.examples.tolist(), "suffix")
    depends, compute = {"seed": known.seed, "sinks": sinks}, partial(route_effects, seed=known.seed)
    made = measured(chunks, half, "routes", depends, compute)
    return _route_rows(made, windows(known.bench.engine.n_layers))


def route_effects(chunk: Chunk, seed: int) -> Arrays:
    """Cut every route in every window."""
    recording, model = chunk.run("va"), chunk.bench.engine.model
    spans, listed = recording.inputs.spans, windows(chunk.bench.engine.n_layers)
    sinks = sinks_of(spans, chunk.bench.sinks)
    queries = {name: named_span(target, spans, sinks).positions.tolist() for name, (_, target) in ROUTES.items()}
    mass = attention_mass(model, recording.inputs, queries, weight="value").mean(0).double().numpy()
    arms: list[Arm] = []
    for number, (name, (source, _)) in enumerate(ROUTES.items()):
        keys = tuple(named_span(source, spans, sinks).positions.tolist())
        sound = tuple(spans["audio"].positions.tolist()) if name != "encoding" else ()
        others = [p for p in range(len(spans)) if p not in {*queries[name], *spans.media.positions.tolist()}]
        others = [p for p in others if p < max(queries[name])]
        for window in listed:
            made = partial(_cut, queries[name], window.layers, model.spec.n_heads)
            arms += _arms(made(keys), made(sound), mass[:, :, number], others, len(spans), (seed, number), window)
    effect, removed = averaged(chunk, arms)
    shape = (len(effect), len(ROUTES), len(listed), len(ROUTE_ARMS))
    plans = [next(iter(arm.plans), None) for arm in arms]
    return {
        "effect": effect.reshape(shape),
        "mass": removed.reshape(shape),
        "says": says_sound(chunk, plans).reshape(shape),
        "before": chunk.says("sound"),
    }


def _cut(queries: Sequence[int], layers: Sequence[int], n_heads: int, keys: tuple[int, ...]) -> EdgeCut:
    heads: dict[int, tuple[int, ...] | None] = dict.fromkeys(layers)
    return EdgeCut(tuple(queries), tuple(queries), keys, heads, n_heads, {"renormalize": True})


def _arms(
    edge: EdgeCut,
    sound: EdgeCut,
    mass: np.ndarray,
    others: Sequence[int],
    n_prompt: int,
    seed: tuple[int, int],
    window: Window,
) -> list[Arm]:
    """The cut and its controls, in the order of `ARMS`."""
    if edge.empty or edge.backwards:
        return [Arm(()) for _ in ROUTE_ARMS]
    cut = Arm((edge.plan(),), edge.mass(mass))
    if not window.controlled:
        return [cut, Arm(()), Arm(()), Arm(())]
    return [
        cut,
        *controls_of(edge, mass, others, n_prompt, seed),
        Arm((sound.plan(),), sound.mass(mass)) if sound.keys else Arm(()),
    ]


def _route_rows(made: Measured, listed: Sequence[Window]) -> list[Row]:
    bounds, shares = made.bounds("effect"), made.shares("effect", made.half.G)[0]
    says, mass = made.bounds("says")[0], made.bounds("mass")[0]
    rows: list[Row] = [
        {"route": "none", "edges": "nothing is cut", "arm": CUT, "effect": 0.0, "low": 0.0, "high": 0.0, "share": 0.0,
         "says_sound": float(made.bounds("before")[0]), "mass": 0.0}
    ]  # fmt: skip
    for r, (route, (source, target)) in enumerate(ROUTES.items()):
        for w, window in enumerate(listed):
            ends = dict.fromkeys((min(window.layers), max(window.layers)))
            where = f"{window.name} ({'-'.join(map(str, ends))})"
            for a, arm in enumerate(ROUTE_ARMS if window.controlled else ROUTE_ARMS[:1]):
                value, low, high = (float(bound[r, w, a]) for bound in bounds)
                edges = f"{source.replace('|image', '')} -> {target}, {where}"
                rows.append(
                    {
                        "route": route, "edges": edges, "arm": arm, "effect": value, "low": low, "high": high,
                        "share": float(shares[r, w, a]), "says_sound": float(says[r, w, a]),
                        "mass": float(mass[r, w, a]), "note": _why_not(route, arm) if np.isnan(value) else "",
                    }
                )  # fmt: skip
    return rows


def _why_not(route: str, arm: str) -> str:
    if arm == EQUAL_MASS:
        return "nothing else that these queries read moves as much"
    if arm == EQUAL_COUNT:
        return TOO_FEW
    if route in ("sink", "without sinks"):
        return "these prompts have no sinks: no media position gets 10 times the mean attention from the suffix"
    return "these prompts have no such edges"
