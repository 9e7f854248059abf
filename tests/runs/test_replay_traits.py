"""What an adapter declares about its architecture reaches replay: handled exactly, or run hooked and said by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_av import small_inputs, small_model
from tiny import letter, tiny_hf_model, tiny_processor
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as modeling

import av_lens as avl
from av_lens.core import run
from av_lens.errors import ModelError
from av_lens.families.adapter import ReplayTraits
from av_lens.families.qwen2_5_omni import FAMILY
from av_lens.interventions import Plan, Site, add, cut, scale, zero
from av_lens.metrics import logit_diff
from av_lens.replay import Trace


def declare(monkeypatch: pytest.MonkeyPatch, **traits: Any) -> None:
    declared = replace(FAMILY, replay_traits=lambda config: ReplayTraits(**traits))
    monkeypatch.setattr(small_model(), "family", declared)


def plans(x: Any) -> list[Plan]:
    """Edits that start inside a block of sound, inside one of pictures, and after both."""
    sound, video = x.spans.audio.positions, x.spans.video.positions
    return [
        Plan(zero(Site("z", 1, 2, "suffix"))),
        Plan(scale(Site("z", 0, (1, 3), sound[[7, 20]].tolist()), 3.0)),
        Plan(zero(Site("pattern", 2, 1, sound[30:40].tolist()))),
        Plan([add(Site("resid_pre", 1, positions=video[[5]].tolist()), torch.ones(64)), cut("generated", "audio")]),
        Plan(zero(Site("v", 1, positions=video[3:].tolist()))),
    ]


def gaps(trace: Any) -> list[float]:
    """How far each replayed plan is from its hooked full forward."""
    chosen = plans(trace.x)
    replayed = trace.replay(chosen, logits_at="all")
    whole = [run(trace.model, trace.x, plan=plan, logits_at="all").logits.detach() for plan in chosen]
    return [float((one - other).abs().max()) for one, other in zip(replayed, whole, strict=True)]


# Where a restart begins


def test_a_restart_moves_to_the_start_of_a_block_that_reads_both_ways():
    roles = ["system", "video", "video", "audio", "audio", "boundary", "audio", "question", "video"]
    both, sound = ReplayTraits(bidirectional=("audio", "video")), ReplayTraits(bidirectional=("audio",))
    assert [both.restart(p, roles) for p in range(10)] == [0, 1, 1, 1, 1, 5, 6, 7, 8, 9]
    assert [sound.restart(p, roles) for p in range(10)] == [0, 1, 2, 3, 3, 5, 6, 7, 8, 9]
    assert [ReplayTraits().restart(p, roles) for p in range(10)] == list(range(10))
    assert both.restart(2, ["video", "video", "video"]) == 0


def test_a_declaration_that_cannot_be_is_refused():
    with pytest.raises(ModelError, match=r"unknown role 'sound'"):
        ReplayTraits(bidirectional=("sound",))
    with pytest.raises(ModelError, match=r"at least one position, not 0"):
        ReplayTraits(sliding_window=0)


# Blocks that read both ways, in a model whose mask really does


@pytest.fixture
def both_ways(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let neighbouring media positions of the tiny model read each other both ways."""
    x = small_inputs(sound="separate")
    block = torch.zeros(len(x.spans), dtype=torch.long)
    for number, name in enumerate(("video", "audio"), start=1):
        block[torch.from_numpy(x.spans[name].positions.copy())] = number
    same = (block[:, None] == block[None]) & (block[:, None] > 0)

    def mask(*, inputs_embeds: torch.Tensor, **rest: Any) -> torch.Tensor:
        n = inputs_embeds.shape[1]
        read = torch.ones(n, n).tril().bool() | same
        return torch.zeros(1, 1, n, n).masked_fill(~read, torch.finfo(torch.float32).min)

    monkeypatch.setattr(modeling, "create_causal_mask", mask)
    return x


def test_blocks_that_read_both_ways_replay_exactly_where_they_are_declared(monkeypatch, both_ways):
    whole = run(small_model(), both_ways, logits_at="all")
    declare(monkeypatch, bidirectional=("audio", "video"))
    trace = small_model().trace(both_ways)
    assert trace.hooked_because == ""
    schedule = trace.schedule(plans(both_ways))
    sound, video = (int(both_ways.spans[name].positions[0]) for name in ("audio", "video"))
    starts = {number: stack.start for stack in schedule.stacks for number in stack.numbers}
    assert starts == {0: int(both_ways.spans.suffix.positions[0]), 1: sound, 2: sound, 3: video, 4: video}
    assert max(gaps(trace)) <= 1e-5
    torch.testing.assert_close(trace.logits("all"), whole.logits.detach(), atol=1e-5, rtol=0)


def test_blocks_that_read_both_ways_undeclared_are_noticed_and_would_be_wrong(both_ways):
    trace = small_model().trace(both_ways)
    first = int(both_ways.spans.video.positions[0])
    assert f"position {first} (video) reads position {first + 11} (video) after it" in trace.hooked_because
    assert max(gaps(trace)) <= 1e-5
    blind = Trace(**{**vars(trace), "hooked_because": ""})
    found = gaps(blind)
    assert found[0] <= 1e-5
    assert min(found[1], found[4]) > 1e-4, "the declaration changes nothing here, so that the tests prove nothing"


