"""Where to intervene (component, layer, heads, positions), and what to do there: replace, zero, mean, resample, ...

Positions are those of the *prompt*; None means every position, and during decoding every new one too. Only the role
`"generated"` names positions that decoding adds. Heads are query heads everywhere but at `k`, `v` and `rot_k`. Values
have the site's shape over exactly the named positions and heads; batch and positions may be 1, or batch left out.

An edit whose values belong to positions of the prompt fires on the prompt only; one with a value for every position
alike (zero, scale, noise, or a value with one position) on `positions=None` fires at every decoding step too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.brief import Brief
from av_lens.errors import InterventionError, unknown
from av_lens.families.decoder import COMPONENTS
from av_lens.spans import SpanMap

KV_COMPONENTS = ("k", "v", "rot_k")


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of a model's fusion stack."""

    n_layers: int  # fusion layers
    n_heads: int  # query heads per layer
    n_kv_heads: int  # key-value heads per layer; each serves `n_heads / n_kv_heads` query heads
    d_model: int  # width of the residual stream
    d_head: int  # width of a head
    d_mlp: int  # hidden units of an MLP
    d_vocab: int  # tokens of the vocabulary
    experts: frozenset[int] = frozenset()  # the layers that choose among many MLPs, and so have no units of one
    lacking: frozenset[tuple[str, int]] = frozenset()  # components that some layer does not have, each with that layer
    own: tuple[tuple[int, int, int], ...] = ()  # where layers differ, each one's own `n_kv_heads`, `d_head` and `d_mlp`

    def at(self, layer: int | None) -> ModelSpec:
        """Say the sizes of one layer."""
        if layer is None or not self.own:
            return self
        n_kv_heads, d_head, d_mlp = self.own[layer]
        return dataclasses.replace(self, n_kv_heads=n_kv_heads, d_head=d_head, d_mlp=d_mlp, own=())

    d_experts: int = 0  # hidden units of all experts that one position goes through; 0 without experts

    @property
    def widest(self) -> int:
        """Hidden units that a position has in the layer where it has most."""
        dense = self.d_mlp if len(self.experts) < self.n_layers else 0
        return max(dense, self.d_experts if self.experts else 0)


@dataclass(frozen=True)
class Positions:
    """Positions resolved on one prompt: a slice where they are contiguous, else a list, and whether decoding joins."""

    index: tuple[int, ...]  # positions of the prompt, ascending and distinct
    decode: bool = False  # whether positions that decoding adds belong to it
    everything: bool = False  # whether all positions were asked for (no list given)

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


def places(index: Iterable[int], device: torch.device) -> torch.Tensor:
    """Numbers to index with, brought to a device without waiting for it."""
    return torch.tensor(list(index), dtype=torch.int64).to(device, non_blocking=True)


def like(value: Tensor, activation: Tensor) -> Tensor:
    """A value where an activation is and in its precision; what comes from memory does not wait for the device."""
    return value.to(activation, non_blocking=value.device.type == "cpu")


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

    def n_heads(self, spec: ModelSpec) -> int:
        """Count the heads of the whole component.

        Args:
            spec: the model's sizes.

        Returns:
            Query heads, or key-value heads for `k`, `v` and `rot_k`; 0 without a head axis.
        """
        if not self.has_heads:
            return 0
        return spec.at(self.layer).n_kv_heads if "kv_head" in self.axes else spec.n_heads

    def check(self, spec: ModelSpec) -> None:
        """Refuse a layer or head that the model does not have.

        Args:
            spec: the model's sizes.

        Raises:
            InterventionError: the layer or a head is out of range.
        """
        check_layers([] if self.layer is None else [self.layer], spec)
        if self.component in UNITS and self.layer in spec.experts:
            raise InterventionError(
                f"layer {self.layer} chooses among experts, each an MLP of its own, and has no {self.component}: name "
                "mlp_in or mlp_out, what the layer's experts read and write together."
            )
        if (self.component, self.layer) in spec.lacking:
            having = [str(one) for one in range(spec.n_layers) if (self.component, one) not in spec.lacking]
            raise InterventionError(
                f"layer {self.layer} has no {self.component} of its own: it reads an earlier layer's keys and values, "
                f"or makes both of one projection. Layers that have it: {', '.join(having) or 'none'}."
            )
        check_heads(self.heads, self.n_heads(spec), spec.at(self.layer), self.component)


