"""One decoder layer, written once: what it computes, for all who compute it or read its weights, and its hooks by name.

    >>> hook_name("z", 3)
    'blocks.3.attn.hook_z'

A hook is *gated* when TransformerLens fires it only after a switch is set (`hook_result` costs a tensor `[batch, pos,
head, d_model]` per layer). `HookedAVLLM` sets the switch for exactly the run that names the hook.

    q, k, v  = W_q n, W_k n, W_v n          n = ln1(stream); heads `[..., pos, head, d_head]`: here stand hook_q, _k, _v
    q', k'   = rotary(q_norm(q)), ...       the norms where the layer has them: here stand hook_rot_q, hook_rot_k
    z        = softmax(q' k'^T scaling + mask) v
    stream  += W_o z;   stream += W_down (act(W_gate m) * W_up m),   m = ln2(stream)

Attention is there twice: `attended`, with scores and pattern written out, and `flash`, torch's kernels, which store no
scores (where gradients are wanted, or no kernel takes the input, they are written out there too).

Known layout: pre-norm blocks, rotary grouped-query attention, gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from av_lens.errors import InterventionError, ModelError, unknown
from av_lens.families.kernels import on_cuda
from av_lens.families.weights import dense


@dataclass(frozen=True)
class Component:
    """What one hook of the fusion stack holds."""

    name: str  # the word used in sites and in `hook_name`
    path: str  # the hook's name inside its layer, or the whole name for a hook outside the layers
    axes: tuple[str, ...]  # the tensor's axes, in order
    gate: str | None = None  # the TransformerLens switch that must be on for the hook to fire, or None
    layered: bool = True  # whether each layer has one
    writable: bool = True  # whether a write changes what follows
    note: str = ""  # what a reader must know before using it

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

ROUTER = {"logits": "hook_out", "weights": "hook_expert_weights", "indices": "hook_expert_indices"}
"""The hooks of a layer's router, TransformerLens's own: each `[batch * pos, expert]`; of indices the chosen alone."""


def router_hook(part: str, layer: int) -> str:
    """The TransformerLens name of a hook of a layer's router, such as `blocks.3.mlp.gate.hook_expert_indices`."""
    return f"blocks.{layer}.mlp.gate.{ROUTER[part]}"


FEW_KEYS = 8  # below it a plain product is faster than a kernel


def _shown(component: str, activation: Tensor) -> Tensor:
    del component
    return activation


def given_weights(router: Any, logits: Float[Tensor, "*rows expert"], chosen: Tensor) -> Float[Tensor, "*rows chosen"]:
    """What a router gives to these experts: its softmax over all, in float32, summed to one where it does so."""
    shares = _softmax(logits).gather(-1, chosen)
    return (shares / shares.sum(-1, keepdim=True) if router.norm_topk_prob else shares).to(logits.dtype)


def readable(weight: Any) -> bool:
    """Whether a weight lies there as plain numbers: neither waiting elsewhere (meta) nor packed."""
    there = isinstance(weight, Tensor) and weight.device.type != "meta"
    return there and weight.is_floating_point() and weight.itemsize > 1


def weight_of(module: Any, name: str = "weight") -> Tensor:
    """A module's weight as plain numbers; fetched where it waits elsewhere, refused where it is packed."""
    weight: Any = getattr(module, name, None)
    return weight if readable(weight) else dense(module, name)


