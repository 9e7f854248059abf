"""The logit lens: TransformerLens's figures, the model's own answer at the end, the study's variant, and the null."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_av import small_clip, small_inputs, small_model
from tiny import letter, tiny_hf_model, untouched
from transformer_lens.tools.analysis import logit_lens as their_lens

import av_lens as avl
from av_lens.errors import InputError, InterventionError
from av_lens.methods import logit_lens
from av_lens.metrics import each
from av_lens.results.grid import Grid
from av_lens.results.readouts import LensReadout


def token(word):
    return small_model().tokenizer(word)["input_ids"][0]


@pytest.mark.parametrize("sound", ["in_video", "separate"])
def test_transformer_lens_reads_the_same_through_bound(sound):
    model, x = small_model(), small_inputs((0,), sound=sound)
    bridge = model.bound(x)
    theirs = their_lens(bridge, bridge.ids, positions=None, targets=[token("a"), token("b")], return_type="probs")
    ours = logit_lens(model, x, at="audio|question", words=[letter("a"), letter("b")])
    positions = ours.ranks.values.coords["pos"].values.copy()
    assert positions.tolist() == x.spans["audio|question"].positions.tolist()
    for layer in range(4):  # their entry 0 is the embedding
        ranks = theirs.readout.target_ranks[layer + 1, 0, positions].T
        np.testing.assert_array_equal(ours.ranks.values[0].sel(layer=layer).values, ranks.numpy())
        found = ours.probabilities.values[0].sel(layer=layer).values
        np.testing.assert_allclose(found, theirs.values[layer + 1, 0, positions].T.detach().numpy(), atol=1e-6)
    likeliest = their_lens(bridge, bridge.ids, positions=None, top_k=5, return_type="probs").readout
    np.testing.assert_array_equal(ours.top_ids[0], likeliest.top_ids[1:, 0, positions].numpy())
    np.testing.assert_allclose(ours.top_probabilities[0], likeliest.values[1:, 0, positions].detach(), atol=1e-6)


def test_the_last_layer_is_the_model_itself():
    model, x = small_model(), small_inputs()
    logits = model(x).detach()
    read = logit_lens(model, x, at="suffix", words=[letter("a")], top=3)
    positions = x.spans.suffix.positions.copy()
    last = read.probabilities.values.sel(word="a", layer=3).values
    np.testing.assert_allclose(last, logits.softmax(-1)[:, positions, token("a")].numpy(), atol=1e-6)
    np.testing.assert_array_equal(read.top_ids[:, 3], logits[:, positions].topk(3).indices.numpy())


@pytest.mark.parametrize("norm", [False, True])
def test_it_is_a_lens_written_by_hand_on_huggingfaces_layers(norm):
    """Forward hooks on the decoder layers, as the study's code has them; without the norm none is normed."""
    model, x = small_model(), small_inputs()
    hf_model, streams = untouched(tiny_hf_model()), []
    for layer in hf_model.model.language_model.layers:
        layer.register_forward_hook(lambda module, args, output: streams.append(output))
    with torch.no_grad():
        hf_model(**x.tensors)
        read_by = hf_model.model.language_model.norm if norm else torch.nn.Identity()
        lens = torch.stack([hf_model.lm_head(read_by(stream)) for stream in streams], dim=1)
    at = x.spans.audio.positions.copy()
    read = logit_lens(model, x, words=[letter("a"), letter("b")], norm=norm)
    for word in "ab":
        wanted = lens.softmax(-1)[:, :, at, token(word)].numpy()
        np.testing.assert_allclose(read.probabilities.values.sel(word=word).values, wanted, atol=1e-6)
    np.testing.assert_array_equal(read.top_ids, lens[:, :, at].topk(5).indices.numpy())
    assert read.ranks.provenance["norm"] == ("final norm" if norm else "left out")


def test_synonyms_take_the_best_rank_and_the_sum_of_probabilities():
    read = logit_lens(small_model(), small_inputs(), words=[[token("a"), token("b")], letter("a"), letter("b")])
    ranks, chances = read.ranks.values, read.probabilities.values
    names = ranks.coords["word"].values.tolist()
    np.testing.assert_array_equal(
        ranks.sel(word=names[0]), np.minimum(ranks.sel(word="a").values, ranks.sel(word="b").values)
    )
    np.testing.assert_allclose(
        chances.sel(word=names[0]), chances.sel(word="a").values + chances.sel(word="b").values, rtol=1e-5
    )


