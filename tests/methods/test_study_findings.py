"""The study's findings on av-tiny, each one call with its intervals, and the one on which studies disagree.

The bias of av-tiny was put there by its training: these are checks that the calls find what is known to be there, and
no evidence about real models. `pytest -m slow -s tests/methods/test_study_findings.py` prints the figures of 48
conflicts.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

import av_lens as avl
from av_lens.lab.calibration import stage
from av_lens.model import short_names

RELAYS = ("video -> question|header", "audio -> question|header", "video -> generation", "audio -> generation")
SINKS = ("media -> sinks", "sinks -> generation", "media - sinks -> generation")

pytestmark = pytest.mark.skipif("av-tiny" not in short_names(), reason="av-tiny is not shipped")


@pytest.fixture(scope="module")
def model():
    return avl.load("av-tiny")


def staged(folder, n, seed):
    """Conflicts as media files, decoded once."""
    listed = avl.conflicts(stage(folder, conflicts=n, seed=seed))
    return [replace(one, sound=one.sound.load(), picture=one.picture.load()) for one in listed]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return staged(tmp_path_factory.mktemp("few"), 24, seed=3)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return staged(tmp_path_factory.mktemp("many"), 48, seed=4)


def bounds(grid, **labels):
    """Mean and 95% interval at one place."""
    low, high = (float(grid.sel(**labels).interval().sel(bound=bound)) for bound in ("low", "high"))
    return float(grid.sel(**labels).mean()), low, high


def gating_heads(model, conflicts, n=4):
    """The heads whose reading of the video costs hearing most, by single cuts on these conflicts."""
    grid = avl.knockout(model, conflicts, edges="video -> generation", over="head", controls=False)
    mean = grid.mean().squeeze(["edge", "condition"])
    best = np.argsort(-mean.values, axis=None)[:n]
    return [
        (int(mean.layer[i]), int(mean["head"][j])) for i, j in zip(*np.unravel_index(best, mean.shape), strict=True)
    ]


def say(grid, *axes):
    """Print a grid's means and intervals, one line for each label of the axes."""
    places = grid.mean().stack(place=list(axes)) if len(axes) > 1 else grid.mean().rename({axes[0]: "place"})
    sys.stdout.write(f"\n{grid!r}\n")
    for place in places.coords["place"].values.tolist():
        labels = dict(zip(axes, place if len(axes) > 1 else (place,), strict=True))
        mean, low, high = bounds(grid, **labels)
        sys.stdout.write(f"  {', '.join(map(str, labels.values())):44s} {mean:+8.3f}  [{low:+.3f}, {high:+.3f}]\n")


def check_attention(flow):
    """The answer reads the picture in the deeper layers, and the sound hardly."""
    for layer in (3, 4):
        _, low, _ = bounds(flow, query="generation", key="video", layer=layer)
        _, _, high = bounds(flow, query="generation", key="audio", layer=layer)
        assert low > 2 * high
    np.testing.assert_allclose(flow.values.sum("key").values, 1.0, atol=1e-5)


def check_lens(understanding):
    """The sound's word is read at sound positions far more often than it is said, and than other sounds' words are."""
    found = {name: bounds(understanding, figure=name) for name in ("sound", "others", "excess", "said")}
    assert found["excess"][1] > 0
    assert found["sound"][0] > found["said"][0] + 0.3
    assert found["said"][0] < 0.3


def check_cut(grid, held):
    """Cutting what the answer reads from the video restores the sound; the controls that exist do not."""
    edge = "video -> generated"
    mean, low, _ = bounds(grid, edge=edge, condition="cut")
    assert low > 1.0
    assert float(grid.baseline.mean()) < 0 < float(grid.baseline.mean()) + mean
    for control in ("other heads", "equal count", "10% of keys", "30% of keys"):
        _, _, high = bounds(grid, edge=edge, condition=control)
        assert high < low, control
    texts = grid.provenance["texts"]
    sounds = [str(conflict.answers[0]) for conflict in held]

    def hears(run):
        return np.mean([said[run].split()[:1] == [sound] for said, sound in zip(texts, sounds, strict=True)])

    assert hears(f"{edge}, cut") > hears("no cut") + 0.3
    assert hears(f"{edge}, other heads") < hears(f"{edge}, cut")


def check_relays(grid):
    """In this model the picture acts where the answer is asked, not through the question."""
    _, low, _ = bounds(grid, edge="video -> generation", condition="cut")
    _, _, high = bounds(grid, edge="video -> question|header", condition="cut")
    assert low > high


def findings(model, discovery, held, *, draws):
    """Every finding, one call each."""
    yield avl.attention_flow(model, held, queries=("question", "generation")), check_attention
    yield avl.logit_lens(model, held).understanding(k=3), check_lens
    heads = gating_heads(model, discovery)
    cut = avl.knockout(
        model, held, edges=("video -> generated", "audio -> generated"), heads=heads, max_new_tokens=3, draws=draws
    )
    yield cut, lambda grid: check_cut(grid, held)
    yield avl.knockout(model, held, edges=(*RELAYS, *SINKS), sinks=3.0, draws=draws), check_relays


def test_each_finding_is_one_call_with_intervals(model, few):
    for grid, check in findings(model, few[:4], few[4:], draws=1):
        assert grid.interval().notnull().any()
        check(grid)


def test_no_position_of_av_tiny_is_a_sink_by_the_protocols_rule(model, few):
    assert len(avl.find_sinks(model, few[:6])) == 0
    grid = avl.knockout(model, few[:6], edges=(RELAYS[0], SINKS[0]), controls=False)
    assert np.isnan(grid.sel(edge=SINKS[0]).values).all()
    assert not np.isnan(grid.sel(edge=RELAYS[0]).values).any()


@pytest.mark.slow
def test_each_finding_on_many_conflicts_with_its_figures_printed(model, many):
    axes = (("query", "key", "layer"), ("figure",), ("edge", "condition"), ("edge", "condition"))
    for (grid, check), names in zip(findings(model, many[:16], many[16:], draws=5), axes, strict=True):
        say(grid, *names)
        if "matched" in grid.provenance:
            sys.stdout.write(f"  masses: {grid.provenance['matched']}\n")
        check(grid)
    windows = avl.knockout(
        model, many[16:], edges=("video -> generation", "video -> question|header"), over="layer", width=(1, 3)
    )
    say(windows.sel(condition=["cut", "equal mass"]), "edge", "width", "layer", "condition")
    sys.stdout.write(f"{avl.find_sinks(model, many, times=3.0).table.to_string()}\n")
