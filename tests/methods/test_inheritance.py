"""Base shift, weight change and grafting against direct computation on two tiny thinkers of one shape."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from small_av import small_clip, small_inputs, small_model
from tiny import letter, tiny_hf_model, tiny_model, tiny_processor

import av_lens as avl
from av_lens.core import run
from av_lens.core.decoding import Generated
from av_lens.errors import InputError, InterventionError, ModelError
from av_lens.inputs import Answer
from av_lens.inputs.pairs import without_sound
from av_lens.interventions import Plan, Site, cut, replace
from av_lens.methods.base_model.grafting import graft, prompt_for, weight_change
from av_lens.methods.base_model.inheritance import CLASSES, FIGURES, Compared, Said, base_shift
from av_lens.metrics import logit_diff
from av_lens.replay.traces import Trace

METRIC = logit_diff(letter("a"), letter("b"))


def literal(text):
    """A text as it stands, whatever form the random model would say."""
    return Answer(text, (tuple(small_model().tokenizer(text)["input_ids"]),))


def moved_hf_model():
    """The small model's weights with layer 2, an MLP and the unembedding moved a little."""
    hf_model = tiny_hf_model()
    draw = torch.Generator().manual_seed(5)
    layers = hf_model.get_decoder().layers
    moved = {hf_model.lm_head.weight: 0.01, layers[1].mlp.down_proj.weight: 0.01}
    moved |= {layers[2].self_attn.q_proj.weight: 0.1, layers[2].self_attn.v_proj.bias: 0.1}
    with torch.no_grad():
        for weight, size in moved.items():
            weight.add_(size * torch.randn(weight.shape, generator=draw))
    return hf_model


@cache
def other_model():
    """A base of the small model's shape."""
    return avl.load("base", hf_model=moved_hf_model(), processor=tiny_processor())


def silent_logits(x, tokens):
    """The base's logits before each token, by one plain forward of HuggingFace's arguments."""
    whole = without_sound(other_model(), x).continued(tokens)
    with torch.no_grad():
        logits = other_model()(whole)
    return logits[:, -tokens.shape[1] - 1 : -1].double()


@pytest.mark.parametrize("sound", ["in_video", "separate"])
def test_every_figure_is_what_one_computes_by_hand(sound):
    model, x = small_model(), small_inputs((0, 1), sound=sound)
    shift = base_shift(model, x, base=other_model(), max_new_tokens=5)
    tokens = model.generate(x, max_new_tokens=5)[:, len(x.spans) :]
    assert tokens.shape == (2, 5)
    with torch.no_grad():
        p = model(x.continued(tokens))[:, -6:-1].double().softmax(-1)
    q = silent_logits(x, tokens).softmax(-1)
    m = (p + q) / 2
    wanted = {
        "kl(model||base)": (p * (p / q).log()).sum(-1),
        "kl(base||model)": (q * (q / p).log()).sum(-1),
        "js": 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)),
    }
    rank = (q > q.gather(-1, tokens[..., None])).sum(-1)
    rows = shift.rows
    for name, values in wanted.items():
        np.testing.assert_allclose(rows[name].to_numpy().reshape(2, 5), values, atol=1e-5)
        found = shift.grid.effects.sel(prompt="own", word_class="all", figure=name)
        np.testing.assert_allclose(found, values.mean(1), atol=1e-5)
    assert rows["rank"].tolist() == rank.flatten().tolist()
    assert rows["token_id"].tolist() == tokens.flatten().tolist()
    kinds = np.array([["unshifted", "marginal", "marginal", "shifted"][min(r, 3)] for r in rank.flatten().tolist()])
    assert rows["kind"].tolist() == kinds.tolist()
    for kind in ("unshifted", "marginal", "shifted"):
        found = shift.grid.effects.sel(prompt="own", word_class="all", figure=kind)
        np.testing.assert_allclose(found, (kinds == kind).reshape(2, 5).mean(1))
    same = shift.grid.effects.sel(prompt="own", word_class="all", figure="same answer")
    np.testing.assert_array_equal(same, (rank == 0).all(1))


