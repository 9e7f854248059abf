"""What do larger units do (groups of heads, layers), and what does an edit of the named set mend and break?

Keys are replaced before rotary position, so that a mean from a prompt of another length stands at the run's own
positions. The set's plan (`found.plan()`) fits any clip: members get zero, or the mean over discovery of what their
donor gave them, a vector for each role (what decoding adds: the generation position's). These are not each conflict's
own donors, so the plan is measured anew on confirmation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.errors import InputError
from av_lens.interventions import Plan, Site, replace, zero
from av_lens.isolation.explaining.knowledge import Known
from av_lens.isolation.measuring.bench import Bench, Chunk, gathered, in_order, shared_out
from av_lens.isolation.measuring.effects import mirrored
from av_lens.isolation.measuring.engine import MLP, PRIMARY_DONORS, Node, Recording, part_of, site_of
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.naming.evidence import chunks_of
from av_lens.isolation.sets.sets import controls, release_of_sets
from av_lens.results.record import Isolation

DONOR = "repair"
_KEY = "repair"


def repair(known: Known) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Write the chosen set's edit as constants from discovery, and measure it on confirmation."""
    chosen, first = known.held.chosen, known.searched.first
    if chosen is None:
        return [], {}
    values = repair_values(first.chunks, chosen.members, chosen.donor)
    chunks = chunks_of(known.bench, known.searched, known.confirmation, first.site)
    return repair_rows(chunks, known.confirmation, chosen.members, values), values


def repair_values(chunks: Sequence[Chunk], members: Sequence[Node], donor: str) -> dict[str, np.ndarray]:
    """Average what a donor gives to the members, by role of the position."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    depends = {"members": list(members), "donor": donor}

    def measure(chunk: Chunk) -> dict[str, np.ndarray]:
        return chunk.remember("repair values", depends, partial(_by_role, chunk, members, donor))

    for found in shared_out(chunks, measure):
        for key, value in found.items():
            sums[key] = sums.get(key, 0.0) + value.sum(0)
            counts[key] = counts.get(key, 0) + len(value)
    return {f"{_KEY}/{donor}/{key}": (total / counts[key]).astype(np.float32) for key, total in sums.items()}


def _by_role(chunk: Chunk, members: Sequence[Node], donor: str) -> dict[str, np.ndarray]:
    """The members' donor outputs per conflict, averaged over the positions of each role."""
    recording, n = chunk.run("va"), len(chunk.examples)
    given = {node: z.expand(n, -1, -1) for node, z in chunk.z("va", members, donor).items()}
    out: dict[str, np.ndarray] = {}
    for role, places in roles_at(recording).items():
        for (layer, head), z in given.items():
            values = z[:, places].double().mean(1).cpu().numpy()
            out[f"{layer}.{'mlp' if head == MLP else head}/{role}"] = values[~np.isnan(values).any(1)]
    return out


def roles_at(recording: Recording) -> dict[str, list[int]]:
    """Find which of a site's positions have which role."""
    roles = recording.inputs.spans.roles
    found: dict[str, list[int]] = {}
    for place, position in enumerate(recording.site.tolist()):
        found.setdefault(str(roles[position]), []).append(place)
    return found


def constants(values: dict[str, np.ndarray], like: Recording, part: str) -> Float[Tensor, "layer one site ..."]:
    """Lay the members' constants out as a donor for one run; other nodes are NaN, so that no one reads them."""
    out = torch.full_like(like.at_site(part)[:, :1], torch.nan)
    where = roles_at(like)
    for key, value in values.items():
        _, (layer, head), role = _parsed(key)
        if part_of((layer, head)) == part:
            at = out[layer, 0] if head == MLP else out[layer, 0, :, head]
            at[where.get(role, [])] = torch.from_numpy(value).to(out)
    return out


def _parsed(key: str) -> tuple[str, Node, str]:
    _, donor, node, role = key.split("/")
    layer, head = node.split(".")
    return donor, (int(layer), MLP if head == "mlp" else int(head)), role


def plan_of(found: Isolation) -> Plan:
    """Write the chosen set's edit as a plan that fits any clip and question."""
    keys = sorted(key for key in found.arrays if key.startswith(f"{_KEY}/"))
    if not keys:
        raise InputError(f"this finding has no set to edit, so there is no repair plan. Its verdict: {found.verdict}")
    edits: list[Any] = []
    for key in keys:
        donor, node, role = _parsed(key)
        site = site_of(node, "generation|generated" if role == "generation" else role)
        edits.append(zero(site) if donor == "zero" else replace(site, torch.from_numpy(found.arrays[key])[None]))
    return Plan(edits)


