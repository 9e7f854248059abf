"""What do the larger units do: groups of heads that share keys, MLPs, the attention of a layer, whole layers?

Each is edited alone at the site, on discovery, and its effect mirrored, as for single heads (`effects`):

| unit | what is edited |
|---|---|
| kv group | z of all query heads that share a key-value head, jointly |
| mlp | the MLP's output |
| attention | z of all heads of the layer |
| layer | z of all heads and the MLP's output: what the layer adds to the stream, not the stream itself |

| estimand | of |
|---|---|
| release (donor) | effect on C with `blank_muted`, `mean_other`, `zero` |
| carries | fall of G with `blank_muted` |
| sufficiency | fall of G with `va` |
| release of K and V (donor) | of a kv group: its keys and values at the site, seen by all its query heads |

Keys are replaced before rotary position, so that a mean from a prompt of another length stands at the run's own
positions. A sender at a position changes keys and values at that position only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_lens.errors import ProtocolError
from av_lens.interventions import Plan, Site, replace
from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.donors import MEANS, MIRROR, PRIMARY_DONORS, align_end, joined
from av_lens.isolation.measuring.effects import mirrored
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.recordings import MEDIA_SITES

K_AND_V = "release of K and V"
PARTS = ("mlp_out", "k", "v")


@dataclass(frozen=True)
class Unit:
    """A unit of a layer.

    Attributes:
        kind: "kv group", "mlp", "attention" or "layer".
        layer: the layer.
        index: the group's number, -1 elsewhere.
        heads: the query heads whose z is edited.
        mlp: whether the MLP's output is edited.
    """

    kind: str
    layer: int
    index: int
    heads: tuple[int, ...]
    mlp: bool = False


@dataclass(frozen=True)
class Asked:
    """An estimand of a unit: the edited base, the donor, the sign, and whether K and V are edited instead of z."""

    estimand: str
    base: str
    donor: str
    sign: int = 1
    keys_and_values: bool = False


def units_of(engine: ModelEngine) -> list[Unit]:
    """List a model's units, layer by layer."""
    n, everyone = engine.model.spec.n_kv_heads, tuple(range(engine.n_heads))
    size, out = engine.n_heads // n, list[Unit]()
    for layer in range(engine.n_layers):
        out += [Unit("kv group", layer, g, everyone[g * size : (g + 1) * size]) for g in range(n)]
        out.append(Unit("mlp", layer, -1, (), mlp=True))
        out += [Unit("attention", layer, -1, everyone), Unit("layer", layer, -1, everyone, mlp=True)]
    return out


def asked_of(site: str) -> list[Asked]:
    """List the estimands at a site."""
    donors = [donor for donor in PRIMARY_DONORS if donor not in MEANS or site not in MEDIA_SITES]
    out = [Asked("release", "va", donor) for donor in donors]
    out += [Asked("carries", "blank_a", "blank_muted", -1), Asked("sufficiency", "blank_a", "va", -1)]
    return out + [Asked(K_AND_V, "va", donor, keys_and_values=True) for donor in donors]


class PartDonors:
    """What outputs that are no head's z become, for one stack of conflicts; keys are before rotary position."""

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self._captured: dict[tuple[int, str, str], Mapping[str, Tensor]] = {}
        self._donors: dict[tuple[str, str], Mapping[str, Tensor]] = {}

    def own(self, cell: str, question: str = "ask", chunk: Chunk | None = None) -> Mapping[str, Tensor]:
        """Give the outputs of an unedited cell at the site, of this stack or of another."""
        of = self.chunk if chunk is None else chunk
        key = (id(of), cell, question)
        if key not in self._captured:
            inputs, bench = of.inputs(cell, question), of.bench
            self._captured[key] = bench.engine.capture(inputs, bench.positions(inputs, of.site), PARTS)
        return self._captured[key]

    def donor(self, base: str, name: str) -> Mapping[str, Tensor]:
        """Give every component's donor for a base cell."""
        if (base, name) not in self._donors:
            own = self.own(base)
            if name == "zero":
                found = {part: torch.zeros_like(values[:, :1]) for part, values in own.items()}
            elif name == "mean_other":
                found = {part: align_end(self._mean_other(part).to(values), values) for part, values in own.items()}
            elif name in MEANS:
                raise ProtocolError(f"the donor {name!r} is a mean over heads' outputs: units have none.")
            else:
                found = self.own(self.chunk.donor_cell(base, name))
            self._donors[base, name] = found
        return self._donors[base, name]

    def _mean_other(self, part: str) -> Tensor:
        means, candidates = self.chunk.means, self.chunk.bench.candidates
        assert means is not None
        if part not in means.parts:
            found = [self.own("va", "see", other) for other in means.chunks]
            means.parts |= {name: joined([one[name].cpu() for one in found]) for name in found[0]}
        z = means.parts[part]
        weights = means.weights(candidates.sound[self.chunk.examples], candidates.picture[self.chunk.examples])
        return torch.einsum("bn,ln...->lb...", torch.from_numpy(weights).to(z), z)


