"""Where hook names come from: the one place that builds them, and the table of what each hook holds.

Names are TransformerLens's own (`blocks.3.attn.hook_z`), built from a component and a layer, never parsed:

    >>> hook_name("z", 3)
    'blocks.3.attn.hook_z'
    >>> hook_name("embed")
    'hook_embed'

A hook is *gated* when TransformerLens fires it only after a switch is set (`hook_result` costs a tensor
`[batch, pos, head, d_model]` per layer). `HookedAVLLM` sets the switch for exactly the run that names the hook.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from av_lens.errors import InterventionError, unknown


@dataclass(frozen=True)
class Component:
    """What one hook of the fusion stack holds.

    Attributes:
        name: the word used in sites and in `hook_name`.
        path: the hook's name inside its layer, or the whole name for a hook outside the layers.
        axes: the tensor's axes, in order.
        gate: the TransformerLens switch that must be on for the hook to fire, or None.
        layered: whether each layer has one.
        writable: whether a write changes what follows.
        note: what a reader must know before using it.
    """

    name: str
    path: str
    axes: tuple[str, ...]
    gate: str | None = None
    layered: bool = True
    writable: bool = True
    note: str = ""

    @property
    def pos_axis(self) -> int:
        """Which axis counts positions (the query's, for scores and patterns)."""
        return self.axes.index("query_pos" if "query_pos" in self.axes else "pos")

    @property
    def head_axis(self) -> int | None:
        """Which axis counts heads (key-value heads for `k`, `v`, `rot_k`), or None."""
        for axis in ("head", "kv_head"):
            if axis in self.axes:
                return self.axes.index(axis)
        return None


_STREAM = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")
_KV_HEADS = ("batch", "pos", "kv_head", "d_head")
_EDGES = ("batch", "head", "query_pos", "key_pos")
_FORK = ("batch", "pos", "head", "d_model")
_KV_FORK = ("batch", "pos", "kv_head", "d_model")
_UNITS = ("batch", "pos", "d_mlp")

_ALL = (
    Component("embed", "hook_embed", _STREAM, layered=False, note="the stream after the media are scattered in"),
    Component("embed_text", "embed.hook_out", _STREAM, layered=False, note="raw text embedding; media come after"),
    Component("resid_pre", "hook_resid_pre", _STREAM),
    Component("attn_in", "hook_attn_in", _FORK, gate="use_attn_in", note="one copy of the stream per head"),
    Component("q_input", "hook_q_input", _FORK, gate="use_split_qkv_input"),
    Component("k_input", "hook_k_input", _KV_FORK, gate="use_split_qkv_input"),
    Component("v_input", "hook_v_input", _KV_FORK, gate="use_split_qkv_input"),
    Component("ln1_scale", "ln1.hook_scale", ("batch", "pos", "one")),
    Component("ln1", "ln1.hook_normalized", _STREAM),
    Component("q", "attn.hook_q", _HEADS, note="before rotary position"),
    Component("k", "attn.hook_k", _KV_HEADS, note="before rotary position"),
    Component("v", "attn.hook_v", _KV_HEADS),
    Component("rot_q", "attn.hook_rot_q", _HEADS),
    Component("rot_k", "attn.hook_rot_k", _KV_HEADS, note="only the new keys while decoding with a cache"),
    Component("scores", "attn.hook_attn_scores", _EDGES, note="before softmax; masked edges hold the dtype's minimum"),
    Component("pattern", "attn.hook_pattern", _EDGES, note="after softmax; rows sum to one"),
    Component("z", "attn.hook_z", _HEADS),
    Component("result", "attn.hook_result", _FORK, gate="use_attn_result", note="each head's write to the stream"),
    Component("attn_out", "hook_attn_out", _STREAM),
    Component("resid_mid", "hook_resid_mid", _STREAM),
    Component("mlp_in", "hook_mlp_in", _STREAM, gate="use_hook_mlp_in", note="the MLP's own copy of resid_mid"),
    Component("ln2_scale", "ln2.hook_scale", ("batch", "pos", "one")),
    Component("ln2", "ln2.hook_normalized", _STREAM),
    Component("mlp_pre", "mlp.hook_pre", _UNITS, note="the gate, before its non-linearity"),
    Component("mlp_pre_linear", "mlp.hook_pre_linear", _UNITS),
    Component("mlp_post", "mlp.hook_post", _UNITS),
    Component("mlp_out", "hook_mlp_out", _STREAM),
    Component("resid_post", "hook_resid_post", _STREAM),
    Component("final_scale", "ln_final.hook_scale", ("batch", "pos", "one"), layered=False),
    Component("final", "ln_final.hook_normalized", _STREAM, layered=False),
    Component("logits", "unembed.hook_out", ("batch", "pos", "d_vocab"), layered=False),
)

COMPONENTS: dict[str, Component] = {component.name: component for component in _ALL}
"""Every hook of the fusion stack by its short word."""


def component_named(name: str) -> Component:
    """The component of that word; others are refused with the nearest."""
    if name not in COMPONENTS:
        raise InterventionError(unknown("component", name, COMPONENTS))
    return COMPONENTS[name]


def hook_name(component: str, layer: int | None = None) -> str:
    """The TransformerLens name of a component's hook, such as `blocks.3.attn.hook_z`; None outside the layers."""
    found = component_named(component)
    if not found.layered:
        if layer is not None:
            raise InterventionError(
                f"{component!r} lies outside the layers, but layer {layer} was given; leave it out."
            )
        return found.path
    if layer is None:
        raise InterventionError(f"{component!r} exists in every layer; say which: hook_name({component!r}, layer).")
    if layer < 0:
        raise InterventionError(f"layer {layer} is negative; count fusion layers from 0.")
    return f"blocks.{layer}.{found.path}"


def layer_names(component: str, n_layers: int) -> tuple[str, ...]:
    """The hook's name in every layer, in order."""
    return tuple(hook_name(component, layer) for layer in range(n_layers))


def gates_named(names: Iterable[str], known: Iterable[str]) -> frozenset[str]:
    """The switches that a run needs which names these hooks, aliases included; no hook is refused with the nearest."""
    known = frozenset(known)
    gates: set[str] = set()
    for name in names:
        if name not in known:
            raise InterventionError(unknown("hook", name, sorted(known)))
        gates.update(gate for ending, gate in _GATED_ENDINGS if name.endswith(ending))
    return frozenset(gates)


_GATED_ENDINGS: tuple[tuple[str, str], ...] = tuple(
    (component.path.rpartition(".")[2], component.gate) for component in _ALL if component.gate is not None
)

GATES: tuple[str, ...] = tuple(dict.fromkeys(gate for _, gate in _GATED_ENDINGS))
"""The switches of TransformerLens's configuration that gate hooks."""
