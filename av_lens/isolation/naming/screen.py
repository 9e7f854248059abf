"""Which of more than 64 nodes are worth measuring? A screen by gradients on discovery; protocol section 6.

Of AtP* (Kramár et al. 2024) GradDrop is taken: a guess's size is the mean over layers of its sizes with that layer's
gradient dropped, the node's own left out; its sign is the plain guess's. The fix for queries and keys has nothing to
mend, as replacing z or an MLP's output leaves the layer's own softmax as it is. A guess is blind where softmaxes are
saturated, and a node that it misses is missed. Answers of several tokens are differentiated at the first. `power_lost`
bounds the chance that stopping early loses a node which is found four times in five.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats

from av_lens.errors import BudgetError
from av_lens.interventions import Site
from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.effects import first_metric, margin_metric, mirrored, trace_of
from av_lens.isolation.measuring.engine import MLP, OUTPUTS, PRIMARY_DONORS, Node
from av_lens.isolation.naming.roles import ALL_NODES, Evidence, head_means
from av_lens.methods.shared.frame import held_layers, starred
from av_lens.results.dealing import rank_hash

BY_ATP, BY_CARRYING = 48, 16
LOOKS = (0.25, 0.5)
LOOK_TAIL = 0.025
GRADIENT_GB = 8.0
CARRIES, SILENCED = "carries", "silenced"
Guesses = dict[str, Float[np.ndarray, "batch layer node"]]


def guesses(chunks: Sequence[Chunk], examples: Int[np.ndarray, " example"]) -> Guesses:
    """Guess every node's effects on all conflicts: AtP* by donor, and what carriers are told by."""
    stage = f"first guesses at {chunks[0].site}"
    return gathered(chunks, examples, "first guesses", {}, _guessed, stage)


def screen(found: Guesses, nodes: Sequence[Node]) -> dict[Node, str]:
    """Choose the nodes that are measured, best first, each with the guess and the rank that chose it."""
    stars = [found[donor] for donor in PRIMARY_DONORS if donor in found]
    signed = np.fmax.reduce([head_means(one) for one in stars])
    sizes = np.fmax.reduce([head_means(np.abs(one)) for one in stars])
    out = dict(list(best_ranked({"AtP*": signed, "size of AtP*": sizes}, nodes).items())[:BY_ATP])
    guesses = {f"guess of {name}": head_means(found[name]) for name in (CARRIES, SILENCED)}
    heads = [node for node in nodes if node[1] != MLP]
    rest = [one for one in best_ranked(guesses, heads).items() if one[0] not in out]
    return out | dict(rest[: min(BY_CARRYING, ALL_NODES - len(out))])


def best_ranked(screens: Mapping[str, Float[np.ndarray, "layer node"]], nodes: Sequence[Node]) -> dict[Node, str]:
    """Order nodes by their best rank on any screen, ties by layer and head; each with that screen and its rank."""
    best: dict[Node, tuple[int, str]] = {}
    for name, by_node in screens.items():
        order = sorted(nodes, key=lambda node: (-np.nan_to_num(by_node[node], nan=-np.inf), node))
        for rank, node in enumerate(order):
            if node not in best or rank < best[node][0]:
                best[node] = (rank, name)
    ordered = sorted(nodes, key=lambda node: (best[node][0], node))
    return {node: f"{best[node][1]} (rank {best[node][0] + 1})" for node in ordered}