def test_kinds_of_tokens_by_their_rank_in_the_base():
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(1, 5, 12, generator=draw)
    order = base.argsort(-1, descending=True)
    tokens = torch.stack([order[0, step, rank] for step, rank in enumerate((0, 1, 2, 3, 0))])[None]
    said = Said(tokens, (5,), (True,), torch.randn(1, 5, 12, generator=draw))
    compared = Compared.of(said, base)
    found = compared.summary(0, ["heard", "seen", "seen", "other", "end"])
    by_class = {name: dict(zip(FIGURES, row.tolist(), strict=True)) for name, row in zip(CLASSES, found, strict=True)}
    kinds = ("unshifted", "marginal", "shifted")
    assert [by_class["all"][kind] for kind in kinds] == [0.25, 0.5, 0.25]
    assert [by_class["heard"][kind] for kind in kinds] == [1.0, 0.0, 0.0]
    assert [by_class["seen"][kind] for kind in kinds] == [0.0, 1.0, 0.0]
    assert [by_class["other"][kind] for kind in kinds] == [0.0, 0.0, 1.0]
    assert by_class["all"]["same answer"] == 0.0
    rows = compared.rows(small_model().tokenizer, 0, 0, ["heard", "seen", "seen", "other", "end"])
    assert [row["rank"] for row in rows] == [0, 1, 2, 3, 0]


def test_the_control_shows_the_base_another_picture():
    model, x = small_model(), small_inputs((0, 1))
    shift = base_shift(model, x, base=other_model(), max_new_tokens=3)
    tokens = model.generate(x, max_new_tokens=3)[:, len(x.spans) :]
    turned = small_inputs((1, 0))
    with torch.no_grad():
        p = model(x.continued(tokens))[:, -4:-1].double().softmax(-1)
    q = silent_logits(turned, tokens).softmax(-1)
    found = shift.grid.effects.sel(prompt="another's", word_class="all", figure="kl(model||base)")
    np.testing.assert_allclose(found, (p * (p / q).log()).sum(-1).mean(1), atol=1e-5)
    alone = base_shift(model, small_inputs((0,)), base=other_model(), max_new_tokens=3)
    assert np.isnan(alone.grid.values.sel(prompt="another's")).all()


def test_a_model_is_its_own_base_when_the_sound_is_kept():
    model, x = small_model(), small_inputs((0, 1))
    shift = base_shift(model, x, base=model, audio="kept", max_new_tokens=4)
    own = shift.grid.effects.sel(prompt="own", word_class="all")
    np.testing.assert_allclose(own.sel(figure=["unshifted", "same answer"]), 1.0)
    np.testing.assert_allclose(own.sel(figure=["kl(model||base)", "kl(base||model)", "js"]), 0.0, atol=1e-9)
    silent = base_shift(model, x, base=model, audio="out", max_new_tokens=4)
    assert (silent.grid.effects.sel(prompt="own", word_class="all", figure="js") > 1e-4).all()


def test_masked_sound_is_read_by_nothing():
    model, x = small_model(), small_inputs((0,), sound="separate")
    muted = avl.AVInputs.stack([model.encode(small_clip(0).muted(kind="noise", seed=3), "What?", sound="separate")])
    kl = []
    for prompt in (x, muted):
        shift = base_shift(model, prompt, base=other_model(), audio="masked", answer=literal(" abc"))
        kl.append(shift.rows["log_prob_base"].to_numpy())
    np.testing.assert_allclose(*kl, atol=1e-6)
    tokens = torch.tensor([[int(t) for t in shift.rows["token_id"]]])
    whole = x.continued(tokens[:, :-1])
    everything = "system|video|boundary|question|header|generation|generated"
    with torch.no_grad():
        logits = run(other_model(), whole, plan=Plan(cut(everything, "audio")), logits_at="all").logits[:, -4:]
    wanted = logits.double().log_softmax(-1).gather(-1, tokens[..., None]).flatten()
    np.testing.assert_allclose(kl[0], wanted, atol=1e-5)


