"""Which model families av_lens can open: those of this folder, those of other packages, those that are registered.

A model's family is that of its class, or of the nearest class that it is derived from.
"""

import copy
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from av_lens.errors import ModelError
from av_lens.families.adapter import ReplayTraits
from av_lens.families.media_layout import MediaLayout

GROUP = "av_lens.families"
HOW_TO_ADD = (
    "To add a family (docs/families.md): write av_lens/families/<family>.py with FAMILY = Family(...): its class, "
    "its TransformerLens ArchitectureAdapter, its MediaLayout, position_ids(hf_model, tensors) and "
    "replay_traits(config). From outside, "
    f"give the Family to av_lens.register_family, or name it among your package's entry points, group {GROUP!r}."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One model family: the facts about a HuggingFace class and the classes derived from it.

    Attributes:
        model_class: the HuggingFace class that is wrapped.
        adapter: how TransformerLens's components map onto it.
        media: how media stand in its prompts.
        position_ids: of a model, wrapped or not, and the keyword arguments of its forward: its own `[stream, batch,
            pos]`.
        replay_traits: of a configuration: where it breaks what a restart in the middle of a run assumes.
        added: of what its decoder is told, by keyword: what is added to the stream after a layer, `[batch, pos, d]`;
            None where nothing is. It must not depend on the stream.
        checkpoints: some that it opens, for people.
        model_types: the `model_type`s of configurations that hold such a model, itself or inside a larger one.
        inner_config: the attribute of a larger configuration that holds this model's, by `model_type`.
    """

    model_class: type[Any]
    adapter: type[ArchitectureAdapter]
    media: type[MediaLayout]
    position_ids: Callable[[Any, Mapping[str, Any]], torch.Tensor]
    replay_traits: Callable[[Any], ReplayTraits]
    added: Callable[[Mapping[str, Any]], Mapping[int, torch.Tensor]] | None = None
    checkpoints: str = "any checkpoint of this class"
    model_types: tuple[str, ...] = ()
    inner_config: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def architecture(self) -> str:
        """The class's name, by which checkpoints and TransformerLens know it."""
        return self.model_class.__name__


_KNOWN: dict[str, Family] = {}  # by every name that a family is found by
_REFUSED: dict[str, str] = {}  # why, by every name of what cannot be one


def register_family(family: Family) -> None:
    """Let av_lens open one more model family, until the session ends.

    Args:
        family: its facts; to give the same family again changes nothing.

    Raises:
        ModelError: one of its names is another family's already.
    """
    families()
    _add(family)


def _add(family: Family) -> None:
    names = dict.fromkeys((family.architecture, *family.model_types), family)
    for name, other in _KNOWN.items():
        if names.get(name, other) is not other:
            raise ModelError(
                f"the family of {family.architecture} cannot be added: its name {name!r} is that of the family of "
                f"{other.architecture} already. Give it names of its own, or leave one of the two out."
            )
    _KNOWN.update(names)


@cache
def _discover() -> None:
    """Find the families of this folder, and those that other packages name."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        held = vars(import_module(f"av_lens.families.{module.name}"))
        _REFUSED.update(held.get("CANNOT_OPEN", {}))
        for found in held.get("FAMILIES", [held["FAMILY"]] if "FAMILY" in held else []):
            _add(found)
    for entry in entry_points(group=GROUP):
        try:
            family = entry.load()
        except Exception as error:
            raise ModelError(
                f"the model family {entry.name!r} of another package ({entry.value}) cannot be loaded: {error}. Mend "
                "or remove that package."
            ) from error
        if not isinstance(family, Family):
            raise ModelError(f"{entry.value}, which a package names as a model family, is no Family. {HOW_TO_ADD}")
        _add(family)


def families() -> tuple[Family, ...]:
    """Every family that can be opened."""
    _discover()
    return tuple(dict.fromkeys(_KNOWN.values()))


def family_of(*names: str | type[Any]) -> Family:
    """The family of a class, or of the nearest that it is derived from, or of the first name that is known."""
    known = families()
    said = [one.__name__ if isinstance(one, type) else one for one in names]
    for one in names:
        for name in [cls.__name__ for cls in one.__mro__] if isinstance(one, type) else [one]:
            if name in _KNOWN:
                return _KNOWN[name]
            if name in _REFUSED:
                raise ModelError(_REFUSED[name])
    listed = ", ".join(family.architecture for family in known)
    raise ModelError(f"no adapter for {said[-1]!r}. Families with one: {listed}. {HOW_TO_ADD}")


def build_bridge(hf_model: Any, *, tokenizer: Any = None, name: str = "external") -> TransformerBridge:
    """Wrap a HuggingFace model, in place, in a TransformerBridge with every hook real and attention eager."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module, detect_tokenizer_bos_eos

    family = family_of(type(hf_model))
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
    ArchitectureAdapterFactory.register_adapter(family.architecture, family.adapter)
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
