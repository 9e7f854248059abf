"""From scores to a circuit: which few nodes do what the model does, and how do we know?

    f(C) = [m(C) - m(empty)] / [m(whole) - m(empty)]               (`runs` says what m and the empty donors are)

1. Score every node (`scores`), or take scores from elsewhere, for each empty donor.
2. Order the nodes by signed score and by size; positive moves m from the empty model towards the whole one.
3. Measure f of the k first nodes over the sizes of `results.faithfulness`: CPR from the signed order, CMD from the
   order by size; and the same for random orders with as many nodes of every layer.
4. Cut the circuit: the first `size` nodes, or the fewest (of 1 to 16 and the sizes above) with |1 - f| <= 1 - faithful;
   all nodes where no size is that faithful.
5. Check it (`circuits.checks`): completeness, minimality, links between members, stability over bootstraps.

Steps 1, 2, 4 and stability use the scoring examples alone; what steps 3 and 5 report is measured on `test`. Every
figure is a replay of the model, none a sum of scores.

`over="edge"` takes edges for nodes (`edge_runs`). Theirs are many: `subsets=0, random=0` for a first look.

Source: Wang et al. (2022); Mueller et al. (2025).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from av_lens.checks import require_at_least, require_choice
from av_lens.core import Progress, watched
from av_lens.errors import InputError
from av_lens.inputs import Conflict, Pair
from av_lens.methods.circuits.edge_runs import EdgeRuns, Edges
from av_lens.methods.circuits.runs import CircuitRuns, Measured, Nodes
from av_lens.methods.circuits.scores import (
    KINDS,
    ORDERS,
    ROUNDING,
    Ranking,
    completeness,
    drawn_subsets,
    links,
    minimality,
    rankings,
    shuffled_orders,
    stability,
)
from av_lens.metrics import Metric
from av_lens.model import HookedAVLLM
from av_lens.results import Circuit, EdgeScores, Grid
from av_lens.results.circuit import Scale, sizes
from av_lens.results.provenance import stamp
from av_lens.spans import Span

AREAS = (("CPR", "signed"), ("CMD", "magnitude"))
NOTHING = "m(whole) - m(empty) cannot be told from 0: there is nothing to find a circuit for, and f is NaN"


def find_circuit(
    model: HookedAVLLM,
    x: Conflict | Pair | Sequence[Conflict] | Sequence[Pair],
    *,
    scores: str | Grid | EdgeScores | xr.DataArray | Float[np.ndarray, "..."] = "exact",
    test: Conflict | Pair | Sequence[Conflict] | Sequence[Pair] | None = None,
    metric: Metric | Callable[..., Any] | None = None,
    of: str = "C",
    over: str = "head",
    at: str | Span = "suffix",
    order: str = "magnitude",
    size: int | None = None,
    faithful: float | int = 0.9,
    subsets: int = 8,
    random: int = 20,
    steps: int = 5,
    drop: float | int = 0.2,
    seed: int = 0,
    layout: str = "in_video",
    stack: int = 16,
    budget_gb: float | int = 1.0,
    keep_gb: float | int = 4.0,
    progress: Progress | bool | None = None,
) -> Circuit:
    """Choose the nodes that do what the model does, and check them by replay.

    Args:
        model: a `HookedAVLLM`.
        x: conflicts or aligned pairs, on which nodes are scored.
        scores: "exact", "atp", "atp_star", "eap_ig" or "greedy"; or an array of contributions over nodes, or over
            examples and nodes; or a `Grid` over layer and head, or `EdgeScores`, made on these examples. Of edges
            "exact", or `EdgeScores`, or contributions as an array with the axes `sender` and `receiver`.
        test: further conflicts or pairs, on which circuits are measured; None for the same.
        metric: of one run; for conflicts None means the sound's answer against the picture's.
        of: "C" or "G", for conflicts.
        over: "head", "head mlp", or "edge".
        at: the site: roles joined by `|`, or a `Span`.
        order: which order the circuit is cut from: "magnitude" or "signed".
        size: how many nodes the circuit has; None for the fewest that are faithful.
        faithful: how faithful.
        subsets: sets of members that completeness and minimality take away.
        random: random orders; 0 for none.
        steps: runs along the path of "eap_ig".
        drop: the share of the nodes left that a round of "greedy" may take away; 0 takes one at a time.
        seed: of all draws.
        layout: how sound and picture are laid out, for conflicts: "in_video" or "separate".
        stack: examples that run together.
        budget_gb: memory for circuits that run together.
        keep_gb: memory for records that are kept between steps.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        The circuit and its evidence.

    Raises:
        InputError: unknown words, scores that do not fit, or a metric that is NaN.
        InterventionError: a site outside an input.
    """
    how = _How(order, size, float(faithful), subsets, random, steps, float(drop), seed)
    made, listed = (EdgeRuns, Edges) if over == "edge" else (CircuitRuns, Nodes)
    nodes = listed.of(model.spec, over)
    how.check(scores, nodes)
    asked = [Measured.of(model, given, metric=metric, of=of, layout=layout) for given in (x, test) if given is not None]
    with watched(progress) as show:
        site: dict[str, Any] = {"at": at, "stack": stack, "budget_gb": budget_gb, "keep_gb": keep_gb, "show": show}
        runs = [made.of(model, one, nodes, **site) for one in asked]
        ranked = rankings(runs[0], scores, steps=steps, drop=how.drop, seed=seed)
        learned, tested = (_Evidence(runs[i], runs[i].scales(seed), ranked, how) for i in (0, -1))
        provenance = stamp(
            method="circuit",
            model=model.name,
            scores=scores if isinstance(scores, str) else f"given: {type(scores).__name__}",
            order=order,
            choices={name: value for name, value in asdict(how).items() if name != "order"}
            | {"of": of, "over": over, "at": str(at), "layout": layout},
            sizes={name: getattr(model.spec, name) for name in ("n_layers", "n_heads", "d_model")},
            positions=sorted({one.positions for one in runs[-1].runs}),
            examples={"scored": runs[0].n, "tested": runs[-1].n, "held_out": len(runs) > 1},
            **asked[0].metric.provenance(),
        )
        return tested.circuit(learned.members(), asked[0], provenance)


@dataclass(frozen=True)
class _How:
    """What was asked for."""

    order: str
    size: int | None
    faithful: float
    subsets: int
    random: int
    steps: int
    drop: float
    seed: int

    def check(self, scores: Any, nodes: Nodes) -> None:
        """Refuse what cannot be done."""
        if isinstance(scores, str):
            require_choice("scores", scores, ("exact",) if isinstance(nodes, Edges) else KINDS)
        require_choice("order", self.order, ORDERS)
        for name, least in (("subsets", 0), ("random", 0), ("steps", 1), ("drop", 0)):
            require_at_least(name, getattr(self, name), least)
        if self.drop >= 1:
            raise InputError(f"drop={self.drop:g}: a round may take a share below 1 of the nodes that are left.")
        if self.size is not None and not 1 <= self.size <= len(nodes):
            raise InputError(f"size={self.size}: the model has {len(nodes)} nodes; a circuit has 1 to all of them.")


@dataclass(frozen=True, eq=False)
class _Evidence:
    """Circuits measured on the tested examples."""

    runs: CircuitRuns
    scales: dict[str, Scale]
    ranked: dict[str, Ranking]
    how: _How

    def members(self) -> list[int]:
        """The circuit, cut with the first empty donor: as large as asked, or the smallest that is faithful, or all."""
        primary = next(iter(self.scales))
        best, size = self.ranked[primary].orders[self.how.order], self.how.size
        if size is None:
            curve = self._curve(primary, self.how.order)
            f = self.scales[primary].share(np.array(list(curve.values()))).value
            near = [k for k, one in zip(curve, f, strict=True) if abs(1 - one) <= 1 - self.how.faithful]
            size = near[0] if near else len(best)
        return best[:size]

    def circuit(self, members: list[int], measured: Measured, provenance: dict[str, Any]) -> Circuit:
        """Measure everything and put it together."""
        primary, nodes, how = next(iter(self.scales)), self.runs.nodes, self.how
        scale, ranking = self.scales[primary], self.ranked[primary]
        curves = {(empty, order): self._curve(empty, order) for empty in self.scales for order in ORDERS}
        subsets = drawn_subsets(members, how.subsets, how.seed) if scale.usable else []
        at = sorted({*self._sizes(how.order), len(members)})
        stable, kept = stability(ranking.resampled, ranking.boot, how.order, at)
        table, often = ranking.table(nodes, how.order), kept[at.index(len(members)), ranking.orders[how.order]]
        random = pd.concat([self._random(empty, len(members)) for empty in self.scales], ignore_index=True)
        return Circuit(
            self._values(curves),
            nodes=table.assign(member=table["place"] <= len(members), kept=often),
            curve=pd.concat([self._rows(*key, found) for key, found in curves.items()], ignore_index=True),
            areas=pd.DataFrame([row for e in self.scales for row in self._areas(e, curves, members, random)]),
            completeness=completeness(self.runs, scale, primary, members, subsets),
            minimality=minimality(self.runs, scale, primary, members, subsets),
            links=links(self.runs, scale, primary, members),
            stability=stable,
            random=random,
            what=measured.what,
            unit=measured.metric.unit,
            provenance=provenance if scale.usable else provenance | {"note": NOTHING},
        )

    def _sizes(self, order: str) -> list[int]:
        """The sizes of the areas, and more of them in the order that the circuit is cut from."""
        n = len(self.runs.nodes)
        more = range(1, min(16, n) + 1) if order == self.how.order else ()
        return sorted({*sizes(n), *more, *([self.how.size] if self.how.size else [])})

    def _measure(self, empty: str, circuits: Sequence[Sequence[int]], stage: str) -> np.ndarray:
        return self.runs.measure(empty, [frozenset(one) for one in circuits], stage=stage)

    def _curve(self, empty: str, order: str) -> dict[int, np.ndarray]:
        """Measure m of the k first nodes, `[example]`, by k."""
        best, at = self.ranked[empty].orders[order], self._sizes(order)
        return dict(zip(at, self._measure(empty, [best[:k] for k in at], f"{order} curve, {empty}"), strict=True))

    def _rows(self, empty: str, order: str, curve: dict[int, np.ndarray]) -> pd.DataFrame:
        f, at = self.scales[empty].share(np.array(list(curve.values()))), list(curve)
        named = {"empty": empty, "order": order, "k": at, "share": np.array(at) / len(self.runs.nodes)}
        return pd.DataFrame(named | {"f": f.value, "low": f.low, "high": f.high})

    def _random(self, empty: str, size: int) -> pd.DataFrame:
        """CPR and CMD of shuffled orders, and f of their first nodes."""
        nodes, scale, rows = self.runs.nodes, self.scales[empty], list[dict[str, Any]]()
        drawn, orders = (self.how.random, self.how.seed), self.ranked[empty].orders
        shuffled = {order: shuffled_orders(nodes, orders[order], *drawn) for order in ORDERS}
        at = sizes(len(nodes))
        wanted = [one[:k] for order in ORDERS for one in shuffled[order] for k in at]
        wanted += [one[:size] for one in shuffled[self.how.order]]
        found = self._measure(empty, wanted, f"random orders, {empty}")
        n = self.how.random * len(at)
        curves = {order: found[i * n : (i + 1) * n].reshape(-1, len(at), self.runs.n) for i, order in enumerate(ORDERS)}
        for draw, f in enumerate(scale.share(found[2 * n :]).value.tolist()):
            m = {name: (curves[order][draw], at, len(nodes)) for name, order in AREAS}
            areas = {name: scale.area(*measured, distance=name == "CMD")[0] for name, measured in m.items()}
            rows.append({"empty": empty, "draw": draw, **areas, "f": f})
        return pd.DataFrame(rows, columns=pd.Index(["empty", "draw", "CPR", "CMD", "f"]))

    def _areas(
        self, empty: str, curves: dict[tuple[str, str], dict[int, np.ndarray]], members: list[int], random: pd.DataFrame
    ) -> Iterator[dict[str, Any]]:
        """One empty donor's rows: the span, f of the circuit, CPR and CMD, each beside the random orders'."""
        scale, at, drawn = self.scales[empty], sizes(len(self.runs.nodes)), random[random["empty"] == empty]
        f = scale.share(self._measure(empty, [members], "the circuit"))
        figures: dict[str, tuple[Any, ...]] = {"span": scale.span, "f": (f.value[0], f.low[0], f.high[0])}
        for name, order in AREAS:
            m = np.array([curves[empty, order][k] for k in at])
            figures[name] = scale.area(m, at, len(self.runs.nodes), distance=name == "CMD")
        worse: dict[str, Callable[[Any], Any]] = {"f": lambda f: np.abs(1 - f), "CPR": lambda v: -v, "CMD": lambda v: v}
        for name, figure in figures.items():
            mean = p = np.nan
            if name in worse and len(drawn):
                others, far = np.asarray(drawn[name], dtype=np.float64), worse[name]
                better = int((far(others) <= far(figure[0]) + ROUNDING).sum())
                mean, p = others.mean(), (1 + better) / (1 + len(others)) if scale.usable else np.nan
            value, low, high = map(float, figure)
            yield {"empty": empty, "figure": name, "value": value, "low": low, "high": high, "random": mean, "p": p}

    def _values(self, curves: dict[tuple[str, str], dict[int, np.ndarray]]) -> xr.Dataset:
        """Every per-example number."""
        empties, names = list(self.scales), list(self.runs.nodes.names)
        at = sorted({k for curve in curves.values() for k in curve})
        unknown = np.full(self.runs.n, np.nan)
        m = [[[curves[e, order].get(k, unknown) for k in at] for order in ORDERS] for e in empties]
        place = [[np.argsort(self.ranked[e].orders[order]) for order in ORDERS] for e in empties]
        return xr.Dataset(
            {
                "scores": (("empty", "scored", "node"), np.array([self.ranked[e].scores for e in empties])),
                "place": (("empty", "order", "node"), np.array(place, dtype=np.int32)),
                "m": (("empty", "order", "k", "example"), np.array(m)),
                "whole": (("example",), self.scales[empties[0]].whole),
                "bare": (("empty", "example"), np.array([self.scales[e].bare for e in empties])),
            },
            coords={"empty": empties, "node": names, "order": list(ORDERS), "k": np.array(at, dtype=np.int32)},
        )