def test_words_are_classed_where_they_stand():
    """The tiny tokenizer knows bytes: each letter of a word is a token of the word's class."""
    shift = base_shift(
        small_model(),
        small_inputs((0,)),
        base=other_model(),
        answer=literal(" a dog, cats"),
        heard=["dog"],
        seen=[["cat"]][0],
    )
    assert shift.rows["word_class"].tolist() == [*["other"] * 3, *["heard"] * 3, *["other"] * 2, *["seen"] * 4]
    classed = shift.rows.groupby("word_class")["js"].mean()
    for name in ("heard", "seen", "other"):
        found = shift.grid.effects.sel(prompt="own", word_class=name, figure="js")
        np.testing.assert_allclose(found, classed[name], atol=1e-12)
    with_list = base_shift(
        small_model(), small_inputs((0, 1)), base=other_model(), answer=literal(" a dog"), heard=[["dog"], ["a"]]
    )
    assert with_list.rows["word_class"].tolist() == [*["other"] * 3, *["heard"] * 3, "other", "heard", *["other"] * 4]


def test_conflicts_bring_their_words():
    conflict = avl.Conflict(
        sound=small_clip(0), picture=small_clip(1), question="What?", answers=(["dog", "puppy"], ["cat", "kitten"])
    )
    shift = base_shift(small_model(), conflict, base=other_model(), answer=literal(" kitten, dog"))
    kinds = shift.rows["word_class"].tolist()
    assert [kinds.count(name) for name in ("seen", "other", "heard")] == [6, 3, 3]


def test_an_end_token_ends_the_answer(monkeypatch):
    """With an end token inside, later tokens are no rows, and the end counts for the same answer alone."""
    model, x = small_model(), small_inputs((0,))
    end = model.tokenizer.eos_token_id
    tokens = torch.tensor([[7, 9, end, 0, 0]])
    with torch.no_grad():
        logits = model(x.continued(tokens))[:, -6:-1]
    said = Generated(torch.cat([x.ids, tokens], dim=1), ("",), logits, {})
    monkeypatch.setattr(type(model), "generate", lambda self, x, **options: said)
    shift = base_shift(model, x, base=other_model(), max_new_tokens=5)
    assert shift.rows["token_id"].tolist() == [7, 9, end]
    assert shift.rows["word_class"].tolist() == ["other", "other", "end"]
    found = shift.grid.effects.sel(prompt="own", word_class="all")
    np.testing.assert_allclose(found.sel(figure="js"), shift.rows["js"][:2].mean())
    assert float(found.sel(figure="same answer").squeeze()) == float((shift.rows["rank"] == 0).all())


def test_base_shift_refusals():
    model, x = small_model(), small_inputs((0,))
    with pytest.raises(InputError, match=r"unknown way with the sound, audio= 'cut'"):
        base_shift(model, x, base=other_model(), audio="cut")
    with pytest.raises(InputError, match="example 0: 'dog' is both heard and seen"):
        base_shift(model, x, base=other_model(), heard=["Dog"], seen=["dog"])
    with pytest.raises(InputError, match="2 lists of heard words for 1 examples"):
        base_shift(model, x, base=other_model(), heard=[["a"], ["b"]])
    with pytest.raises(InputError, match="lists 2 synonyms"):
        base_shift(model, x, base=other_model(), answer=["a", "b"])
    with pytest.raises(ModelError, match=r"has \d+ tokens and external \d+, so their distributions cannot be compared"):
        base_shift(model, x, base=tiny_model(vocab_size=300))


def test_weight_changes_are_the_slices_of_the_projections():
    model, base = small_model(), other_model()
    grid = weight_change(model, base=base)
    attention = [one.get_decoder().layers[2].self_attn for one in (tiny_hf_model(), moved_hf_model())]
    q = [one.q_proj.weight.detach().double().view(4, 16, 64) for one in attention]
    bq = [one.q_proj.bias.detach().double().view(4, 16) for one in attention]
    moved = torch.sqrt(((q[0] - q[1]) ** 2).sum((1, 2)) + ((bq[0] - bq[1]) ** 2).sum(1))
    size = torch.sqrt((q[1] ** 2).sum((1, 2)) + (bq[1] ** 2).sum(1))
    found = grid.values.sel(example=0, layer=2, matrix="Q")
    np.testing.assert_allclose(found.sel(figure="absolute"), moved, rtol=1e-6)
    np.testing.assert_allclose(found.sel(figure="relative"), moved / size, rtol=1e-6)
    bv = [one.v_proj.bias.detach().double().view(2, 16) for one in attention]
    groups = (bv[0] - bv[1]).norm(dim=1)
    np.testing.assert_allclose(
        grid.values.sel(example=0, layer=2, matrix="V", figure="absolute"), groups.repeat_interleave(2), rtol=1e-6
    )
    rest = grid.values.sel(example=0, figure="absolute").to_series()
    where = rest[rest > 0].index
    assert set(where.get_level_values("layer")) == {2}
    assert set(where.get_level_values("matrix")) == {"Q", "V"}


