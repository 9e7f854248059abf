"""Who sends, and through which input another reads it: the two ends of a path.

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
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from av_lens.errors import InputError
from av_lens.interventions.sites import Spec, check_heads, check_layers

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
    """One end of a path.

    Attributes:
        kind: "head", "kv", "mlp", "embed" or "logits"; "total" stands for everything after a sender.
        layer: the layer; None for embed and logits.
        index: the head, or key-value head.
        input: "q", "k" or "v" of a receiving head; None of a sender.
        span: the positions of "embed": a role or a `Span`.
        span_name: the role's name, or "span".
    """

    kind: str
    layer: int | None = None
    index: int | None = None
    input: str | None = None
    span: Any = field(default=None, compare=False)
    span_name: str = ""

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

    def check(self, spec: Spec) -> None:
        """Refuse a layer or head that the model does not have."""
        check_layers([] if self.layer is None else [self.layer], spec)
        if self.index is not None:
            known, component = (spec.n_kv_heads, "k") if self.kind == "kv" else (spec.n_heads, "z")
            check_heads((self.index,), known, spec, component)


Ends = dict[str, tuple[Node, ...]]
"""Ends by name, each made of one node or of several patched together."""


def senders(given: Any, spec: Spec, roles: Sequence[str]) -> Ends:
    """Read what a caller named as senders."""
    every = {
        "heads": [Node("head", la, h) for la in range(spec.n_layers) for h in range(spec.n_heads)],
        "mlps": [Node("mlp", la) for la in range(spec.n_layers)],
        "spans": [Node("embed", span=role, span_name=role) for role in roles],
    }
    found = _ends(given, every, "sender", SENDER_FORMS)
    for node in (node for nodes in found.values() for node in nodes):
        if node.kind in ("kv", "logits") or node.input is not None:
            raise InputError(f"{node.label} is no sender. A sender is {SENDER_FORMS}.")
        node.check(spec)
    return found


def receivers(given: Any, spec: Spec) -> Ends:
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
                raise InputError(
                    f"{node.label} is no receiver: say through which input. A receiver is {RECEIVER_FORMS}."
                )
            if node.kind == "kv" and node.input == "q":
                raise InputError(f"{node.label}: key-value heads have no queries; name a head's: (layer, head, 'q').")
            node.check(spec)
        refuse_double(nodes, spec)
    return found


def refuse_double(nodes: Sequence[Node], spec: Spec) -> None:
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
        found: Ends = {}
        for part in given.split(","):
            word = part.strip()
            if word in every:
                found |= {node.label: (node,) for node in every[word]}
            else:
                nodes = tuple(_written(one.strip(), what, forms, every) for one in word.split("+"))
                found[" + ".join(node.label for node in nodes)] = nodes
        return found
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