def check_layers(layers: Iterable[int], spec: ModelSpec) -> None:
    """Refuse layers that the model does not have."""
    for layer in layers:
        if not 0 <= layer < spec.n_layers:
            where = "past the end" if layer >= spec.n_layers else "negative"
            raise InterventionError(
                f"layer {layer} is {where}: the model has {spec.n_layers} layers, 0 to {spec.n_layers - 1}."
            )


def check_heads(heads: tuple[int, ...] | None, known: int, spec: ModelSpec, component: str) -> None:
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


UNITS = ("mlp_pre", "mlp_pre_linear", "mlp_post")  # components that show the units of one MLP
Kind = Literal["replace", "zero", "resample", "noise", "scale", "add"]


@dataclass(frozen=True, eq=False, repr=False)
class Edit(Brief):
    """A site and what happens to the activation there. Build it with `replace`, `zero`, `mean`, ...

    Attributes:
        kind: the rule.
        site: where it applies.
        value: what `replace` and `add` write, or the examples that `resample` draws from.
        amount: the factor of `scale`, the standard deviation of `noise`.
        seed: the seed of `resample` and `noise`.
    """

    kind: Kind
    site: Site
    value: Float[Tensor, "..."] | None = None
    amount: float | Float[Tensor, "..."] = 0.0
    seed: int = 0

    @property
    def first_layer(self) -> int:
        """The first layer whose computation this edit can change."""
        return self.site.layer or 0

    def first_position(self, spans: SpanMap) -> int:
        """Find the first position that this edit can change.

        Args:
            spans: the `SpanMap` of the input.

        Returns:
            The smallest position of the site.
        """
        index = resolve_positions(self.site.positions, spans).index
        return index[0] if index else len(spans)

    def bound(self, spec: ModelSpec, spans: SpanMap, batch: int | None = None) -> BoundEdit:
        """Check the edit against a model and an input, and make it ready to run.

        Args:
            spec: the model's sizes.
            spans: the `SpanMap` of the input.
            batch: examples in the input, if known.

        Returns:
            The edit with its positions resolved and its value brought to the site's shape.

        Raises:
            InterventionError: layer, head, position or the value's shape does not fit.
        """
        self.site.check(spec)
        positions = resolve_positions(self.site.positions, spans, what=f"{self.kind} at {self.site.component}")
        if self.value is None:
            return BoundEdit(self, positions, None, len(spans))
        positions = _prompt_only(self, self.value, positions, spans)
        value = _shaped(self.value, self, spec, positions, len(spans), batch)
        if positions.everything and value.shape[1] != 1:
            positions = Positions(positions.index, everything=True)
        return BoundEdit(self, positions, value, len(spans))


