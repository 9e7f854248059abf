"""Can the finding be used? A plan that edits the named set on any clip, and what it mends and breaks.

The set's members get constant outputs: zero, or the mean over discovery of what their donor gave them (`blank_muted`:
what they write having neither seen nor heard; `mean_other`: what they write when asked something else), one vector for
each role of the site's positions, so that the plan fits any clip, question and length. What decoding adds is edited
like the generation position. The constants are not the set's own donors (those are each conflict's own), so the plan is
measured anew on confirmation: its release, how often the sound is said, and every control of `specificity`.

    plan = found.plan()
    model.generate(x, plan=plan, return_type="text")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.errors import InputError
from av_lens.interventions import Plan, Site, replace, zero
from av_lens.isolation.explaining.known import Known
from av_lens.isolation.measuring.bench import Chunk, in_order
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.recordings import Head, Recording
from av_lens.isolation.naming.evidence import chunks_of
from av_lens.isolation.sets.sets import release_of_sets
from av_lens.isolation.sets.specificity import controls
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


def repair_values(chunks: Sequence[Chunk], members: Sequence[Head], donor: str) -> dict[str, np.ndarray]:
    """Average what a donor gives to the members, by role of the position."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    depends = {"members": list(members), "donor": donor}
    for chunk in chunks:
        for key, value in chunk.remember("repair values", depends, partial(_by_role, chunk, members, donor)).items():
            sums[key] = sums.get(key, 0.0) + value.sum(0)
            counts[key] = counts.get(key, 0) + len(value)
    return {f"{_KEY}/{donor}/{key}": (total / counts[key]).astype(np.float32) for key, total in sums.items()}


def _by_role(chunk: Chunk, members: Sequence[Head], donor: str) -> dict[str, np.ndarray]:
    """The members' donor z per conflict, averaged over the positions of each role."""
    recording = chunk.run("va")
    z = chunk.donor("va", donor).expand(-1, len(chunk.examples), -1, -1, -1)
    out: dict[str, np.ndarray] = {}
    for role, places in roles_at(recording).items():
        for layer, head in members:
            values = z[layer, :, places, head].double().mean(1).cpu().numpy()
            out[f"{layer}.{head}/{role}"] = values[~np.isnan(values).any(1)]
    return out


def roles_at(recording: Recording) -> dict[str, list[int]]:
    """Find which of a site's positions have which role."""
    roles = recording.inputs.spans.roles
    found: dict[str, list[int]] = {}
    for place, position in enumerate(recording.site.tolist()):
        found.setdefault(str(roles[position]), []).append(place)
    return found


def constants(values: dict[str, np.ndarray], like: Recording) -> Float[Tensor, "layer one site head d_head"]:
    """Lay the members' constants out as a donor for one run; other heads are NaN, so that no one reads them."""
    out = torch.full_like(like.site_z[:, :1], torch.nan)
    where = roles_at(like)
    for key, value in values.items():
        _, _, head, role = key.split("/")
        layer, index = (int(part) for part in head.split("."))
        out[layer, 0, where.get(role, []), index] = torch.from_numpy(value).to(out)
    return out


def plan_of(found: Isolation) -> Plan:
    """Write the chosen set's edit as a plan that fits any clip and question."""
    keys = sorted(key for key in found.arrays if key.startswith(f"{_KEY}/"))
    if not keys:
        raise InputError(
            f"this finding has no set of heads to edit, so there is no repair plan. Its verdict: {found.verdict}"
        )
    edits: list[Any] = []
    for key in keys:
        _, donor, head, role = key.split("/")
        layer, index = (int(part) for part in head.split("."))
        positions = "generation|generated" if role == "generation" else role
        site = Site("z", layer, head=index, positions=positions)
        edits.append(zero(site) if donor == "zero" else replace(site, torch.from_numpy(found.arrays[key])[None]))
    return Plan(edits)


def repair_rows(
    chunks: Sequence[Chunk], half: Half, members: Sequence[Head], values: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Measure the plan on confirmation: what it mends, and what else it changes (rows of `repair`)."""
    given: Callable[[Recording], Tensor] = partial(constants, values)
    for chunk in chunks:
        chunk.constants[DONOR] = given
    sets = [tuple(members)]
    effect = release_of_sets(chunks, sets, [DONOR], half.examples, "the repair plan")
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
