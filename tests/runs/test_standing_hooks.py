"""A trace under the caller's hooks is the hooked model's, at every position and for every verb, or refuses in words."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_av import small_inputs, small_model
from tiny import letter
from torch.nn.modules.module import register_module_forward_hook

import av_lens as avl
from av_lens.core import run
from av_lens.core.execution import standing_hooks
from av_lens.errors import BudgetError, InputError, InterventionError, ModelError
from av_lens.interventions import Plan, Site, cut, replace, zero
from av_lens.metrics import logit_diff
from av_lens.model.binding import remembered_towers
from av_lens.replay import sweep
from av_lens.replay.recording import record_bytes

PLANS = [Plan(zero(Site("z", 1, 2, "suffix"))), Plan(cut("generation", "audio", layers=[2]))]
Z = "blocks.3.attn.hook_z"


def look(activation, hook):
    """A hook that only looks."""


def ablate(activation, hook):
    return torch.zeros_like(activation)


def logits_of(model: Any, x: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@cache
def plain() -> torch.Tensor:
    """The logits of the first small input, no hook anywhere, of a model whose restarts are proved."""
    small_model().trace(small_inputs((0,)))
    return logits_of(small_model(), small_inputs((0,)))


def check_trace(model: Any, x: Any, *, hooked: bool, swept: bool = False) -> Any:
    """Every number of a trace recorded now is that of the model as it is hooked now."""
    trace, truth = model.trace(x), logits_of(model, x)
    assert bool(trace.hooked_because) == hooked, trace.hooked_because
    close(trace.logits("all"), truth)
    wanted = [run(model, x, plan=plan, logits_at="all").logits.detach() for plan in PLANS]
    for one, found in zip(wanted, trace.replay(PLANS, logits_at="all"), strict=True):
        close(found, one)
    if swept:
        metric = logit_diff(letter("a"), letter("b"))
        read = metric.bind()
        if not bool(read(truth[:, -1:]).isfinite().all()):
            with pytest.raises(InputError, match="is NaN or infinite on the recorded run"):
                sweep(trace, PLANS, metric)
            return trace
        grid = sweep(trace, PLANS, metric)
        values = [grid.baseline.values, *grid.values.values.T]
        for one, found in zip([truth, *wanted], values, strict=True):
            close(torch.from_numpy(found), read(one[:, -1:]).double(), among=one)
    return trace


def close(found: torch.Tensor, wanted: torch.Tensor, *, among: torch.Tensor | None = None) -> None:
    among = (wanted if among is None else among).nan_to_num(0.0, 0.0, 0.0)  # a zeroed scale makes a hooked run's NaN
    tolerance = 1e-5 * max(1.0, float(among.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=tolerance, equal_nan=True, check_dtype=False)


# Recognised by identity


@pytest.mark.parametrize("first", ["context", "added"])
def test_a_hook_that_took_the_place_of_another_is_in_force(first):
    model, x = small_model(), small_inputs((0,))
    if first == "context":
        with model.hooks(fwd_hooks=[(Z, look)]):
            close(model.trace(x).logits("all"), plain())
    else:
        model.add_hook(Z, look)
        close(model.trace(x).logits("all"), plain())
        model.reset_hooks()
    with model.hooks(fwd_hooks=[(Z, ablate)]):  # as many hooks as before
        check_trace(model, x, hooked=True, swept=first == "added")
        assert float((logits_of(model, x) - plain()).abs().max()) > 1e-3
    check_trace(model, x, hooked=False)


@contextmanager
def removed(*handles: Any) -> Any:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def permanent(model: Any) -> Any:
    model.bridge.add_perma_hook(Z, ablate)
    try:
        yield
    finally:
        model.bridge.reset_hooks(including_permanent=True)


@contextmanager
def written_over(module: Any) -> Any:
    was = module.forward
    module.forward = lambda *args, **kwargs: was(*args, **kwargs) * 0.5
    try:
        yield
    finally:
        del module.forward


def at_other_positions(activation: torch.Tensor, hook: Any) -> torch.Tensor:
    activation = activation.clone()
    activation[:, :-1] = 0
    return activation


def other_rows_of_logits(module: Any, args: Any, output: Any) -> Any:
    return output.index_fill(1, torch.tensor([0]), 7.0)


ROADS = {
    "a hook point": lambda m: m.hooks(fwd_hooks=[(Z, ablate)]),
    "many hook points at once": lambda m: m.hooks(fwd_hooks=[(lambda name: name.endswith("hook_mlp_out"), ablate)]),
    "a gated hook point": lambda m: m.hooks(fwd_hooks=[("blocks.2.attn.hook_result", ablate)]),
    "a permanent hook": permanent,
    "an effect too small for a tolerance": lambda m: m.hooks(fwd_hooks=[(Z, lambda z, hook: z * (1 + 1e-4))]),
    "positions before the last": lambda m: m.hooks(fwd_hooks=[("blocks.3.hook_resid_post", at_other_positions)]),
    "the embedding": lambda m: m.hooks(fwd_hooks=[("hook_embed", lambda e, hook: e * 1.5)]),
    "the final norm": lambda m: m.hooks(fwd_hooks=[("ln_final.hook_normalized", lambda n, hook: n * 0.5)]),
    "logits of other positions": lambda m: m.hooks(fwd_hooks=[("unembed.hook_out", at_other_positions)]),
    "torch's own on a layer": lambda m: removed(
        m.hf_model.get_decoder().layers[1].register_forward_hook(lambda module, args, output: output * 0.9)
    ),
    "torch's own before a projection": lambda m: removed(
        m.bridge.blocks[2].attn.q.original_component.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    ),
    "torch's own on the rotary tables": lambda m: removed(
        m.hf_model.get_decoder().rotary_emb.register_forward_hook(lambda module, args, out: (out[0], out[1] * 0.5))
    ),
    "torch's own on the unembedding": lambda m: removed(
        m.hf_model.lm_head.original_component.register_forward_hook(other_rows_of_logits)
    ),
    "torch's global hooks": lambda m: removed(
        register_module_forward_hook(lambda module, args, out: out * 0.5 if "SiLU" in type(module).__name__ else None)
    ),
    "a forward that was written over": lambda m: written_over(m.bridge.blocks[1].mlp.out.original_component),
}


@pytest.mark.parametrize("road", ROADS)
def test_hooks_are_in_force_by_whatever_road_they_came(road):
    model, x = small_model(), small_inputs((0,))
    assert plain() is not None  # proved before, so that nothing but the hook itself tells
    with ROADS[road](model):
        assert float((logits_of(model, x) - plain()).abs().max()) > 1e-6, "the hook does nothing, and proves nothing"
        check_trace(model, x, hooked=True)
    assert standing_hooks(model) == ()


def test_a_hook_that_only_looks_fires_at_every_position():
    model, x, seen = small_model(), small_inputs((0,)), []
    model.trace(x)
    places = [
        (Z, lambda z, hook: seen.append(z.shape[1])),
        ("unembed.hook_out", lambda v, hook: seen.append(v.shape[1])),
    ]
    with model.hooks(fwd_hooks=places):
        model.trace(x)
    assert seen == [len(x.spans)] * 2


def test_switches_left_on_are_no_hooks():
    model, x = small_model(), small_inputs((0,))
    model.trace(x)
    model.set_use_attn_result(True)
    try:
        check_trace(model, x, hooked=False)
    finally:
        model.set_use_attn_result(False)


def test_hooks_on_the_towers_are_recorded_and_replays_still_restart():
    model, x = small_model(), small_inputs((0,))
    with model.hooks(fwd_hooks=[("audio_encoder.hook_out", lambda heard, hook: heard * 3.0)]):
        assert float((logits_of(model, x) - plain()).abs().max()) > 1e-3
        trace = check_trace(model, x, hooked=False)
    with pytest.raises(InterventionError, match=r"with hooks at audio_encoder.hook_out, .* hooks at nothing"):
        trace.replay(PLANS)


def test_backward_hooks_act_on_gradients():
    model, x, site = small_model(), small_inputs((0,)), Site("resid_pre", 1, positions="suffix")
    unhooked = model.trace(x).gradients(site, logit_diff(letter("a"), letter("b"))).gradient[0]
    with model.hooks(bwd_hooks=[("blocks.2.hook_resid_pre", lambda grad, hook: grad * 2.0)]):
        doubled = model.trace(x).gradients(site, logit_diff(letter("a"), letter("b"))).gradient[0]
    torch.testing.assert_close(doubled, 2.0 * unhooked, atol=1e-6, rtol=1e-4)


def test_patching_is_of_the_hooked_model_and_what_computes_layers_by_itself_says_that_it_cannot():
    model, (clean, corrupt) = small_model(), (small_inputs((seed,)) for seed in (0, 1))
    pair, metric = avl.Pair(clean=clean, corrupt=corrupt), logit_diff(letter("a"), letter("b"))
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 0.3)]):
        grid = avl.patch(model, pair, at="generation", metric=metric)
        z = run(model, clean, capture=[Site("z", 2, positions="generation")]).cache["z", 2].detach()
        plan = Plan(replace(Site("z", 2, 1, "generation"), z[:, :, [1]]))
        wanted = metric.bind()(run(model, corrupt, plan=plan).logits.detach())
        assert float(grid.values.values[0, 2, 1]) == pytest.approx(float(wanted), abs=1e-5)
        for verb, what in ((avl.path_patch, "path patching"), (avl.edge_attribution, "edge attribution")):
            with pytest.raises(ModelError, match=rf"{what} .* cannot here: hooks stand at blocks.0.attn"):
                verb(model, pair, metric=metric)


# Other hooks than at the recording


def test_a_trace_is_of_the_model_as_it_was_hooked():
    model, x = small_model(), small_inputs((0,))
    clean, truth = model.trace(x), logits_of(model, x)
    with model.hooks(fwd_hooks=[(Z, ablate)]):
        hooked, hooked_truth = model.trace(x), logits_of(model, x)
        replayed = hooked.replay(PLANS)
        metric = logit_diff(letter("a"), letter("b"))
        for verb in (
            lambda: clean.replay(PLANS),
            lambda: clean.score(PLANS, metric),
            lambda: clean.schedule(PLANS),
            lambda: clean.gradients(Site("z", 1), metric),
            lambda: clean.generate(Plan(), max_new_tokens=1),
            lambda: sweep(clean, PLANS, metric),
        ):
            with pytest.raises(InterventionError, match=r"recorded with hooks at nothing, and the model now has hooks"):
                verb()
        close(clean.logits("all"), truth)  # what was said then
    close(hooked.logits("all"), hooked_truth)
    message = (
        r"recorded with hooks at blocks.3.attn.o.hook_in, and the model now has hooks at nothing: a number would be "
        r"true of neither. Record again with model.trace\(x\), or put the hooks back as they were"
    )
    with pytest.raises(InterventionError, match=message):
        hooked.replay(PLANS)
    with model.hooks(fwd_hooks=[(Z, ablate)]):  # the same function in the same place
        assert torch.equal(hooked.replay(PLANS), replayed)
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", ablate)]), pytest.raises(InterventionError, match="neither"):
        hooked.replay(PLANS)


def test_traces_under_hooks_are_not_saved_and_none_is_opened_under_them(tmp_path):
    model, x = small_model(), small_inputs((0,))
    path = model.trace(x).save(tmp_path / "run")
    with model.hooks(fwd_hooks=[(Z, look)]):
        with pytest.raises(InterventionError, match=r"functions cannot be saved: .* write what they do as a Plan"):
            model.trace(x).save(tmp_path / "hooked")
        with pytest.raises(InterventionError, match=r"was recorded without hooks, and the model has hooks at blocks.3"):
            avl.replay.traces.Trace.load(path, model, x)
    assert avl.replay.traces.Trace.load(path, model, x).hooked_because == ""
    assert not (tmp_path / "hooked.safetensors").exists()


def test_logits_that_are_kept_are_counted_before_the_run():
    model, x = small_model(), small_inputs((0,))
    needed = record_bytes(model, x, logits=True) / 1e9
    with model.hooks(fwd_hooks=[(Z, look)]):
        assert model.trace(x, budget_gb=needed * 1.01).hooked_because
        with pytest.raises(BudgetError, match=r"and all logits, which standing hooks may change, needs 0\.0 GB"):
            model.trace(x, budget_gb=needed * 0.99)


def test_encoders_that_remember_forget_under_other_hooks():
    model, x = small_model(), small_inputs((0,))
    inner = model.bridge.audio_encoder.original_component.layers[0]
    with remembered_towers(model):
        logits_of(model, x)
        with removed(inner.register_forward_hook(lambda module, args, out: (out[0] * 2.0, *out[1:]))):
            changed = logits_of(model, x)
        assert float((changed - plain()).abs().max()) > 1e-4
        with model.hooks(fwd_hooks=[("audio_encoder.hook_out", lambda heard, hook: heard.zero_())]):
            logits_of(model, x)  # in place: the memory keeps its own
        assert torch.equal(logits_of(model, x), plain())


# At random

EFFECTS = {
    "read": lambda v, index: None,
    "tiny": lambda v, index: v.index_add(1, index, v.index_select(1, index), alpha=1e-4),
    "large": lambda v, index: v.index_fill(1, index, 0.0),
    "huge": lambda v, index: v.index_add(1, index, v.index_select(1, index), alpha=30.0),
}


@cache
def hook_places() -> tuple[str, ...]:
    """Every hook point of the model that fires unasked, encoders too, and torch modules (marked by a star)."""
    model, fired = small_model(), []
    points = model.bridge.hook_dict
    with model.hooks(fwd_hooks=[(lambda name: True, lambda v, hook: fired.append(hook.name))]):
        logits_of(model, small_inputs((0,)))
    modules = [f"*{name}" for name, module in model.bridge.named_modules() if isinstance(module, torch.nn.Linear)]
    return tuple(sorted(name for name in set(fired) if name in points)) + tuple(modules)


def standing(stack: ExitStack, model: Any, place: str, effect: str, start: int, count: int, road: str) -> None:
    """Put one hook on the model until the stack closes."""

    def change(v: Any) -> Any:
        if not isinstance(v, torch.Tensor) or not v.is_floating_point() or v.ndim < 2:
            return None
        first = start % v.shape[1]
        return EFFECTS[effect](v, torch.arange(first, min(first + count, v.shape[1])))

    if place.startswith("*"):
        module = model.bridge.get_submodule(place[1:])
        stack.enter_context(removed(module.register_forward_hook(lambda module, args, out: change(out))))
    elif road == "added":
        handle = model.bridge.hook_dict[place].add_hook(lambda v, hook: change(v))
        stack.callback(model.reset_hooks)
        assert handle is not None
    else:
        stack.enter_context(model.hooks(fwd_hooks=[(place, lambda v, hook: change(v))]))


drawn_hooks = st.tuples(
    st.integers(0, 10_000),
    st.sampled_from(tuple(EFFECTS)),
    st.integers(0, 200),
    st.integers(1, 200),
    st.sampled_from(("context", "added")),
)
drawn_states = st.lists(st.lists(drawn_hooks, min_size=0, max_size=3), min_size=1, max_size=3)


def check_states(states: list[list[Any]]) -> None:
    """One state after the other: traces of each are its own, and those of the state before are refused."""
    model, x = small_model(), small_inputs((0,))
    before: Any = None
    truth_before = torch.empty(0)
    for hooks in states:
        with ExitStack() as stack:
            for place, *how in hooks:
                standing(stack, model, hook_places()[place % len(hook_places())], *how)
            if before is not None:
                close(before.logits("all"), truth_before)
                if hooks or before.standing:
                    with pytest.raises(InterventionError, match="true of neither"):
                        before.replay(PLANS)
            truth_before = logits_of(model, x)
            encoders_only = all(hook.in_tower for hook in standing_hooks(model))
            before = check_trace(model, x, hooked=not encoders_only, swept=True)
    assert standing_hooks(model) == ()


repeatable = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=2, **repeatable)
@given(drawn_states)
def test_hooks_at_random_are_in_force(states):
    check_states(states)


@pytest.mark.slow
@settings(max_examples=500, **repeatable)
@given(drawn_states)
def test_many_more_hooks_at_random_are_in_force(states):
    check_states(states)
