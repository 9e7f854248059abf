"""Attention knockout: what does the answer become, if one role may no longer read another?

    effect(edge) = metric(run without the edge's attention) - metric(run)          positive: the cut restores

    over="all"     the edges in all named layers and heads at once              [example, edge, condition]
    over="layer"   in windows of `width` layers around each layer               [example, edge, width, layer, condition]
    over="head"    in every head alone                                          [example, edge, layer, head, condition]

A window of width w around layer l holds the layers l - w // 2 to l - w // 2 + w - 1, cut off at the model's ends. Cuts
act before the softmax, or after it (`renormalize=False`: the weight is lost). `condition` holds the cut beside its
controls (`shared.matched_cuts`; protocol section 8), means over `draws`; how well their mass was matched stands in the
provenance. Of conflicts, without a metric, C is measured (protocol section 2).

Source: Geva et al. (2023) for knockout, the study (arXiv 2604.02605) for roles, "From Senses to Decisions" (2606.10147)
for windows. Not done: cuts chosen by content (patch the pattern instead).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from av_lens.checks import require_at_least, require_choice
from av_lens.core import Progress
from av_lens.core.budget import listed
from av_lens.core.readings import SINK_TIMES, attention_mass, sinks_by_layout, sinks_of
from av_lens.errors import InputError, InterventionError
from av_lens.inputs import AVInputs
from av_lens.interventions import Plan
from av_lens.interventions.edits import ModelSpec, check_heads, check_layers
from av_lens.methods.shared.frame import Examples, Frame, Stack, numbers, scored
from av_lens.methods.shared.matched_cuts import EQUAL_COUNT, EQUAL_MASS, OTHER_HEADS, EdgeCut, matches
from av_lens.methods.shared.places import Flow, is_plain, named_span
from av_lens.metrics import Metric, each, logit_diff, require_numbers
from av_lens.model import HookedAVLLM
from av_lens.replay import measure_plans
from av_lens.replay.traces import Trace, record
from av_lens.results import Grid
from av_lens.spans import Span, SpanMap

Heads = Mapping[int, tuple[int, ...] | None]  # layer -> the heads that are edited there; None for all of them


def _points(
    spec: ModelSpec, over: str, width: int | Sequence[int], layers: Sequence[int] | None, heads: Any
) -> tuple[Sequence[Heads], dict[str, Any]]:
    """What is cut in turn (nothing where a window holds none of the named heads), and the labels of each axis."""
    require_choice("over", over, ("all", "layer", "head"))
    chosen = list(range(spec.n_layers)) if layers is None else list(layers)
    if not chosen:
        raise InterventionError("no layer is named (an empty range). The end of a range is exclusive.")
    check_layers(chosen, spec)
    named = _heads_by_layer(spec, chosen, heads)
    if over == "head":
        pairs = [(layer, head, named[layer]) for layer in chosen for head in range(spec.n_heads)]
        points = [{layer: (head,)} if known is None or head in known else {} for layer, head, known in pairs]
        return points, {"layer": chosen, "head": list(range(spec.n_heads))}
    windows, axes = [range(spec.n_layers)], dict[str, Any]()
    if over == "layer":
        widths = [width] if isinstance(width, int) else list(width)
        for one in widths:
            require_at_least("width", one, 1)
        windows = [range(layer - one // 2, layer - one // 2 + one) for one in widths for layer in chosen]
        axes = {"width": widths, "layer": chosen}
    return [{at: named[at] for at in chosen if at in window and named[at] != ()} for window in windows], axes


def _heads_by_layer(spec: ModelSpec, layers: Sequence[int], heads: Any) -> Heads:
    if heads is None:
        return dict.fromkeys(layers)
    listed = [heads] if isinstance(heads, int) else list(heads)
    pairs = [tuple(item) for item in listed if not isinstance(item, int)]
    if len(pairs) not in (0, len(listed)) or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"heads={heads!r}: name numbers (in every layer), or pairs (layer, head).")
    check_layers([layer for layer, _ in pairs], spec)
    check_heads(tuple(h for _, h in pairs) if pairs else tuple(listed), spec.n_heads, spec, "the attention pattern")
    if not pairs:
        return dict.fromkeys(layers, tuple(sorted(set(listed))))
    return {layer: tuple(sorted({h for at, h in pairs if at == layer})) for layer in layers}


def knockout(
    model: HookedAVLLM,
    x: Any,
    *,
    edges: str | Sequence[str] = "video -> generated",
    metric: Metric | Callable[..., Any] | None = None,
    over: str = "all",
    width: int | Sequence[int] = 1,
    layers: Sequence[int] | None = None,
    heads: Sequence[Any] | None = None,
    renormalize: bool = True,
    include_generation: bool = True,
    sinks: float | int | Span = SINK_TIMES,
    controls: bool = True,
    fractions: Sequence[float] = (0.1, 0.3),
    draws: int = 5,
    max_new_tokens: int = 0,
    seed: int = 0,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Grid:
    """Cut attention edges between roles and measure what the answer becomes.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, conflicts, or several of either, also of different layouts.
        edges: flows in words, "source -> target", one or several.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`; of
            conflicts None means C, and another metric is measured on their cell `va`.
        over: "all", "layer" or "head".
        width: layers of a window, one width or several to compare; for over="layer".
        layers: the layers that are cut, or iterated; None for all.
        heads: the heads that are cut: numbers (in every layer) or pairs (layer, head); None for all.
        renormalize: scale the remaining weights up, or lose the weight that is cut.
        include_generation: let "generated" include the asked position, from which the first token is read.
        sinks: what "sinks" stands for: a `Span`, or how many times the mean over media positions one must receive.
        controls: measure the controls beside the cuts.
        fractions: nested shares of the cut's keys that are cut as well.
        draws: random controls of each kind.
        max_new_tokens: let the model answer greedily under each cut, with at most so many tokens; for over="all".
        seed: draws the controls.
        stack: examples that run together, at most.
        budget_gb: memory for the activations of cuts that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid whose `baseline` is the run without a cut; NaN where a role or the sinks are missing. Interrupted
        (Ctrl-C), it holds what is done, and `grid.partial` says so.

    Raises:
        InputError: an unknown edge, role or `over`, no metric, a metric that is NaN.
        InterventionError: a layer or head out of range, edges that no input has, or keys that come after the queries.
    """
    require_at_least("draws", draws, 1)
    if max_new_tokens and over != "all":
        raise InputError("max_new_tokens lets the model answer under each cut: it needs over='all'.")
    flows = [Flow.parsed(text) for text in listed(edges)]
    points, axes = _points(model.spec, over, width, layers, heads)
    job = _Job(
        model,
        flows=flows,
        points=points,
        axes=axes,
        options={"renormalize": renormalize, "include_generation": include_generation},
        sinks=sinks,
        fractions=tuple(fractions) if controls else (),
        draws=draws if controls else 0,
        seed=seed,
        new_tokens=max_new_tokens,
        budget_gb=budget_gb,
    )
    examples = Examples.of(model, x)
    if metric is not None:
        return job.grid(Frame.of(model, examples, metric), stack, progress)
    if not examples.conflicts:
        raise InputError(
            "knockout needs a metric for inputs: logit_diff('siren', 'dog'); conflicts bring their own, C."
        )
    mirror = Examples.of(model, list(examples.conflicts), cell="av")
    both = Examples((*examples.inputs, *mirror.inputs), examples.conflicts)
    sides = ([conflict.answers[side] for conflict in examples.conflicts] * 2 for side in (0, 1))
    own = logit_diff(*(each(side) for side in sides))
    return job.grid(Frame.of(model, both, own), stack, progress, va=examples)


def _layouts(examples: Examples) -> list[SpanMap]:
    found: list[SpanMap] = []
    for x in examples.inputs:
        if all(spans.layout_difference(x.spans) is not None for spans in found):
            found.append(x.spans)
    return found


Entry = tuple[int, int, int, Plan]  # the numbers of an edge, a point and a condition, and one plan for them


@dataclass(frozen=True, eq=False)
class _Job:
    """What is cut, and how it is controlled."""

    model: Any
    flows: list[Flow]
    points: Sequence[Heads]
    axes: dict[str, Any]
    options: dict[str, Any]
    sinks: float | int | Span
    fractions: tuple[float, ...]
    draws: int
    seed: int
    new_tokens: int
    budget_gb: float | int

    @property
    def conditions(self) -> list[str]:
        controls = [EQUAL_MASS, OTHER_HEADS, EQUAL_COUNT, *(f"{share:.0%} of keys" for share in self.fractions)]
        return ["cut", *(controls if self.draws else [])]

    def grid(self, frame: Frame, stack: int, progress: Progress | bool | None, *, va: Examples | None = None) -> Grid:
        """Check every cut, measure stack by stack, and label what was found; half of `va` against `av` is C."""
        examples = frame.examples
        runless = [flow for flow in self.flows if not flow.names_sinks]  # compiled before any run is paid for
        for spans, flow in product(_layouts(examples), runless):
            for edge in self._edges(flow, spans, ()):
                edge.plan().compile(self.model.spec, spans)
        frame.shape(len(self.flows), len(self.points), len(self.conditions))
        size = examples.stack_size(self.model, stack, self.budget_gb)
        known, matched, texts = list[Any](), dict[str, Any](), dict[int, dict[str, str]]()

        def work(stack: Stack, show: Progress) -> None:
            known.extend([] if known else self._sinks(examples, size))
            x = stack.x
            trace, entries = record(self.model, x), list(self._entries(x, sinks_of(x.spans, known), matched))
            self._measure(frame, stack, trace, entries, show)
            if self.new_tokens:
                texts.update(self._texts(trace, entries, stack.rows))

        frame.run(work, examples.stacks(size), progress)
        if np.isnan(frame.values).all() and not frame.partial:
            roles = sorted({role for x in examples.inputs for role in x.spans.roles})
            found = f"they have the roles {', '.join(roles)}"
            if any(flow.names_sinks for flow in self.flows):
                found += f", and no media position receives over {self.sinks} times the mean; give another `sinks`"
            raise InterventionError(f"no input has {[flow.text for flow in self.flows]}: {found}.")
        named = None
        if va is not None:
            frame.examples, named = va, ("C, hearing under conflict", "logit")
            frame.values, frame.lines = (
                np.subtract(*np.split(part, 2, axis)) / 2 for part, axis in ((frame.values, 0), (frame.lines, 1))
            )
        return frame.grid(
            {"edge": [flow.text for flow in self.flows], **self.axes, "condition": self.conditions},
            named=named,
            direction="without the edge's attention; positive: the cut raises the metric",
            method="attention knockout",
            **self.options,
            heads="iterated" if self.axes else [dict(point) for point in self.points],
            seed=self.seed,
            draws=self.draws,
            matched=matched,
            sinks=[positions for _, positions in known],
            texts=[texts[row] for row in sorted(texts) if row < len(frame.values)],
        )

    def _measure(self, frame: Frame, stack: Stack, trace: Trace, entries: Sequence[Entry], show: Progress) -> None:
        """Write the baseline and every cut of one stack as they are done."""
        metric, plans = frame.own(stack), [plan for *_, plan in entries]
        own = measure_plans(trace, [Plan()], metric, budget_gb=self.budget_gb)[0]
        require_numbers(own, metric.name)
        frame.lines[0, stack.rows] = numbers(own)
        if not entries:
            return
        places = np.array([entry[:3] for entry in entries])

        def write(scores: np.ndarray) -> None:
            for edge, point, condition in np.unique(places, axis=0).tolist():
                drawn = (places == (edge, point, condition)).all(1)
                frame.values[stack.rows, edge, point, condition] = scores[drawn].mean(0)

        scored(trace, plans, metric, write, budget_gb=self.budget_gb, show=show, stage="attention knockout")

    def _texts(self, trace: Trace, entries: Sequence[Entry], rows: np.ndarray) -> dict[int, dict[str, str]]:
        """What the model answers: as it is, and under each cut and the first control of each kind."""
        named: dict[str, Plan] = {"no cut": Plan()}
        for edge, _, condition, plan in entries:
            named.setdefault(f"{self.flows[edge].text}, {self.conditions[condition]}", plan)
        answers = trace.generate(
            list(named.values()), max_new_tokens=self.new_tokens, return_type="text", budget_gb=self.budget_gb
        )
        said = [[answer] if isinstance(answer, str) else list(answer) for answer in answers]
        return {row: {name: said[k][i] for k, name in enumerate(named)} for i, row in enumerate(rows.tolist())}

    def _entries(self, x: AVInputs, sinks: list[int], matched: dict[str, Any]) -> Iterator[Entry]:
        """Every plan with the place of its number; several of one place are averaged."""
        mass = self._mass(x, sinks) if self.draws else {}
        for number, flow in enumerate(self.flows):
            if flow.names_sinks and not len(sinks):
                continue
            removed: list[tuple[float, float]] = []
            for point, edge in enumerate(self._edges(flow, x.spans, sinks)):
                if edge.empty or (flow.names_sinks and edge.backwards):
                    continue
                yield number, point, 0, edge.plan()
                if self.draws and edge.queries:
                    yield from self._controls(edge, mass[flow.text], x.spans, (number, point), removed)
            if removed:
                shares, ratios = np.array(removed).T
                said = {"share_of_mass": shares.mean(), "mass_ratio": ratios.mean()}
                said |= {"draws_matched": matches(ratios).sum(), "draws": len(ratios)}
                matched.setdefault(flow.text, []).append(said)

    def _controls(
        self, edge: EdgeCut, mass: np.ndarray, spans: SpanMap, at: tuple[int, int], removed: list[tuple[float, float]]
    ) -> Iterator[Entry]:
        # Keys for a control of equal mass: no media, not cut, no queries of the cut, and not after the last of these.
        taken = {*edge.keys, *edge.queries, *spans.media.positions.tolist()}
        others = [p for p in range(max(edge.queries) + 1) if p not in taken]
        for draw in range(self.draws):
            seed = (self.seed, draw, at[0])
            plan, ratio = edge.equal_mass(mass, others, seed)
            removed.append((edge.mass(mass), ratio))
            if matches(ratio):
                yield *at, self.conditions.index(EQUAL_MASS), plan
            heads = edge.other_heads(self.model.spec.n_layers, seed)
            for name, control in ((OTHER_HEADS, heads), (EQUAL_COUNT, edge.equal_count(len(spans), seed))):
                if control is not None:
                    yield *at, self.conditions.index(name), control
        for number, share in enumerate(self.fractions, self.conditions.index(EQUAL_COUNT) + 1):
            yield *at, number, edge.fraction(share, self.seed)

    def _sinks(self, examples: Examples, size: int) -> list[tuple[SpanMap, list[int]]]:
        """The sinks of each layout, found on the inputs themselves (of conflicts, on `va` alone) or given."""
        if not any(flow.names_sinks for flow in self.flows):
            return []
        if isinstance(self.sinks, Span):
            given = self.sinks.positions.tolist()
            return [(spans, spans.span(given).positions.tolist()) for spans in _layouts(examples)]
        own = Examples(examples.inputs[: len(examples.conflicts) or None])
        return sinks_by_layout(self.model, [one.x for one in own.stacks(size)], times=self.sinks)

    def _mass(self, x: AVInputs, sinks: Sequence[int]) -> dict[str, np.ndarray]:
        """What each edge's queries move from every position, `[layer, head, pos]`, the mean over examples."""
        queries = {flow.text: list(self._queries(flow, x.spans, sinks)) for flow in self.flows}
        mass = attention_mass(self.model, x, queries, weight="value").mean(0).double().numpy()
        return {text: mass[:, :, number] for number, text in enumerate(queries)}

    def _queries(self, flow: Flow, spans: SpanMap, sinks: Sequence[int]) -> tuple[int, ...]:
        found = set(named_span(flow.target, spans, sinks).positions.tolist())
        if "generated" in flow.target and self.options["include_generation"]:
            found.add(spans.generation_position)
        return tuple(sorted(found))

    def _edges(self, flow: Flow, spans: SpanMap, sinks: Sequence[int]) -> list[EdgeCut]:
        queries = self._queries(flow, spans, sinks)
        keys = tuple(named_span(flow.source, spans, sinks).positions.tolist())
        query = flow.target if is_plain(flow.target) else queries
        return [EdgeCut(query, queries, keys, heads, self.model.spec.n_heads, self.options) for heads in self.points]
