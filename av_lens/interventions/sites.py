"""Where to intervene: a component, a layer, heads and positions.

A site names a place by what it is (`Site("z", 5, head=3, positions=x.spans.suffix)`), never by a hook's string.
Positions are positions of the *prompt*, as a `Span`, integers, or role names joined by `|` (`"question|generation"`,
also `"suffix"` and `"media"`); None means every position, and during decoding every new one too. Only the role
`"generated"` names positions that decoding adds.

Heads are query heads everywhere but at `k`, `v` and `rot_k`, which a model with grouped queries keeps once for each
key-value head; the error that refuses a head says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from av_lens.errors import InterventionError, unknown
from av_lens.families.hook_names import COMPONENTS
from av_lens.spans import SpanMap

KV_COMPONENTS = ("k", "v", "rot_k")


@runtime_checkable
class Spec(Protocol):
    """The sizes of a model that a site is checked against (`HookedAVLLM.spec` has them)."""

    @property
    def n_layers(self) -> int:
        """Fusion layers."""
        ...

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        ...

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads of a layer."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def d_head(self) -> int:
        """Width of one head."""
        ...


@dataclass(frozen=True)
class Positions:
    """Positions resolved on one prompt: a slice where they are contiguous, else a list, and whether decoding joins.

    Attributes:
        index: positions of the prompt, ascending and distinct.
        decode: whether positions that decoding adds belong to it.
        everything: whether all positions were asked for (no list given).
    """

    index: tuple[int, ...]
    decode: bool = False
    everything: bool = False

    def __len__(self) -> int:
        return len(self.index)

    def local(self, offset: int, length: int, n_prompt: int) -> slice | torch.Tensor | None:
        """Find these positions in a tensor that holds `length` positions starting at `offset`."""
        if offset >= n_prompt:
            return slice(0, length) if self.decode else None
        rows = [p - offset for p in self.index if offset <= p < offset + length]
        if not rows:
            return None
        return slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else torch.tensor(rows)


def resolve_positions(positions: Any, spans: SpanMap, *, what: str = "site") -> Positions:
    """Turn a span, integers, role names or None into positions of this prompt."""
    n = len(spans)
    if positions is None:
        return Positions(tuple(range(n)), decode=True, everything=True)
    named = positions.split("|") if isinstance(positions, str) else []
    decode = "generated" in map(str.strip, named)
    raw = spans[positions] if isinstance(positions, str) else positions
    index = tuple(sorted({int(p) for p in getattr(raw, "positions", raw)}))
    if not index and not decode:
        raise InterventionError(
            f"the {what} names no position ({positions!r}): this input has none there. "
            f"Look at x.spans for the roles it has."
        )
    if index and (index[0] < 0 or index[-1] >= n):
        bad = index[0] if index[0] < 0 else index[-1]
        raise InterventionError(
            f"the {what} names position {bad}, but the input has {n} positions (0 to {n - 1}). "
            "Count from the start; x.spans.generation_position is the last."
        )
    return Positions(index, decode=decode)


@dataclass(frozen=True)
class Site:
    """One place in the model: a component of a layer, some or all heads, some or all positions.

    Attributes:
        component: what is read or written: `z`, `resid_pre`, `attn_out`, `pattern`, ... (`COMPONENTS` lists them).
        layer: the layer, counted from 0; None for components that no layer owns (`embed`).
        head: one head, several, or None for all.
        positions: a `Span`, integers, role names joined by `|`, or None for all.
    """

    component: str
    layer: int | None = None
    head: int | tuple[int, ...] | None = None
    positions: Any = None

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            raise InterventionError(unknown("component", self.component, COMPONENTS))
        if COMPONENTS[self.component].layered and self.layer is None:
            raise InterventionError(f"{self.component} belongs to a layer: write Site({self.component!r}, layer, ...).")
        if not COMPONENTS[self.component].layered and self.layer is not None:
            raise InterventionError(f"{self.component} belongs to no layer: write Site({self.component!r}).")
        if self.head is not None and not self.has_heads:
            raise InterventionError(
                f"{self.component} has no head axis (its axes: {' '.join(self.axes)}); leave head out, "
                "or name z, result, q, pattern or scores."
            )
        if isinstance(self.head, Sequence) and len(set(self.head)) != len(self.head):
            raise InterventionError(f"heads {self.head} name one head twice.")

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the whole activation, such as `("batch", "pos", "head", "d_head")`."""
        return tuple(COMPONENTS[self.component].axes)

    @property
    def has_heads(self) -> bool:
        """Whether the component is kept per head."""
        return COMPONENTS[self.component].head_axis is not None

    @property
    def heads_first(self) -> bool:
        """Whether the head axis stands before the positions (scores, pattern)."""
        return COMPONENTS[self.component].head_axis == 1

    @property
    def is_edges(self) -> bool:
        """Whether the component is a matrix of queries and keys; its positions are the queries."""
        return self.axes[-1] == "key_pos"

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The named heads, or None for all."""
        if self.head is None:
            return None
        return (self.head,) if isinstance(self.head, int) else tuple(self.head)

    def n_heads(self, spec: Spec) -> int:
        """Count the heads of the whole component.

        Args:
            spec: the model's sizes.

        Returns:
            Query heads, or key-value heads for `k`, `v` and `rot_k`; 0 without a head axis.
        """
        if not self.has_heads:
            return 0
        return spec.n_kv_heads if "kv_head" in self.axes else spec.n_heads

    def check(self, spec: Spec) -> None:
        """Refuse a layer or head that the model does not have.

        Args:
            spec: the model's sizes.

        Raises:
            InterventionError: the layer or a head is out of range.
        """
        check_layers([] if self.layer is None else [self.layer], spec)
        check_heads(self.heads, self.n_heads(spec), spec, self.component)


def check_layers(layers: Iterable[int], spec: Spec) -> None:
    """Refuse layers that the model does not have."""
    for layer in layers:
        if not 0 <= layer < spec.n_layers:
            where = "past the end" if layer >= spec.n_layers else "negative"
            raise InterventionError(
                f"layer {layer} is {where}: the model has {spec.n_layers} layers, 0 to {spec.n_layers - 1}."
            )


def check_heads(heads: tuple[int, ...] | None, known: int, spec: Spec, component: str) -> None:
    """Refuse heads that the component does not have; with grouped queries say which heads it is kept for."""
    for head in heads or ():
        if not 0 <= head < known:
            text = f"head {head} of {component} is out of range: it has {known} heads, 0 to {known - 1}."
            if component in KV_COMPONENTS and spec.n_kv_heads != spec.n_heads:
                group = spec.n_heads // spec.n_kv_heads
                text = (
                    f"head {head} of {component} is out of range: keys and values are kept for {known} key-value heads "
                    f"(0 to {known - 1}), shared by {spec.n_heads} query heads, {group} each; query head h reads "
                    f"key-value head h // {group}. To edit one query head alone, name q, scores, pattern, z or result."
                )
            raise InterventionError(text)
