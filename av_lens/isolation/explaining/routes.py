"""By which road does the picture win? Edges of named heads and of whole routes cut, beside cuts of as much elsewhere.

Routes are cut in all heads of a window of layers (`WINDOWS`, and 7 of 36 layers around every layer, as in "From Senses
to Decisions"): *relay* after SECRET and "From Senses to Decisions", *generation* after arXiv 2604.02605, *sink* after
"Probing Cross-modal Information Hubs". Controls, the mean of `DRAWS` draws (how often the sound is said: the first's):
*equal mass*, within a quarter, in other heads at most one layer away (outside the window) or, of a route, from other
keys that hold no media; *the sound's* is the same queries deaf. `mass` of a cut is its share of all that its heads move
to these queries, of an equal-mass control what it removes over what the cut removes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from av_lens.core.readings import attention_mass, sinks_of
from av_lens.interventions import Plan
from av_lens.isolation.explaining.knowledge import Known, Row
from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.effects import effects_of_plans, says_sound
from av_lens.isolation.measuring.engine import MLP, Node
from av_lens.isolation.measuring.halves import Half, columns
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
NO_NUMBER = {EQUAL_MASS: NO_MATCH, DIFFERENCE: NO_MATCH, EQUAL_COUNT: TOO_FEW}
Group = tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to cut: its plans (the outcome is their mean; none where it cannot be made) and the mass it removes."""

    plans: tuple[Plan, ...]
    mass: float = float("nan")


def outcomes(half: Half, name: str, effect: np.ndarray, mass: np.ndarray) -> Callable[[tuple[int, ...], str], Row]:
    """Write one cut's columns: what it does on C, its share of G and the mass that it removes, or why it has none."""
    bounds, shares, removed = half.boot.mean(effect), half.shares(effect), half.boot.mean(mass)

    def row(at: tuple[int, ...], why_not: str) -> Row:
        out: Row = columns(bounds, name, "low", "high", at=at) | columns(shares, "share", at=at)
        out |= columns(removed, "mass", at=at) if at[-1] < mass.shape[-1] else {}  # not known of a difference
        return out | ({"note": why_not} if np.isnan(out[name]) else {})

    return row


def cut_rows(known: Known) -> list[Row]:
    """Cut the edges of every head that releases, and of the chosen set, on confirmation: rows of `cuts`."""
    sinks, chosen = known.sinks(), known.held.chosen
    keys = KEYS + (WITH_SINKS if any(sinks) else ())
    rows: list[Row] = []
    for site in known.searched.sites:
        groups: list[Group] = [(one.at,) for one in known.subjects(site) if one.releases and one.head != MLP]
        members = () if chosen is None else tuple(node for node in chosen.members if node[1] != MLP)
        if site == known.searched.first.site and len(members) > 1:
            groups.append(members)
        if not groups:
            continue
        depends = {"groups": groups, "keys": keys, "seed": known.seed, "sinks": sinks}
        compute = partial(cut_effects, groups=groups, keys=keys, seed=known.seed)
        made = gathered(known.chunks(site), known.confirmation.examples, "edge cuts", depends, compute)
        rows += [row | {"site": site} for row in _rows(known.confirmation, made, groups, keys, site)]
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


def _rows(half: Half, made: Arrays, groups: Sequence[Group], keys: Sequence[str], site: str) -> list[Row]:
    difference = made["effect"][..., [ARMS.index(CUT)]] - made["effect"][..., [ARMS.index(EQUAL_MASS)]]
    outcome = outcomes(half, "release", np.concatenate([made["effect"], difference], axis=-1), made["mass"])
    rows: list[Row] = []
    arms = (*ARMS, DIFFERENCE)
    for (g, group), (k, words), (number, arm) in product(enumerate(groups), enumerate(keys), enumerate(arms)):
        row = outcome((g, k, number), NO_NUMBER.get(arm, "this prompt has no such edges"))
        edges = f"{words.replace('|image', '')} -> {site}"
        rows.append(row | {"heads": head_names(group), "edges": edges, "renormalised": arm != LOST, "arm": arm})
    return rows


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
NO_SINKS = "these prompts have no sinks: no media position gets 10 times the mean attention from the suffix"
NO_ROUTE = {EQUAL_MASS: "nothing else that these queries read moves as much", EQUAL_COUNT: TOO_FEW}
ROUTE_ARMS = (CUT, EQUAL_MASS, EQUAL_COUNT, SOUNDS)


