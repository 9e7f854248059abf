"""Hook names and what each hook holds."""

from __future__ import annotations

import pytest
import torch
from tiny import Tensors, tiny_model, tiny_tensors

from av_lens.errors import InterventionError
from av_lens.families.decoder import COMPONENTS, GATES, gates_named, hook_name, layer_names


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    ("component", "layer", "name"),
    [
        ("embed", None, "hook_embed"),
        ("resid_pre", 0, "blocks.0.hook_resid_pre"),
        ("resid_mid", 3, "blocks.3.hook_resid_mid"),
        ("z", 27, "blocks.27.attn.hook_z"),
        ("rot_k", 2, "blocks.2.attn.hook_rot_k"),
        ("scores", 1, "blocks.1.attn.hook_attn_scores"),
        ("pattern", 1, "blocks.1.attn.hook_pattern"),
        ("mlp_post", 1, "blocks.1.mlp.hook_post"),
        ("final_scale", None, "ln_final.hook_scale"),
    ],
)
def test_names_are_transformer_lens_names(component, layer, name):
    assert hook_name(component, layer) == name


def test_layer_names_are_in_order():
    assert layer_names("z", 2) == ("blocks.0.attn.hook_z", "blocks.1.attn.hook_z")


@pytest.mark.parametrize(
    ("component", "layer", "text"),
    [
        ("resid_past", 0, "unknown component 'resid_past'. Did you mean 'resid_post'?"),
        ("z", None, "'z' exists in every layer; say which"),
        ("embed", 0, "'embed' lies outside the layers, but layer 0 was given"),
        ("z", -1, "layer -1 is negative"),
    ],
)
def test_wrong_names_are_refused_with_the_mend(component, layer, text):
    with pytest.raises(InterventionError) as error:
        hook_name(component, layer)
    assert text in str(error.value)


def test_every_component_has_the_axes_it_claims(model):
    x = Tensors(tiny_tensors("in_video"))
    names = {name: hook_name(name, 1 if c.layered else None) for name, c in COMPONENTS.items()}
    sizes = vars(model.spec)
    batch, pos = x.tensors["input_ids"].shape
    length = {"batch": batch, "pos": pos, "query_pos": pos, "key_pos": pos, "one": 1, "head": sizes["n_heads"]}
    length |= {
        "kv_head": sizes["n_kv_heads"],
        **{axis: sizes[axis] for axis in ("d_model", "d_head", "d_mlp", "d_vocab")},
    }
    forks = [name for name, c in COMPONENTS.items() if c.gate == "use_split_qkv_input"]
    with torch.no_grad():
        _, cache = model.run_with_cache(x, [names[name] for name in names if name not in forks])
        _, forked = model.run_with_cache(x, [names[name] for name in forks])
    for name, component in COMPONENTS.items():
        found = (forked if name in forks else cache)[names[name]]
        assert tuple(found.shape) == tuple(length[axis] for axis in component.axes), name


def test_gates_are_found_from_names_as_callers_write_them(model):
    known = model.hook_dict
    assert gates_named(["blocks.0.attn.hook_result", "blocks.1.attn.hook_z"], known) == {"use_attn_result"}
    assert gates_named(["blocks.0.hook_mlp_in"], known) == {"use_hook_mlp_in"}
    assert gates_named(["blocks.0.attn.hook_q_input", "blocks.2.hook_v_input"], known) == {"use_split_qkv_input"}
    assert gates_named(["blocks.0.hook_attn_in"], known) == {"use_attn_in"}
    assert gates_named(["hook_embed", "blocks.0.attn.hook_in", "blocks.0.mlp.hook_in"], known) == frozenset()
    assert set(GATES) == {"use_attn_in", "use_split_qkv_input", "use_attn_result", "use_hook_mlp_in"}
    with pytest.raises(InterventionError, match=r"Did you mean 'blocks\.0\.attn\.hook_z'"):
        gates_named(["blocks.0.attn.hook_zz"], known)


def test_no_hook_of_a_layer_is_dead(model):
    """A hook point that exists and never fires would make an edit there a silent no-op."""
    x = Tensors(tiny_tensors("in_video"))
    forks = ("hook_q_input", "hook_k_input", "hook_v_input")
    with torch.no_grad():
        _, plain = model.run_with_cache(x, lambda name: not name.endswith(forks))
        _, forked = model.run_with_cache(x, lambda name: name.endswith(forks))
    assert set(model.hook_dict) == set(plain) | set(forked)
