"""Models with code of their own: HuggingFace's numbers to the bit; every tool, live and from files; what is refused."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brought import OWN, Encoders, brought, decoder, embed_of, input_of
from safetensors.torch import load_file, save_file
from small_av import small_clip
from tiny import letter
from tiny_text import text_hf_model, text_tokenizer

import av_lens as avl
from av_lens import bring, methods
from av_lens.core import run
from av_lens.errors import AlignmentError, InputError, ModelError
from av_lens.inputs import Answer
from av_lens.inputs.pairs import without_sound
from av_lens.interventions import Plan, Site, cut, scale, zero
from av_lens.metrics import logit_diff
from av_lens.model import check_model

METRIC = logit_diff(letter("a"), letter("b"))
PLANS = [
    *(Plan(zero(Site("z", layer, head, positions="suffix"))) for layer in (0, 3) for head in range(4)),
    Plan([scale(Site("resid_pre", 1, positions="audio"), 2.0), cut("generation", "video")]),
]


def arguments(x: Any) -> dict[str, torch.Tensor]:
    """What HuggingFace is given, without the ids."""
    return {name: one for name, one in x.tensors.items() if name != "input_ids"}


@pytest.mark.parametrize("name", OWN)
def test_a_user_writes_at_most_thirty_lines(name):
    lines = inspect.getsource(OWN[name][1]).splitlines()[1:-1]  # without what hands it the encoders
    assert len([line for line in lines if line.strip()]) <= 30


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("more", [{}, {"sound": None}, {"picture": None}, {"sound": None, "picture": None}])
@torch.no_grad()
def test_logits_are_huggingfaces_to_the_bit(name, more):
    x, hf_model = input_of(name, **more), decoder(name)
    wanted = hf_model(**arguments(x)).logits
    assert wanted.std() > 0.1
    assert torch.equal(brought(name)(x), wanted)
    assert torch.equal(brought(name).hf_model(**x.tensors).logits, wanted)
    if name != "video_salmonn":  # positions that are counted need not be told
        bare = hf_model(inputs_embeds=x.tensors["inputs_embeds"]).logits
        assert torch.equal(brought(name)(x), bare)


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_a_stack_gives_what_each_gives_alone(name):
    alone = [input_of(name, seed) for seed in (0, 1)]
    both = brought(name).encode([small_clip(0), small_clip(1)], "What?")
    together = brought(name)(both)
    assert torch.equal(together, decoder(name)(**arguments(both)).logits)
    for i, x in enumerate(alone):
        torch.testing.assert_close(together[i : i + 1], brought(name)(x), atol=1e-5, rtol=0)
        assert torch.equal(both[i].tensors["inputs_embeds"], x.tensors["inputs_embeds"])
        assert torch.equal(both[i].tensors["position_ids"], x.tensors["position_ids"])
    with pytest.raises(AlignmentError, match="Different layouts are never padded together"):
        avl.AVInputs.stack([alone[0], input_of(name, question="Which one?")])


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_text_after_the_prompt_goes_on_from_its_last_position(name):
    model, tokenizer, hf_model = brought(name), text_tokenizer(), decoder(name)
    x = input_of(name, prefix="I hear", answer=Answer("ab", ((5, 6),)))
    bare, ids = input_of(name), [*tokenizer("I hear")["input_ids"], 5, 6]
    embeds = torch.cat([bare.tensors["inputs_embeds"], hf_model.get_input_embeddings()(torch.tensor([ids]))], dim=1)
    positions = bare.position_ids
    later = positions[..., -1:] + torch.arange(1, len(ids) + 1)
    whole = torch.cat([positions, later], dim=-1)
    wanted = hf_model(inputs_embeds=embeds, position_ids=whole if len(whole) == 3 else whole[0]).logits
    assert torch.equal(model(x), wanted)
    assert x.tokens[x.spans.generation_position] == "r"
    assert "".join(x.tokens[i] for i in x.spans.generated) == tokenizer.decode([5, 6])
    assert torch.equal(bare.continued(torch.tensor([ids])).tensors["inputs_embeds"], embeds)


@pytest.mark.parametrize("name", OWN)
def test_what_was_not_asked_for_is_not_seen(name):
    x = input_of(name)
    assert x.layout == OWN[name][2]
    assert len(x.spans.audio) > 5
    assert len(x.spans.video) > 5
    assert not len(input_of(name, sound=None).spans.audio)
    assert not len(input_of(name, picture=None).spans.video)
    other = "separate" if x.layout == "in_video" else "in_video"
    with pytest.raises(InputError, match=rf"sound='{other}' is asked of an embed that lays .* use sound='{x.layout}'"):
        input_of(name, sound=other)


def test_times_and_patches_are_those_that_were_given():
    x = input_of("videollama2")
    late = np.isnan(x.spans.start_s[x.spans.audio.positions])
    assert late.tolist() == [False] * 10 + [True] * 5  # the sound ends at 2 s, its window at 3 s
    assert len(x.spans.audio.between(0.0, 1.0)) == 5
    assert len(x.spans.video.box(row=0)) == 4
    own = embed_of("video_salmonn")(small_clip(0), "What?").position_ids
    assert torch.equal(input_of("video_salmonn").position_ids[:, 0], own)
    assert not torch.equal(own[0], own[1])
    woven = input_of("minicpm_o")
    assert [run_[1] - run_[0] for run_ in woven.spans.audio.runs] == [5, 5]
    assert (woven.spans.row == -1).all()


def test_a_decoder_of_text_turns_by_one_stream_whatever_its_configuration_says():
    """HuggingFace's Qwen2 passes over `mrope_section`, which the text part of a Qwen2-VL has."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    model = bring.wrap(text_hf_model("qwen2", rope_parameters=rope), tokenizer=text_tokenizer())
    given = bring.Given(torch.randn(4, 64), ["question", "question", "header", "generation"])
    assert model(model.encode(given)).shape[:2] == (1, 4)
    with pytest.raises(InputError, match=r"has 3 streams and this decoder turns by 1: give \[pos\]"):
        model.encode(bring.Given(given.embeds, given.roles, position_ids=[range(4)] * 3))


