"""Experts: which ones a token goes through is recorded, told where it changes, and can be held; methods read them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from drawn_plans import drawn_plan, edit_of, site_of
from small_av import small_clip, small_inputs, small_model
from tiny import letter
from tiny_families import TINY, family_model, omni3_hf_model
from torch.nn import functional

import av_lens as avl
from av_lens.core import run
from av_lens.errors import InputError, InterventionError
from av_lens.families.decoder import Layer, hook_name, router_hook
from av_lens.interventions import Plan, Site, replace, zero
from av_lens.interventions.edits import UNITS
from av_lens.metrics import logit_diff

METRIC = logit_diff(letter("a"), letter("b"))
NAME, SPARSE = "qwen3_omni_moe", (0, 2, 3)  # layer 1 has a plain MLP


def encoded(layout: str, seed: int = 0) -> Any:
    return family_model(NAME).encode(small_clip(seed), "What?", **TINY[NAME].layouts[layout])


@cache
def pair() -> avl.Pair:
    return avl.Pair(clean=encoded("in_video"), corrupt=encoded("in_video", seed=1))


def drawn_plans(trace: Any, n: int, seed: int = 0) -> list[Plan]:
    rng = np.random.default_rng(seed)
    return [drawn_plan(trace, rng) for _ in range(n)]


def chosen_in(model: Any, x: Any, hooks: Any = ()) -> dict[int, torch.Tensor]:
    """The experts of every position in a hooked run, as sets: `[batch, pos, expert]`, true where chosen."""
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda value, hook: kept.__setitem__(layer, functional.one_hot(value, 8).sum(1).bool())

    looks = [(router_hook("indices", layer), keep(layer)) for layer in SPARSE]
    model.run_with_hooks(x, fwd_hooks=[*hooks, *looks])
    return {layer: one.unflatten(0, (len(x), -1)) for layer, one in kept.items()}


@torch.no_grad()
def test_a_trace_holds_the_experts_of_the_run():
    model, x = family_model(NAME), avl.AVInputs.stack([encoded("in_video"), encoded("in_video", seed=1)])
    trace, own = model.trace(x), chosen_in(model, x)
    assert sorted(trace.experts) == list(SPARSE) == sorted(model.spec.experts)
    for layer in SPARSE:
        assert torch.equal(functional.one_hot(trace.experts[layer], 8).sum(-2).bool(), own[layer])


@torch.no_grad()
def test_a_row_alone_goes_where_it_goes_in_a_run_and_in_a_stack():
    generator = torch.Generator().manual_seed(0)
    block = family_model(NAME).bridge.blocks[2]
    rows, sets = torch.randn(300, 64, generator=generator), list[torch.Tensor]()
    for size in (1, 7, 300):
        found: list[torch.Tensor] = []
        for part in rows.split(size):
            Layer.of(block).mlp(part[None], lambda name, one, found=found: found.append(one[0].sort(-1).values) or one)
        sets.append(torch.cat(found))
    assert torch.equal(sets[0], sets[1])
    assert torch.equal(sets[0], sets[2])


@torch.no_grad()
def test_rerouted_tokens_are_those_of_the_hooked_run():
    model, x = family_model(NAME), encoded("in_video")
    trace = model.trace(x)
    plans = [Plan(), *drawn_plans(trace, 12), Plan(zero(Site("ln2", 2, positions=[9])))]  # the last runs hooked
    found = trace.rerouted(plans)
    assert found.shape == (14, 4, 1, len(x.spans))
    own = chosen_in(model, x)
    for plan, one in zip(plans, found, strict=True):
        new = chosen_in(model, x, plan.compile(model.spec, x.spans).fwd_hooks)
        wanted = torch.zeros_like(one)
        for layer in SPARSE:
            wanted[layer] = (new[layer] != own[layer]).any(-1)
        assert torch.equal(one, wanted)
    counts = found.sum((1, 3))[:, 0]
    assert counts[0] == 0
    assert int((counts > 0).sum()) > 6
    assert found[-1, 2, 0, 9]
    assert not trace.routed("frozen").replay(plans[1:2]).equal(trace.replay(plans[1:2]))


@pytest.mark.parametrize("n", [16, pytest.param(500, marks=pytest.mark.slow)])
@torch.no_grad()
def test_frozen_replays_are_frozen_hooked_runs(n):
    model, x = family_model(NAME), encoded("in_video")
    trace, differ = model.trace(x), 0
    for start in range(0, n, 8):
        plans = drawn_plans(trace, 8, start)
        if not start:
            plans[0] = Plan(zero(Site("ln2", 2, positions="audio")))  # runs as a full hooked forward
        frozen, free = (trace.replay(plans, logits_at="all", routing=routing) for routing in ("frozen", "free"))
        for number, plan in enumerate(plans):
            hooks = [*trace.routing_hooks(), *plan.compile(model.spec, x.spans).fwd_hooks]
            wanted = model.run_with_hooks(x, fwd_hooks=hooks)
            assert float((frozen[number] - wanted).abs().max()) <= 1e-5
            differ += bool((frozen[number] - free[number]).abs().max() > 1e-3)
    assert differ > n // 3


def by_hand(hf_model: Any, layer: int, chosen: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
    """Experts by their definition, token by token: the softmax over all, of the chosen summed to one."""
    block, out = hf_model.model.language_model.layers[layer].mlp, torch.zeros_like(normed)
    for example, position in np.ndindex(*normed.shape[:2]):
        token, experts = normed[example, position], chosen[example, position].tolist()
        chances = torch.softmax(block.gate.weight @ token, 0)
        for expert in experts:
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            written = block.experts.down_proj[expert] @ (functional.silu(gate) * up)
            out[example, position] += chances[expert] / chances[experts].sum() * written
    return out


@torch.no_grad()
def test_frozen_experts_are_weighed_anew():
    model, x, bare = family_model(NAME), encoded("audio"), omni3_hf_model(0)
    trace = model.trace(x)
    plan = Plan([zero(Site("attn_out", 0, positions="audio")), zero(Site("z", 1, head=2))])
    read: dict[int, torch.Tensor] = {}
    hooks: list[Any] = plan.compile(model.spec, x.spans).fwd_hooks
    for layer in SPARSE:
        hooks.append((f"blocks.{layer}.mlp.hook_in", lambda value, hook, layer=layer: read.__setitem__(layer, value)))
        hooks.append(
            (
                f"blocks.{layer}.mlp.hook_out",
                lambda value, hook, layer=layer: by_hand(bare, layer, trace.experts[layer], read[layer]),
            )
        )
    wanted = model.run_with_hooks(x, fwd_hooks=hooks)
    found = trace.replay(plan, logits_at="all", routing="frozen")[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert trace.rerouted(plan).any()


@torch.no_grad()
def test_a_patch_can_hold_the_experts():
    model, one = family_model(NAME), pair()
    grid = avl.patch(model, one, over="layer", at="audio", metric=METRIC, routing="frozen")
    free = avl.patch(model, one, over="layer", at="audio", metric=METRIC)
    trace, values = model.trace(one.corrupt), []
    _, cache = model.run_with_cache(one.clean, [hook_name("resid_pre", layer) for layer in range(4)])
    at = one.clean.spans.audio.positions.tolist()
    for layer in range(4):
        plan = Plan(replace(Site("resid_pre", layer, positions=at), cache["resid_pre", layer][:, at]))
        hooks = [*trace.routing_hooks(), *plan.compile(model.spec, one.corrupt.spans).fwd_hooks]
        values.append(model.run_with_hooks(one.corrupt, fwd_hooks=hooks)[:, -1])
    ids = model.tokenizer.convert_tokens_to_ids(["a", "b"])
    wanted = [float(logits[0, ids[0]] - logits[0, ids[1]]) for logits in values]
    np.testing.assert_allclose(grid.values.values[0], wanted, atol=1e-5)
    assert np.abs(grid.values.values - free.values.values).max() > 1e-4
    assert grid.provenance["routing"] == "frozen"


def test_what_cannot_be_frozen_is_refused():
    dense, x = small_model(), small_inputs((0,))
    with pytest.raises(InputError, match="routing='frozen' holds every position's experts, and this model has none"):
        dense.trace(x).replay(Plan(), routing="frozen")
    with pytest.raises(InputError, match="routing='frozen' holds every position's experts, and this model has none"):
        avl.patch(dense, avl.Pair(clean=x, corrupt=x), metric=METRIC, routing="frozen")
    model, x = family_model(NAME), encoded("audio")
    trace = model.trace(x)
    with pytest.raises(InputError, match=r"unknown routing 'frozn'.*frozen"):
        trace.replay(Plan(), routing="frozn")
    with pytest.raises(InterventionError, match=rf"{len(x.spans)} positions have recorded experts and this run has"):
        model.run_with_hooks(encoded("text"), fwd_hooks=trace.routing_hooks())
    with pytest.raises(InputError, match=r"a decoded token has none: use trace\.routed\('free'\)\.generate"):
        trace.routed("frozen").generate(Plan(), max_new_tokens=2)
    assert dense.trace(small_inputs((0,))).routing_hooks() == []
    assert not dense.trace(small_inputs((0,))).rerouted(Plan(zero(Site("z", 1, 0)))).any()


def test_a_saved_trace_keeps_the_experts(tmp_path):
    model, x = family_model(NAME), encoded("audio")
    trace, plan = model.trace(x), Plan(zero(Site("attn_out", 0, positions="audio")))
    opened = avl.Trace.load(trace.save(tmp_path / "t"), model, x)
    assert torch.equal(opened.rerouted(plan), trace.rerouted(plan))
    frozen = trace.routed("frozen")
    assert torch.equal(opened.replay(plan, routing="frozen"), frozen.replay(plan))
    assert torch.equal(avl.Trace.load(frozen.save(tmp_path / "frozen"), model, x).replay(plan), frozen.replay(plan))
    from dataclasses import replace as changed

    changed(trace, experts={0: trace.experts[0]}).save(tmp_path / "less")
    with pytest.raises(InputError, match=r"no whole trace of this model and input: experts\.2, experts\.3 have other"):
        avl.Trace.load(tmp_path / "less.safetensors", model, x)


@torch.no_grad()
def test_an_edited_run_goes_on_from_its_own_experts():
    from av_lens.replay.rerun import rerun_under

    model, x = family_model(NAME), encoded("audio")
    plan, trace = Plan(zero(Site("attn_out", 0, positions="audio"))), model.trace(x)
    edited, own = rerun_under(trace, plan), chosen_in(model, x, plan.compile(model.spec, x.spans).fwd_hooks)
    for layer in SPARSE:
        assert torch.equal(functional.one_hot(edited.experts[layer], 8).sum(-2).bool(), own[layer])
    assert any(not torch.equal(edited.experts[layer], trace.experts[layer]) for layer in SPARSE)


@torch.no_grad()
def test_routers_that_all_but_tie_still_restart():
    hf_model = omni3_hf_model(0)
    generator = torch.Generator().manual_seed(0)
    for layer in SPARSE:
        weight = hf_model.model.language_model.layers[layer].mlp.gate.weight
        weight[1:] = weight[:1] + 3e-8 * torch.randn(7, 64, generator=generator)
    model = avl.load("ties", hf_model=hf_model, processor=TINY[NAME].processor())
    x = model.encode(small_clip(0), "What?")
    trace, plan = model.trace(x), Plan(zero(Site("z", 2, head=1)))
    assert not trace.hooked_because
    found = trace.replay(plan, routing="frozen")[0]
    hooks = [*trace.routing_hooks(), *plan.compile(model.spec, x.spans).fwd_hooks]
    torch.testing.assert_close(found, model.run_with_hooks(x, fwd_hooks=hooks)[:, -1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("routing", "more"), [("free", "mlp_in"), ("frozen", "mlp_in"), ("frozen", "ln2")])
def test_gradients_pass_through_experts_and_their_weights(routing, more):  # at ln2 the run is a full hooked forward
    model, x = family_model(NAME), encoded("audio")
    trace = model.trace(x).routed(routing)
    sites = [Site(part, layer, positions="audio") for layer in (0, 2) for part in ("z", "mlp_out", more)]
    found = trace.gradients(sites, METRIC)
    at = x.spans.audio.positions.tolist()
    leaves = [torch.zeros(one.shape).requires_grad_() for one in found.value]
    hooks = [
        (
            hook_name(site.component, site.layer),
            lambda value, hook, leaf=leaf: value.index_add(1, torch.tensor(at), leaf),
        )
        for site, leaf in zip(sites, leaves, strict=True)
    ]
    beside = trace.routing_hooks() if routing == "frozen" else []
    logits = model.run_with_hooks(x, fwd_hooks=[*beside, *hooks])[0, -1]
    ids = model.tokenizer.convert_tokens_to_ids(["a", "b"])
    wanted = torch.autograd.grad(logits[ids[0]] - logits[ids[1]], leaves)
    for site, one, own in zip(sites, found.gradient, wanted, strict=True):
        torch.testing.assert_close(one, own, atol=1e-6, rtol=1e-4, msg=lambda said, site=site: f"{site}: {said}")
        assert float(own.abs().max()) > 1e-4


def test_guesses_and_exact_patches_hold_on_experts():
    grid = avl.methods.attribution_patch(
        family_model(NAME), pair(), metric=METRIC, over="layer", component="mlp_out", at="audio", top=4
    )
    exact = avl.patch(family_model(NAME), pair(), metric=METRIC, over="layer", component="mlp_out", at="audio")
    effects = grid.effects.sel(figure="exact").values
    np.testing.assert_allclose(effects, exact.effects.values, atol=1e-5)
    assert np.isfinite(grid.effects.sel(figure="atp_star").values).all()


@pytest.mark.parametrize("by", ["head", "component", "head span"])
def test_what_is_added_after_a_layer_is_a_part_of_its_own(by):
    model, x = family_model(NAME), encoded("in_video")

    def more(module: Any, args: Any, told: dict[str, Any]) -> Any:
        """Let what pictures add reach the last position too, where no picture of a real prompt stands."""
        seen = told["visual_pos_masks"].clone()
        seen[:, -1] = True
        features = [torch.cat((one, one[:1])) for one in told["deepstack_visual_embeds"]]
        return args, told | {"visual_pos_masks": seen, "deepstack_visual_embeds": features}

    plain = avl.direct_attribution(model, x, metric=METRIC, by=by)
    handle = model.hf_model.get_decoder().register_forward_pre_hook(more, with_kwargs=True)
    try:
        found = avl.direct_attribution(model, x, metric=METRIC, by=by)
    finally:
        handle.remove()
    names = ["added"] if by == "component" else ["L0 added", "L1 added"]
    assert [name for name in found.effects["part"].values.tolist() if "added" in name] == names
    sums = found.effects.sum("part") if by != "head span" else found.effects.sum(("part", "source"))
    np.testing.assert_allclose(sums, found.baseline, atol=1e-4)
    shares = found.effects.sel(part=names).values
    assert np.nanmax(np.abs(shares)) > 1e-3
    assert np.nanmax(np.abs(plain.effects.sel(part=names).values)) == 0


def test_beside_inputs_without_pictures_what_they_add_is_nothing():
    model = family_model(NAME)
    both = [encoded("text"), encoded("in_video")]
    found = avl.direct_attribution(model, both, metric=METRIC)
    np.testing.assert_allclose(found.effects.sum("part", skipna=False), found.baseline, atol=1e-4)


@pytest.mark.parametrize("component", UNITS)
def test_methods_that_read_units_refuse_experts_in_words(component):
    model, one = family_model(NAME), pair()
    said = rf"layer 0 chooses among experts, each an MLP of its own, and has no {component}: name mlp_in or mlp_out"
    with pytest.raises(InterventionError, match=said):
        avl.patch(model, one, over="layer", component=component, metric=METRIC)
    with pytest.raises(InterventionError, match=said):
        avl.methods.attribution_patch(model, one, over="layer", component=component, metric=METRIC)
    with pytest.raises(InterventionError, match=said):
        run(model, one.clean, capture=[Site(component, 0)])
    with pytest.raises(InterventionError, match=said):
        model.trace(one.clean).gradients(Site(component, 0), METRIC)
    with pytest.raises(InterventionError, match=r"layer 0 chooses among experts.* has no mlp_post"):
        avl.direct_attribution(model, one.clean, metric=METRIC, by="neuron")


def test_a_replaced_trace_edits_any_site():
    """Edits of every kind at what experts read and write."""
    model, x = family_model(NAME), encoded("audio")
    trace = model.trace(x)
    plans = [
        Plan(edit_of(kind, site_of(component, trace, 2, 0, "audio"), trace, 1))
        for kind in ("replace", "noise", "scale")
        for component in ("mlp_in", "mlp_out", "resid_mid")
    ]
    with torch.no_grad():
        for plan, found in zip(plans, trace.replay(plans), strict=True):
            torch.testing.assert_close(found, run(model, x, plan=plan).logits, atol=1e-5, rtol=0)


def test_frame_rates_go_by_time_alone():
    """The checkpoint's configuration says `seconds_per_chunk`, which nothing of this family reads."""
    hf_model = omni3_hf_model(0)
    hf_model.config.seconds_per_chunk = 2
    model = avl.load("as the checkpoint", hf_model=hf_model, processor=TINY[NAME].processor())
    x = model.encode(
        small_clip(0, seconds=6.0), "What?", fps=0.5
    )  # a patch lasts 4 s: ids are checked with the model's
    np.testing.assert_allclose(x.table().loc[x.spans.video.positions, "end_s"].max(), 8.0, atol=0.1)
    for fps in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=rf"fps={fps:g}: frames are sampled at a rate above 0"):
            model.encode(small_clip(0), "What?", fps=fps)
