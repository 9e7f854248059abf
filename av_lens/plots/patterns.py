"""Attention patterns token by token, drawn by circuitsvis, without its network: works offline, and asks nobody.

circuitsvis's own notebook view first calls a web server to see whether it is online and then loads its script from a
CDN. The view returned here always carries the script that was installed with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from av_lens import colours
from av_lens.errors import InputError

_LESS = "lessThanSignOfAToken"  # circuitsvis writes tokens into a script as they are; "</script>" would end it


@dataclass(frozen=True)
class PatternView:
    """A drawn pattern: shows itself in Jupyter, and `html` goes into any page.

    Attributes:
        html: markup and script, self-contained.
    """

    html: str

    def _repr_html_(self) -> str:
        return self.html


def attention_patterns(
    pattern: Any, tokens: Sequence[str], *, names: Sequence[str] | None = None, bound: float | int | None = None
) -> PatternView:
    """Draw the attention patterns of some heads over named tokens.

    Args:
        pattern: attention weights `[head, query pos, key pos]`, an array or a tensor.
        tokens: one name per position; shown as they are.
        names: one name per head, such as "L5 H2".
        bound: the weight drawn in full colour; None takes the largest in the pattern.

    Returns:
        A view that Jupyter draws; `.html` for a page.

    Raises:
        InputError: if the shapes do not fit the tokens or the names.
    """
    from circuitsvis.attention import attention_heads

    detached = pattern.detach().cpu().float().numpy() if hasattr(pattern, "detach") else pattern
    weights = np.asarray(detached, dtype=np.float32)
    if weights.ndim != 3 or weights.shape[1] != weights.shape[2] or weights.shape[1] != len(tokens):
        raise InputError(
            f"attention_patterns draws [head, pos, pos] over as many tokens; got {weights.shape} "
            f"and {len(tokens)} tokens."
        )
    if names is not None and len(names) != len(weights):
        raise InputError(f"{len(names)} names were given for {len(weights)} heads.")
    view = attention_heads(
        attention=weights.round(4),
        tokens=[f"{token}".replace("<", _LESS) for token in tokens],
        attention_head_names=[name.replace("<", _LESS) for name in names] if names is not None else None,
        min_value=0.0,
        max_value=float(bound if bound is not None else weights.max()),
        negative_color=colours.PICTURE,
        positive_color=colours.SOUND,
    )
    return PatternView(html=str(view.local_src).replace(_LESS, "\\u003c"))