def applied(linear: Any, rows: Tensor) -> Tensor:
    """A projection of `[..., d]`; packed ones are shown plain rows, since their kernels know no further axes."""
    weight = getattr(linear, "weight", None)
    if rows.ndim < 4 or (isinstance(weight, Tensor) and weight.dtype.itemsize > 1):
        return linear(rows)
    return linear(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer's own modules, found through the bridge."""

    ln1: Any  # norm before attention
    ln2: Any  # norm before the MLP
    q: torch.nn.Linear  # query projection
    k: torch.nn.Linear  # key projection
    v: torch.nn.Linear  # value projection
    o: torch.nn.Linear  # output projection
    gate: Any  # the MLP's gate
    up: Any  # the MLP's other input projection
    down: Any  # the MLP's output projection
    act: Any  # the MLP's non-linearity
    d_head: int  # width of one head
    scaling: float  # factor of the scores
    norms: dict[str, Any]  # the norms of queries and keys, "q" and "k", where the layer has them
    experts: Any = None  # the many MLPs that stand in one's place; None where there is one
    router: Any = None  # what chooses among them

    @classmethod
    def of(cls, block: Any) -> Layer:
        """Find the modules of a bridge's block; ModelError for one that says that its layout is its own."""
        if block.own_layout:
            raise ModelError(f"what computes this layer or reads its weights would be wrong here: {block.own_layout}.")
        attention, mlp = block.attn, block.mlp
        inner = attention.original_component
        own = attention._modules
        plain = ("dense_gate", "dense_in", "dense_out") if "dense_in" in mlp._modules else ("gate", "in", "out")
        experts = getattr(mlp.original_component, "experts", None)
        parts = [None if experts is not None else mlp._modules[name].original_component for name in plain]
        return cls(
            ln1=block.ln1.original_component,
            ln2=block.ln2.original_component,
            q=attention.q.original_component,
            k=attention.k.original_component,
            v=attention.v.original_component,
            o=attention.o.original_component,
            gate=parts[0],
            up=parts[1],
            down=parts[2],
            act=None if experts is not None else mlp.original_component.act_fn,
            experts=experts,
            router=None if experts is None else mlp._modules["gate"].original_component,
            d_head=inner.head_dim,
            scaling=inner.scaling,
            norms={kind: own[f"{kind}_norm"].original_component for kind in "qk" if f"{kind}_norm" in own},
        )

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.q.out_features // self.d_head

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads."""
        return self.k.out_features // self.d_head

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.n_heads // self.n_kv_heads

    def heads(self, kind: str, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows head d_head"]:
        """Queries ("q"), keys ("k") or values ("v") of the normed stream, where `hook_q`, `hook_k`, `hook_v` stand."""
        return applied(getattr(self, kind), normed).unflatten(-1, (-1, self.d_head))

    def head(self, kind: str, index: int, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_head"]:
        """The same of one head alone: a query head, or for keys and values a key-value head."""
        linear, part = getattr(self, kind), slice(index * self.d_head, (index + 1) * self.d_head)
        if not readable(linear.weight):  # fetched or packed: through the module, which alone knows its numbers
            return applied(linear, normed)[..., part]
        return functional.linear(normed, linear.weight[part], None if linear.bias is None else linear.bias[part])

    def turned(self, kind: str, heads: Tensor, cos: Tensor, sin: Tensor, *, fused: bool = False) -> Tensor:
        """Queries or keys as scores read them: normed where the layer norms them, then rotated."""
        return rotated(self.norms[kind](heads) if kind in self.norms else heads, cos, sin, fused=fused)

    def rows(self, kind: str) -> Float[Tensor, "head d_head d_model"]:
        """The weights by which each query head reads the normed stream; heads that share a key have the same."""
        weight = weight_of(getattr(self, kind)).detach().unflatten(0, (-1, self.d_head))
        return weight.repeat_interleave(self.n_heads // weight.shape[0], dim=0)

    def outputs(self) -> Float[Tensor, "head d_head d_model"]:
        """The weights by which each head writes to the stream."""
        return weight_of(self.o).detach().T.unflatten(0, (-1, self.d_head))

    def along(self, direction: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows head d_head"]:
        """How far each number of z moves the stream along a direction."""
        return (direction @ weight_of(self.o).detach()).unflatten(-1, (-1, self.d_head))

    def write(self, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows d_model"]:
        """What all heads together write to the stream."""
        return applied(self.o, z.flatten(-2))

    def results(self, z: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows head d_model"]:
        """What each head writes by itself, without a bias."""
        return torch.einsum("...hd,mhd->...hm", z, weight_of(self.o).detach().unflatten(1, (-1, self.d_head)))

    def mlp(
        self,
        normed: Tensor,
        show: Callable[[str, Tensor], Tensor] = _shown,
        matched: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda first, second: (first, second),
    ) -> Tensor:
        """What the MLP writes; `show` may change what stands at its hooks, and name other "experts"."""
        if self.experts is not None:
            rows = normed.reshape(-1, normed.shape[-1])
            logits, weights, own = self.router(rows)
            own = own.unflatten(0, normed.shape[:-1])
            chosen = show("experts", own)
            if chosen is not own:
                weights = given_weights(self.router, logits, chosen.flatten(0, -2))
            return self.experts(rows, chosen.flatten(0, -2), weights).view(normed.shape)
        gate, up = applied(self.gate, normed), applied(self.up, normed)
        gate, up = matched(show("mlp_pre", gate), show("mlp_pre_linear", up))
        return applied(self.down, show("mlp_post", self.act(gate) * up))


def sizes_of(block: Any, n_heads: int) -> tuple[int, int, int]:
    """One of the bridge's blocks: its key-value heads, the width of a head, and the units of its one MLP, if any."""
    attention, parts = block.attn.original_component, block.mlp._modules
    up = next((parts[name].original_component for name in ("in", "dense_in") if name in parts), None)
    return n_heads // attention.num_key_value_groups, attention.head_dim, 0 if up is None else up.out_features


def at_scale(norm: Any, stream: Tensor, base: Tensor) -> Tensor:
    """Norm a stream by the scale of another one."""
    variance = base.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon
    return weight_of(norm) * (stream.float() * torch.rsqrt(variance)).to(stream.dtype)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor, *, fused: bool = False) -> Tensor:
    """Apply rotary position: heads x cos + (-second half, first half) x sin, rounded in HuggingFace's order.

    Fused, the second is added without a rounding of its own, in place. Narrow tables turn a head's first numbers alone.
    """
    width = cos.shape[-1]
    if width < heads.shape[-1]:
        return torch.cat((rotated(heads[..., :width], cos, sin, fused=fused), heads[..., width:]), dim=-1)
    first, second = heads.chunk(2, dim=-1)
    if not fused:
        return heads * cos + torch.cat((-second, first), dim=-1) * sin
    half, found = first.shape[-1], heads * cos
    found[..., :half].addcmul_(second, sin[..., :half], value=-1)
    found[..., half:].addcmul_(first, sin[..., half:])
    return found


