"""Gemma 4's own blocks: what its layers do that no other family's do, and where they stand (`docs/families.md`).

    stream = (stream + norm(attn(ln1(stream))) + norm(mlp(ln2(.))) + norm(W_2 (act(W_1 .) * own))) * scalar

Keys are normed and rotated, values normed without a weight. Experts read the stream by norms of their own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from av_lens.errors import InputError
from av_lens.families.adapter import DecoderAdapter, WithMedia
from av_lens.families.blocks import FullBlockBridge, RealAttentionBridge, RealRMSNormBridge

PIXELS = {"video": "pixel_values_videos", "image": "pixel_values"}


class Gemma4NormBridge(RealRMSNormBridge):
    """Gemma's RMSNorm, which weighs before it rounds; those of values have no weight."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Norm the stream."""
        norm: Any = self.original_component
        stream = self.hook_in(hidden_states)
        wide = stream.float()
        variance = wide.pow(2).mean(-1, keepdim=True) + norm.eps
        normalized = self.hook_normalized(self.scaled(wide, variance, lambda one: torch.pow(one, -0.5)))
        return self.hook_out((normalized * norm.weight.float() if norm.with_scale else normalized).type_as(stream))


def lacking(attention: Any) -> list[str]:
    """The hooks of what a layer's attention has not, but for those of its projections."""
    if attention.is_kv_shared_layer:
        return ["hook_k_input", "hook_v_input", "hook_rot_k", "hook_k_normed"]
    return ["hook_v_input"] if attention.v_proj is None else []


class Gemma4AttentionBridge(RealAttentionBridge):
    """Attention whose keys and values may be one projection's, or another layer's."""

    def set_original_component(self, component: Any) -> None:
        """Take the layer's attention, and drop the hooks of what it has not."""
        super().set_original_component(component)
        for name in lacking(component):
            self._modules.pop(name, None)
            self._hook_registry.pop(name, None)

    def _normed(self, heads: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        value = heads.pop("v", heads.get("k"))
        made = super()._normed(heads)
        return made if value is None else (*made, self.v_norm(value))

    def _read(self, own: list[torch.Tensor], tables: tuple[torch.Tensor, ...], told: dict[str, Any]) -> Any:
        attention: Any = self.original_component
        shared = told["shared_kv_states"]
        if attention.is_kv_shared_layer:
            return shared[attention.layer_type]
        read = super()._read(own, tables, told)
        if attention.store_full_length_kv:
            shared[attention.layer_type] = read
        return read


class Gemma4BlockBridge(FullBlockBridge):
    """A layer with norms behind its writes, a third write, and a scale."""

    own_layout = "its layers norm what they write and scale the stream"

    def set_original_component(self, original_component: Any) -> None:
        """Take the layer, and drop the names of hooks that its attention has not."""
        super().set_original_component(original_component)
        absent = lacking(original_component.self_attn)
        self.hook_aliases = {name: path for name, path in self.hook_aliases.items() if name not in absent}

    def _attended(self, stream: torch.Tensor, told: dict[str, Any]) -> torch.Tensor:
        return self.ln1_post(super()._attended(stream, told))

    def _fed(self, entering: torch.Tensor) -> torch.Tensor:
        written = super()._fed(entering)
        if "experts" in self.submodules:
            rows = entering.reshape(-1, entering.shape[-1])
            _, weights, chosen = self.router(rows)
            mixed = self.experts(self.ln_experts(rows), chosen, weights).reshape(entering.shape)
            written = self.ln_mlp_post(written) + self.ln_experts_post(mixed)
        return self.ln2_post(written)

    def _leaving(self, stream: torch.Tensor, told: tuple[Any, ...]) -> torch.Tensor:
        layer: Any = self.original_component
        if "per_layer_gate" in self.submodules:
            gated = layer.act_fn(self.per_layer_gate(stream)) * told[0]
            stream = stream + self.per_layer_post(self.per_layer_out(gated))
        return stream * layer.layer_scalar


class WholePrompt(WithMedia):
    """Mixed into HuggingFace's inner model, which before layers that share keys drops all but the asked position."""

    def forward(self, **kwargs: Any) -> Any:
        """Run the model."""
        kwargs.pop("logits_to_keep", None)
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is not None and (cache is None or not cache.get_seq_length()):
            self.require_media(ids, kwargs)
            self._require_kinds(kwargs)
        return super().forward(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _require_kinds(self, kwargs: Mapping[str, Any]) -> None:
        both_ways = self.config.get_text_config().use_bidirectional_attention == "vision"
        seen = any(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        if both_ways and seen and kwargs.get("mm_token_type_ids") is None:
            raise InputError(
                "pictures attend both ways here, and mm_token_type_ids, which say where they stand, did not come with "
                "them: the model would read them forward alone. Make the input with model.encode, or by one call of "
                "the checkpoint's processor."
            )


class Gemma4Adapter(DecoderAdapter):
    """Which of TransformerLens's components stand where."""

    towers = {  # noqa: RUF012
        "audio_encoder": ("model.audio_tower", "last_hidden_state"),
        "vision_encoder": ("model.vision_tower", "last_hidden_state"),
    }
    media = {"audio": "input_features", **PIXELS}  # noqa: RUF012
    inner = WholePrompt
    _attention_bridge_cls = Gemma4AttentionBridge
    _block_cls = Gemma4BlockBridge

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.supports_fold_ln = False
        more = {kind: GeneralizedComponent(f"model.embed_{kind}", optional=True) for kind in ("vision", "audio")}
        found = {f"{kind}_projector": component for kind, component in more.items()}
        self.component_mapping = {**(self.component_mapping or {}), **found}

    def _norm(self, name: str) -> Gemma4NormBridge:
        return Gemma4NormBridge(name=name, config=self.cfg, optional=True)

    def _layer(self) -> dict[str, Any]:
        """What only some layers have is optional."""
        norms = {"ln1_post": "post_attention", "ln2": "pre_feedforward", "ln2_post": "post_feedforward"}
        made = super()._layer() | {name: self._norm(f"{path}_layernorm") for name, path in norms.items()}
        third = {"per_layer_gate": "per_layer_input_gate", "per_layer_out": "per_layer_projection"}
        made |= {name: LinearBridge(name=path, optional=True) for name, path in third.items()}
        made |= {name: GeneralizedComponent(name, optional=True) for name in ("router", "experts")}
        more = {
            "per_layer_post": "post_per_layer_input_norm",
            "ln_mlp_post": "post_feedforward_layernorm_1",
            "ln_experts": "pre_feedforward_layernorm_2",
            "ln_experts_post": "post_feedforward_layernorm_2",
        }
        return made | {name: self._norm(path) for name, path in more.items()}

    def _build_attention_bridge(self) -> Any:
        norms: dict[str, Any] = {f"{kind}_norm": self._norm(f"{kind}_norm") for kind in "qkv"}
        attention = self._qkvo_attention_bridge(extra_submodules=norms)
        for kind in "kv":
            attention.submodules[kind].optional = True
        return attention