Tool = Callable[[Any, Any, Any, Path], Any]


def generated(model: Any, x: Any, pair: Any, folder: Path) -> Any:
    return model.generate(x, max_new_tokens=6)


def from_a_saved_trace(model: Any, x: Any, pair: Any, folder: Path) -> Any:
    trace = model.trace(x)
    return avl.Trace.load(trace.save(folder / "trace.safetensors"), model, x).replay(PLANS)


def checked(model: Any, x: Any, pair: Any, folder: Path) -> Any:
    report = check_model(model, x, full=True)
    assert report.ok
    return torch.tensor(len(report.passed))


TOOLS: dict[str, Tool] = {
    "encode": lambda model, x, pair, folder: x.tensors["inputs_embeds"],
    "trace": lambda model, x, pair, folder: model.trace(x).logits("all"),
    "replay": lambda model, x, pair, folder: model.trace(x).replay(PLANS),
    "patch, heads": lambda model, x, pair, folder: avl.patch(model, pair, metric=METRIC),
    "patch, windows": lambda model, x, pair, folder: avl.patch(model, pair, over="layer window:0.5s", metric=METRIC),
    "direct_attribution": lambda model, x, pair, folder: avl.direct_attribution(
        model, x, metric=METRIC, by="head span"
    ),
    "knockout": lambda model, x, pair, folder: avl.knockout(
        model, x, edges="video -> generation", metric=METRIC, draws=1
    ),
    "attention_flow": lambda model, x, pair, folder: avl.attention_flow(model, x),
    "logit_lens": lambda model, x, pair, folder: avl.logit_lens(model, x, words=[letter("a")]).ranks,
    "attribution_patch": lambda model, x, pair, folder: avl.attribution_patch(model, pair, metric=METRIC),
    "path_patch": lambda model, x, pair, folder: avl.path_patch(model, pair, metric=METRIC),
    "edge_attribution": lambda model, x, pair, folder: avl.edge_attribution(model, pair, metric=METRIC),
    "find_sinks": lambda model, x, pair, folder: avl.find_sinks(model, x).incoming,
    "generate": generated,
    "trace.generate": lambda model, x, pair, folder: torch.stack(
        [one.tokens for one in model.trace(x).generate([Plan(), PLANS[1]], max_new_tokens=6)]
    ),
    "without_sound": lambda model, x, pair, folder: model(without_sound(model, x)),
    "bound": lambda model, x, pair, folder: (bound := model.bound(x))(bound.ids.repeat(2, 1)),
    "trace save and load": from_a_saved_trace,
    "check_model": checked,
    "compatible": lambda model, x, pair, folder: model.compatible()(x),
}
"""With `isolate`, below, the toolkit's 21."""


