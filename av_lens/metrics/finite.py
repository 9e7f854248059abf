"""A metric that is NaN on the unedited run is NaN everywhere: refused before anything else is paid for."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from av_lens.errors import InputError


def require_numbers(found: Float[Tensor, " batch"], name: str, *, run: str = "the run without edits") -> None:
    """Refuse a metric that gives no number.

    Args:
        found: the metric of every example, measured before the edits.
        name: the metric's name.
        run: which run it was measured on.

    Raises:
        InputError: an example's metric is NaN or infinite; the message counts them.
    """
    bad = (~found.isfinite()).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:6])) + (", ..." if len(bad) > 6 else "")
        raise InputError(
            f"the metric {name} is NaN or infinite on {run} for {len(bad)} of {len(found)} examples ({shown}), so no "
            "effect can be measured. Mend the metric: a log of 0, a division by 0, or an answer that an example lacks."
        )