@dataclass(frozen=True)
class Window:
    """Some layers, and whether controls stand beside them."""

    name: str
    layers: tuple[int, ...]
    controlled: bool


def windows(n_layers: int) -> list[Window]:
    """List the windows of a model's layers."""
    width = max(1, round(WIDTH * n_layers))
    whole = {
        name: tuple(layer for layer in range(n_layers) if low <= layer / n_layers < high)
        for name, (low, high) in WINDOWS.items()
    }
    around = {
        f"around {layer}": tuple(range(max(0, layer - width // 2), min(n_layers, layer - width // 2 + width)))
        for layer in range(n_layers)
    }
    return [Window(name, layers, name in WINDOWS) for name, layers in (whole | around).items() if layers]


def route_rows(known: Known) -> list[Row]:
    """Cut every route on confirmation: rows of `routes`."""
    sinks, half = known.sinks(), known.confirmation
    chunks = known.bench.chunks(half.examples.tolist(), "suffix")
    depends, compute = {"seed": known.seed, "sinks": sinks}, partial(route_effects, seed=known.seed)
    made = gathered(chunks, half.examples, "routes", depends, compute)
    return _route_rows(half, made, windows(known.bench.engine.n_layers))


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
        at = tuple(queries[name])
        others = [p for p in range(max(at)) if p not in {*at, *spans.media.positions.tolist()}]
        for window in listed:
            cut, said = (
                EdgeCut(at, at, read, dict.fromkeys(window.layers), model.spec.n_heads, {"renormalize": True})
                for read in (keys, sound)
            )
            moved = mass[:, :, number]
            draw = partial(controls_of, cut, moved, others, len(spans), (seed, number)) if window.controlled else None
            arms += _arms(cut, said, moved, draw)
    effect, removed = averaged(chunk, arms)
    shape = (len(effect), len(ROUTES), len(listed), len(ROUTE_ARMS))
    plans = [next(iter(arm.plans), None) for arm in arms]
    return {
        "effect": effect.reshape(shape),
        "mass": removed.reshape(shape),
        "says": says_sound(chunk, plans).reshape(shape),
        "before": chunk.says("sound"),
    }


def _arms(edge: EdgeCut, sound: EdgeCut, mass: np.ndarray, draw: Callable[[], tuple[Arm, Arm]] | None) -> list[Arm]:
    """The cut and its controls, where some are drawn, in the order of `ROUTE_ARMS`."""
    if edge.empty or edge.backwards:
        return 4 * [Arm(())]
    cut, deaf = Arm((edge.plan(),), edge.mass(mass)), Arm(())
    if draw is None:
        return [cut, *3 * [deaf]]
    return [cut, *draw(), Arm((sound.plan(),), sound.mass(mass)) if sound.keys else deaf]


def _route_rows(half: Half, made: Arrays, listed: Sequence[Window]) -> list[Row]:
    outcome, says = outcomes(half, "effect", made["effect"], made["mass"]), half.boot.mean(made["says"])
    rows: list[Row] = [
        {"route": "none", "edges": "nothing is cut", "arm": CUT, **dict.fromkeys(("effect", "low", "high"), 0.0),
         "share": 0.0, "says_sound": float(half.boot.mean(made["before"]).value), "mass": 0.0}
    ]  # fmt: skip
    for (r, (route, (source, target))), (w, window) in product(enumerate(ROUTES.items()), enumerate(listed)):
        ends = dict.fromkeys((min(window.layers), max(window.layers)))
        edges = f"{source.replace('|image', '')} -> {target}, {window.name} ({'-'.join(map(str, ends))})"
        none = NO_SINKS if "sinks" in source else "these prompts have no such edges"
        for a, arm in enumerate(ROUTE_ARMS if window.controlled else ROUTE_ARMS[:1]):
            row = outcome((r, w, a), NO_ROUTE.get(arm, none))
            row |= columns(says, "says_sound", at=(r, w, a))
            rows.append(row | {"route": route, "edges": edges, "arm": arm})
    return rows
