"""Linear probes against plain scikit-learn, control labels and folds by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from av_lens.errors import InputError
from av_lens.results.readouts import LinearProbe, control_labels, folds, held_out, looked_up


def clouds(n: int, d: int, *, seed: int = 0, apart: float = 1.0) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    labels = [("dog", "cat", "car")[i % 3] for i in range(n)]
    centres = {name: row for name, row in zip(("dog", "cat", "car"), apart * np.eye(3, d), strict=True)}
    return rng.normal(size=(n, d)) + np.stack([centres[label] for label in labels]), labels


def test_a_probe_is_a_plain_logistic_regression_on_standardized_vectors():
    from sklearn.linear_model import LogisticRegression

    x, y = clouds(90, 8)
    x_test, _ = clouds(60, 8, seed=1)
    mean, scale = x.mean(0), x.std(0, ddof=1) + 1e-6
    plain = LogisticRegression(C=0.1, max_iter=500).fit((x - mean) / scale, y)
    assert LinearProbe.fitted(x, y).predicted(x_test).tolist() == plain.predict((x_test - mean) / scale).tolist()


def test_the_row_space_leaves_the_probe_as_it_is():
    from sklearn.linear_model import LogisticRegression

    x, y = clouds(30, 200, apart=3.0)
    x_test, _ = clouds(60, 200, seed=1, apart=3.0)
    mean, scale = x.mean(0), x.std(0, ddof=1) + 1e-6
    plain = LogisticRegression(C=0.1, max_iter=2000, tol=1e-10).fit((x - mean) / scale, y)
    probe = LinearProbe.fitted(x, y)
    assert probe.basis.shape == (200, 30)
    standard = (x_test - mean) / scale
    np.testing.assert_allclose(
        probe.regression.predict_proba(standard @ probe.basis), plain.predict_proba(standard), atol=2e-3
    )
    assert probe.predicted(x_test).tolist() == plain.predict(standard).tolist()


def test_a_fit_at_the_width_of_a_checkpoint_runs_to_its_end():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    few = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 2048))  # a few directions carry nearly everything
    x, y = few + 0.05 * rng.normal(size=(40, 2048)), [str(i % 20) for i in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe = LinearProbe.fitted(x, y)
    standard = (x - probe.mean) / probe.scale @ probe.basis
    exact = LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-8).fit(standard, y)
    np.testing.assert_allclose(probe.regression.predict_proba(standard), exact.predict_proba(standard), atol=2e-3)


def test_control_labels_go_with_the_source_and_keep_their_frequencies():
    labels, sources = ["a", "a", "b", "b", "c", "c"], ["s1", "s2", "s3", "s3", "s4", "s5"]
    drawn = [control_labels(labels, sources, seed=seed) for seed in range(20)]
    for given in drawn:
        assert given[2] == given[3]
        assert sorted([*given[:3], *given[4:]]) == ["a", "a", "b", "c", "c"]
    assert len({tuple(given) for given in drawn}) > 5
    assert control_labels(labels, sources, seed=3) == drawn[3]


def test_folds_keep_groups_whole():
    dealt = folds([0, 0, 0, 1, 1, 2, 3, 3], 3)
    assert dealt == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert folds([4, 4, 9], 5) == [[0, 1], [2]]
    with pytest.raises(InputError, match="two groups of clips"):
        folds([1, 1, 1], 5)


def test_cross_validation_never_sees_the_fold():
    """Every group has a mark of its own: probes learn marks by heart, and of other groups they know nothing."""
    labels = [("a", "b")[(i // 2) % 2] for i in range(40)]
    vectors = np.eye(20)[np.arange(40) // 2]
    right = held_out(vectors, labels, folds([i // 2 for i in range(40)], 5), c=10.0)
    assert np.mean(right) <= 0.5
    seen = LinearProbe.fitted(vectors, labels, c=10.0).predicted(vectors)
    assert seen.tolist() == labels


def test_looking_up_the_other_label():
    known, labels = ["x", "x", "x", "y"], ["a", "b", "b", "c"]
    assert list(looked_up(known, labels, ["x", "y", "z"])) == ["b", "c", "b"]


def test_refusals():
    x, y = clouds(9, 4)
    with pytest.raises(InputError, match="NaN or infinite"):
        LinearProbe.fitted(np.where(x > 0, x, np.nan), y)
    with pytest.raises(InputError, match="all its training examples are 'dog'"):
        LinearProbe.fitted(x, ["dog"] * 9)
