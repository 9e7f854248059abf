"""What long work costs before it is paid for, what fits into one run, and how it can be watched.

TransformerLens stores each hook's tensor under every one of its names, shared ones once: a cache costs the number of
*distinct* tensors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from rich import progress as rich
from rich.console import Console

from av_lens.errors import BudgetError, InputError
from av_lens.families.blocks import refuse_scores, score_budget, score_gigabytes
from av_lens.families.decoder import layer_names
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair
from av_lens.interventions.edits import ModelSpec

Progress = Callable[[str, int, int], None]  # called as `progress(stage, done, total)`


class Bars:
    """Progress bars for callbacks `(stage, done, total)`: one bar a stage, or one line a stage where nobody watches."""

    def __init__(self, console: Console | None = None):
        console = self.console = console or Console(stderr=True, highlight=False)
        kinds = rich.BarColumn, rich.MofNCompleteColumn, rich.TimeElapsedColumn, rich.TimeRemainingColumn
        columns = [rich.TextColumn("{task.description}"), *(kind() for kind in kinds)]
        self._progress = rich.Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, rich.TaskID] = {}
        self._begun: dict[str, float] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move one stage's bar on; a stage that is done prints its time where nobody watches."""
        self._begun.setdefault(stage, time.monotonic())
        if self.console.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total)
            self._progress.update(self._tasks[stage], completed=done, total=total)
        elif done >= total:
            self.console.print(f"{stage}: {total} in {time.monotonic() - self._begun[stage]:.1f} s")
        if done >= total:
            self._begun.pop(stage, None)
            self._tasks.pop(stage, None)


def part_of(show: Progress, number: int, parts: int) -> Progress:
    """Make the progress of one of several equal parts progress of all."""
    return lambda stage, done, total: show(stage, number * total + done, parts * total)


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


def named(progress: Progress | None, name: str) -> Progress:
    """Put a name before every stage that is told; of None, the callback that tells nobody."""
    return silent if progress is None else lambda stage, done, total: progress(f"{name}: {stage}", done, total)


@contextmanager
def watched(progress: Progress | bool | None) -> Generator[Progress]:
    """Turn what a caller passed as `progress` into a callback."""
    if callable(progress):
        yield progress
    elif progress:
        with Bars() as bars:
            yield bars
    else:
        yield silent


def listed(given: Any) -> list[Any]:
    """Take one thing, or several; a stack of inputs and a text are one."""
    one = isinstance(given, str | AVInputs) or not isinstance(given, Iterable)
    return [given] if one else list(given)


def pairs_of(verb: str, given: Any) -> list[Pair]:
    """Read one pair, or several."""
    pairs = listed(given)
    others = [type(one).__name__ for one in pairs if not isinstance(one, Pair)]
    if others or not pairs:
        raise InputError(
            f"{verb} compares two aligned inputs, and got {others[0] if others else 'nothing'}: pass "
            "avl.Pair(clean=x, corrupt=y), such as the same sound with and without its picture "
            "(model.encode(clip.blank(), question) and model.encode(clip, question)), or a list of them."
        )
    return pairs


def that_fit(model: Any, longest: int, stack: int, budget_gb: float | int) -> int:
    """Say how many examples may run together, so that one layer's scores and pattern fit a budget."""
    each = 4.0 * model.spec.n_heads * longest * longest * max(4, model.dtype.itemsize)  # mask, scores, softmax, sum
    return max(1, min(stack, int(budget_gb * 1e9 / each)))


def input_stacks(inputs: Sequence[AVInputs], size: int) -> Iterator[list[int]]:
    """Group inputs of one layout."""
    layouts: list[tuple[AVInputs, list[int]]] = []
    for number, x in enumerate(inputs):
        alike = (g for y, g in layouts if y.layout == x.layout and y.spans.layout_difference(x.spans) is None)
        group = next(alike, None)
        if group is None:
            layouts.append((x, group := []))
        group.append(number)
    for _, group in layouts:
        current: list[int] = []
        for number in group:
            if current and sum(len(inputs[n]) for n in current) + len(inputs[number]) > size:
                yield current
                current = []
            current.append(number)
        yield current