def plan_of_unit(unit: Unit, asked: Asked, chunk: Chunk, parts: PartDonors, base: str) -> Plan | None:
    """Write a unit's edit of one base cell; None where the estimand is not the unit's."""
    run = chunk.run(base)

    def given(component: str, head: int | None = None) -> Plan:
        value = parts.donor(base, asked.donor)[component][unit.layer]
        site = Site(component, unit.layer, head=head, positions=run.site.tolist())
        return Plan(replace(site, value if head is None else value[:, :, head]))

    if asked.keys_and_values:
        return given("k", unit.index) + given("v", unit.index) if unit.kind == "kv group" else None
    heads = [(unit.layer, head) for head in unit.heads]
    plan = run.plan(chunk.z(base, heads, asked.donor)) if heads else Plan()
    return plan + given("mlp_out") if unit.mlp else plan


def _chunk_units(chunk: Chunk, units: Sequence[Unit], wanted: Sequence[Asked]) -> dict[str, np.ndarray]:
    """Every unit's effect by every estimand in one stack, `[batch, asked, unit]`; NaN where it is not the unit's."""
    candidates, engine, parts = chunk.bench.candidates, chunk.bench.engine, PartDonors(chunk)
    out = np.full((len(wanted), len(units), len(chunk.examples)), np.nan)
    for base in dict.fromkeys(asked.base for asked in wanted):
        changes: list[np.ndarray] = []
        for cell in (base, MIRROR[base]):
            plans: dict[tuple[int, int], Plan] = {}
            for (a, asked), (u, unit) in product(enumerate(wanted), enumerate(units)):
                plan = plan_of_unit(unit, asked, chunk, parts, cell) if asked.base == base else None
                if plan is not None:
                    plans[a, u] = plan
            change = np.full_like(out, np.nan)
            for (a, u), one in zip(plans, engine.changed(chunk.run(cell), list(plans.values())), strict=True):
                change[a, u] = candidates.margin(candidates.scores(one.logits), chunk.examples) - chunk.margin(cell)
            chunk.drop_traces(cell)
            changes.append(change)
        found = mirrored(changes[0], changes[1])
        out = np.where(np.isnan(found), out, found)
    return {"margin": (out * np.array([asked.sign for asked in wanted])[:, None, None]).transpose(2, 0, 1)}


def unit_rows(chunks: Sequence[Chunk], half: Half, *, site: str) -> list[dict[str, Any]]:
    """Measure every unit at a site: rows of `units`."""
    units, wanted = units_of(chunks[0].bench.engine), asked_of(site)
    depends = {"units": [vars(unit) for unit in units], "asked": [vars(asked) for asked in wanted]}
    compute, stage = partial(_chunk_units, units=units, wanted=wanted), f"groups, MLPs, attentions and layers at {site}"
    made = gathered(chunks, half.examples, "unit effects", depends, compute, stage)
    out: list[dict[str, Any]] = []
    for a, asked in enumerate(wanted):
        values = made["margin"][:, a]
        kept = [u for u in range(len(units)) if not np.isnan(values[:, u]).all()]
        for unit, found in zip((units[u] for u in kept), half.rows(values[:, kept]), strict=True):
            of = {"half": half.name, "site": site, "unit": unit.kind, "layer": unit.layer, "index": unit.index}
            out.append(of | {"estimand": asked.estimand, "donor": asked.donor} | found)
    return out
