"""How many conflicts does a study need, from the effects that a pilot saw?

An effect of mean m and standard deviation d (both of effect - s G, per conflict) is found in `power` of all studies
with n conflicts a half where

    n >= ((t_df(1 - level / family) + z(power)) d / m)^2,  df = (n - 1) / 2

and n components could pass at all (2^-n x family <= level). A verdict needs 60 conflicts a half besides.

Example:
    ```python
    release = found.arrays["discovery/suffix/release/zero"][:, 4, 7] - found.protocol["s"] * found.arrays["discovery/G"]
    print(conflicts_needed(release, family=found.protocol["family"]).sentence())
    ```
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from av_lens.errors import InputError
from av_lens.results.dealing import FIRM_CONFLICTS
from av_lens.results.dyadic import LEAST_DF, smallest_of

FEWEST_PILOTS = 5
MOST = 10**6


@dataclass(frozen=True)
class Needed:
    """How many conflicts in all, for a pilot's effect; `cautious`: for its mean's lower one-sided 80% bound."""

    pilot: int
    mean: float
    deviation: float
    conflicts: float
    cautious: float

    def sentence(self) -> str:
        """The numbers in words."""
        seen = f"With these {self.pilot} pilot conflicts ({self.mean:.2f} above the threshold, sd {self.deviation:.2f})"
        if math.isinf(self.conflicts):
            return f"{seen}: no number of conflicts, for the effect is not above the threshold."
        more = "no number is enough" if math.isinf(self.cautious) else f"{self.cautious:.0f}"
        return f"{seen}: {self.conflicts:.0f} disjoint conflicts, and {more} if the effect is at its lower 80% bound."


def conflicts_needed(
    effects: Float[np.ndarray, " example"], *, family: int, level: float = 0.05, power: float = 0.8
) -> Needed:
    """Plan a study: how many disjoint conflicts find an effect as large as the pilot's.

    Args:
        effects: effect - s G of each conflict of the pilot, in logits; NaN is left out.
        family: how many tests are corrected for (`found.protocol["family"]`).
        level: the error of the whole family.
        power: how often the effect is to be found.

    Returns:
        The numbers, both halves together.

    Raises:
        InputError: fewer than 5 conflicts, or a family of none.
    """
    known = np.asarray(effects, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < FEWEST_PILOTS or family < 1:
        raise InputError(
            f"a study is planned from the effects of at least {FEWEST_PILOTS} pilot conflicts and a family of at least "
            f"1 test; found {len(known)} conflicts and {family} tests."
        )
    mean, deviation = float(known.mean()), float(known.std(ddof=1))
    lower = mean - float(stats.t.ppf(0.8, len(known) - 1)) * deviation / math.sqrt(len(known))
    enough, cautious = (_half(one, deviation, family, level, power) for one in (mean, lower))
    return Needed(len(known), mean, deviation, 2 * enough, 2 * cautious)


def _half(mean: float, deviation: float, family: int, level: float, power: float) -> float:
    """The fewest conflicts a half, by halving; more only make it easier."""
    if not mean > 0:
        return math.inf

    def found(n: int) -> bool:
        size = smallest_of(n, max(LEAST_DF, (n - 1) / 2), family=family, level=level, power=power)
        return 2.0**-n * family <= level and deviation * size <= mean

    low, high = FIRM_CONFLICTS - 1, MOST
    if not found(high):
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return float(high)