def test_small_budgets_read_the_same():
    whole = logit_lens(small_model(), small_inputs(), words=[letter("a")], others=[letter("c"), letter("d")])
    chunks = logit_lens(
        small_model(), small_inputs(), words=[letter("a")], others=[letter("c"), letter("d")], budget_gb=4e-5
    )
    np.testing.assert_array_equal(whole.ranks.values.values, chunks.ranks.values.values)
    np.testing.assert_array_equal(whole.best_others, chunks.best_others)
    np.testing.assert_array_equal(whole.top_ids, chunks.top_ids)


def made_up(ranks, others, said=(1.0, 0.0)):
    """A readout with ranks `[example, word, layer, pos]` and the best ranks of others `[example, layer, other]`."""
    ranks, others = np.asarray(ranks, dtype=float), np.asarray(others, dtype=float)
    axes = {"word": ["sound", "picture"], "layer": np.arange(ranks.shape[2]), "pos": np.arange(ranks.shape[3])}
    grid = Grid.of(ranks, axes=axes, baseline=np.zeros(len(ranks)))
    blank = np.zeros((len(ranks), ranks.shape[2], ranks.shape[3], 1))
    return LensReadout(grid, grid, blank.astype(int), blank, {0: "a"}, others, np.asarray(said))


def test_understanding_is_a_maximum_less_that_of_other_words_by_hand():
    nan = np.nan
    read = made_up(
        [[[[9, 7], [9, 2]], [[0, 9], [9, 9]]], [[[9, 9], [9, 9]], [[9, 9], [4, 9]]]],  # sound, picture; 2 layers, 2 pos
        [[[1, 9, 9], [9, 9, 2]], [[9, nan, 0], [9, nan, 9]]],  # three others; the second word is example 1's own
    )
    found = read.understanding(3).values
    assert found.coords["figure"].values.tolist() == ["sound", "picture", "others", "excess", "said"]
    np.testing.assert_allclose(found[0], [1, 1, 2 / 3, 1 / 3, 1])
    np.testing.assert_allclose(found[1], [0, 0, 1 / 2, -1 / 2, 0])
    by_layer = read.understanding(3, by="layer").values
    np.testing.assert_allclose(by_layer[0].sel(layer=0), [0, 1, 1 / 3, -1 / 3, 1])
    np.testing.assert_allclose(by_layer[0].sel(layer=1), [1, 0, 1 / 3, 2 / 3, 1])
    assert read.best().values[0].sel(word="sound").values.tolist() == [7, 2]


def test_conflicts_bring_their_words_and_their_null():
    model = small_model()
    words = [("a", "b"), ("c", "d"), ("a", "d")]
    conflicts = [
        avl.Conflict(sound=small_clip(i), picture=small_clip(i + 5), question="What?", answers=tuple(map(letter, pair)))
        for i, pair in enumerate(words)
    ]
    read = logit_lens(model, conflicts)
    x = avl.AVInputs.stack([conflict.cells(model)["va"] for conflict in conflicts])
    plain = logit_lens(
        model, x, words=[letter("a"), letter("b"), letter("c"), letter("d")], others=[letter("a"), letter("c")]
    )
    for i, (sound, picture) in enumerate(words):
        for name, word in (("sound", sound), ("picture", picture)):
            expected = plain.ranks.values[i].sel(word=word).values
            np.testing.assert_array_equal(read.ranks.values[i].sel(word=name).values, expected)
    assert read.ranks.provenance["others"] == ["a", "c"]
    assert np.isnan(read.best_others).any(1).tolist() == [[True, False], [False, True], [True, False]]
    expected = plain.ranks.values.min("pos")
    np.testing.assert_array_equal(read.best_others[0, :, 1], expected[0].sel(word="c").values)
    answers = model(x)[:, -1].argmax(-1).tolist()
    assert read.said.tolist() == [
        float(answer == token(word)) for answer, (word, _) in zip(answers, words, strict=True)
    ]
    assert np.isnan(plain.best_others).all()  # every other word is one of the example's own