def numbers(found: Any) -> list[np.ndarray]:
    """All that a result holds."""
    if isinstance(found, torch.Tensor):
        return [found.detach().numpy()]
    if hasattr(found, "values"):
        return [np.asarray(found.values)]
    frame = found.to_frame()
    return [frame[column].to_numpy() for column in frame.columns if frame[column].dtype.kind in "if"]


def material(model: Any) -> tuple[Any, Any]:
    x, y = (model.encode(small_clip(seed), "What?") for seed in (0, 1))
    return x, avl.Pair(clean=x, corrupt=y)


@cache
def from_files(name: str, folder: Path) -> Any:
    """The same decoder, on files that a run with the code left there."""
    for clip in (small_clip(0), small_clip(1)):
        for more in ({}, {"sound": None}):
            bring.wrap(OWN[name][0](0), bring.Saved(folder, embed_of(name)), tokenizer=text_tokenizer()).encode(
                clip, "What?", **more
            )
    return bring.wrap(OWN[name][0](0), bring.Saved(folder), tokenizer=text_tokenizer(), name=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("givens")


QUICK = ("encode", "trace", "replay", "patch, heads", "logit_lens", "generate", "without_sound", "trace save and load")


@pytest.mark.parametrize(
    ("name", "tools"),
    [("minicpm_o", QUICK), *(pytest.param(name, tuple(TOOLS), marks=pytest.mark.slow, id=name) for name in OWN)],
)
def test_every_tool_runs_live_and_from_files_equal_to_the_bit(name, tools, folder, tmp_path):
    assert len(TOOLS) == 20
    live, saved = brought(name), from_files(name, folder / name)
    for tool in tools:
        call = TOOLS[tool]
        found = [numbers(call(model, *material(model), tmp_path)) for model in (live, saved)]
        assert found[0], tool
        assert any(one.size and not np.isnan(one.astype(float)).all() for one in found[0]), tool
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=tool)


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_replay_decoding_and_bound_are_the_references(name):
    model, (x, pair) = brought(name), material(brought(name))
    trace = model.trace(x)
    assert not trace.hooked_because
    for plan, found in zip(PLANS, trace.replay(PLANS), strict=True):
        torch.testing.assert_close(found, run(model, x, plan=plan).logits, atol=1e-5, rtol=0)
    wanted = decoder(name).generate(**x.tensors, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(x, max_new_tokens=8), wanted)
    assert torch.equal(trace.generate(Plan(), max_new_tokens=8)[0].tokens, wanted)
    assert torch.equal(model.bound(x)(model.bound(x).ids), model(x))
    both = model.bound(pair)
    assert torch.equal(both(both.corrupt_ids), model(pair.corrupt))
    two = avl.AVInputs.stack([x, pair.corrupt])
    bound = model.bound(two)
    assert torch.equal(bound(bound.ids.repeat(2, 1)), model(two).repeat(2, 1, 1))
    after = model.bound(x)(trace.stream(2, 0), start_at_layer=2)
    torch.testing.assert_close(after, model(x), atol=1e-5, rtol=0)
    logits = model.compatible()(x).log_softmax(-1)
    torch.testing.assert_close(logits, model(x).log_softmax(-1), atol=1e-4, rtol=0)
    shares = avl.direct_attribution(model, x, metric=METRIC)
    np.testing.assert_allclose(shares.effects.sum("part"), shares.baseline, atol=1e-4)


def test_a_base_is_compared_where_its_prompt_is_the_same_without_sound():
    x = input_of("videollama2")
    found = methods.base_shift(brought("videollama2"), x, base=brought("videollama2", seed=1))
    assert found.grid.values.sel(figure="kl(model||base)", word_class="all", prompt="own").item() > 0.1
    with pytest.raises(AlignmentError, match="these prompts differ in more than the sound"):  # bounds of sound stay
        methods.base_shift(brought("minicpm_o"), input_of("minicpm_o"), base=brought("minicpm_o", seed=1))


