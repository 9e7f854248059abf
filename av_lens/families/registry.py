"""Which model families av_lens can open, and the few facts about each that other rooms need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge

from av_lens.errors import ModelError
from av_lens.families.traits import ReplayTraits

HOW_TO_ADD = (
    "To add a family: write av_lens/families/<family>.py with a TransformerLens ArchitectureAdapter and "
    "position_ids(hf_model, tensors) and replay_traits(config), and name it in av_lens.families.registry.FAMILIES."
)


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        architecture: the HuggingFace class that is wrapped, and the name TransformerLens knows it by.
        module: where its adapter lives.
        adapter: the adapter's class in that module.
        model_types: the `model_type`s of configurations that hold such a model, itself or inside a larger one.
        inner_config: the attribute of a larger configuration that holds this model's, by `model_type`.
        weight_prefixes: what its weights' names may begin with in a checkpoint.
    """

    architecture: str
    module: str
    adapter: str
    model_types: tuple[str, ...]
    inner_config: Mapping[str, str]
    weight_prefixes: tuple[str, ...]

    def adapter_class(self) -> Any:
        """The adapter, imported on first use."""
        return getattr(import_module(self.module), self.adapter)

    def model_class(self) -> Any:
        """The HuggingFace class, imported on first use."""
        return getattr(import_module("transformers"), self.architecture)

    def position_ids(self, hf_model: Any, tensors: Mapping[str, Any]) -> torch.Tensor:
        """The model's own position ids for an input.

        Args:
            hf_model: the wrapped or unwrapped HuggingFace model.
            tensors: keyword arguments of its forward.

        Returns:
            int64 `[stream, batch, pos]`.
        """
        derive: Callable[[Any, Mapping[str, Any]], torch.Tensor] = import_module(self.module).position_ids
        return derive(hf_model, tensors)

    def replay_traits(self, config: Any) -> ReplayTraits:
        """Where the architecture breaks what a restart in the middle of a run assumes.

        Args:
            config: the model's HuggingFace configuration.

        Returns:
            What the adapter declares for it.
        """
        declare: Callable[[Any], ReplayTraits] = import_module(self.module).replay_traits
        return declare(config)


FAMILIES: tuple[Family, ...] = (
    Family(
        architecture="Qwen2_5OmniThinkerForConditionalGeneration",
        module="av_lens.families.qwen2_5_omni",
        adapter="Qwen2_5OmniThinkerAdapter",
        model_types=("qwen2_5_omni_thinker", "qwen2_5_omni"),
        inner_config={"qwen2_5_omni": "thinker_config"},
        weight_prefixes=("thinker.", "model.", "lm_head."),
    ),
)
"""Every family with an adapter."""


def family_of(name: str) -> Family:
    """The family of a HuggingFace class or `model_type`.

    Args:
        name: such as `Qwen2_5OmniThinkerForConditionalGeneration` or `qwen2_5_omni`.

    Returns:
        Its family.

    Raises:
        ModelError: none has an adapter; the message says how to add one.
    """
    for family in FAMILIES:
        if name == family.architecture or name in family.model_types:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise ModelError(f"no adapter for {name!r}. Families with one: {known}. {HOW_TO_ADD}")


def build_bridge(hf_model: Any, *, tokenizer: Any = None, name: str = "external") -> TransformerBridge:
    """Wrap a HuggingFace model, in place, in a TransformerBridge with every hook real.

    The model keeps its weights and its answers; its layers are replaced by bridge components, its attention becomes
    eager, and its configuration becomes its own copy. Do not save it afterwards: its parameter names have changed.

    Args:
        hf_model: a model of a known family, not wrapped before.
        tokenizer: its tokenizer, as it is; TransformerLens would load it again by name.
        name: what the bridge calls itself.

    Returns:
        The bridge, in evaluation mode.

    Raises:
        ModelError: no adapter, or a model that was wrapped before.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module, detect_tokenizer_bos_eos

    family = family_of(type(hf_model).__name__)
    if any(
        isinstance(module, TransformerBridge) or hasattr(module, "original_component") for module in hf_model.modules()
    ):
        raise ModelError(
            f"this {family.architecture} is wrapped already; use the HookedAVLLM or TransformerBridge that wraps it, "
            "or load the weights again."
        )
    _own_configs(hf_model)
    # Entry points first: found later, they would warn that they override what is registered here.
    ArchitectureAdapterFactory.discover_entry_points()
    ArchitectureAdapterFactory.register_adapter(family.architecture, family.adapter_class())
    hf_model.eval()
    bridge = build_bridge_from_module(hf_model, family.architecture, hf_config=hf_model.config, model_name=name)
    if tokenizer is not None:
        cfg: Any = bridge.cfg
        cfg.tokenizer_prepends_bos, cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
        bridge.tokenizer = tokenizer
    return bridge


def _own_configs(hf_model: Any) -> None:
    """Give the model configurations of its own: models built from one share it, and with it the kind of attention."""
    memo: dict[int, Any] = {}
    for module in hf_model.modules():
        if "config" in module.__dict__:
            module.__dict__["config"] = copy.deepcopy(module.__dict__["config"], memo)
