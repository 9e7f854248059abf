"""Are two isolations the same?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from av_lens.results.record import TABLES

TIMES = ("created", "seconds")


def assert_same(found, expected):
    """Equal bit for bit, but for when and how long."""
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(found, name), getattr(expected, name), check_exact=True, obj=name)
    assert found.arrays.keys() == expected.arrays.keys()
    for name, values in expected.arrays.items():
        assert np.array_equal(found.arrays[name], values, equal_nan=True), name
    for name in ("verdict", "verdict_kind", "stamps", "reasons", "protocol"):
        assert getattr(found, name) == getattr(expected, name), name
    assert {k: repr(v) for k, v in found.summary.items()} == {k: repr(v) for k, v in expected.summary.items()}
    plain = [{k: v for k, v in one.provenance.items() if k not in TIMES} for one in (found, expected)]
    assert plain[0] == plain[1]
