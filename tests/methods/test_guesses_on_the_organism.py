"""How well do first guesses rank what exact patching finds on av-tiny? Prints the table of docs/toolbox.md.

pytest -m slow -s tests/methods/test_guesses_on_the_organism.py
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy.stats import spearmanr

import av_lens as avl
from av_lens.metrics import each
from av_lens.model import short_names

PAIRS = 12


@cache
def material():
    """Sounds that fit (clean, cell aa) beside conflicts (corrupt, cell va), both classes drawn by seed."""
    if "av-tiny" not in short_names():
        pytest.skip("av-tiny is not shipped")
    model, names = avl.load("av-tiny"), list(avl.organism.classes())
    rng, pairs, answers = np.random.default_rng(0), [], []
    for i in range(PAIRS):
        sound, picture = (names[k] for k in rng.choice(len(names), 2, replace=False))
        clips = avl.organism.clip(sound, seed=i), avl.organism.clip(picture, seed=100 + i)
        conflict = avl.Conflict(
            sound=clips[0], picture=clips[1], question="What do you hear?", answers=(sound, picture)
        )
        cells = conflict.cells(model)
        pairs.append(avl.Pair(clean=cells["aa"], corrupt=cells["va"]))
        answers.append((sound, picture))
    metric = avl.logit_diff(each([a for a, _ in answers]), each([v for _, v in answers]))
    return model, pairs, metric


def agreement(guess, exact):
    """Spearman's correlation of the mean effects, and of the mean sizes of effects."""
    pair = [(values.mean(0).ravel(), np.abs(values).mean(0).ravel()) for values in (guess, exact)]
    return tuple(float(spearmanr(one, other)[0]) for one, other in zip(*pair, strict=True))


def rows_of_guesses():
    model, pairs, metric = material()
    for over, component, at in (
        ("head", "z", "suffix"),
        ("head", "q", "suffix"),
        ("head", "k", "media"),
        ("layer span", "resid_pre", None),
    ):
        options = {"over": over, "component": component, "at": at, "metric": metric}
        exact = avl.patch(model, pairs, **options).effects.values
        found = avl.attribution_patch(model, pairs, top=0, **options).effects
        where = f"{over}, {component}" + (f" at {at}" if at else "")
        for figure in ("atp", "atp_fixed", "atp_star"):
            yield where, figure, agreement(found.sel(figure=figure).values, exact)


def rows_of_edges():
    model, pairs, metric = material()
    shape = (len(pairs), model.spec.n_layers, model.spec.n_heads)
    heads = [f"L{layer}H{head}" for layer in range(shape[1]) for head in range(shape[2])]
    everywhere = pairs[0].corrupt.spans.all
    exact = avl.patch(model, pairs, over="head", at=everywhere, metric=metric).effects.values
    for variant in ("eap", "ig_inputs", "ig_activations"):
        found = avl.edge_attribution(model, pairs, metric=metric, variant=variant, direction="denoise")
        total = float(abs(found.donor - found.baseline).mean())
        guess = found.nodes().effects.sel(sender=heads).values.reshape(shape)
        yield variant, agreement(guess, exact), float(abs(found.closure_error).mean()) / total


@pytest.mark.slow
def test_first_guesses_rank_places_as_exact_patching_does():
    guesses, edges = list(rows_of_guesses()), list(rows_of_edges())
    print(f"\nSpearman's correlation with exact patching, {PAIRS} pairs of av-tiny: mean effects, mean sizes")
    for where, figure, (signed, sizes) in guesses:
        print(f"{where:28} {figure:15} {'-' if figure == 'atp_star' else f'{signed:.2f}':>6} {sizes:6.2f}")
    for variant, (signed, sizes), gap in edges:
        print(f"{'edges summed to heads':28} {variant:15} {signed:6.2f} {sizes:6.2f}   closure error {gap:.2f} of it")
    found = {(where, figure): agreed for where, figure, agreed in guesses}
    by_variant = {variant: (agreed, gap) for variant, agreed, gap in edges}
    assert found["head, z at suffix", "atp"][0] > 0.8
    for where in ("head, q at suffix", "head, k at media"):  # the softmax fix is what AtP* is for
        assert found[where, "atp_fixed"][0] > found[where, "atp"][0]
        assert found[where, "atp_fixed"][1] > 0.9
    assert by_variant["eap"][0][0] > 0.7
    assert by_variant["ig_inputs"][1] < 0.5 * by_variant["eap"][1]