def test_what_is_said_is_the_first_words_answer():
    model, x = small_model(), small_inputs()
    answers = model(x)[:, -1].argmax(-1).tolist()
    read = logit_lens(model, x, words=[each([answers[0], token("a")])])
    assert read.said.tolist() == [1.0, float(answers[1] == token("a"))]


def test_layouts_are_mixed_and_positions_that_are_missing_are_nan():
    model = small_model()
    inputs = [small_inputs((0,), sound="separate"), small_inputs((1,))]
    read = logit_lens(model, inputs, words=[letter("a")])
    for i, x in enumerate(inputs):
        held = set(x.spans.audio.positions.tolist())
        alone = logit_lens(model, x, words=[letter("a")])
        for position in read.ranks.values.coords["pos"].values.tolist():
            found = read.ranks.values[i].sel(pos=position).values
            if position in held:
                np.testing.assert_array_equal(found, alone.ranks.values[0].sel(pos=position).values)
            else:
                assert np.isnan(found).all()
        assert set(read.top(i)["pos"]) == held


def test_tokens_are_listed_in_words():
    model, x = small_model(), small_inputs((0,))
    frame = logit_lens(model, x, at="generation", top=2).top(layer=3)
    best = model(x)[0, -1].topk(2).indices.tolist()
    assert frame[[1, 2]].values.tolist() == [[model.tokenizer.decode([one]) for one in best]]
    assert frame["pos"].tolist() == [x.spans.generation_position]


def test_a_saved_readout_opens_as_it_was(tmp_path):
    read = logit_lens(
        small_model(), small_inputs(), words=[letter("a"), letter("b")], others=[letter("a"), letter("c")]
    )
    again = LensReadout.load(read.save(tmp_path / "lens"))
    np.testing.assert_array_equal(again.ranks.values.values, read.ranks.values.values)
    np.testing.assert_array_equal(again.top_ids, read.top_ids)
    np.testing.assert_array_equal(again.understanding(3).values.values, read.understanding(3).values.values)
    assert again.texts == dict(read.texts)
    assert again.ranks.clusters == read.ranks.clusters
    assert again.ranks.provenance["method"] == "logit lens"
    wordless = logit_lens(small_model(), small_inputs((0,)))
    assert LensReadout.load(wordless.save(tmp_path / "wordless")).ranks.values.sizes["word"] == 0
    with pytest.raises(InputError, match="no such file"):
        LensReadout.load(tmp_path / "nothing.nc")
    with pytest.raises(InputError, match=r"holds av_lens\.Grid"):
        LensReadout.load(read.ranks.save(tmp_path / "grid"))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"at": "adio"}, InputError, "unknown role 'adio'. Did you mean 'audio'"),
        ({"at": "image"}, InterventionError, "names no position"),
        ({"words": "a"}, InputError, r"write words=\['dog'\]"),
        ({"words": ["a", "a"]}, InputError, "one word twice"),
        ({"words": [each(["a"])]}, InputError, "gives 1 words for 2 examples"),
        ({"top": 0}, InputError, "top"),
    ],
)
def test_what_cannot_be_read_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        logit_lens(small_model(), small_inputs(), **options)


def test_understanding_needs_words_and_a_k():
    read = logit_lens(small_model(), small_inputs())
    with pytest.raises(InputError, match="no words were read"):
        read.understanding(5)
    with pytest.raises(InputError, match="k"):
        made_up(np.zeros((2, 2, 1, 1)), np.zeros((2, 1, 1))).understanding(0)
    with pytest.raises(InputError, match="Did you mean 'layer'"):
        made_up(np.zeros((2, 2, 1, 1)), np.zeros((2, 1, 1))).understanding(5, by="layers")


def test_a_file_that_is_no_readout_is_refused(tmp_path):
    from av_lens.results.readouts import LensReadout

    (tmp_path / "text.nc").write_text("no netCDF at all")
    with pytest.raises(InputError, match=r"is not a saved readout"):
        LensReadout.load(tmp_path / "text.nc")
