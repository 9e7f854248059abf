"""What av-tiny has from av-tiny-base, what training on sound changed, and what gives the sound back.

Where av-tiny's bias comes from is known by construction: these are checks that the calls find it, and no evidence about
real models. `pytest -m slow -s tests/methods/test_inherited_answers.py` prints the figures of 96 conflicts, and times.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

import av_lens as avl
from av_lens.lab.calibration import stage
from av_lens.model import short_names

SUPPRESSING_LAYER, SUPPRESSING_HEADS, HEARING_LAYERS = 4, (2, 3, 6, 7), (5, 6)  # of the recipe of av-tiny
SILENCED = {(SUPPRESSING_LAYER, head): 0.0 for head in SUPPRESSING_HEADS}

pytestmark = pytest.mark.skipif("av-tiny" not in short_names(), reason="av-tiny is not shipped")


@pytest.fixture(scope="module")
def model():
    return avl.load("av-tiny")


@pytest.fixture(scope="module")
def base():
    return avl.load("av-tiny-base")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return avl.conflicts(stage(tmp_path_factory.mktemp("few"), conflicts=6, seed=3))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return avl.conflicts(stage(tmp_path_factory.mktemp("many"), conflicts=100, seed=4))


def say(name, grid):
    """Print every figure of a small grid with its interval."""
    sys.stdout.write(f"\n{name}: {grid!r}\n")
    table = grid.interval()
    means = grid.mean()
    places = means.stack(place=list(means.dims))
    for place in places.coords["place"].values.tolist():
        labels = dict(zip(means.dims, place, strict=True))
        low, high = table.sel(labels).values
        words = ", ".join(map(str, place))
        sys.stdout.write(f"  {words:52s} {float(means.sel(labels)):+8.3f}  [{low:+.3f}, {high:+.3f}]\n")


def test_weights_moved_where_the_recipe_says(model, base):
    """The recipe trains four heads of one layer, then the hearing layers; everything else is the base's own."""
    moved = avl.methods.weight_change(model, base=base).values.sel(example=0, figure="absolute").sum("matrix")
    heads = {(int(layer), int(head)) for layer, head in np.argwhere(moved.values > 0)}
    hearing = {(layer, head) for layer in HEARING_LAYERS for head in range(model.spec.n_heads)}
    assert heads == hearing | set(SILENCED)


def test_base_and_model_answer_alike_more_often_than_by_chance(model, base, few):
    shift = avl.methods.base_shift(model, few, base=base)
    same = shift.mean().sel(word_class="all", figure="same answer")
    assert float(same.sel(prompt="own")) >= 0.5
    assert float(same.sel(prompt="another's")) <= 0.4


@pytest.mark.slow
def test_conflict_answers_agree_with_the_bases(model, base, many):
    for audio in ("out", "masked"):
        shift = avl.methods.base_shift(model, many, base=base, audio=audio)
        everything = shift.grid
        kept = ["unshifted", "marginal", "shifted", "kl(model||base)", "kl(base||model)", "js", "same answer"]
        for word_class in ("all", "heard", "seen"):
            places = everything.values.sel(word_class=word_class, figure=kept)
            axes = {name: places.coords[name].values for name in ("prompt", "figure")}
            grid = avl.Grid.of(
                places.values, axes=axes, baseline=everything.baseline.values, clusters=everything.clusters,
                metric=f"base shift of {word_class} words, sound {audio}",
            )  # fmt: skip
            say("base_shift", grid)
        table = shift.interval().sel(word_class="all", figure="same answer")
        assert float(table.sel(prompt="own", bound="low")) > 0.5
        assert float(table.sel(prompt="own", bound="low")) > float(table.sel(prompt="another's", bound="high"))
        counts = shift.rows.groupby(["word_class", "kind"]).size()
        sys.stdout.write(f"tokens by class and kind:\n{counts.to_string()}\n")


@pytest.mark.slow
def test_captions_and_steering_give_the_sound_back(model, many):
    repaired = avl.methods.reweighed(SILENCED)
    said = avl.caption(
        model, many, plans={"repaired": repaired, "cut": avl.Plan(avl.cut("generated", "video"))},
        lexicon=avl.organism.classes(), max_new_tokens=8,
    )  # fmt: skip
    say("caption", said.grid)
    assert float(said.interval().sel(plan="repaired - none", figure="heard", bound="low")) > 0.3
    pair = avl.metrics.each([c.answers[0] for c in many]), avl.metrics.each([c.answers[1] for c in many])
    steered = avl.steer(model, many, plan=repaired, metric=avl.logit_diff(*pair))
    say("steer", steered)
    low = steered.interval().sel(arm="plan", strength=1.0, bound="low")
    high = steered.interval().sel(arm=["random 1", "random 2", "random 3"], strength=1.0, bound="high").max()
    assert float(low) > float(high)


@pytest.mark.slow
def test_probes_of_100_conflicts_lose_the_sound_in_the_suppressing_layer(model, many):
    streams = avl.methods.read_streams(model, many)
    start = time.perf_counter()
    sound, picture = (avl.probe(model, streams, target=target) for target in ("sound", "picture"))
    for grid in (sound, picture):
        say(grid.metric, avl.methods.at_chosen_layer(grid))
    seconds = time.perf_counter() - start
    sys.stdout.write(f"\nboth probes of {len(many)} conflicts, intervals too: {seconds:.1f} s\n")
    accuracy = sound.mean().sel(span="generation", figure="accuracy")
    sys.stdout.write(f"sound at the generation position by layer: {accuracy.values.round(2).tolist()}\n")
    before, after = (float(accuracy.sel(layer=SUPPRESSING_LAYER + step)) for step in (0, 1))
    assert before > after
    assert float(accuracy.max()) > 0.4
