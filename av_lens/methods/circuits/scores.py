"""How much does each node contribute, in which order are nodes taken, and is the circuit complete, minimal, stable?

A contribution is m(whole) - m(the node alone replaced by its empty donor), or a first guess at it, in the unit of m:

    exact     the replacement itself, one replay for each node
    atp       (value - empty value) . dm/d(value), at the whole model's run
    atp_star  its size averaged over layers whose gradient is dropped in turn (a node's own layer left out), with the
              sign of atp; replacing z or an MLP's write leaves the softmax as it is, so there is no QK fix
    eap_ig    (value - empty value) . mean of dm/d(value) over runs whose embedding lies between the run's own and the
              empty run's. The empty donor "zero" has no run of its own: its path is the same, its empty value 0
    greedy    each round takes the cheapest node left away, by replay; the contribution is what it took at that moment

    completeness  |f(C without K) - f(model without K)| for sets K of members: none, all, and random halves
    minimality    for each member v the K for which f(C without K) - f(C without K and v) is largest
    links         f(C) - f(C without u) - f(C without v) + f(C without both): two members need each other where together
                  they add more in size beside each other, else they stand in for each other
    random        the nodes of each layer change places at random (heads with heads)
    stability     the ranking is made anew from resampled conflicts; Jaccard = shared / either

Sources: AtP and AtP*: Nanda (2023), Kramár et al. (2024, 2403.00745); EAP-IG: Hanna et al. (2024); elimination as in
ACDC: Conmy et al. (2023), here over nodes; completeness and minimality: Wang et al. (2022), who search for the worst K;
here K is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from av_lens.core import run
from av_lens.errors import InputError
from av_lens.families.decoder import hook_name
from av_lens.interventions import Plan, Site, replace
from av_lens.methods.circuits.edge_runs import Edges
from av_lens.methods.circuits.runs import CircuitRuns, Nodes, TermRun, Values, written
from av_lens.methods.shared.frame import held_layers, starred
from av_lens.results import EdgeScores, Grid
from av_lens.results.circuit import Scale
from av_lens.results.statistics import Bootstrap

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
    layers = nodes.layers
    return {empty: starred(guesses, layers) if kind == "atp_star" else guesses[0] for empty, guesses in total.items()}


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


class Search(NamedTuple):
    """A greedy search's outcome: the nodes, best first, and what each took with it at its moment."""

    order: tuple[int, ...]
    scores: Float[np.ndarray, "example node"]