@dataclass(frozen=True, eq=False, repr=False)
class BoundEdit(Brief):
    """An edit on one model and one prompt: `apply_` writes it into an activation in place."""

    edit: Edit  # what was asked
    positions: Positions  # the site's positions, resolved
    value: Tensor | None  # `[batch or 1, pos or 1, (head or 1,) d]`, or None
    n_prompt: int  # positions of the prompt

    @property
    def rowwise(self) -> bool:
        """Whether the edit does to each row the same whichever other rows it is shown; a drawn tensor does not."""
        amount = self.edit.amount
        return self.edit.kind != "noise" and (not isinstance(amount, Tensor) or amount.numel() == 1)

    def apply_(self, activation: Tensor, offset: int) -> bool:
        """Write the edit into an activation."""
        rows = self.positions.local(offset, activation.shape[1], self.n_prompt)
        if rows is None:
            return False
        where = _index(rows, self.edit.site.heads if activation.ndim == 4 else None, activation.device)
        kind = self.edit.kind
        value = None if self.value is None else self._rows_of_value(self.value, rows, offset, activation)
        if value is not None and kind in ("replace", "resample"):
            activation[where] = value
            return True
        old = activation[where]
        if kind == "zero":
            activation[where] = self._allowed(old, torch.zeros_like(old))
        elif kind == "scale":
            activation[where] = self._allowed(old, old * _amount(self.edit, old))
        elif kind == "noise":
            step = offset if offset >= self.n_prompt else 0
            activation[where] = old + _noise(old, self.edit, step)
        elif value is not None:
            activation[where] = old + value
        return True

    def _allowed(self, old: Tensor, new: Tensor) -> Tensor:
        """The new activation; edges of scores that the mask forbids stay forbidden, whatever their new number."""
        if self.edit.site.component != "scores":
            return new
        return torch.where(old <= torch.finfo(old.dtype).min / 2, old, new)

    def _rows_of_value(self, value: Tensor, rows: slice | Tensor, offset: int, activation: Tensor) -> Tensor:
        if self.edit.kind == "resample":
            rng = np.random.default_rng(self.edit.seed)
            value = value[places(rng.integers(0, value.shape[0], activation.shape[0]).tolist(), value.device)]
        if value.shape[0] not in (1, activation.shape[0]):
            raise InterventionError(
                f"{self.edit.kind} at {self.edit.site.component}: the value has {value.shape[0]} examples, "
                f"the run {activation.shape[0]}. Give one value for each example, or a single one."
            )
        n_rows = (rows.stop - rows.start) if isinstance(rows, slice) else len(rows)
        if value.shape[1] not in (1, n_rows):  # a restart in the middle of the site: only its last rows are here
            inside = [i for i, p in enumerate(self.positions.index) if offset <= p < offset + activation.shape[1]]
            value = value[:, places(inside, value.device)]
        return like(value, activation)


def _prompt_only(edit: Edit, value: Tensor, positions: Positions, spans: SpanMap) -> Positions:
    """Values recorded on a whole prompt go to that prompt's positions when an answer follows it."""
    answer = spans["generated"].positions
    if not positions.everything or not len(answer):
        return positions
    prompt = tuple(sorted(set(positions.index) - set(answer.tolist())))
    by_head = edit.site.has_heads and (not isinstance(edit.site.head, int) or value.ndim == 4)
    axis = value.ndim - (3 if by_head else 2)
    given = value.shape[axis] if axis >= 0 else 1
    return Positions(prompt) if given == len(prompt) else positions


def _index(rows: slice | Tensor, heads: tuple[int, ...] | None, device: torch.device) -> tuple[slice | Tensor, ...]:
    """Index `[batch, rows, heads]` so that the head axis stays, whatever mixture of slices and lists."""
    rows = rows if isinstance(rows, slice) else rows.to(device, non_blocking=True)
    if heads is None:
        return (slice(None), rows)
    if heads[-1] - heads[0] + 1 == len(heads) and list(heads) == sorted(heads):
        return (slice(None), rows, slice(heads[0], heads[-1] + 1))
    return (slice(None), rows if isinstance(rows, slice) else rows[:, None], places(heads, device))


def _noise(old: Tensor, edit: Edit, step: int) -> Tensor:
    """Gaussian noise from the edit's own seed, the same whichever way the run is made."""
    seed = int(np.random.SeedSequence([edit.seed, step]).generate_state(1)[0])
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(old.shape, generator=generator, dtype=torch.float32)
    return like(draw, old) * _amount(edit, old)


def _amount(edit: Edit, old: Tensor) -> float | Tensor:
    """The factor or the standard deviation, where the activation is and in its precision."""
    return like(edit.amount, old) if isinstance(edit.amount, Tensor) else edit.amount


