"""Where does a head's release go: straight to the logits, or into which other head's queries, keys or values?

For a sender and its donor, on the base `va` (mirrored `av`), at the site:

    total        z from the donor, everything after it free: its release
    direct       the same with every later head's output held, MLPs and norms recomputed: to the logits by its own write
    L5H1.q       path patching: run 3 gives what head 1 of layer 5 would read as query if nothing but the sender had
                 changed (every other head held, MLPs and norms recomputed); run 4 is the base run with only that input
                 replaced and everything after it free. Keys and values are ungrouped: this query head alone sees them
    queries      all receivers' queries in one run 4
    joint        all receivers' queries, keys and values in one run 4
    remainder    total - direct - joint: what passes elsewhere, and what the parts make of each other

Positive: that road lets the model hear more. A gate shows up as mediated by the queries of the carriers that it turns
away. Receivers not after the sender are NaN. For carriers the base is `blank_a` (mirrored `blank_v`), the donor
`blank_muted`, the effect one on G, and only total, direct and remainder are measured.

Donors need not be a run of their own (`zero`, means), so the runs of `methods.path_patching` are made here from the
same parts (`runs.held`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from av_lens.core.execution import run
from av_lens.interventions import Plan, Site, replace
from av_lens.interventions.nodes import INPUTS, Node
from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.plan_effects import effects_of_plans, trace_of
from av_lens.isolation.measuring.recordings import Head
from av_lens.isolation.measuring.store import Arrays
from av_lens.replay.held import HeldRun, replaced

TOTAL, DIRECT, QUERIES, JOINT, REMAINDER = "total", "direct", "queries", "joint", "remainder"
Sender = tuple[Head, str]


def receiver_nodes(heads: Sequence[Head]) -> list[Node]:
    """List the inputs of heads that may receive."""
    return [Node("head", layer, head, name) for layer, head in heads for name in INPUTS]


def columns(heads: Sequence[Head]) -> list[str]:
    """Name the columns of `paths`."""
    return [TOTAL, DIRECT, *(node.label for node in receiver_nodes(heads)), *([QUERIES, JOINT] if heads else [])]


@torch.no_grad()
def paths(chunk: Chunk, base: str, senders: Sequence[Sender], heads: Sequence[Head]) -> Arrays:
    """Measure where the senders' effects go."""

    def plans(cell: str) -> list[Plan | None]:
        by_sender = [_own_plans(chunk, cell, sender) for sender in senders]
        if heads:
            for sender, received in zip(by_sender, _receiver_plans(chunk, cell, senders, heads), strict=True):
                sender += received
        return [plan for listed in by_sender for plan in listed]

    effect = effects_of_plans(chunk, base, plans)
    return {"effect": effect.reshape(len(effect), len(senders), len(columns(heads)))}


def _own_plans(chunk: Chunk, cell: str, sender: Sender) -> list[Plan | None]:
    """The sender as in its donor: everything after it free, and every later head held."""
    (head, donor), recording = sender, chunk.run(cell)
    return [recording.plan(chunk.z(cell, [head], donor), freeze=freeze) for freeze in (False, True)]


def _receiver_plans(
    chunk: Chunk, cell: str, senders: Sequence[Sender], heads: Sequence[Head]
) -> list[list[Plan | None]]:
    """Each receiver's input as in run 3, and all of them together, for every sender."""
    held, nodes = _held(chunk, cell), receiver_nodes(heads)
    read = held.inputs([_change(chunk, cell, sender) for sender in senders], nodes)
    ends = [Node("head", *head).writes_at for head, _ in senders]
    found: list[list[Plan | None]] = [[None] * len(nodes) for _ in senders]
    for number, node in enumerate(nodes):
        rows = [row for row, end in enumerate(ends) if node.reads_at > end]
        if rows:
            for row, plan in zip(rows, replaced(held, {node: read[node][rows]}), strict=True):
                found[row][number] = plan
    queries = _together(held, {node: given for node, given in read.items() if node.input == "q"}, ends)
    joint = _joint(chunk, cell, held, read, ends)
    return [[*listed, *both] for listed, *both in zip(found, queries, joint, strict=True)]


def _held(chunk: Chunk, cell: str) -> HeldRun:
    """The base run with its heads held, at the site; MLPs and norms are recomputed."""
    trace, recording = trace_of(chunk, cell), chunk.run(cell)
    site = tuple(recording.site.tolist())
    sites = [Site("resid_mid", layer, positions=site) for layer in range(trace.n_layers)]
    with torch.no_grad():
        cache = run(chunk.bench.engine.model, recording.inputs, capture=sites).cache
    middle = tuple(cache["resid_mid", layer] for layer in range(trace.n_layers))
    return HeldRun(trace, site, middle, "free", "recomputed")


def _change(chunk: Chunk, cell: str, sender: Sender) -> dict[tuple[str, int], torch.Tensor]:
    """What the stream gains where the sender writes as in its donor."""
    (layer, head), donor = sender
    own = chunk.run(cell).site_z[layer, :, :, head]
    output = chunk.bench.engine.model.bridge.blocks[layer].attn.W_O.detach()[head]
    return {("heads", layer): (chunk.donor(cell, donor)[layer, :, :, head] - own) @ output}


def _together(held: HeldRun, read: dict[Node, torch.Tensor], ends: Sequence[int]) -> list[Plan | None]:
    """All receivers after each sender together, everything else free."""
    found: list[Plan | None] = []
    for row, end in enumerate(ends):
        later = {node: given[[row]] for node, given in read.items() if node.reads_at > end}
        found.append(replaced(held, later)[0] if later else None)
    return found


def _joint(
    chunk: Chunk, cell: str, held: HeldRun, read: dict[Node, torch.Tensor], ends: Sequence[int]
) -> list[Plan | None]:
    """All receivers after each sender together: their queries, keys and values.

    Where the site reaches to the end of the prompt, a receiver's queries, keys and values there are all given and its
    earlier keys and values are the base run's, so that its z is known beforehand, whatever else changes.
    """
    site, window = chunk.run(cell).site.tolist(), chunk.run(cell).window.tolist()
    if site != window:
        return _together(held, read, ends)
    made = held.outputs(read)
    found: list[Plan | None] = []
    for row, end in enumerate(ends):
        heads = sorted({(node.layer or 0, node.index or 0) for node in read if node.reads_at > end})
        edits = [replace(Site("z", *head, window), made[("z", *head)][0][row]) for head in heads]
        found.append(Plan(edits) if edits else None)
    return found