def test_weight_change_refuses_models_of_other_shapes():
    with pytest.raises(ModelError, match="n_layers = 4 and external 2"):
        weight_change(small_model(), base=tiny_model(n_layers=2))
    with pytest.raises(ModelError, match="folded weights"):
        weight_change(small_model().compatible(), base=other_model())


@pytest.mark.parametrize(("direction", "audio"), [("into model", "out"), ("into base", "masked"), ("into base", "out")])
def test_grafts_are_full_hooked_forwards(direction, audio):
    model, base, x = small_model(), other_model(), small_inputs((0, 1))
    prompt = prompt_for(base, model, x, audio)
    deaf = Plan(cut("system|video|boundary|question|header|generation", "audio")) if audio == "masked" else Plan()
    grid = graft(model, x, base=base, metric=METRIC, direction=direction, audio=audio, at="question|generation")
    one, two = ((model, x, Plan()), (base, prompt, deaf))
    (receiver, edited, own), (giver, other, its) = (one, two) if direction == "into model" else (two, one)
    bound = METRIC.bind()
    with torch.no_grad():
        before = bound(run(receiver, edited, plan=own).logits)
        np.testing.assert_allclose(grid.baseline, before, atol=1e-5)
        taken = run(giver, other, plan=its, capture="z")
        np.testing.assert_allclose(grid.donor, bound(taken.logits), atol=1e-5)
        for layer, head in ((0, 1), (2, 3), (3, 0)):
            value = taken.cache["z", layer][:, list(other.spans["question|generation"]), head]
            plan = own + Plan(replace(Site("z", layer, head, "question|generation"), value))
            after = bound(run(receiver, edited, plan=plan).logits)
            np.testing.assert_allclose(grid.values.sel(layer=layer, head=head), after, atol=1e-5)
    assert float(abs(grid.effects).max()) > 1e-3


def test_a_model_grafted_with_itself_is_itself():
    x = small_inputs((0, 1))
    grid = graft(small_model(), x, base=small_model(), metric=METRIC, audio="kept", over="layer span")
    assert float(abs(grid.effects).max()) < 1e-5
    assert not np.isnan(grid.effects).any()


def test_places_that_are_not_shared_are_not_measured():
    grid = graft(small_model(), small_inputs((0,)), base=other_model(), metric=METRIC, over="layer span")
    assert np.isnan(grid.effects.sel(span="audio")).all()
    assert not np.isnan(grid.effects.drop_sel(span="audio")).any()
    assert grid.provenance["grafted"]["audio"] == []


def test_graft_refusals(monkeypatch):
    model, x = small_model(), small_inputs((0,))

    def given(**options):
        return graft(model, x, **{"base": other_model(), "metric": METRIC} | options)

    monkeypatch.setattr(Trace, "score", None)  # nothing is paid for
    with pytest.raises(InputError, match=r"unknown direction 'into modle'\. Did you mean 'into model'"):
        given(direction="into modle")
    with pytest.raises(InputError, match="takes one place at a time"):
        given(over="pair")
    with pytest.raises(InterventionError, match="rot_k means something else in the other model's prompt"):
        given(component="rot_k")
    with pytest.raises(InterventionError, match="attn_out has no heads to iterate"):
        given(component="attn_out")
    with pytest.raises(ModelError, match="n_layers = 4 and external 2: activations can be grafted between"):
        given(base=tiny_model(n_layers=2))
    monkeypatch.undo()
    with pytest.raises(InputError, match="NaN or infinite on the run that is grafted into"):
        given(metric=lambda logits: logits[:, -1, 0] * torch.nan)
