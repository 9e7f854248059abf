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
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.donors import MEANS, MIRROR, PRIMARY_DONORS, align_end, joined
from av_lens.isolation.measuring.effects import Progress, mirrored
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.seam import MEDIA_SITES, Engine, Head, Part, Swap

K_AND_V = "release of K and V"


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


def units_of(engine: Engine) -> list[Unit]:
    """List a model's units.

    Args:
        engine: the model's.

    Returns:
        The units, layer by layer; none with an MLP where the engine has no such output.
    """
    size, everyone = engine.n_heads // engine.n_kv_heads, tuple(range(engine.n_heads))
    with_mlp = "mlp_out" in engine.parts
    out: list[Unit] = []
    for layer in range(engine.n_layers):
        groups = [everyone[g * size : (g + 1) * size] for g in range(engine.n_kv_heads)]
        out += [Unit("kv group", layer, g, heads) for g, heads in enumerate(groups)]
        out += [Unit("mlp", layer, -1, (), mlp=True)] if with_mlp else []
        out += [Unit("attention", layer, -1, everyone), Unit("layer", layer, -1, everyone, mlp=with_mlp)]
    return out


def asked_of(engine: Engine, site: str) -> list[Asked]:
    """List the estimands at a site.

    Args:
        engine: the model's.
        site: the site set.

    Returns:
        The estimands; means are undefined at media positions.
    """
    donors = [donor for donor in PRIMARY_DONORS if donor not in MEANS or site not in MEDIA_SITES]
    out = [Asked("release", "va", donor) for donor in donors]
    out += [Asked("carries", "blank_a", "blank_muted", -1), Asked("sufficiency", "blank_a", "va", -1)]
    if "k" in engine.parts and "v" in engine.parts:
        out += [Asked(K_AND_V, "va", donor, keys_and_values=True) for donor in donors]
    return out


