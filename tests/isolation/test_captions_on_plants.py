"""Do heads that hold back the word hold it back from captions too? On planted heads, 60 held-out conflicts (slow).

`pytest -m slow -s` prints the table: how many captions name what is heard, what is shown and something else, as they
are and with heads edited; and the rank correlation of the captions' release with the one-word release.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import av_lens as avl
from av_lens.lab.calibration import stage

PLANTS = ("writers", "gates", "opponents", "redundant-writers", "redundant-gates")
ARMS = ("none", "set", "set by its donor", "see heads", "cut", "random")


@pytest.fixture(scope="module")
def conflicts(tmp_path_factory):
    return avl.conflicts(stage(tmp_path_factory.mktemp("clips"), conflicts=132, seed=0))


def shown(found):
    """A row for each arm, random sets averaged."""
    table = found.captions.groupby("arm", sort=False)[["heard", "seen", "hallucinated", "release", "one_word"]].mean()
    return table.loc[[arm for arm in ARMS if arm in table.index]]


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS)
def test_planted_heads_hold_back_captions_as_they_hold_back_the_word(conflicts, plant):
    model = avl.load(f"av-tiny-planted-{plant}")
    found = avl.isolate(model, conflicts, quick=plant != "redundant-gates", named_only=True, captions=True)
    table = shown(found)
    with pd.option_context("display.float_format", "{:.2f}".format, "display.width", 120):
        print(f"\n{plant}: {found.captions['members'].iloc[1]}; rank correlation {found.caption_correlation():.2f}")
        print(table.to_string())
    assert (found.captions["n"] >= 60).all()
    assert table.loc["none", "heard"] < 0.5
    assert table.loc["set", "heard"] > table.loc["none", "heard"] + 0.4
    assert found.captions.set_index("arm").loc["set", "low"] > 0
    assert abs(table.loc["random", "release"]) < 0.25 * table.loc["set", "release"]
    assert table.loc["see heads", "release"] < table.loc["set", "release"]
    assert np.isfinite(found.caption_correlation())