GIGABYTE = 1e9


_STREAM, _WHOLE_SCORES = ("d_model",), (".hook_attn_scores", ".hook_pattern")
_WIDE = (".ln1.hook_normalized", ".ln2.hook_normalized", ".ln1.hook_scale", ".ln2.hook_scale")  # always in float32
# Hooks of a layer by the ends of their names: the shape of each tensor, and all hooks that show it.
_SHAPES: dict[tuple[str, ...], tuple[str, ...]] = {
    _STREAM: (
        *_WIDE[:2],
        ".hook_resid_mid .ln2.hook_in",
        ".hook_mlp_in",
        ".ln1.hook_out .attn.hook_in .q.hook_in .k.hook_in .v.hook_in",
        ".attn.o.hook_out .attn.hook_out .hook_attn_out",
        ".ln2.hook_out .mlp.hook_in .mlp.gate.hook_in .mlp.in.hook_in",
        ".mlp.out.hook_out .mlp.hook_out .hook_mlp_out",
    ),
    ("d_mlp",): (
        ".mlp.gate.hook_out .mlp.hook_pre",
        ".mlp.in.hook_out .mlp.hook_pre_linear",
        ".mlp.out.hook_in .mlp.hook_post",
    ),
    ("n_heads", "d_head"): (".q.hook_out .attn.hook_q", ".hook_rot_q", ".attn.o.hook_in .attn.hook_z"),
    ("n_kv_heads", "d_head"): (".k.hook_out .attn.hook_k", ".v.hook_out .attn.hook_v", ".hook_rot_k"),
    ("n_heads", "pos"): _WHOLE_SCORES,
    ("n_heads", "d_model"): (".hook_result", ".hook_attn_in", ".hook_q_input"),
    ("n_kv_heads", "d_model"): (".hook_k_input", ".hook_v_input"),
    ("one",): _WIDE[2:],
    ("none",): (".attn.hook_cos .attn.hook_sin",),
}
_TENSORS = [
    *((tuple(ends.split()), shape) for shape, tensors in _SHAPES.items() for ends in tensors),
    ((".hook_resid_pre", ".ln1.hook_in", ".hook_resid_post", ".hook_in", ".hook_out"), _STREAM),
]


def cache_bytes(names: Iterable[str], spec: ModelSpec, *, batch: int, n_pos: int, itemsize: int) -> int:
    """Estimate what caching these hooks stores."""
    sizes = {**vars(spec), "pos": n_pos, "one": 1, "none": 0}
    seen: set[tuple[str, int]] = set()
    total = 0
    for name in names:
        layer, number, shape = _place(name)
        if (layer, number) not in seen:
            seen.add((layer, number))
            width = math.prod(sizes[axis] for axis in shape)
            total += batch * n_pos * width * (4 if layer != name and name.endswith(_WIDE) else itemsize)
    return total


def _place(name: str) -> tuple[str, int, tuple[str, ...]]:
    """Which tensor a hook shows: its layer, its number in the table, and its shape beside batch and pos."""
    parts = name.split(".")
    if parts[0] != "blocks":
        if parts[0] in ("unembed", "hook_unembed") and parts[-1] != "hook_in":
            return "logits", 0, ("d_vocab",)
        return name, 0, _STREAM if parts[0] in ("embed", "hook_embed", "ln_final", "unembed") else ("none",)
    for number, (endings, shape) in enumerate(_TENSORS):
        if name.endswith(endings):
            layer = parts[1]
            if number == len(_TENSORS) - 1 and (parts[2] in ("hook_out", "hook_resid_post")):
                layer = str(int(layer) + 1)  # a layer's output is the next one's input
            return layer, number, shape
    return name, -1, _STREAM


