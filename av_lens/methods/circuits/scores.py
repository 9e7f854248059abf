"""How much does each node contribute to m? Scores from which a circuit is chosen.

A contribution is m(whole) - m(the node alone replaced by its empty donor), or a first guess at it, in the unit of m:

    exact     the replacement itself, one replay for each node
    atp       (value - empty value) . dm/d(value), at the whole model's run
    atp_star  its size averaged over layers whose gradient is dropped in turn (GradDrop, a node's own layer left out),
              with the sign of atp. Replacing z or what an MLP writes leaves the layer's own softmax as it is, so that
              the fix for queries and keys has nothing to mend
    eap_ig    (value - empty value) . mean of dm/d(value) over runs whose embedding lies between the run's own and the
              empty run's: the sum of the EAP-IG scores of all edges that leave the node at the site. The empty donor
              "zero" has no run of its own: its path is the same, its empty value 0
    greedy    a search by replay: from the whole model, each round measures what every node that is left would take with
              it, and takes the cheapest away. The contribution is what it took at that moment; they sum to
              m(whole) - m(empty)

Sources: AtP and AtP*: Nanda (2023), Kramár et al. (2024, 2403.00745); EAP-IG: Hanna et al. (2024); elimination as in
ACDC: Conmy et al. (2023), here over nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.execution import run
from av_lens.core.progress import Progress
from av_lens.families.hook_names import hook_name
from av_lens.interventions import Plan, Site, replace
from av_lens.methods.circuits.runs import CircuitRuns, TermRun
from av_lens.methods.circuits.terms import Nodes
from av_lens.methods.shared.gradient_drops import held_layers
from av_lens.replay.suffix_gradients import SuffixGradients

KINDS = ("exact", "atp", "atp_star", "eap_ig", "greedy")
GRADIENT_GB = 8.0
_EQUAL = 1e-5  # of m(whole) - m(empty): costs nearer than this are equal


def contributions(
    runs: CircuitRuns, kind: str, empties: Sequence[str], *, steps: int, show: Progress
) -> dict[str, Float[np.ndarray, "example node"]]:
    """Score every node, for each empty donor.

    Args:
        runs: the runs.
        kind: "exact", "atp", "atp_star" or "eap_ig".
        empties: the empty donors.
        steps: runs along the path of "eap_ig".
        show: called as `show(stage, done, total)`.

    Returns:
        Contributions, positive where the node raises m.
    """
    nodes = runs.nodes
    if kind == "exact":
        without = [nodes.all - {node} for node in range(len(nodes))]
        found: dict[str, np.ndarray] = {}
        for empty in empties:
            scores = runs.measure(empty, [nodes.all, *without], show=show, stage=f"exact scores, {empty}")
            found[empty] = (scores[0] - scores[1:]).T
        return found
    n_gradients = runs.model.spec.n_layers if kind == "atp_star" else 1
    total = {empty: np.zeros((1 + n_gradients, runs.n, len(nodes))) for empty in empties}
    for number, one in enumerate(runs.runs):
        for empty, guesses in _first_order(runs, number, one, kind, empties, steps).items():
            total[empty][: len(guesses), one.rows] += one.weight * guesses
        show(f"{kind} scores", number + 1, len(runs.runs))
    return {empty: _starred(guesses, nodes) if kind == "atp_star" else guesses[0] for empty, guesses in total.items()}


def _first_order(
    runs: CircuitRuns, number: int, one: TermRun, kind: str, empties: Sequence[str], steps: int
) -> dict[str, Float[np.ndarray, "gradient batch node"]]:
    """Change times gradient: of the run itself first, then of every other gradient asked for."""
    trace, sites, positions = runs.trace(number), one.sites(runs.nodes), one.positions
    first = trace.traits.restart(positions[0], trace.spans.roles)
    plans: list[Plan | None] = [None]
    if kind == "atp_star":
        plans += held_layers(runs.model, one.base, list(range(first, len(trace.spans))))
    if kind == "eap_ig":
        plans = list(_along_the_path(runs, one, steps))
    budget = max(GRADIENT_GB, runs.budget_gb)
    values = _values(runs, one, sites)
    guesses: dict[str, list[Tensor]] = {empty: [] for empty in empties}
    for plan in plans:
        gradients = trace.gradients(sites, one.metric, plan=plan, budget_gb=budget)
        for empty in empties:
            guesses[empty].append(_by_node(one, runs.nodes, sites, values, gradients, empty))
    stacked = {empty: torch.stack(listed).cpu().numpy() for empty, listed in guesses.items()}
    return {empty: each.mean(0, keepdims=True) if kind == "eap_ig" else each for empty, each in stacked.items()}


def _values(runs: CircuitRuns, one: TermRun, sites: Sequence[Site]) -> list[Tensor]:
    with torch.no_grad():
        cache = run(runs.model, one.base, capture=list(sites)).cache
    return [cache[hook_name(site.component, site.layer)] for site in sites]


def _by_node(
    one: TermRun,
    nodes: Nodes,
    sites: Sequence[Site],
    values: Sequence[Tensor],
    gradients: SuffixGradients,
    empty: str,
) -> Float[Tensor, "batch node"]:
    columns: dict[tuple[int, int | None], Tensor] = {}
    for site, value, gradient in zip(sites, values, gradients.gradient, strict=True):
        layer = site.layer or 0
        product = ((value - one.given[empty][site.component, layer]).double() * gradient.double()).sum(-1).sum(1)
        if site.component == "mlp_out":
            columns[layer, None] = product
        else:
            columns |= {(layer, head): column for head, column in enumerate(product.unbind(-1))}
    return torch.stack([columns[place] for place in zip(nodes.layers, nodes.heads, strict=True)], dim=-1)


def _along_the_path(runs: CircuitRuns, one: TermRun, steps: int) -> list[Plan]:
    """Plans whose embedding lies between the run's own and the empty run's, at the middles of equal steps."""
    with torch.no_grad():
        own, other = (
            run(runs.model, x, capture="embed").cache[hook_name("embed", None)] for x in (one.base, one.donor)
        )
    change = other - own
    moved = torch.nonzero(change.abs().amax((0, 2))).flatten().tolist()
    if not moved:
        return [Plan()] * steps
    site = Site("embed", positions=moved)
    return [Plan(replace(site, own[:, moved] + (step + 0.5) / steps * change[:, moved])) for step in range(steps)]


def _starred(guesses: Float[np.ndarray, "gradient example node"], nodes: Nodes) -> Float[np.ndarray, "example node"]:
    """The mean size over dropped layers, a node's own left out, with the sign of the plain guess."""
    layers = np.arange(len(guesses) - 1)
    others = (layers[:, None] != np.asarray(nodes.layers)[None]).astype(float)  # [dropped, node]
    sizes = (np.abs(guesses[1:]) * others[:, None]).sum(0) / np.maximum(others.sum(0), 1.0)
    return np.sign(guesses[0]) * sizes


