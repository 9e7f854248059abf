"""Plans of every kind for the tests that edit and replay, made from small numbers so that failing ones can be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from av_lens.interventions import Plan, Site, add, cut, mean, noise, replace, resample, scale, zero
from av_lens.interventions.edits import UNITS, resolve_positions
from av_lens.replay.rerun import RESTARTABLE

KINDS = ("replace", "zero", "mean", "resample", "noise", "scale", "add")
COMPONENTS = tuple(sorted(RESTARTABLE))
POSITION_KINDS = ("single", "role", "span", "scattered", "window", "box", "everything")
ROLES = ("generation", "question", "suffix", "audio", "video", "question|generation", "system|audio", "boundary")
KEYS = ("boundary", "system|boundary", "system", "video", "audio", "media", "question|generation")


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def positions_of(kind: str, number: int, spans: Any) -> Any:
    """Positions of one kind; `number` picks among them."""
    n, pick = len(spans), torch.Generator().manual_seed(number)
    if kind == "everything":
        return None
    if kind == "single":
        return [number % n]
    if kind == "role":
        return ROLES[number % len(ROLES)]
    if kind == "span":
        return spans[ROLES[number % len(ROLES)]]
    if kind == "window":
        start = 0.25 * (number % 6)
        return (spans.audio if number % 2 else spans.video).between(start, start + 0.6)
    if kind == "box":
        return spans.video.box(row=number % 2, col=None if number % 3 == 0 else number % 2)
    count = 2 + number % 5
    return sorted(torch.randperm(n, generator=pick)[:count].tolist())


def edit_of(kind: str, site: Site, trace: Any, seed: int) -> Any:
    """An edit of one kind; its value has the site's own shape, or one row for all positions and examples."""
    spec, n = trace.model.spec, len(trace.spans)
    rows = site.positions
    n_pos = n if rows is None else len(trace.spans[rows] if isinstance(rows, str) else rows)
    width = n if site.is_edges else int(getattr(spec.at(site.layer), site.axes[-1]))
    heads = [] if not site.has_heads else [len(site.heads) if site.heads is not None else site.n_heads(spec)]
    shared = seed % 3 == 0  # one row for every position
    tail = (1 if shared else n_pos, *heads, width)
    value = drawn(seed, trace.batch if seed % 2 else 1, *tail)
    if kind == "zero":
        return zero(site)
    if kind == "replace":
        return replace(site, value.softmax(-1) if site.component == "pattern" else value)
    if kind == "mean":
        return mean(site, drawn(seed, 3, *tail))
    if kind == "resample":
        return resample(site, drawn(seed, 4, *tail), seed=seed)
    if kind == "noise":
        return noise(site, scale=0.5 if seed % 2 else value.abs(), seed=seed)
    if kind == "scale":
        return scale(site, value if seed % 4 == 0 else (-1.0, 0.5, 2.0)[seed % 3])
    return add(site, value)


def heads_of(component: str, trace: Any, number: int, layer: int = 0) -> int | tuple[int, ...] | None:
    if not Site(component, None if component == "embed" else 0).has_heads:
        return None
    n = Site(component, layer).n_heads(trace.model.spec)
    choices: tuple[Any, ...] = (
        number % n,
        None,
        tuple(dict.fromkeys((n - 1, 0))),
        tuple(range(n)),
        tuple(range(n // 2, n)),
    )
    return choices[number % len(choices)]


def site_of(component: str, trace: Any, layer: int, head: int, positions: Any) -> Site:
    return Site(component, None if component == "embed" else layer, heads_of(component, trace, head, layer), positions)


def cut_of(trace: Any, positions: Any, layer: int, number: int, seed: int) -> Any:
    """A cut whose queries are these positions, of one layer or from it on."""
    last = max(resolve_positions(positions, trace.spans).index)
    keys = [key for key in KEYS if trace.spans[key].positions[0] <= last]
    return cut(
        range(len(trace.spans)) if positions is None else positions,
        keys[number % len(keys)],
        layers=range(layer, 4) if seed % 3 else (layer,),
        heads=heads_of("z", trace, number),
        renormalize=seed % 2 == 0,
    )


def drawn_plan(trace: Any, rng: np.random.Generator) -> Plan:
    """One to three edits of any kind at any component, layer, heads and positions."""
    edits = []
    for _ in range(rng.integers(1, 4)):
        n = len(trace.spans)
        media = "media" if len(trace.spans.media) else "boundary"
        positions = (None, media, "question|generation", sorted(rng.choice(n, rng.integers(1, 6), False).tolist()))
        component, kind = COMPONENTS[rng.integers(len(COMPONENTS))], KINDS[rng.integers(len(KINDS))]
        layer, number = int(rng.integers(trace.model.spec.n_layers)), int(rng.integers(60))
        spec = trace.model.spec
        if (component, layer) in spec.lacking or (component in UNITS and layer in spec.experts):
            component = "mlp_out"
        site = site_of(component, trace, layer, number, positions[rng.integers(4)])
        edits.append(edit_of(kind, site, trace, number))
    return Plan(edits)


def shown(plan: Plan) -> str:
    """A plan in words, without its values."""
    return "; ".join(
        f"{edit.kind} at {edit.site}"
        if hasattr(edit, "site")
        else f"cut of {edit.query!r} from {edit.key!r}, "
        f"layers {edit.layers}, heads {edit.heads}, renormalize={edit.renormalize}"
        for edit in plan
    )
