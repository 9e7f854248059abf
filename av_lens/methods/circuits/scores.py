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

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core import run
from av_lens.families.hook_names import hook_name
from av_lens.interventions import Plan, Site, replace
from av_lens.methods.circuits.runs import CircuitRuns, TermRun, Values, written
from av_lens.methods.circuits.terms import Nodes
from av_lens.methods.shared.frame import held_layers

KINDS = ("exact", "atp", "atp_star", "eap_ig", "greedy")
GRADIENT_GB = 8.0
_EQUAL = 1e-5  # of m(whole) - m(empty): costs nearer than this are equal


def contributions(runs: CircuitRuns, kind: str, *, steps: int) -> dict[str, Float[np.ndarray, "example node"]]:
    """Score every node in the unit of m, for each empty donor: "exact", "atp", "atp_star" or "eap_ig"."""
    nodes, empties = runs.nodes, runs.measured.empties
    if kind == "exact":
        circuits = [nodes.all, *(nodes.all - {node} for node in range(len(nodes)))]
        scores = {empty: runs.measure(empty, circuits, stage=f"exact scores, {empty}") for empty in empties}
        return {empty: (found[0] - found[1:]).T for empty, found in scores.items()}
    n_gradients = runs.model.spec.n_layers if kind == "atp_star" else 1
    total = {empty: np.zeros((1 + n_gradients, runs.n, len(nodes))) for empty in empties}
    for number, one in enumerate(runs.runs):
        for empty, guesses in _first_order(runs, number, one, kind, steps).items():
            total[empty][: len(guesses), one.rows] += one.weight * guesses
        runs.show(f"{kind} scores", number + 1, len(runs.runs))
    return {empty: _starred(guesses, nodes) if kind == "atp_star" else guesses[0] for empty, guesses in total.items()}


def _first_order(
    runs: CircuitRuns, number: int, one: TermRun, kind: str, steps: int
) -> dict[str, Float[np.ndarray, "gradient batch node"]]:
    """Change times gradient: of the run itself first, then of every other gradient asked for."""
    trace, sites = runs.trace(number), runs.nodes.sites(one.positions)
    plans: list[Plan | None] = [None]
    if kind == "atp_star":
        first = trace.traits.restart(one.positions[0], trace.spans.roles)
        plans += held_layers(runs.model, one.base, list(range(first, len(trace.spans))))
    if kind == "eap_ig":
        plans = list(_along_the_path(runs, one, steps))
    values = written(runs.model, one.base, sites)
    changes = {empty: {key: values[key] - given for key, given in one.given[empty].items()} for empty in one.given}
    guesses: dict[str, list[Tensor]] = {empty: [] for empty in changes}
    for plan in plans:
        found = trace.gradients(sites, one.metric, plan=plan, budget_gb=max(GRADIENT_GB, runs.budget_gb))
        for empty, change in changes.items():
            guesses[empty].append(_by_node(runs.nodes, change, dict(zip(change, found.gradient, strict=True))))
    stacked = {empty: torch.stack(listed).cpu().numpy() for empty, listed in guesses.items()}
    return {empty: each.mean(0, keepdims=True) if kind == "eap_ig" else each for empty, each in stacked.items()}


def _by_node(nodes: Nodes, change: Values, gradient: Values) -> Float[Tensor, "batch node"]:
    """Sum change times gradient over positions and what a node writes."""
    summed = {key: (one.double() * gradient[key].double()).sum(-1).sum(1) for key, one in change.items()}
    places = zip(nodes.layers, nodes.heads, strict=True)
    columns = (summed["mlp_out", layer] if head is None else summed["z", layer][:, head] for layer, head in places)
    return torch.stack(list(columns), dim=-1)


def _along_the_path(runs: CircuitRuns, one: TermRun, steps: int) -> list[Plan]:
    """Plans whose embedding lies between the run's own and the empty run's, at the middles of equal steps."""
    with torch.no_grad():
        own, other = (run(runs.model, x, capture="embed").cache[hook_name("embed")] for x in (one.base, one.donor))
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


class Search(NamedTuple):
    """A greedy search's outcome: the nodes, best first, and what each took with it at its moment."""

    order: tuple[int, ...]
    scores: Float[np.ndarray, "example node"]


def eliminated(runs: CircuitRuns, empty: str, *, signed: bool, drop: float) -> Search:
    """Take nodes away one after another, the cheapest first, until none is left.

    Where several are taken in a round, each must cost no more, beside those before it, than the cheapest node that
    stays: redundant nodes, each of which is cheap alone, do not go together. `signed` keeps m far from empty, else it
    is kept near the whole model's; `drop` is the share of what is left that a round may take, 0 takes one at a time.
    """
    nodes = runs.nodes
    whole, bare = runs.measure(empty, [nodes.all, frozenset()])
    span = float((whole - bare).mean())
    sign, own = np.sign(span) if signed else 0.0, float(whole.mean())

    def worth(row: np.ndarray) -> float:
        """What is kept large: m in its own direction, or its nearness to the whole model's."""
        return sign * float(row.mean()) if sign else -abs(float(row.mean()) - own)

    kept, before, tie = nodes.all, whole, _EQUAL * abs(span) or 1.0
    scores, gone = np.zeros((runs.n, len(nodes))), list[int]()
    while kept:
        listed = sorted(kept)
        single = np.array([worth(row) for row in runs.measure(empty, [kept - {node} for node in listed])])
        cheapest = [listed[i] for i in np.argsort(-np.round(single / tie), kind="stable")]
        several = max(1, int(drop * len(kept)))
        stays = np.sort(single)[::-1][several] if several < len(kept) else -np.inf
        most = worth(before) - stays + tie
        taken = runs.measure(empty, [kept - set(cheapest[: i + 1]) for i in range(several)])
        for node, row in zip(cheapest[:several], taken, strict=True):
            if node != cheapest[0] and worth(before) - worth(row) > most:
                break
            scores[:, node], before = before - row, row
            gone.append(node)
        kept = nodes.all - set(gone)
        runs.show(f"greedy search, {empty}", len(gone), len(nodes))
    return Search(tuple(reversed(gone)), scores)
