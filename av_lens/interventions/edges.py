"""Cutting attention edges: what the queries of one role may no longer read from the keys of another.

`cut("generated", "video", layers=range(4, 8))` forbids it before the softmax (scores to minus infinity), so that the
remaining weights are renormalised; `renormalize=False` sets the pattern to zero after the softmax, so that the weight
is lost. A row of which every allowed key is cut reads nothing: its output is zero (a finite minimum in place of minus
infinity would give a uniform pattern over future keys, silently).

The token that answers is read from the last *prompt* position. The query role `"generated"` therefore includes the
generation position; `include_generation=False` leaves it out, as studies that start at the first generated token do.
Cuts act in the prompt and at every decoding step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from av_lens.brief import Brief
from av_lens.errors import InterventionError
from av_lens.interventions.sites import Positions, Spec, check_heads, check_layers, resolve_positions
from av_lens.spans import SpanMap


@dataclass(frozen=True, eq=False)
class Cut:
    """Attention edges to be cut. Build it with `cut`.

    Attributes:
        query: positions that read: role names joined by `|`, a `Span`, or integers.
        key: positions that are read.
        layers: the layers, or None for all.
        heads: query heads, or None for all.
        renormalize: whether the remaining weights are scaled up (scores), or not (pattern).
        include_generation: whether the role "generated" includes the generation position.
    """

    query: Any
    key: Any
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None = None
    renormalize: bool = True
    include_generation: bool = True

    @property
    def first_layer(self) -> int:
        """The first layer in which edges are cut."""
        return 0 if self.layers is None else min(self.layers)

    def first_position(self, spans: SpanMap) -> int:
        """Find the first position whose reading changes.

        Args:
            spans: the `SpanMap` of the input.

        Returns:
            The smallest query position.
        """
        index = self._queries(spans).index
        return index[0] if index else len(spans)

    def _queries(self, spans: SpanMap) -> Positions:
        found = resolve_positions(self.query, spans, what="cut's query")
        roles = [role.strip() for role in self.query.split("|")] if isinstance(self.query, str) else []
        generation = int(spans.generation_position)
        if "generated" in roles and self.include_generation and generation not in found.index:
            return Positions(tuple(sorted((*found.index, generation))), decode=found.decode)
        return found

    def bound(self, spec: Spec, spans: SpanMap, batch: int | None = None) -> BoundCut:
        """Check the cut against a model and an input, and make it ready to run.

        Args:
            spec: the model's sizes.
            spans: the `SpanMap` of the input.
            batch: not used; edges are cut in every example alike.

        Returns:
            The cut with its positions and layers resolved.

        Raises:
            InterventionError: a layer or head is out of range, or no edge would be cut.
        """
        del batch
        layers = tuple(range(spec.n_layers)) if self.layers is None else self.layers
        check_layers(layers, spec)
        check_heads(self.heads, spec.n_heads, spec, "the attention pattern")
        queries, keys = self._queries(spans), resolve_positions(self.key, spans, what="cut's key")
        if not queries.decode and keys.index and queries.index and min(keys.index) > max(queries.index):
            raise InterventionError(
                f"no edge to cut: the keys {self.key!r} start at position {min(keys.index)}, after the last query "
                f"{max(queries.index)} of {self.query!r}. Queries read only what comes before them: "
                "were the two swapped?"
            )
        return BoundCut(self, layers, queries, keys, len(spans))


@dataclass(frozen=True, eq=False, repr=False)
class BoundCut(Brief):
    """A cut on one model and one prompt.

    Attributes:
        edit: what was asked.
        layers: the layers, resolved.
        queries: positions that read.
        keys: positions that are read.
        n_prompt: positions of the prompt.
    """

    edit: Cut
    layers: tuple[int, ...]
    queries: Positions
    keys: Positions
    n_prompt: int

    def mask(
        self, n_heads: int, n_query: int, n_key: int, *, offset: int
    ) -> Bool[Tensor, "head query_pos key_pos"] | None:
        """Mark the edges to cut."""
        rows = self.queries.local(offset, n_query, self.n_prompt)
        if rows is None:
            return None
        heads, queries, keys = (torch.zeros(n, dtype=torch.bool) for n in (n_heads, n_query, n_key))
        keys[list(self.keys.index)] = True
        if self.keys.decode:
            keys[self.n_prompt :] = True
        heads[slice(None) if self.edit.heads is None else list(self.edit.heads)] = True
        queries[rows] = True
        return heads[:, None, None] & queries[None, :, None] & keys[None, None, :]


def cut_scores_(
    scores: Float[Tensor, "batch head query_pos key_pos"], mask: Bool[Tensor, "head query_pos key_pos"]
) -> Bool[Tensor, "batch head query_pos"]:
    """Cut edges before the softmax, in place, and say which rows are left with nothing to read."""
    scores.masked_fill_(mask.to(scores.device)[None], -torch.inf)
    # Future keys carry the mask's finite minimum (or minus infinity), never a score of the model's.
    dead = scores.amax(-1) <= torch.finfo(scores.dtype).min / 2
    dead &= mask.to(scores.device).any(-1)[None]
    scores.masked_fill_(dead[..., None], 0.0)
    return dead


def silence_(
    pattern: Float[Tensor, "batch head query_pos key_pos"], dead: Bool[Tensor, "batch head query_pos"]
) -> None:
    """Let rows without any key left read nothing, in place."""
    pattern.masked_fill_(dead[..., None], 0.0)


def cut(
    query: Any,
    key: Any,
    *,
    layers: Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    renormalize: bool = True,
    include_generation: bool = True,
) -> Cut:
    """Forbid some positions to read others.

    Args:
        query: positions that read: role names joined by `|`, a `Span`, or integers.
        key: positions that are read.
        layers: the layers (a range's end is exclusive, as in Python); None for all.
        heads: query heads; None for all.
        renormalize: cut before the softmax, so that the rest is scaled up; False cuts after it.
        include_generation: let the query role "generated" include the generation position, from which the first
            generated token is read.

    Returns:
        The cut, to be put into a `Plan`.

    Raises:
        InterventionError: no layer is named.
    """
    named = None if layers is None else tuple(layers)
    if named == ():
        raise InterventionError("cut: no layer is named (an empty range). The end of a range is exclusive.")
    chosen = (heads,) if isinstance(heads, int) else (None if heads is None else tuple(heads))
    return Cut(query, key, named, chosen, renormalize, include_generation)
