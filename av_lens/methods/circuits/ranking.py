"""In which order does a circuit take its nodes?

Contributions are turned towards the whole model: positive moves m from the empty model to the whole one, whichever way
that is. The *signed* order puts the largest contributions first, the order by *magnitude* the largest sizes; ties stay
in the nodes' own order. A search has its own two orders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from av_lens.errors import InputError
from av_lens.methods.circuits.checks import places
from av_lens.methods.circuits.runs import CircuitRuns
from av_lens.methods.circuits.scores import contributions, eliminated
from av_lens.methods.circuits.terms import Nodes
from av_lens.results import EdgeScores, Grid
from av_lens.results.statistics import Bootstrap

ORDERS = ("magnitude", "signed")


@dataclass(frozen=True, eq=False)
class Ranking:
    """One empty donor's contributions (positive towards the whole model) and the two orders of the nodes, best first.

    There is one example where only means are known; `searched` orders were made by a search.
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
        """Tabulate the nodes, best first; an MLP's head is -1."""
        chosen = self.orders[order]
        known = len(self.scores) == self.boot.weights.shape[1]
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