class PartDonors:
    """What outputs that are no head's z become, for one stack of conflicts.

    Args:
        chunk: the conflicts.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self._captured: dict[tuple[int, str, str], Mapping[str, Tensor]] = {}
        self._donors: dict[tuple[str, str], Mapping[str, Tensor]] = {}

    def own(self, cell: str, question: str = "ask", chunk: Chunk | None = None) -> Mapping[str, Tensor]:
        """Give the outputs of an unedited cell at the site.

        Args:
            cell: the cell.
            question: what it is asked.
            chunk: other conflicts than these.

        Returns:
            Component -> `[layer, batch, site, ...]`.
        """
        of = self.chunk if chunk is None else chunk
        key = (id(of), cell, question)
        if key not in self._captured:
            inputs, bench = of.inputs(cell, question), of.bench
            self._captured[key] = bench.engine.capture(inputs, bench.positions(inputs, of.site), bench.engine.parts)
        return self._captured[key]

    def donor(self, base: str, name: str) -> Mapping[str, Tensor]:
        """Give every component's donor for a base cell.

        Args:
            base: the cell that is edited.
            name: "zero", "mean_other", or a cell as it is named for `va` and `blank_a`.

        Returns:
            Component -> values at the base's site.
        """
        if (base, name) not in self._donors:
            own = self.own(base)
            if name == "zero":
                found = {part: torch.zeros_like(values[:, :1]) for part, values in own.items()}
            elif name in MEANS:
                found = {part: align_end(self._mean_other(part).to(values), values) for part, values in own.items()}
            else:
                found = self.own(self.chunk.donor_cell(base, name))
            self._donors[base, name] = found
        return self._donors[base, name]

    def _mean_other(self, part: str) -> Tensor:
        means, candidates = self.chunk.means, self.chunk.bench.candidates
        assert means is not None
        if part not in means.kept:
            found = [self.own("va", "see", other) for other in means.chunks]
            means.kept |= {name: joined([one[name].cpu() for one in found]) for name in found[0]}
        z = means.kept[part]
        weights = means.weights(candidates.sound[self.chunk.examples], candidates.picture[self.chunk.examples])
        return torch.einsum("bn,ln...->lb...", torch.from_numpy(weights).to(z), z)


def swap_of(unit: Unit, asked: Asked, chunk: Chunk, parts: PartDonors, base: str) -> Swap | None:
    """Write a unit's edit of one base cell.

    Args:
        unit: the unit.
        asked: the estimand.
        chunk: the conflicts.
        parts: donors of what is no head's z.
        base: the cell that is edited.

    Returns:
        The edit; None where the estimand is not the unit's.
    """
    if asked.keys_and_values:
        if unit.kind != "kv group":
            return None
        found = parts.donor(base, asked.donor)
        return Swap(
            (), (), parts=tuple(_part(name, unit.layer, unit.index, found[name][unit.layer]) for name in ("k", "v"))
        )
    heads: tuple[Head, ...] = tuple((unit.layer, head) for head in unit.heads)
    z = chunk.donor(base, asked.donor) if heads else None
    values = () if z is None else tuple(z[layer, :, :, head] for layer, head in heads)
    if not unit.mlp:
        return Swap(heads, values)
    written = parts.donor(base, asked.donor)["mlp_out"][unit.layer]
    return Swap(heads, values, parts=(_part("mlp_out", unit.layer, None, written),))


def _part(component: str, layer: int, head: int | None, values: Tensor) -> Part:
    return Part(component, layer, head, values if head is None else values[:, :, head])


def _chunk_units(chunk: Chunk, units: Sequence[Unit], wanted: Sequence[Asked]) -> dict[str, np.ndarray]:
    """Every unit's effect by every estimand in one stack, `[asked, unit, batch]`; NaN where it is not the unit's."""
    candidates, engine, parts = chunk.bench.candidates, chunk.bench.engine, PartDonors(chunk)
    out = np.full((len(wanted), len(units), len(chunk.examples)), np.nan)
    for base in dict.fromkeys(asked.base for asked in wanted):
        changes: list[np.ndarray] = []
        for cell in (base, MIRROR[base]):
            swaps: dict[tuple[int, int], Swap] = {}
            for (a, asked), (u, unit) in ((x, y) for x in enumerate(wanted) for y in enumerate(units)):
                swap = swap_of(unit, asked, chunk, parts, cell) if asked.base == base else None
                if swap is not None:
                    swaps[a, u] = swap
            before = candidates.margin(chunk.reading(cell).scores, chunk.examples)
            change = np.full_like(out, np.nan)
            for (a, u), one in zip(swaps, engine.changed(chunk.run(cell), list(swaps.values())), strict=True):
                change[a, u] = candidates.margin(candidates.scores(one.logits), chunk.examples) - before
            chunk.run(cell).kept.clear()  # traces are large
            changes.append(change)
        found = mirrored(changes[0], changes[1])
        out = np.where(np.isnan(found), out, found)
    return {"margin": out * np.array([asked.sign for asked in wanted])[:, None, None]}


def unit_rows(
    chunks: Sequence[Chunk], half: Half, *, site: str, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Measure every unit at a site.

    Args:
        chunks: discovery's conflicts, stacked, with their means.
        half: discovery.
        site: the site set.
        progress: called as `progress(stage, done, total)`.

    Returns:
        Rows for `table("units", ...)`.
    """
    engine = chunks[0].bench.engine
    units, wanted = units_of(engine), asked_of(engine, site)
    effects = np.full((len(wanted), len(units), len(half.examples)), np.nan)
    depends = {"units": [vars(unit) for unit in units], "asked": [vars(asked) for asked in wanted]}
    for number, chunk in enumerate(chunks):
        rows = np.array([int(np.flatnonzero(half.examples == i)[0]) for i in chunk.examples])
        found = chunk.remember("unit effects", depends, partial(_chunk_units, chunk, units, wanted))
        effects[:, :, rows] = found["margin"]
        if progress is not None:
            progress(f"groups, MLPs, attentions and layers at {site}", number + 1, len(chunks))
    out: list[dict[str, Any]] = []
    for asked, values in zip(wanted, effects, strict=True):
        out += _rows(asked, units, values.T, half, site)
    return out


def _rows(
    asked: Asked, units: Sequence[Unit], values: Float[np.ndarray, "example unit"], half: Half, site: str
) -> list[dict[str, Any]]:
    """One estimand's rows, of the units that it was measured for."""
    kept = [u for u in range(len(units)) if not np.isnan(values[:, u]).all()]
    picked = values[:, kept]
    mean, share = half.boot.mean(picked), half.boot.ratio(picked, np.broadcast_to(half.G[:, None], picked.shape))
    names = ("mean", "low", "high", "share", "share_low", "share_high")
    columns = (mean.value, mean.low, mean.high, share.value, share.low, share.high)
    return [
        {
            "half": half.name, "site": site, "unit": units[u].kind, "layer": units[u].layer, "index": units[u].index,
            "estimand": asked.estimand, "donor": asked.donor, "n": int((~np.isnan(picked[:, i])).sum()),
            **{name: float(column[i]) for name, column in zip(names, columns, strict=True)},
        }
        for i, u in enumerate(kept)
    ]  # fmt: skip