@contextmanager
def bounded(
    model: Any, ids: torch.Tensor, budget_gb: float | int, options: Mapping[str, Any] = MappingProxyType({})
) -> Generator[None, None, None]:
    """Hold a run to a budget, under the hooks that are on the model now."""
    copies = 3 if options.get("return_type") in ("loss", "both") else 1
    spec, (batch, n_pos), itemsize = model.spec, ids.shape, model.dtype.itemsize
    taken = batch * n_pos * spec.d_vocab * itemsize * copies / GIGABYTE
    partial = options.get("stop_at_layer") is not None or model.bridge.unembed.hook_in.has_hooks()
    if taken > budget_gb and not partial:
        raise BudgetError(
            f"the logits of {batch} x {n_pos} positions and {spec.d_vocab} tokens would take about {taken:.3g} GB, "
            f"beyond budget_gb={budget_gb:g}. Ask for those of a few positions, with "
            'avl.run(model, x, logits_at="generation").logits, or raise budget_gb.'
        )
    asking = [names for block in model.bridge.blocks if (names := block.attn.score_hooks())]
    with score_budget(budget_gb):
        if asking:
            graph = torch.is_grad_enabled() and any(p.requires_grad for p in model.hf_model.parameters())
            scores = batch * spec.n_heads * n_pos * n_pos
            need = score_gigabytes(scores, itemsize=itemsize, kept_layers=len(asking) if graph else 0)
            refuse_scores([n for names in asking for n in names], need, shape=(batch, n_pos, n_pos), graph=graph)
        yield


def require_budget(
    names: Iterable[str], spec: ModelSpec, *, batch: int, n_pos: int, itemsize: int, budget_gb: float | int
) -> None:
    """Refuse a cache beyond the budget, naming a filter that fits; of kept scores a layer's whole ones count too."""
    taken = partial(_taken, spec, batch, n_pos, itemsize)
    need = taken(names)
    if need <= budget_gb:
        return
    text = (
        f"caching this run would take about {need:.3g} GB ({batch} x {n_pos} positions, {spec.n_layers} layers), "
        f"beyond budget_gb={budget_gb:g}."
    )
    for shown, filtered in _suggestions(spec):
        fits = taken(filtered)
        if fits <= budget_gb:
            raise BudgetError(f"{text} This filter fits, with about {fits:.3g} GB: names_filter={shown}.")
    raise BudgetError(f"{text} Name single hooks in names_filter, stack fewer examples, or raise budget_gb.")


def _taken(spec: ModelSpec, batch: int, n_pos: int, itemsize: int, cached: Iterable[str]) -> float:
    """GB of a cache of these hooks, and of whole scores while it is made where any needs them."""
    cached = tuple(cached)
    whole = any(name.endswith(_WHOLE_SCORES) for name in cached)
    working = score_gigabytes(batch * spec.n_heads * n_pos * n_pos, itemsize=itemsize) if whole else 0.0
    return cache_bytes(cached, spec, batch=batch, n_pos=n_pos, itemsize=itemsize) / GIGABYTE + working


def _suggestions(spec: ModelSpec) -> list[tuple[str, tuple[str, ...]]]:
    """Filters worth having, the richest first: the text a user can paste, and the hooks it selects."""

    def ending(*components: str) -> tuple[str, tuple[str, ...]]:
        names = tuple(name for component in components for name in layer_names(component, spec.n_layers))
        ends = tuple(layer_names(component, 1)[0].partition(".0.")[2].rpartition(".")[2] for component in components)
        shown = repr(ends[0]) if len(ends) == 1 else repr(ends)
        return f"lambda name: name.endswith({shown})", names

    return [
        ending("resid_pre", "resid_mid", "resid_post", "z", "v", "pattern", "attn_out", "mlp_out"),
        ending("resid_post", "z", "pattern"),
        ending("resid_post", "z"),
        ending("resid_post"),
        (f"{layer_names('resid_post', spec.n_layers)[-1]!r}", layer_names("resid_post", spec.n_layers)[-1:]),
    ]


def selected(names_filter: str | Iterable[str] | Callable[[str], bool] | None, known: Iterable[str]) -> tuple[str, ...]:
    """The hooks that a filter selects."""
    if names_filter is None:
        return tuple(known)
    if isinstance(names_filter, str):
        return (names_filter,)
    if callable(names_filter):
        return tuple(name for name in known if names_filter(name))
    return tuple(names_filter)