def repair_rows(
    chunks: Sequence[Chunk], half: Half, members: Sequence[Node], values: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Measure the plan on confirmation: what it mends, and what else it changes (rows of `repair`)."""
    for chunk in chunks:
        chunk.constants[DONOR] = partial(constants, values)
    effect = release_of_sets(chunks, [tuple(members)], [DONOR], half.examples, "the repair plan")
    out = [_change("C", half, half.C, half.C + effect.release[0])]
    for answer, after in (("sound", effect.says_sound[0]), ("picture", effect.says_picture[0])):
        before = in_order(chunks, half.examples, lambda chunk, answer=answer: chunk.says(answer))
        out.append(_change(f"says the {answer} under conflict", half, before, after))
    for row in controls(chunks, members, DONOR, half):
        told = row["verdict"].startswith(("not measured", "reported"))
        kept = {name: row[name] for name in ("n", "before", "after", "bound", "verdict") if name in row}
        change = float("nan") if told else row["after"] - row["before"]
        out.append({"quantity": row["control"], **kept, "change": change})
    return out


def _change(name: str, half: Half, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    row = {"quantity": name, "n": int((~np.isnan(after)).sum())}
    row |= {"before": float(np.nanmean(before)), "after": float(np.nanmean(after))}
    return row | half.bounded(after - before, "change")


K_AND_V = "release of K and V"


@dataclass(frozen=True)
class Unit:
    """A unit of a layer: its `kind`, its number where it is a kv group (-1 elsewhere), the nodes edited together."""

    kind: str
    layer: int
    index: int
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Asked:
    """An estimand of a unit: the edited base, the donor, the sign, and whether K and V are edited instead of z."""

    estimand: str
    base: str
    donor: str
    sign: int = 1
    keys_and_values: bool = False


def units_of(bench: Bench) -> list[Unit]:
    """List a model's units, layer by layer."""
    engine = bench.engine
    n = engine.model.spec.n_kv_heads
    size, out = engine.n_heads // n, list[Unit]()
    for layer in range(engine.n_layers):
        heads = tuple((layer, head) for head in range(engine.n_heads))
        out += [Unit("kv group", layer, g, heads[g * size : (g + 1) * size]) for g in range(n)]
        out += [] if bench.mlps else [Unit("mlp", layer, -1, ((layer, MLP),))]  # else it is one of the nodes
        out += [Unit("attention", layer, -1, heads), Unit("layer", layer, -1, (*heads, (layer, MLP)))]
    return out


def asked_of(chunks: Sequence[Chunk]) -> list[Asked]:
    """List the estimands at the conflicts' site."""
    donors = [donor for donor in PRIMARY_DONORS if chunks[0].has(donor)]
    out = [Asked("release", "va", donor) for donor in donors]
    out += [Asked("carries", "blank_a", "blank_muted", -1), Asked("sufficiency", "blank_a", "va", -1)]
    return out + [Asked(K_AND_V, "va", donor, keys_and_values=True) for donor in donors]


def plan_of_unit(unit: Unit, asked: Asked, chunk: Chunk, base: str) -> Plan | None:
    """Write a unit's edit of one base cell; None where the estimand is not the unit's."""
    run = chunk.run(base)
    if not asked.keys_and_values:
        return run.plan(chunk.z(base, unit.nodes, asked.donor))
    if unit.kind != "kv group":
        return None
    given = ((part, chunk.donor(base, asked.donor, part=part)[unit.layer][:, :, unit.index]) for part in ("k", "v"))
    return Plan([replace(Site(part, unit.layer, unit.index, run.site.tolist()), value) for part, value in given])


def _chunk_units(chunk: Chunk, units: Sequence[Unit], wanted: Sequence[Asked]) -> dict[str, np.ndarray]:
    """Every unit's effect by every estimand in one stack, `[batch, asked, unit]`; NaN where it is not the unit's."""
    candidates = chunk.bench.candidates
    out = np.full((len(wanted), len(units), len(chunk.examples)), np.nan)

    def changes(cell: str, these: Sequence[int]) -> np.ndarray:
        planned = [plan_of_unit(unit, wanted[a], chunk, cell) for a, unit in product(these, units)]
        found = chunk.changed(chunk.run(cell), [plan for plan in planned if plan is not None])
        scores = np.stack([chunk.scores(one) for one in found])
        change = np.full((len(planned), len(chunk.examples)), np.nan)
        made = [plan is not None for plan in planned]
        change[made] = candidates.margin(scores, chunk.examples) - chunk.margin(cell)
        chunk.drop_traces(cell)
        return change.reshape(len(these), *out.shape[1:])

    for base in dict.fromkeys(asked.base for asked in wanted):
        these = [a for a, asked in enumerate(wanted) if asked.base == base]
        out[these] = mirrored(base, partial(changes, these=these))
    return {"margin": (out * np.array([asked.sign for asked in wanted])[:, None, None]).transpose(2, 0, 1)}


def unit_rows(chunks: Sequence[Chunk], half: Half, *, site: str) -> list[dict[str, Any]]:
    """Measure every unit at a site: rows of `units`."""
    units, wanted = units_of(chunks[0].bench), asked_of(chunks)
    depends = {"units": [vars(unit) for unit in units], "asked": [vars(asked) for asked in wanted]}
    compute, stage = partial(_chunk_units, units=units, wanted=wanted), f"groups, attentions and layers at {site}"
    made = gathered(chunks, half.examples, "unit effects", depends, compute, stage)
    out: list[dict[str, Any]] = []
    for a, asked in enumerate(wanted):
        values = made["margin"][:, a]
        kept = [u for u in range(len(units)) if not np.isnan(values[:, u]).all()]
        for unit, found in zip((units[u] for u in kept), half.rows(values[:, kept]), strict=True):
            of = {"half": half.name, "site": site, "unit": unit.kind, "layer": unit.layer, "index": unit.index}
            out.append(of | {"estimand": asked.estimand, "donor": asked.donor} | found)
    return out
