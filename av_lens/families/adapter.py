"""How TransformerLens's components map onto a decoder: one adapter for every pre-norm, rotary, gated decoder.

A family says where its parts lie and what its layers have beyond the plain ones:

| fact | what it says |
|---|---|
| `decoder` | the path of the module that holds `embed_tokens`, `layers` and `norm` |
| `towers` | the encoders: TransformerLens's name, their path, and the output that the fusion stack receives |
| `media` | the tensor that comes with the placeholders of each kind; none where the inner model takes text alone |
| `qk_norm` | queries and keys are normed, head by head, before rotary position |
| `experts` | layers route each position to some of many MLPs; a layer may still have a plain one |
| `biases` | queries, keys and values have biases |
| `fused` | projections that are stored as one, by path in a layer, and what each of their parts is called |
| `inner` | what is mixed into the inner model, so that it runs as it is called here |

It also says where a restart in the middle of a run is not exact (`ReplayTraits`; `docs/replay.md` lists what follows):
where a layer reads more than the recorded stream, keys, values and the first layer's mask, or later positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    EmbeddingBridge,
    LinearBridge,
    MoEBridge,
    MoERouterBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from av_lens.errors import InputError, ModelError, unknown
from av_lens.families.blocks import FullBlockBridge, RealAttentionBridge, RealRMSNormBridge, install_embed_hook
from av_lens.families.fused import take_apart
from av_lens.spans import ROLES

_REMAKE = "Make the input with model.encode, or by one call of the checkpoint's processor."


_HOOKED = {
    "per_layer_inputs": "its layers read embeddings of their own beside the stream (per-layer inputs)",
    "shared_keys": "some of its layers read another layer's keys and values (shared keys)",
}


@dataclass(frozen=True, kw_only=True)
class ReplayTraits:
    """Where an architecture breaks what a restart assumes."""

    # roles whose positions read each other both ways, within a run of neighbouring positions
    bidirectional: tuple[str, ...] = ()
    # how many positions the layers with a window read, where other layers have none or another; None where all layers
    # have one mask
    sliding_window: int | None = None
    # how many positions all layers read, where all have one window. A recorded run holds its mask, so restarts are
    # exact; decoding past it forgets keys, and is left to full runs.
    shared_window: int | None = None
    per_layer_inputs: bool = False  # whether layers read embeddings of their own
    shared_keys: bool = False  # whether layers read another layer's keys and values
    layers: str = ""  # what layers do beyond the layout that `Layer` knows, in words; empty where nothing

    def __post_init__(self) -> None:
        for role in self.bidirectional:
            if role not in ROLES:
                raise ModelError(unknown("role", role, ROLES))
        for window in (self.sliding_window, self.shared_window):
            if window is not None and window < 1:
                raise ModelError(f"a sliding window holds at least one position, not {window}.")

    def obstacle(self, n_pos: int) -> str:
        """Say in words why a run of so many positions cannot be restarted; empty where a restart is exact."""
        reasons = [reason for name, reason in _HOOKED.items() if getattr(self, name)]
        reasons += [self.layers] if self.layers else []
        if self.sliding_window is not None and n_pos > self.sliding_window:
            reasons.append(
                f"some of its layers read a sliding window of {self.sliding_window} positions, and there are {n_pos}"
            )
        return f"this architecture cannot be restarted: {'; '.join(reasons)}" if reasons else ""

    def forgets(self, n_pos: int) -> bool:
        """Whether a run of so many positions leaves its first ones unread."""
        return self.shared_window is not None and n_pos > self.shared_window

    def restart(self, position: int, roles: Sequence[str]) -> int:
        """Find where a restart must begin for a change at a position: at the start of a block that reads both ways."""
        if position >= len(roles) or roles[position] not in self.bidirectional:
            return position
        while position and roles[position - 1] in self.bidirectional:
            position -= 1
        return position


class TowerBridge(GeneralizedComponent):
    """An encoder as one piece: `hook_in` on its features, `hook_out` on the embeddings that the fusion stack receives.

    These are the output, one of its fields, or at a depth (from the end) of it. A `memory(encoder, args, kwargs)` may
    answer in the encoder's place.
    """

    def __init__(self, name: str, field: str | None, depth: int = 0) -> None:
        super().__init__(name, optional=True)  # a checkpoint may come without it
        self.rows = Rows(field, depth)
        self.memory: Callable[..., Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Encode."""
        tower: Any = self.original_component
        first, *rest = args or (kwargs.pop(next(iter(kwargs))),)
        args = (self.hook_in(first), *rest)
        output = tower(*args, **kwargs) if self.memory is None else self.memory(tower, args, kwargs)
        return self.rows.put(output, self.hook_out(self.rows.of(output)))