@dataclass(frozen=True, eq=False)
class Search:
    """A greedy search's outcome.

    Attributes:
        order: the nodes, the last to be taken away first.
        scores: what each took with it at its moment.
    """

    order: tuple[int, ...]
    scores: Float[np.ndarray, "example node"]


def eliminated(runs: CircuitRuns, empty: str, *, signed: bool, drop: float, show: Progress) -> Search:
    """Take nodes away one after another, the cheapest first, until none is left.

    Where several are taken in a round, each must cost no more, beside those before it, than the cheapest node that
    stays: redundant nodes, each of which is cheap alone, do not go together.

    Args:
        runs: the runs.
        empty: the empty donor.
        signed: keep m far from empty; else keep it near the whole model's.
        drop: the share of what is left that a round may take; 0 takes one at a time.
        show: called as `show(stage, done, total)`.

    Returns:
        The order, best nodes first, and their contributions.
    """
    nodes, stage = runs.nodes, f"greedy search, {empty}"

    def measured(circuits: Sequence[frozenset[int]]) -> Float[np.ndarray, "circuit example"]:
        return runs.measure(empty, circuits, show=lambda *_: None, stage=stage)

    whole, bare = measured([nodes.all, frozenset()])
    span = float((whole - bare).mean())
    worth = _worth(float(whole.mean()), np.sign(span) if signed else 0.0)
    kept, before, tie = nodes.all, whole, _EQUAL * abs(span) or 1.0
    scores, gone = np.zeros((runs.n, len(nodes))), list[int]()
    while kept:
        listed = sorted(kept)
        single = np.array([worth(row) for row in measured([kept - {node} for node in listed])])
        cheapest = [listed[i] for i in np.argsort(-np.round(single / tie), kind="stable")]
        several = max(1, int(drop * len(kept)))
        stays = np.sort(single)[::-1][several] if several < len(kept) else -np.inf
        most = worth(before) - stays + tie
        taken = measured([kept - set(cheapest[: i + 1]) for i in range(several)])
        for node, row in zip(cheapest[:several], taken, strict=True):
            if node != cheapest[0] and worth(before) - worth(row) > most:
                break
            scores[:, node], before = before - row, row
            gone.append(node)
        kept = nodes.all - set(gone)
        show(stage, len(gone), len(nodes))
    return Search(tuple(reversed(gone)), scores)


def _worth(whole: float, sign: float) -> Callable[[np.ndarray], float]:
    """What a search keeps large: m in its own direction, or (sign 0) its nearness to the whole model's."""
    return lambda row: sign * float(row.mean()) if sign else -abs(float(row.mean()) - whole)
