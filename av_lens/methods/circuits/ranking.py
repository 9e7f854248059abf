"""In which order does a circuit take its nodes?

Contributions are turned towards the whole model: positive moves m from the empty model to the whole one, whichever way
that is. The *signed* order puts the largest contributions first, the order by *magnitude* the largest sizes; ties stay
in the nodes' own order. A search has its own two orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from av_lens.core.progress import Progress
from av_lens.errors import InputError
from av_lens.methods.circuits.checks import places
from av_lens.methods.circuits.runs import CircuitRuns
from av_lens.methods.circuits.scores import contributions, eliminated
from av_lens.methods.circuits.terms import Nodes
from av_lens.results.edge_scores import EdgeScores
from av_lens.results.faithfulness import Scale
from av_lens.results.grid import Grid
from av_lens.results.statistics import Bootstrap

ORDERS = ("magnitude", "signed")


@dataclass(frozen=True, eq=False)
class Ranking:
    """One empty donor's contributions and orders.

    Attributes:
        scores: contributions, positive towards the whole model; one example where only means are known.
        orders: "magnitude" and "signed": the nodes, best first.
        searched: whether a search made the orders.
        boot: the weights of the scored examples.
    """

    scores: Float[np.ndarray, "example node"]
    orders: dict[str, list[int]]
    searched: bool
    boot: Bootstrap

    @property
    def resampled(self) -> Float[np.ndarray, "example node"]:
        """The scores that an order on resampled examples can be made of; none after a search."""
        return self.scores[:0] if self.searched else self.scores

    def table(self, nodes: Nodes, order: str) -> pd.DataFrame:
        """Tabulate the nodes, best first.

        Args:
            nodes: the candidates.
            order: "magnitude" or "signed".

        Returns:
            `node layer head score low high place`; an MLP's head is -1.
        """
        chosen = self.orders[order]
        known = len(self.scores) == self.boot.weights.shape[1]
        bounds = self.boot.mean(self.scores) if known else None
        return pd.DataFrame(
            {
                "node": [nodes.names[i] for i in chosen],
                "layer": [nodes.layers[i] for i in chosen],
                "head": [-1 if nodes.heads[i] is None else nodes.heads[i] for i in chosen],
                "score": self.scores.mean(0)[chosen],
                "low": np.nan if bounds is None else bounds.low[chosen],
                "high": np.nan if bounds is None else bounds.high[chosen],
                "place": np.arange(1, len(chosen) + 1),
            }
        )


def rankings(
    runs: CircuitRuns,
    boot: Bootstrap,
    scores: Any,
    empties: Sequence[str],
    *,
    pairs: bool,
    steps: int,
    drop: float,
    show: Progress,
) -> dict[str, Ranking]:
    """Rank the nodes for each empty donor.

    Args:
        runs: the runs on the scored examples.
        boot: their weights.
        scores: a kind of score, or scores that somebody else made.
        empties: the empty donors.
        pairs: whether the examples are pairs.
        steps: runs along the path of "eap_ig".
        drop: the share that a round of "greedy" may take.
        show: called as `show(stage, done, total)`.

    Returns:
        A ranking for each.

    Raises:
        InputError: given scores do not fit.
    """
    kind, found = scores if isinstance(scores, str) else "", dict[str, Ranking]()
    handed = {} if kind else dict.fromkeys(empties, given_scores(scores, runs.nodes, pairs=pairs))
    made = contributions(runs, kind, empties, steps=steps, show=show) if kind not in ("", "greedy") else handed
    for empty in empties:
        sign = Scale(boot, *runs.measure(empty, [runs.nodes.all, frozenset()], show=show, stage="whole and empty")).sign
        if kind == "greedy":
            searches = {name: eliminated(runs, empty, signed=name == "signed", drop=drop, show=show) for name in ORDERS}
            orders = {name: list(search.order) for name, search in searches.items()}
            found[empty] = Ranking(sign * searches["magnitude"].scores, orders, True, boot)
        else:
            turned = sign * made[empty]
            orders = {name: np.argsort(places(turned.mean(0), name)).tolist() for name in ORDERS}
            found[empty] = Ranking(turned, orders, False, boot)
    return found


def given_scores(scores: Any, nodes: Nodes, *, pairs: bool) -> Float[np.ndarray, "example node"]:
    """Read scores that somebody else made.

    A grid's or edges' effects are what replacing a node does to the run that was edited: the whole model, but for
    pairs patched by "denoise", whose corrupt run was edited.

    Args:
        scores: `[node]`, `[example, node]`, a `Grid` over layer and head, or `EdgeScores`.
        nodes: the candidates.
        pairs: whether they were made on pairs.

    Returns:
        Contributions; one example where means were given.

    Raises:
        InputError: they name other nodes, or are not all numbers.
    """
    if isinstance(scores, EdgeScores):
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