@dataclass(frozen=True)
class Rows:
    """Where an encoder's output holds its embeddings."""

    field: str | None
    depth: int = 0

    def of(self, output: Any) -> torch.Tensor:
        """Take them out of it."""
        found = output if self.field is None else output[self.field]
        return found[self.depth] if self.depth else found

    def put(self, output: Any, rows: torch.Tensor) -> Any:
        """Bring them in; of depths theirs alone is kept."""
        if self.field is None:
            return rows
        output[self.field] = (rows, *[None] * (-1 - self.depth)) if self.depth else rows
        return output

    def lean(self, output: Any) -> Any:
        """Make an output of its class with all that a model may read, but not the encoder's own layers."""
        if self.field is None:
            return output
        held = {name: value for name, value in output.items() if name == self.field or name not in _OWN_LAYERS}
        return self.put(type(output)(**held), self.of(output))


_OWN_LAYERS = ("last_hidden_state", "hidden_states", "attentions")


def decoder_adapter(name: str, **facts: Any) -> type[DecoderAdapter]:
    """Make the adapter of a decoder of which these facts hold."""
    return type(f"{name}Adapter", (DecoderAdapter,), facts)


class DecoderAdapter(ArchitectureAdapter):
    """A decoder with the towers whose outputs enter its stream."""

    decoder: str = "model.language_model"
    towers: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    media: Mapping[str, str] = MappingProxyType({})
    qk_norm: bool = False
    experts: bool = False
    biases: bool = False
    fused: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    inner: type[Any] | None = None  # mixed into the inner model where media come with it; else `Continued` is

    # The pattern is a hook here; asking HuggingFace for attentions as well would only cost memory.
    supports_hf_output_attentions: bool = False
    _attention_bridge_cls = RealAttentionBridge
    _block_cls = FullBlockBridge

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.is_multimodal = bool(self.towers)
        self.cfg.attn_implementation = "eager"
        self.cfg.default_prepend_bos = False
        self._set_rms_rotary_defaults()
        self.weight_processing_conversions = {**self._qkvo_weight_conversions(include_biases=self.biases)}
        self.component_mapping = {
            **{name: TowerBridge(path, *output) for name, (path, *output) in self.towers.items()},
            "embed": EmbeddingBridge(name=f"{self.decoder}.embed_tokens"),
            "blocks": self._block_cls(name=f"{self.decoder}.layers", config=self.cfg, submodules=self._layer()),
            "ln_final": self._norm(f"{self.decoder}.norm"),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }

    def _layer(self) -> dict[str, Any]:
        return {
            "ln1": self._norm("input_layernorm"),
            "ln2": self._norm("post_attention_layernorm"),
            "attn": self._build_attention_bridge(),
            "mlp": self._mixed_mlp() if self.experts else self._gated_mlp(),
        }

    def _norm(self, name: str) -> RealRMSNormBridge:
        return RealRMSNormBridge(name=name, config=self.cfg)

    def _build_attention_bridge(self) -> Any:
        norms: dict[str, Any] = {f"{kind}_norm": self._norm(f"{kind}_norm") for kind in ("qk" if self.qk_norm else "")}
        return self._qkvo_attention_bridge(extra_submodules=norms)

    def _mixed_mlp(self) -> MoEBridge:
        """Experts behind a router, or a plain MLP in layers that have one."""
        plain = {"dense_gate": "gate_proj", "dense_in": "up_proj", "dense_out": "down_proj"}
        parts: dict[str, Any] = {name: LinearBridge(name=path, optional=True) for name, path in plain.items()}
        parts["gate"] = MoERouterBridge(name="gate", optional=True)
        return ExpertsBridge(name="mlp", config=self.cfg, sparse_required=("gate",), submodules=parts)

    def prepare_model(self, hf_model: Any) -> None:
        """Let the model run as TransformerLens calls it: without positions or mask, never without its media."""
        super().prepare_model(hf_model)
        if self.media:  # a class of its own, since a torch hook would stand among the caller's
            own = type(hf_model.model)
            mixed = self.inner or Continued
            hf_model.model.__class__ = type(own.__name__, (mixed, own), {"media_tensors": dict(self.media)})
        if self.fused:
            keys = (self.cfg.n_key_value_heads or self.cfg.n_heads) * self.cfg.d_head
            take_apart(hf_model.get_submodule(f"{self.decoder}.layers"), self.fused, keys=keys)

    def setup_hook_compatibility(self, bridge: Any) -> None:
        """Give the bridge its `hook_embed`: the stream after the media are scattered in."""
        install_embed_hook(bridge)