def test_gradients_through_such_blocks_are_those_of_the_full_forward(monkeypatch, both_ways):
    declare(monkeypatch, bidirectional=("audio", "video"))
    trace = small_model().trace(both_ways)
    site = Site("z", 1, (0, 3), both_ways.spans.video.positions[[5, 9]].tolist())
    metric = logit_diff(letter("a"), letter("b"))
    ours = trace.gradients(site, metric)
    full = Trace(**{**vars(trace), "hooked_because": "a full forward, to compare with"}).gradients(site, metric)
    assert float(full.gradient[0].abs().max()) > 1e-4
    torch.testing.assert_close(ours.gradient[0], full.gradient[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.value[0], full.value[0], atol=1e-5, rtol=0)


def test_methods_that_compute_layers_by_themselves_refuse_such_blocks(monkeypatch):
    declare(monkeypatch, bidirectional=("audio",))
    pair = avl.Pair(clean=small_inputs((0, 1)), corrupt=small_inputs((2, 3)))
    for method in (avl.path_patch, avl.edge_attribution):
        with pytest.raises(ModelError, match=r"needs positions that read only earlier ones; here audio read both ways"):
            method(small_model(), pair, metric=logit_diff(letter("a"), letter("b")))


def test_another_role_does_not_cover_the_block(monkeypatch, both_ways):
    declare(monkeypatch, bidirectional=("audio",))
    assert "(video) after it" in small_model().trace(both_ways).hooked_because


# Sliding windows, in a model whose layers really have them


def sliding_model(window: int) -> Any:
    config = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 2}
    return avl.load("tiny", hf_model=tiny_hf_model(**config), processor=tiny_processor())


def test_the_adapter_reads_sliding_windows_from_the_configuration():
    assert small_model().family.replay_traits(small_model().config) == ReplayTraits()
    model = sliding_model(40)
    assert model.family.replay_traits(model.config) == ReplayTraits(sliding_window=40)


def test_a_window_shorter_than_the_prompt_runs_hooked_and_a_longer_one_restarts():
    x = small_inputs()
    trace = sliding_model(40).trace(x)
    assert f"sliding window of 40 positions, and there are {len(x.spans)}" in trace.hooked_because
    assert max(gaps(trace)) <= 1e-5
    wide = sliding_model(len(x.spans)).trace(x)
    assert wide.hooked_because == ""
    assert max(gaps(wide)) <= 1e-5
    assert float((trace.logits() - wide.logits()).abs().max()) > 1e-3, "the window changes nothing"


def test_generation_past_a_sliding_window_is_the_models_own():
    x = small_inputs()
    model = sliding_model(len(x.spans) + 2)
    trace, plan = model.trace(x), plans(x)[0]
    assert trace.hooked_because == ""
    told = trace.generate([plan], max_new_tokens=8)[0]
    wanted = model.generate(x, max_new_tokens=8, plan=plan, return_type="result")
    torch.testing.assert_close(told.logits, wanted.logits, atol=1e-5, rtol=0)
    assert torch.equal(told.tokens, wanted.tokens)


# What is only declared


@pytest.mark.parametrize(("trait", "name"), [("per_layer_inputs", "per-layer inputs"), ("shared_keys", "shared")])
def test_a_declared_obstacle_runs_hooked_and_is_named(monkeypatch, tmp_path, trait, name):
    model, x = small_model(), small_inputs()
    path = model.trace(x).save(tmp_path / "run")
    declare(monkeypatch, **{trait: True})
    trace = model.trace(x)
    assert trace.hooked_because.startswith("this architecture cannot be restarted: ")
    assert name in trace.hooked_because
    assert all(stack.hooked for stack in trace.schedule(plans(x)).stacks)
    assert max(gaps(trace)) <= 1e-5
    assert Trace.load(path, model, x).hooked_because == trace.hooked_because
    plan = plans(x)[0]
    assert trace.generate([plan], max_new_tokens=3, return_type="text") == (
        model.generate(x, max_new_tokens=3, plan=plan, return_type="text"),
    )
    metric = logit_diff(letter("a"), letter("b")).bind()
    assert float(trace.gradients(Site("z", 1, 2, "suffix"), metric).gradient[0].abs().max()) > 1e-4
    wanted = metric(run(model, x, plan=plan).logits.detach())
    torch.testing.assert_close(trace.score([plan], metric)[0], wanted, atol=1e-5, rtol=0)


def test_several_obstacles_are_all_named():
    said = ReplayTraits(per_layer_inputs=True, shared_keys=True, sliding_window=3).obstacle(4)
    assert all(part in said for part in ("per-layer inputs", "shared keys", "sliding window of 3 positions"))
    assert ReplayTraits(sliding_window=4).obstacle(4) == ""