def test_a_given_is_an_input_by_itself(tmp_path):
    given = embed_of("minicpm_o")(small_clip(0), "What?")
    model = bring.wrap(text_hf_model("qwen2"), tokenizer=text_tokenizer())
    x = model.encode(bring.Given.load(given.save(tmp_path / "one")))
    assert torch.equal(model(x), brought("minicpm_o")(input_of("minicpm_o")))
    assert len(model.encode([given, given], "")) == 2
    with pytest.raises(InputError, match="fps= has nothing to act on: a Given is made already"):
        model.encode(given, fps=1.0)
    with pytest.raises(InputError, match=r"wrapped without embed=, so it takes a Given, such as Given.load\(path\)"):
        model.encode(small_clip(0), "What?")
    with pytest.raises(InputError, match="these inputs do not say how they were made"):
        without_sound(model, x)


def stub(clip: Any, question: str) -> Any:
    return bring.Given(torch.zeros(2, 64), ["question", "generation"])


@pytest.mark.parametrize(
    ("embed", "asked", "said"),
    [
        (lambda clip, question: 3, {}, r"embed gave int: it returns av_lens.bring.Given\(embeds, roles, ...\)"),
        (stub, {}, "embed was shown a sound and gave 0 positions of it: leave no stream out that is there"),
        (stub, {"sound": None}, "embed was shown a picture and gave 0 positions of it"),
        (stub, {"fps": 1.0}, "fps=1.0 is asked of an embed that takes no fps=: give it that keyword"),
        (stub, {"system": "Hi."}, "system='Hi.' is asked of an embed that takes no system="),
        (stub, {"picture": "image"}, "picture='image' is asked of an embed that takes no picture="),
        (stub, {"fsp": 1.0}, "unknown keyword of encode 'fsp'. Did you mean 'fps'"),
        (stub, {"prefix": "<|im_end|>", "sound": None, "picture": None}, "the prefix holds the special token"),
        (
            lambda clip, question: bring.Given(torch.zeros(1, 8), ["generation"]),
            {"sound": None, "picture": None},
            "embeds is 8 wide and this decoder's stream 64",
        ),
        (
            lambda clip, question: bring.Given(torch.zeros(1, 64), ["generation"], [9999]),
            {"sound": None, "picture": None},
            "ids holds 9999, and this decoder knows",
        ),
        (
            lambda clip, question: bring.Given(torch.zeros(1, 64), ["generation"], position_ids=[[0]] * 3),
            {"sound": None, "picture": None},
            "position_ids has 3 streams and this decoder turns by 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(embed, asked, said):
    model = copy.copy(brought("minicpm_o"))
    model.__dict__.pop("encoder", None)
    model.embed_clip = embed
    with pytest.raises(InputError, match=said):
        model.encode(small_clip(0), "What?", **asked)


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(InputError, match=r"embed is called as embed\(clip, question, \*\*asked\), and yours takes no"):
        bring.wrap(text_hf_model("qwen2"), lambda clip: clip, tokenizer=text_tokenizer())
    with pytest.raises(ModelError, match="no adapter for 'Linear'"):
        bring.wrap(torch.nn.Linear(2, 2), stub, tokenizer=text_tokenizer())
    broken = text_hf_model("qwen2")
    broken.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"the weight lm_head.weight of 'brought' holds 1 numbers"):
        bring.wrap(broken, stub, tokenizer=text_tokenizer())
    with pytest.raises(ModelError, match="the tokenizer of 'brought' is another model's: it has"):
        bring.wrap(
            text_hf_model("qwen2", vocab_size=100, eos_token_id=1, pad_token_id=2), stub, tokenizer=text_tokenizer()
        )
    with pytest.raises(ModelError, match="is wrapped already"):
        bring.wrap(brought("minicpm_o").hf_model, stub, tokenizer=text_tokenizer())


def conflict(i: int) -> avl.Conflict:
    clips = {name: small_clip(10 * i + k) for k, name in enumerate(("sound", "picture"))}
    return avl.Conflict(question="What?", answers=(letter("a"), letter("b")), id=str(i), **clips)


def test_what_is_missing_is_told_and_asked_for(tmp_path):
    model = bring.wrap(text_hf_model("qwen2"), bring.Saved(tmp_path / "new"), tokenizer=text_tokenizer())
    with pytest.raises(
        InputError, match=r"is not there yet: the Given of Clip\(.* asked 'What\?'. \w+.ask beside it says"
    ):
        model.encode(small_clip(0), "What?")
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".ask"]
    saved = bring.Saved(tmp_path / "new")
    assert saved.ask_all([conflict(0)]) == 3 * (9 + 2 + 1)  # questions x (cells, sounds alone, nothing)
    cells, embed = conflict(0).cells(brought("minicpm_o")), embed_of("minicpm_o")
    made = bring.wrap(text_hf_model("qwen2"), bring.Saved(tmp_path / "new", embed), tokenizer=text_tokenizer())
    for name in conflict(0).cells(made):
        assert torch.equal(conflict(0).cells(made)[name].tensors["inputs_embeds"], cells[name].tensors["inputs_embeds"])
    assert saved.ask_all([conflict(0)]) == 3 * (9 + 2 + 1) - 10


def shards(name: str, path: Path, prefix: str) -> Path:
    """A checkpoint of code of its own: the decoder's weights under a prefix, others beside them."""
    text_hf_model("qwen2").save_pretrained(path)
    weights = {f"{prefix}{key}": one for key, one in load_file(path / "model.safetensors").items()}
    save_file(weights | {"vpm.layers.0.weight": torch.zeros(3)}, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": [name], "model_type": "own", "auto_map": {"AutoModel": "code.Own"}}
    (path / "config.json").write_text(json.dumps(config))
    text_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("prefix", ["llm.", "", "model.language_model."])
def test_the_decoder_is_loaded_out_of_its_own_shards(tmp_path, prefix):
    place = shards("OwnForCausalLM", tmp_path / "it", prefix)
    found, wanted = bring.load_text_model(place, family="qwen2", prefix=prefix), text_hf_model("qwen2").state_dict()
    assert {name: one.tolist() for name, one in found.state_dict().items()} == {
        n: w.tolist() for n, w in wanted.items()
    }
    if prefix:
        with pytest.raises(ModelError, match=r"\d+ weights of Qwen2ForCausalLM are missing in .* with prefix='' \("):
            bring.load_text_model(place, family="qwen2")


def test_a_checkpoint_that_cannot_be_read_is_refused(tmp_path):
    place = shards("OwnForCausalLM", tmp_path / "it", "llm.")
    with pytest.raises(ModelError, match="no adapter for 'own'"):
        bring.load_text_model(place, prefix="llm.")
    with pytest.raises(ModelError, match="does not exist"):
        bring.load_text_model(tmp_path / "no")
    with pytest.raises(ModelError, match=r"is not a configuration, or damaged \(KeyError: 'llm_config'"):
        bring.load_text_model(place, family="qwen2", inner="llm_config")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ModelError, match="weights of Qwen2ForCausalLM are beyond its layers"):
        bring.load_text_model(place, family="qwen2", prefix="llm.")
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match="are quantised: load those that they were made from"):
        bring.load_text_model(place, family="qwen2", prefix="llm.")


