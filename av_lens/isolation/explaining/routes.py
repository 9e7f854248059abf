"""By which road does the picture win? The routes that studies disagree on, cut on the same conflicts with controls.

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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from av_lens.core.attention_mass import attention_mass, sinks_of
from av_lens.isolation.explaining.edge_cuts import CUT, TOO_FEW, Arm, averaged, controls_of
from av_lens.isolation.explaining.known import Known, Row
from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.plan_effects import Measured, measured, says_sound
from av_lens.isolation.measuring.store import Arrays
from av_lens.methods.shared.matched_cuts import EQUAL_COUNT, EQUAL_MASS, EdgeCut
from av_lens.methods.shared.role_words import named_span

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
ARMS = (CUT, EQUAL_MASS, EQUAL_COUNT, SOUNDS)


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
    return _rows(made, windows(known.bench.engine.n_layers))


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
    shape = (len(effect), len(ROUTES), len(listed), len(ARMS))
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
        return [Arm(()) for _ in ARMS]
    cut = Arm((edge.plan(),), edge.mass(mass))
    if not window.controlled:
        return [cut, Arm(()), Arm(()), Arm(())]
    return [
        cut,
        *controls_of(edge, mass, others, n_prompt, seed),
        Arm((sound.plan(),), sound.mass(mass)) if sound.keys else Arm(()),
    ]


def _rows(made: Measured, listed: Sequence[Window]) -> list[Row]:
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
            for a, arm in enumerate(ARMS if window.controlled else ARMS[:1]):
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