def _shaped(
    value: Tensor, edit: Edit, spec: ModelSpec, positions: Positions, n_prompt: int, batch: int | None
) -> Tensor:
    """Bring a value to `[batch or 1, pos or 1, (head or 1,) d]`, or say which shape was wanted."""
    site = edit.site
    n_heads = site.n_heads(spec) if site.heads is None else len(site.heads)
    d = width_of(site, spec, n_prompt)
    given = tuple(value.shape)
    wanted = f"[batch, {len(positions)} positions" + (f", {n_heads} heads" if site.has_heads else "") + f", {d}]"
    if isinstance(site.head, int) and (value.ndim < 4 or value.shape[2] != 1):
        value = value.unsqueeze(-2)
    rank = 4 if site.has_heads else 3
    value = value[(None,) * max(0, rank - value.ndim)]
    sizes = [len(positions), *([n_heads] if site.has_heads else []), d]
    ok = value.ndim == rank and all(n in (1, size) for n, size in zip(value.shape[1:], sizes, strict=True))
    if not ok or (edit.kind != "resample" and batch is not None and value.shape[0] not in (1, batch)):
        named = f"head {site.head}, " if site.head is not None else ""
        raise InterventionError(
            f"{edit.kind} at {site.component} (layer {site.layer}, {named}{len(positions)} positions): the value has "
            f"shape {given}; wanted {wanted}"
            + (f" for {batch} examples" if batch else "")
            + ", over the site's positions and heads only (batch and positions may be 1)."
        )
    return value


def width_of(site: Site, spec: ModelSpec, n_prompt: int) -> int:
    """The size of the activation's last axis."""
    last = site.axes[-1]
    return {"key_pos": n_prompt, "one": 1}.get(last) or int(getattr(spec.at(site.layer), last))


def replace(site: Site, value: Float[Tensor, "..."]) -> Edit:
    """Put other values in the activation's place, such as those of another run.

    Args:
        site: where.
        value: `[batch, pos, (head,) d]` over the site's positions and heads; batch and pos may be 1.

    Returns:
        The edit.
    """
    return Edit("replace", site, value)


def zero(site: Site) -> Edit:
    """Set the activation to zero.

    Args:
        site: where.

    Returns:
        The edit.
    """
    return Edit("zero", site)


def mean(site: Site, values: Float[Tensor, "..."]) -> Edit:
    """Put the mean over examples in the activation's place.

    Args:
        site: where.
        values: `[example, pos, (head,) d]` over the site's positions and heads, averaged over the first axis.

    Returns:
        The edit.
    """
    return Edit("replace", site, values.mean(0, keepdim=True))


def resample(site: Site, values: Float[Tensor, "..."], *, seed: int = 0) -> Edit:
    """Put another example's values in the activation's place, drawn at random for each example.

    Args:
        site: where.
        values: `[example, pos, (head,) d]`, the examples to draw from.
        seed: the seed of the draw.

    Returns:
        The edit.
    """
    return Edit("resample", site, values, seed=seed)


def noise(site: Site, *, scale: float | Float[Tensor, "..."] = 1.0, seed: int = 0) -> Edit:
    """Add Gaussian noise to the activation.

    Args:
        site: where.
        scale: standard deviation in the activation's own unit; a tensor broadcasts over `[batch, pos, (head,) d]`.
        seed: the seed of the noise.

    Returns:
        The edit.
    """
    return Edit("noise", site, amount=scale, seed=seed)


def scale(site: Site, factor: float | Float[Tensor, "..."]) -> Edit:
    """Multiply the activation; at scores, edges that the mask forbids stay forbidden.

    Args:
        site: where.
        factor: what to multiply by; a tensor broadcasts over `[batch, pos, (head,) d]`.

    Returns:
        The edit.
    """
    return Edit("scale", site, amount=factor)


def add(site: Site, value: Float[Tensor, "..."]) -> Edit:
    """Add a value to the activation, such as a steering vector.

    Args:
        site: where.
        value: `[batch, pos, (head,) d]` over the site's positions and heads; batch and pos may be 1.

    Returns:
        The edit.
    """
    return Edit("add", site, value)