class ExpertsBridge(MoEBridge):
    """Experts behind a router, whose units have no hooks: TransformerLens gives their names to the block's two ends."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hook_aliases = {one: path for one, path in self.hook_aliases.items() if one not in MoEBridge.hook_aliases}


class WithMedia:
    """Mixed into HuggingFace's inner model: a prompt's placeholders never run without their media."""

    media_tensors: Mapping[str, str]
    config: Any

    def require_media(self, ids: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
        """Refuse placeholders whose media did not come along: a run that reads them bare is about nothing."""
        for kind, tensor in self.media_tensors.items():
            missing = kwargs.get(tensor) is None and kwargs.get("mm_encoder_outputs") is None
            if missing and bool((ids == getattr(self.config, f"{kind}_token_id")).any()):
                raise bare_placeholders(kind, tensor)


def bare_placeholders(kind: str, tensor: str) -> InputError:
    """What is told where ids hold placeholders and their media are missing."""
    return InputError(
        f"these ids hold placeholders of {kind}, but {tensor} did not come with them: the model would read bare "
        "placeholders. Use model(x), model.generate(x), or model.bound(x) for tools that take ids. (TransformerLens's "
        "generate hands media on with the cache alone: leave use_past_kv_cache on.)"
    )


class Continued(WithMedia):
    """Mixed into HuggingFace's inner model: it also continues a cache without being told positions.

    HuggingFace remembers of the last prompt alone how far media moved them, and counts media as text without a mask.
    """

    rope_deltas: Any

    def forward(self, **kwargs: Any) -> Any:
        """Run the model."""
        self.__dict__.pop("_heard", None)  # of a run that was broken off
        ids, embeds, cache = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "past_key_values"))
        past = 0 if cache is None else cache.get_seq_length()
        if kwargs.get("position_ids") is None and past:
            kwargs["position_ids"] = _continued(ids if ids is not None else embeds, cache, kwargs.get("attention_mask"))
        elif kwargs.get("position_ids") is None and ids is not None:
            self.require_media(ids, kwargs)
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = torch.ones_like(ids)
        output: Any = super().forward(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if output.past_key_values is not None and not past:
            output.past_key_values.rope_deltas = self.rope_deltas
        return output

    def get_audio_features(self, *args: Any, **kwargs: Any) -> Any:
        """Encode sounds, and remember how many rows they are."""
        found = super().get_audio_features(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self.__dict__["_heard"] = len(found.last_hidden_state)
        return found

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> Any:
        """Find the media's positions; HuggingFace compares their number with the tower's rows for pictures alone."""
        try:
            masks = super().get_placeholder_mask(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except ValueError as error:
            raise InputError(f"{error}. {_REMAKE}") from error
        heard = self.__dict__.pop("_heard", None)
        tokens = None if heard is None else int(masks[-1][..., 0].sum())
        if tokens != heard:
            raise InputError(
                f"the prompt has {tokens} tokens of sound and the sound's tower gives {heard} rows: the rest would be "
                f"dropped in silence. {_REMAKE}"
            )
        return masks


def _continued(new: Any, cache: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Positions `[3, batch, pos]` of tokens that continue a cache."""
    if mask is None:
        mask = torch.ones(new.shape[0], cache.get_seq_length() + new.shape[1], dtype=torch.long, device=new.device)
    positions = (mask.long().cumsum(-1) - 1)[:, -new.shape[1] :]
    deltas = getattr(cache, "rope_deltas", None)
    if deltas is not None:
        positions = positions + deltas.repeat_interleave(len(positions) // len(deltas), 0).to(positions.device)
    return positions.expand(3, -1, -1)


def deepstack(told: Mapping[str, Any]) -> dict[int, torch.Tensor]:
    """What is added after each of the first layers, `[batch, pos, d_model]`: features of the vision tower's depths."""
    seen, features = told.get("visual_pos_masks"), told.get("deepstack_visual_embeds")
    added: dict[int, torch.Tensor] = {}
    for layer, part in enumerate(features or ()):
        added[layer] = part.new_zeros((*seen.shape, part.shape[-1]))  # pyright: ignore[reportOptionalMemberAccess]
        added[layer][seen] = part
    return added


def added_layers(config: Any) -> int:
    """After how many layers features of the vision tower's depths are added."""
    return len(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def experts_units(config: Any) -> int:
    """Hidden units of all experts that one position goes through."""
    text = config.get_text_config()
    return int(getattr(text, "num_experts_per_tok", 0) or 0) * int(getattr(text, "moe_intermediate_size", 0) or 0)


def causal_decoder(config: Any) -> ReplayTraits:
    """Restarts are exact, but for layers with a sliding window beside others, where a config has them.

    Media enter with the embeddings, and else only as what is added after a layer (recorded with the run).
    """
    text = config.get_text_config()
    kinds: set[str] = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None)
    if len(kinds) > 1:
        return ReplayTraits(sliding_window=window if "sliding_attention" in kinds else None)
    return ReplayTraits(shared_window=window if kinds <= {"sliding_attention"} else None)