def _guessed(chunk: Chunk) -> Guesses:
    donors = [donor for donor in PRIMARY_DONORS if chunk.has(donor)]
    try:
        on_c = _guesses(chunk, "va", [*donors, "blank_a"], drop=True)
        on_g = _guesses(chunk, "blank_a", ["blank_muted"], drop=False)
    except BudgetError:
        halves = np.array_split(chunk.examples, 2)
        parts = [_guessed(one) for half in halves for one in chunk.taken(half)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    n_layers, n_columns = chunk.bench.shape
    layers = np.repeat(np.arange(n_layers), n_columns).tolist()
    stars = {d: starred(one.reshape(*one.shape[:2], -1), layers) for d, one in zip(donors, on_c, strict=False)}
    out = {donor: star.reshape(-1, n_layers, n_columns) for donor, star in stars.items()}
    plain = on_c[:, 0]
    return out | {CARRIES: -on_g[0, 0], SILENCED: plain[-1] - plain[donors.index("blank_muted")]}


def _guesses(
    chunk: Chunk, base: str, donors: Sequence[str], *, drop: bool
) -> Float[np.ndarray, "donor gradient batch layer node"]:
    """First-order effects of every node by each donor, mirrored: of the run itself, then with each layer dropped."""
    engine = chunk.bench.engine
    metric = margin_metric(chunk) if chunk.spoken is None else first_metric(chunk)

    def changes(cell: str) -> np.ndarray:
        run, trace = chunk.run(cell), trace_of(chunk, cell)
        at, layers = run.site.tolist(), range(engine.n_layers)
        sites = [Site(part, layer, positions=at) for part, layer in product(OUTPUTS, layers)]
        later = list(range(trace.traits.restart(at[0], trace.spans.roles), len(trace.spans)))
        plans = [None, *(held_layers(engine.model, run.inputs, later) if drop else ())]
        moved = [{part: chunk.donor(cell, one, part=part) - run.at_site(part) for part in OUTPUTS} for one in donors]
        budget = GRADIENT_GB if len(chunk.examples) > 1 else math.inf  # one conflict is no more to be parted
        out: list[np.ndarray] = []
        for plan in plans:
            found = trace.gradients(sites, metric, plan=plan, budget_gb=budget).gradient
            both = zip(OUTPUTS, (found[: len(layers)], found[len(layers) :]), strict=True)
            slopes = {part: torch.stack(listed) for part, listed in both}
            out.append(np.stack([_by_node(change, slopes) for change in moved]))
        chunk.drop_traces(cell)
        return np.stack(out, axis=1)

    return mirrored(base, changes)


def _by_node(
    change: Mapping[str, torch.Tensor], slopes: Mapping[str, torch.Tensor]
) -> Float[np.ndarray, "batch layer node"]:
    z, mlp = (change[part].double() * slopes[part].double() for part in OUTPUTS)
    summed = torch.cat([z.sum((2, 4)), mlp.sum((2, 3))[..., None]], dim=-1)
    return summed.transpose(0, 1).cpu().numpy()


def drawn_nodes(nodes: Sequence[Node], seed: int) -> list[Node]:
    """Draw the nodes that are measured under the control question, all where they are few."""
    if len(nodes) <= ALL_NODES:
        return list(nodes)
    rng = np.random.default_rng([seed, 0xD1])
    return [nodes[i] for i in sorted(rng.permutation(len(nodes))[:ALL_NODES].tolist())]


def upper_bound(values: Float[np.ndarray, " node"], percentile: float, *, confidence: float = 0.95) -> float:
    """Bound a high percentile of what some values were drawn from, from above; never below their own percentile.

    No order statistic of 64 bounds the 99th percentile (the largest is above it in 47 draws of 100). The tail is taken
    to be exponential above the upper quarter: its mean excess b over k values has 2 k b / (true mean) ~ chi2(2 k).
    """
    ordered = np.sort(values)
    k = max(1, len(ordered) // 4)
    start, share = float(ordered[-k - 1]), (1 - percentile / 100) * len(ordered) / k
    excess = float((ordered[-k:] - start).mean()) * 2 * k / float(stats.chi2.ppf(1 - confidence, 2 * k))
    return max(start + excess * math.log(1 / share), float(np.percentile(values, percentile)))


def looks_of(examples: Int[np.ndarray, " example"], ids: Sequence[str], seed: int) -> list[Int[np.ndarray, " part"]]:
    """Part the conflicts into those of the first look, those that the second adds, and the rest."""
    order = sorted(range(len(examples)), key=lambda i: rank_hash(seed, ids[i]))
    return np.split(examples[order], [math.ceil(share * len(order)) for share in LOOKS])


def futile(found: Evidence, nodes: Sequence[Node], *, s: float) -> list[Node]:
    """Find the nodes of which every figure that could name them has its upper bound below delta."""
    figures = [*found.by_donor("release").values(), found["silenced"], found[CARRIES]]
    at = tuple(np.array(nodes).T)
    highs = [found.half.boot.mean(one[:, *at]).high for one in figures if not np.isnan(one).all()]
    below = np.all([high < found.half.delta(s) for high in highs], axis=0)
    return [node for node, stops in zip(nodes, below, strict=True) if stops]


def power_lost(family: int) -> float:
    """Bound how often a node stops whose release is just found four times in five (normal, independent looks)."""
    beyond = stats.norm.isf(0.05 / family) + stats.norm.isf(0.2)
    return float(sum(stats.norm.sf(stats.norm.isf(LOOK_TAIL) + beyond * math.sqrt(share)) for share in LOOKS))