def eliminated(runs: CircuitRuns, empty: str, *, signed: bool, drop: float) -> Search:
    """Take nodes away one after another, the cheapest first, until none is left.

    Where several are taken in a round, each must cost no more, beside those before it, than the cheapest node that
    stays: redundant nodes do not go together. `signed` keeps m far from empty, else it is kept near the whole model's.
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


TIE = 1e-5
ROUNDING = 1e-6
COMPLETENESS = ("removed", "size", "circuit", "model", "difference", "low", "high")
LINKS = ("first", "second", "interaction", "low", "high", "how")
MINIMALITY = ("node", "adds", "low", "high", "removed", "needed")


def drawn_subsets(members: Sequence[int], n: int, seed: int) -> list[frozenset[int]]:
    """Draw sets of members, each member with probability a half: all different, none of them empty or whole."""
    rng = np.random.default_rng(seed)
    found: dict[frozenset[int], None] = {}
    for _ in range(20 * n):
        chosen = frozenset(int(node) for node in np.asarray(members)[rng.random(len(members)) < 0.5])
        if 0 < len(chosen) < len(members) and len(found) < n:
            found.setdefault(chosen)
    return list(found)


def completeness(
    runs: CircuitRuns, scale: Scale, empty: str, members: Sequence[int], subsets: Sequence[frozenset[int]]
) -> pd.DataFrame:
    """Take sets of members from the circuit and from the model."""
    if not scale.usable:
        return pd.DataFrame(columns=pd.Index(COMPLETENESS))
    circuit, model = frozenset(members), runs.nodes.all
    listed = [frozenset[int](), circuit, *subsets]
    both = [base - removed for removed in listed for base in (circuit, model)]
    found = runs.measure(empty, both, stage="completeness").reshape(len(listed), 2, -1)
    difference = scale.ratio(found[:, 0] - found[:, 1])
    removed, size = [_words(runs.nodes, one, members) for one in listed], list(map(len, listed))
    f = (scale.share(found[:, i]).value for i in (0, 1))
    columns = (removed, size, *f, difference.value, difference.low, difference.high)
    return pd.DataFrame(dict(zip(COMPLETENESS, columns, strict=True)))


def minimality(
    runs: CircuitRuns, scale: Scale, empty: str, members: Sequence[int], subsets: Sequence[frozenset[int]]
) -> pd.DataFrame:
    """Find beside which removed set each member adds most."""
    if not scale.usable:
        return pd.DataFrame(columns=pd.Index(MINIMALITY))
    circuit = frozenset(members)
    listed = [frozenset[int](), *subsets]
    pairs = [(circuit - removed, circuit - removed - {node}) for node in members for removed in listed]
    found = runs.measure(empty, [one for pair in pairs for one in pair], stage="minimality")
    found = found.reshape(len(members), len(listed), 2, -1)
    rows = list[tuple[Any, ...]]()
    for node, changes in zip(members, found[:, :, 0] - found[:, :, 1], strict=True):
        adds = scale.ratio(changes)
        best = int(np.argmax(np.nan_to_num(np.abs(adds.value), nan=-1.0)))
        low, high = float(adds.low[best]), float(adds.high[best])
        needed = "untested" if np.isnan(low) else "no" if low <= 0 <= high else "yes"
        removed = _words(runs.nodes, listed[best] - {node}, members)
        rows.append((runs.nodes.names[node], float(adds.value[best]), low, high, removed, needed))
    return pd.DataFrame(rows, columns=pd.Index(MINIMALITY))


def links(runs: CircuitRuns, scale: Scale, empty: str, members: Sequence[int]) -> pd.DataFrame:
    """Measure how every two members of a circuit act together; none where there are too many of them."""
    pairs = list(combinations(sorted(members), 2))
    if not scale.usable or not pairs or len(members) > 24:
        return pd.DataFrame(columns=pd.Index(LINKS))
    circuit = frozenset(members)
    wanted = [circuit - set(gone) for one, two in pairs for gone in ((), (one,), (two,), (one, two))]
    found = runs.measure(empty, wanted, stage="links").reshape(len(pairs), 4, -1)
    interaction = scale.ratio(found[:, 0] - found[:, 1] - found[:, 2] + found[:, 3])
    both, neither_one, neither_two, none = (scale.share(found[:, i]).value for i in range(4))
    beside = np.abs(both - neither_one) + np.abs(both - neither_two)
    alone = np.abs(neither_two - none) + np.abs(neither_one - none)
    how = np.where(beside + ROUNDING >= alone, "need each other", "stand in for each other")
    first, second = ([runs.nodes.names[pair[i]] for pair in pairs] for i in (0, 1))
    columns = (first, second, interaction.value, interaction.low, interaction.high, how)
    return pd.DataFrame(dict(zip(LINKS, columns, strict=True)))


def shuffled_orders(nodes: Nodes, order: Sequence[int], n: int, seed: int) -> list[list[int]]:
    """Let the nodes of each layer change places in an order, heads with heads."""
    rng, groups = np.random.default_rng(seed), nodes.within_layers()  # one after another these are all nodes, in order
    drawn = [np.concatenate([rng.permutation(group) for group in groups]) for _ in range(n)]
    return [other[list(order)].tolist() for other in drawn]


def stability(
    scores: Float[np.ndarray, "example node"], boot: Bootstrap, order: str, sizes: Sequence[int]
) -> tuple[pd.DataFrame, Float[np.ndarray, "size node"]]:
    """Rank the nodes anew on resampled examples: overlap of the k first, and how often each node is among them."""
    overlap = np.full((len(sizes), 3), np.nan)
    share = np.full((len(sizes), scores.shape[1]), np.nan)
    if len(scores) >= 2 and len(scores) == boot.weights.shape[1]:
        weights = boot.weights[:500]
        whole = places(scores.mean(0), order)
        drawn = np.stack([places(row @ scores, order) for row in weights[weights.sum(1) > 0]])
        for i, k in enumerate(sizes):
            first = drawn < k
            shared = (first & (whole < k)).sum(1)
            jaccard = shared / (2 * k - shared)
            share[i] = first.mean(0)
            overlap[i] = (jaccard.mean(), *np.percentile(jaccard, [2.5, 97.5]))
    columns = dict(zip(("jaccard", "low", "high"), overlap.T, strict=True))
    return pd.DataFrame({"k": list(sizes), **columns}), share


def places(mean: Float[np.ndarray, " node"], order: str) -> Float[np.ndarray, " node"]:
    """Rank nodes by signed mean or by size, 0 for the best; ties stay in the nodes' own order."""
    key = np.abs(mean) if order == "magnitude" else mean
    found, unit = np.empty(len(mean)), TIE * float(np.abs(mean).max(initial=0.0)) or 1.0
    found[np.argsort(-np.round(key / unit), kind="stable")] = np.arange(len(mean))
    return found


