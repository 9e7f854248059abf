"""Edges: what queries may no longer read from keys, and the two ends of a path from a sender to a reader.

    sender     (3, 2)            what head 2 of layer 3 writes                        "L3H2"
               (3, "mlp")        what the MLP of layer 3 writes                       "L3 mlp"
               ("embed", "audio")   the stream entering the layers at a role or `Span`  "embed audio"
    receiver   "logits"          the unembedding
               (5, 1, "q")       the queries of head 1 of layer 5                     "L5H1.q"
               (5, 1, "k")       the keys that query head 1 *alone* sees (likewise "v")  "L5H1.k"
               (5, KV(0), "k")   the keys of key-value head 0, seen by all its query heads   "L5KV0.k"
               (5, "mlp")        the MLP of layer 5                                   "L5 mlp"

A list is *one* end made of several, patched together. Several in turn are a dictionary of names to ends, or a string:
"L5H1.q, L5H1.k" are two, "L5H1.q + L6H0.v" is one made of two. The words "heads", "mlps", "spans" (senders) and
"heads.q", "heads.k", "heads.v", "kv.k", "kv.v", "mlps" (receivers) name all of a kind, each in turn.

A row of which every allowed key is cut reads nothing: its output is zero (a finite minimum in place of minus infinity
would give a uniform pattern over future keys, silently). Cuts act in the prompt and at every decoding step.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from av_lens.brief import Brief
from av_lens.errors import InputError, InterventionError
from av_lens.interventions.edits import ModelSpec, Positions, check_heads, check_layers, resolve_positions
from av_lens.spans import SpanMap

INPUTS = ("q", "k", "v")
SENDER_FORMS = "(layer, head), (layer, 'mlp') or ('embed', role or Span)"
RECEIVER_FORMS = "'logits', (layer, head, 'q'|'k'|'v'), (layer, KV(g), 'k'|'v') or (layer, 'mlp')"
_HEAD = re.compile(r"L(\d+)\s*(H|KV)(\d+)(?:\s*[.\s]\s*([qkv]))?")
_MLP = re.compile(r"L(\d+)\s*[.\s]?\s*mlp")
_LAST = 10**9


@dataclass(frozen=True)
class KV:
    """A key-value head, as receiver: all query heads that share it see the new key or value."""

    group: int


@dataclass(frozen=True)
class Node:
    """One end of a path."""

    kind: str  # "head", "kv", "mlp", "embed" or "logits"; "total" stands for everything after a sender
    layer: int | None = None  # the layer; None for embed and logits
    index: int | None = None  # the head, or key-value head
    input: str | None = None  # "q", "k" or "v" of a receiving head; None of a sender
    span: Any = field(default=None, compare=False)  # the positions of "embed": a role or a `Span`
    span_name: str = ""  # the role's name, or "span"

    @property
    def label(self) -> str:
        """The end as one would write it."""
        plain = {"logits": "logits", "total": "total", "embed": f"embed {self.span_name}", "mlp": f"L{self.layer} mlp"}
        if self.kind in plain:
            return plain[self.kind]
        name = f"L{self.layer}{'KV' if self.kind == 'kv' else 'H'}{self.index}"
        return f"{name}.{self.input}" if self.input else name

    @property
    def reads_at(self) -> int:
        """When it reads, counted along a run: attention of layer l at 4 l, its MLP at 4 l + 2."""
        if self.kind == "logits":
            return _LAST
        return 4 * (self.layer or 0) + (2 if self.kind == "mlp" else 0)

    @property
    def writes_at(self) -> int:
        """When it writes, on the same count; the embedding before all."""
        if self.kind in ("embed", "logits"):
            return -1 if self.kind == "embed" else _LAST
        return self.reads_at + 1

    def check(self, spec: ModelSpec) -> None:
        """Refuse a layer or head that the model does not have."""
        check_layers([] if self.layer is None else [self.layer], spec)
        if self.index is not None:
            known, component = (spec.n_kv_heads, "k") if self.kind == "kv" else (spec.n_heads, "z")
            check_heads((self.index,), known, spec, component)


Ends = dict[str, tuple[Node, ...]]  # ends by name, each made of one node or of several patched together


def senders(given: Any, spec: ModelSpec, roles: Sequence[str]) -> Ends:
    """Read what a caller named as senders."""
    every = {
        "heads": [Node("head", la, h) for la in range(spec.n_layers) for h in range(spec.n_heads)],
        "mlps": [Node("mlp", la) for la in range(spec.n_layers)],
        "spans": [Node("embed", span=role, span_name=role) for role in roles],
    }
    found = _ends(given, every, "sender", SENDER_FORMS)
    for node in itertools.chain(*found.values()):
        if node.kind in ("kv", "logits") or node.input is not None:
            raise InputError(f"{node.label} is no sender. A sender is {SENDER_FORMS}.")
        node.check(spec)
    return found


def receivers(given: Any, spec: ModelSpec) -> Ends:
    """Read what a caller named as receivers."""
    layers = range(spec.n_layers)
    every = {"mlps": [Node("mlp", la) for la in layers]}
    for what in INPUTS:
        every[f"heads.{what}"] = [Node("head", la, h, what) for la in layers for h in range(spec.n_heads)]
        if what != "q":
            every[f"kv.{what}"] = [Node("kv", la, g, what) for la in layers for g in range(spec.n_kv_heads)]
    found = _ends(given, every, "receiver", RECEIVER_FORMS)
    for nodes in found.values():
        for node in nodes:
            if node.kind == "embed" or (node.kind in ("head", "kv") and node.input is None):
                forms = f"A receiver is {RECEIVER_FORMS}."
                raise InputError(f"{node.label} is no receiver: say through which input. {forms}")
            if node.kind == "kv" and node.input == "q":
                raise InputError(f"{node.label}: key-value heads have no queries; name a head's: (layer, head, 'q').")
            node.check(spec)
        refuse_double(nodes, spec)
    return found


def refuse_double(nodes: Sequence[Node], spec: ModelSpec) -> None:
    """Refuse receivers that cannot be patched together: one input of one head may have one new value only."""
    if len(nodes) > 1 and any(node.kind == "logits" for node in nodes):
        raise InputError("'logits' cannot be patched together with others: its input replaced, theirs changes nothing.")
    seen: set[tuple[Any, ...]] = set()
    group = spec.n_heads // spec.n_kv_heads
    for node in nodes:
        index = node.index or 0
        heads = range(index * group, (index + 1) * group) if node.kind == "kv" else (index,)
        touched = {(node.layer, node.kind == "mlp", node.input, head) for head in heads}
        if touched & seen:
            raise InputError(f"{node.label} is named twice in {' + '.join(n.label for n in nodes)}.")
        seen |= touched


def _ends(given: Any, every: Mapping[str, Sequence[Node]], what: str, forms: str) -> Ends:
    if isinstance(given, str):
        words = [part.strip() for part in given.split(",")]
        parts = [[(n,) for n in every[w]] if w in every else [_together(w, what, forms, every)] for w in words]
        return {" + ".join(node.label for node in nodes): nodes for part in parts for nodes in part}
    if isinstance(given, Mapping):
        if not given:
            raise InputError(f"no {what} is named; name one: {forms}.")
        return {str(name): _together(end, what, forms, every) for name, end in given.items()}
    nodes = _together(given, what, forms, every)
    return {" + ".join(node.label for node in nodes): nodes}


def _together(given: Any, what: str, forms: str, every: Mapping[str, Sequence[Node]]) -> tuple[Node, ...]:
    if isinstance(given, str):
        return tuple(_written(part.strip(), what, forms, every) for part in given.split("+"))
    if isinstance(given, tuple) and given and isinstance(given[0], int | str):
        return (_node(given, what, forms),)
    listed = list(given) if isinstance(given, Sequence) else []
    if not listed:
        raise InputError(f"{given!r} is no {what}. A {what} is {forms}.")
    return tuple(node for one in listed for node in _together(one, what, forms, every))


def _node(given: tuple[Any, ...], what: str, forms: str) -> Node:
    match given:
        case (int(layer), "mlp"):
            return Node("mlp", layer)
        case ("embed", span):
            return Node("embed", span=span, span_name=span if isinstance(span, str) else "span")
        case (int(layer), int(head)):
            return Node("head", layer, head)
        case (int(layer), int(head), str(name)) if name in INPUTS:
            return Node("head", layer, head, name)
        case (int(layer), KV(group), str(name)) if name in INPUTS:
            return Node("kv", layer, group, name)
        case _:
            raise InputError(f"{given!r} is no {what}. A {what} is {forms}.")


def _written(word: str, what: str, forms: str, every: Mapping[str, Sequence[Node]]) -> Node:
    if word == "logits":
        return Node("logits")
    if word.startswith("embed "):
        return _node(("embed", word.removeprefix("embed ").strip()), what, forms)
    if found := _MLP.fullmatch(word):
        return Node("mlp", int(found[1]))
    if found := _HEAD.fullmatch(word):
        return Node("head" if found[2] == "H" else "kv", int(found[1]), int(found[3]), found[4])
    words = ", ".join(repr(name) for name in every)
    raise InputError(
        f"{word!r} is no {what}. Write 'L3H2', 'L3 mlp', 'embed audio' (senders), 'logits', 'L5H1.q', 'L5KV0.k', "
        f"'L5 mlp' (receivers), one of {words}, or {forms}."
    )


@dataclass(frozen=True, eq=False)
class Cut:
    """Attention edges to be cut. Build it with `cut`, whose arguments its fields are."""

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
        """Find the first position whose reading changes."""
        index = self._queries(spans).index
        return index[0] if index else len(spans)

    def _queries(self, spans: SpanMap) -> Positions:
        found = resolve_positions(self.query, spans, what="cut's query")
        roles = [role.strip() for role in self.query.split("|")] if isinstance(self.query, str) else []
        generation = int(spans.generation_position)
        if "generated" in roles and self.include_generation and generation not in found.index:
            return Positions(tuple(sorted((*found.index, generation))), decode=found.decode)
        return found

    def bound(self, spec: ModelSpec, spans: SpanMap, batch: int | None = None) -> BoundCut:
        """Check the cut against a model and an input, and make it ready to run."""
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
    """A cut on one model and one prompt."""

    edit: Cut  # what was asked
    layers: tuple[int, ...]  # the layers, resolved
    queries: Positions  # positions that read
    keys: Positions  # positions that are read
    n_prompt: int  # positions of the prompt

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
    mask = mask.to(scores.device, non_blocking=True)
    scores.masked_fill_(mask[None], -torch.inf)
    # Future keys carry the mask's finite minimum (or minus infinity), never a score of the model's.
    dead = scores.amax(-1) <= torch.finfo(scores.dtype).min / 2
    dead &= mask.any(-1)[None]
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
