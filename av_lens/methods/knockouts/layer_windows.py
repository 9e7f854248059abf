"""Which heads of which layers are edited together: everywhere, in windows of layers, or one head at a time.

    "all"     all named layers at once
    "layer"   a window of `width` layers around each layer (cut off at the model's ends)
    "head"    every head alone

A window of width w around layer l holds the layers l - w // 2 to l - w // 2 + w - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from av_lens.checks import require_at_least, require_choice
from av_lens.errors import InputError, InterventionError
from av_lens.interventions.sites import Spec, check_heads, check_layers

OVER = ("all", "layer", "head")
Heads = Mapping[int, tuple[int, ...] | None]
"""Layer -> the heads that are edited there; None for all of them."""


@dataclass(frozen=True)
class Windows:
    """What is edited in turn, and the axes that label it.

    Attributes:
        points: the heads of each, in the order of the axes; empty where a window holds none of the named heads.
        axes: the labels of each axis; none where there is one point.
    """

    points: tuple[Heads, ...]
    axes: dict[str, Any]

    @classmethod
    def of(
        cls,
        spec: Spec,
        over: str,
        *,
        width: int | Sequence[int] = 1,
        layers: Sequence[int] | None = None,
        heads: int | Sequence[Any] | None = None,
    ) -> Windows:
        """Read what a caller asked for."""
        require_choice("over", over, OVER)
        chosen = list(range(spec.n_layers)) if layers is None else list(layers)
        if not chosen:
            raise InterventionError("no layer is named (an empty range). The end of a range is exclusive.")
        check_layers(chosen, spec)
        named = _heads_by_layer(spec, chosen, heads)
        if over == "all":
            return cls((_nonempty(named, chosen),), {})
        if over == "head":
            every = range(spec.n_heads)
            pairs = [(layer, head, named[layer]) for layer in chosen for head in every]
            points = tuple({layer: (head,)} if known is None or head in known else {} for layer, head, known in pairs)
            return cls(points, {"layer": chosen, "head": list(every)})
        widths = [width] if isinstance(width, int) else list(width)
        for one in widths:
            require_at_least("width", one, 1)
        windows = [range(layer - one // 2, layer - one // 2 + one) for one in widths for layer in chosen]
        points = tuple(_nonempty(named, [layer for layer in chosen if layer in window]) for window in windows)
        return cls(points, {"width": widths, "layer": chosen})


def _nonempty(named: Heads, layers: Sequence[int]) -> Heads:
    return {layer: named[layer] for layer in layers if named[layer] != ()}


def _heads_by_layer(spec: Spec, layers: Sequence[int], heads: Any) -> Heads:
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