@dataclass(frozen=True, eq=False)
class Read:
    """Keys and values that queries read, or some of them."""

    keys: Tensor  # `[..., key, d_head]`
    values: Tensor  # likewise
    mask: Tensor | None = None  # added to the scores
    # the product of `[..., head, row, _]` with keys or values, where these are shared in some way
    times: Callable[[Tensor, Tensor], Tensor] = torch.matmul


def _softmax(scores: Tensor) -> Tensor:
    return functional.softmax(scores, dim=-1, dtype=torch.float32)


def _same(activation: Tensor) -> Tensor:
    return activation


def attended(
    queries: Float[Tensor, "*_ row d_head"],
    read: Sequence[Read],
    scaling: float,
    *,
    scores: Callable[[Tensor], Tensor] = _same,
    softmax: Callable[[Tensor], Tensor] = _softmax,
    pattern: Callable[[Tensor], Tensor] = _same,
    values: Read | None = None,
) -> tuple[Float[Tensor, "*_ row d_head"], Float[Tensor, "*_ row key"]]:
    """Attend with scores and pattern written out."""
    parts = [one.times(queries, one.keys.transpose(-1, -2)) * scaling for one in read]
    parts = [part if one.mask is None else part + one.mask for part, one in zip(parts, read, strict=True)]
    weights = pattern(softmax(scores(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])).to(queries.dtype))
    if values is not None:
        return values.times(weights, values.values), weights
    pieces = weights.split([part.shape[-1] for part in parts], dim=-1) if len(parts) > 1 else (weights,)
    z = [one.times(piece, one.values) for one, piece in zip(read, pieces, strict=True)]
    return (z[0] if len(z) == 1 else z[0] + z[1]), weights


def flash(
    q: Float[Tensor, "batch head row d_head"],
    k: Float[Tensor, "batch head key d_head"],
    v: Float[Tensor, "batch head key d_head"],
    scaling: float,
    *,
    mask: Float[Tensor, "..."] | None = None,
    causal: bool = False,
) -> tuple[Float[Tensor, "batch head row d_head"], Float[Tensor, "batch head row"]]:
    """Attend by one of torch's kernels where one can, and hand back the log-sum-exp of the scores."""
    plain = torch.is_grad_enabled() or k.shape[2] < FEW_KEYS or not q.shape[2]  # the kernel divides by its rows
    kernel = None if plain else KERNELS.get(q.device.type)
    found = None if kernel is None else kernel(q, k, v, mask, causal, scaling)
    if found is not None:
        return found
    scores = (q @ k.transpose(-1, -2)).float() * scaling
    if causal:
        scores = scores + causal_mask(k.shape[2], scores)
    elif mask is not None:
        scores = scores + mask.float()
    weight = scores.logsumexp(-1)
    return (scores - weight[..., None]).exp().to(v.dtype) @ v, weight


def as_forward(position_ids: Shaped[Tensor, "stream batch pos"]) -> Shaped[Tensor, "*stream batch pos"]:
    """Position ids as a forward and its rotary embedding take them: a single stream without its axis."""
    return position_ids[0] if position_ids.shape[0] == 1 else position_ids


def on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Attend by torch's kernel for CPUs."""
    options: dict[str, Any] = {"attn_mask": mask, "scale": scaling}
    found, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, **options)
    return found, weight.float()


KERNELS = {"cpu": on_cpu, "cuda": on_cuda}


def causal_mask(n: int, like: Tensor) -> Float[Tensor, "1 1 pos pos"]:
    """The additive mask of a causal model: 0 where a query may read, the precision's least number where not."""
    lowest = torch.finfo(like.dtype).min
    return torch.full((1, 1, n, n), lowest, dtype=like.dtype, device=like.device).triu(1)