def test_a_folder_of_files_opens_as_a_model(tmp_path):
    place = shards("OwnForCausalLM", tmp_path / "checkpoint", "llm.")
    folder = tmp_path / "givens"
    live = bring.wrap(text_hf_model("qwen2"), bring.Saved(folder, embed_of("minicpm_o")), tokenizer=text_tokenizer())
    x = live.encode(small_clip(0), "What?")
    (folder / "bring.json").write_text('{"model": "../checkpoint", "family": "qwen2", "prefix": "llm."}')
    model = avl.load(folder)
    assert torch.equal(model(model.encode(small_clip(0), "What?")), live(x))
    for told, said in (
        ('{"modle": "../checkpoint"}', "unknown key 'modle'. Did you mean 'model'"),
        ('{"model": "../no"}', "names the checkpoint .*no', which is no folder"),
        ("{", "bring.json is not a json object of texts, or damaged"),
        ("{}", "bring.json is not a json object of texts, or damaged .*model"),
    ):
        (folder / "bring.json").write_text(told)
        with pytest.raises(ModelError, match=said):
            avl.load(folder)
    assert place.is_dir()


def test_encoders_are_those_of_their_descriptions():
    encoders = Encoders()
    assert encoders.eye(small_clip(0).frames).shape == (4, 4, 4, 64)
    assert encoders.ear(small_clip(0).waveform, windows=15)[10:].abs().max() == 0