def _words(nodes: Nodes, chosen: frozenset[int], members: Sequence[int]) -> str:
    if not chosen:
        return "none"
    return "all" if len(chosen) == len(members) else " ".join(nodes.names[node] for node in members if node in chosen)


ORDERS = ("magnitude", "signed")


@dataclass(frozen=True, eq=False)
class Ranking:
    """One empty donor's contributions, one example where only means are known, and the two orders, best first."""

    scores: Float[np.ndarray, "example node"]
    orders: dict[str, list[int]]
    searched: bool
    boot: Bootstrap

    @property
    def resampled(self) -> Float[np.ndarray, "example node"]:
        """The scores that an order on resampled examples can be made of; none after a search."""
        return self.scores[:0] if self.searched else self.scores

    def table(self, nodes: Nodes, order: str) -> pd.DataFrame:
        """Tabulate the nodes, best first; an MLP's head is -1."""
        chosen, known = self.orders[order], len(self.scores) == self.boot.weights.shape[1]
        bounds = self.boot.mean(self.scores) if known else None
        rows = [(nodes.names[i], nodes.layers[i], -1 if (head := nodes.heads[i]) is None else head) for i in chosen]
        return pd.DataFrame(rows, columns=pd.Index(["node", "layer", "head"])).assign(
            score=self.scores.mean(0)[chosen],
            low=np.nan if bounds is None else bounds.low[chosen],
            high=np.nan if bounds is None else bounds.high[chosen],
            place=np.arange(1, len(chosen) + 1),
        )


def rankings(runs: CircuitRuns, scores: Any, *, steps: int, drop: float, seed: int) -> dict[str, Ranking]:
    """Rank the nodes for each empty donor: by a kind of score, or by scores that somebody else made."""
    kind, found = scores if isinstance(scores, str) else "", dict[str, Ranking]()
    empties, pairs = runs.measured.empties, not runs.measured.clips[0]
    handed = {} if kind else dict.fromkeys(empties, given_scores(scores, runs.nodes, pairs=pairs))
    made = contributions(runs, kind, steps=steps) if kind not in ("", "greedy") else handed
    for empty, scale in runs.scales(seed).items():
        if kind == "greedy":
            searches = {name: eliminated(runs, empty, signed=name == "signed", drop=drop) for name in ORDERS}
            orders = {name: list(search.order) for name, search in searches.items()}
            found[empty] = Ranking(scale.sign * searches["magnitude"].scores, orders, True, scale.boot)
        else:
            turned = scale.sign * made[empty]
            orders = {name: np.argsort(places(turned.mean(0), name)).tolist() for name in ORDERS}
            found[empty] = Ranking(turned, orders, False, scale.boot)
    return found


def given_scores(scores: Any, nodes: Nodes, *, pairs: bool) -> Float[np.ndarray, "example node"]:
    """Read scores that somebody else made as contributions; effects of a replacement have the other sign."""
    if isinstance(nodes, Edges) and isinstance(scores, EdgeScores | xr.DataArray):
        values = scores if isinstance(scores, xr.DataArray) else scores.values
        found = np.atleast_3d(values.sel(sender=list(nodes.senders), receiver=list(nodes.receivers)).values.T).T
        found = found[:, *np.array(nodes.ends).T]
    elif isinstance(scores, EdgeScores):
        grid = scores.nodes()
        missing = [name for name in nodes.names if name not in scores.senders]
        if missing or grid.values.ndim != 2:
            raise InputError(
                f"these edge scores do not name every node (missing: {missing[:4]}), or tell edges apart by span; make "
                "them with edge_attribution(model, pair, metric=...)."
            )
        found = grid.effects.sel(sender=list(nodes.names)).values
    elif isinstance(scores, Grid):
        if scores.values.dims[1:] != ("layer", "head") or nodes.mlps:
            raise InputError(
                f"scores over {scores.values.dims[1:]} are no scores of these nodes: give a grid over layer and head "
                "(choose a figure with grid.sel(figure='atp_fixed')) and over='head', or an array."
            )
        found = scores.effects.values.reshape(len(scores.values), -1)
    else:
        found = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if found.ndim != 2 or found.shape[1] != len(nodes) or not np.isfinite(found).all():
        raise InputError(
            f"scores of shape {found.shape} do not fit {len(nodes)} nodes ({nodes.names[0]} to {nodes.names[-1]}), or "
            "are not all numbers: give [node] or [example, node]."
        )
    replaced = isinstance(scores, Grid | EdgeScores) and not (pairs and scores.direction.startswith("denoise"))
    return -found if replaced else found
