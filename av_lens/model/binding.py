"""A real TransformerBridge that carries the media of an input, for TransformerLens's own tools.

TransformerLens's tools take token ids and call the model with them; for an audio-visual prompt the ids are only
placeholders. `bind` returns a `TransformerBridge` (the same modules and hooks, a shallow copy) whose `forward` adds
the media that belong to the ids. Which media is decided, never guessed: one input is told by its ids or their
repetition along the batch; two inputs whose ids are equal are told apart by identity (the tensor itself, or rows of it
that share its memory), so a tool that copies ids is refused instead of served the other's media.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from av_lens.checks import require_keywords
from av_lens.core.turns import Turn, turn_of, waiting
from av_lens.errors import InputError

SUPPORTED_TOOLS: tuple[str, ...] = (
    "patching.generic_activation_patch",
    "patching.get_act_patch_resid_pre",
    "patching.get_act_patch_resid_mid",
    "patching.get_act_patch_attn_out",
    "patching.get_act_patch_mlp_out",
    "patching.get_act_patch_attn_head_out_by_pos",
    "patching.get_act_patch_attn_head_q_by_pos",
    "patching.get_act_patch_attn_head_k_by_pos",
    "patching.get_act_patch_attn_head_v_by_pos",
    "patching.get_act_patch_attn_head_pattern_by_pos",
    "patching.get_act_patch_attn_head_out_all_pos",
    "patching.get_act_patch_attn_head_pattern_all_pos",
    "patching.get_act_patch_block_every",
    "patching.get_act_patch_direct_path",
    "tools.analysis.direct_logit_attribution",
    "tools.analysis.logit_lens",
    "tools.analysis.attribution_patch",
    "ActivationCache.decompose_resid",
    "ActivationCache.accumulated_resid",
    "ActivationCache.stack_head_results",
    "ActivationCache.logit_attrs",
)
"""TransformerLens's tools that run unchanged through `HookedAVLLM.bound` and are tested there."""

_GENERATORS = ("generate", "generate_stream", "hf_generate", "diffusion_generate")
_RUNNERS = ("run_with_hooks", "run_with_cache", "add_hook", "reset_hooks")  # they wait for other threads' runs
_REWRITERS = ("enable_compatibility_mode", "process_weights")


@dataclass(frozen=True, eq=False)
class Bound:
    """One input as a bound bridge knows it.

    Attributes:
        name: how errors call it.
        ids: the id tensors that stand for it, by identity.
        tensors: its keyword arguments of the HuggingFace forward, ids included.
        position_ids: `[stream, batch, pos]`, for restarts from the stream.
        rows: the keyword arguments of some of its examples, from one number up to another; None with one example.
    """

    name: str
    ids: tuple[torch.Tensor, ...]
    tensors: Mapping[str, Any]
    position_ids: torch.Tensor
    rows: Callable[[int, int], Mapping[str, Any]] | None = None

    @property
    def values(self) -> torch.Tensor:
        """The ids themselves, `[batch, pos]`."""
        return self.tensors["input_ids"]


def bind(bridge: TransformerBridge, inputs: Sequence[Bound]) -> TransformerBridge:
    """Copy a bridge so that its forward adds the media of these inputs.

    Args:
        bridge: the bridge; its modules and hooks are shared, not copied.
        inputs: one input, or two of a pair.

    Returns:
        A `TransformerBridge`. With one input its ids are `bound.ids`; with two, `bound.clean_ids` and
        `bound.corrupt_ids`.
    """
    bound = TransformerBridge.__new__(TransformerBridge)
    bound.__dict__.update(bridge.__dict__)
    storages = [{known.untyped_storage().data_ptr() for known in given.ids} for given in inputs]
    if len(inputs) == 2 and storages[0] & storages[1]:
        raise InputError("the two inputs of a pair need id tensors of their own, or nothing tells their media apart.")
    names = ("ids",) if len(inputs) == 1 else ("clean_ids", "corrupt_ids")
    bound.__dict__.update({name: given.ids[0] for name, given in zip(names, inputs, strict=True)})
    turn = turn_of(bridge)
    bound.__dict__["forward"] = _MediaForward(bridge, bound, tuple(inputs))
    for name in _RUNNERS:
        bound.__dict__[name] = waiting(turn, getattr(TransformerBridge, name).__get__(bound))
    bound.__dict__["hooks"] = functools.partial(_hooks_in_turn, turn, bound)
    for name in _GENERATORS:
        bound.__dict__[name] = _refuse_generation
    for name in _REWRITERS:
        bound.__dict__[name] = _refuse_rewriting
    return bound


@contextmanager
def _hooks_in_turn(turn: Turn, bound: TransformerBridge, *args: Any, **kwargs: Any) -> Generator[Any]:
    with turn, TransformerBridge.hooks(bound, *args, **kwargs) as hooked:
        yield hooked


def _refuse_generation(*args: Any, **kwargs: Any) -> Any:
    raise InputError("a bound bridge runs prompts; to generate with media, call model.generate(x, ...).")


def _refuse_rewriting(*args: Any, **kwargs: Any) -> Any:
    raise InputError("a bound bridge shares its model's weights; rewrite a copy: model.compatible().bound(x).")


class _MediaForward:
    """The forward of a bound bridge."""

    def __init__(self, bridge: TransformerBridge, bound: TransformerBridge, inputs: tuple[Bound, ...]) -> None:
        self._bridge, self._bound, self._inputs = bridge, bound, inputs
        self._hf_forward = bridge.original_model.forward

    def __call__(self, input: Any, *args: Any, **kwargs: Any) -> Any:  # the name is TransformerLens's
        if self._bound.compatibility_mode != self._bridge.compatibility_mode:
            raise InputError("the model changed to compatibility mode after this was bound; call model.bound again.")
        require_keywords("a bound bridge", kwargs, TransformerBridge.forward, self._hf_forward, own=("self", "input"))
        if not isinstance(input, torch.Tensor):
            raise InputError(f"a bound bridge runs its own ids, not {type(input).__name__}; pass {self._shown()}.")
        if input.is_floating_point():
            extra = self._restart(input)
        else:
            input, extra = self._with_media(input)
        with turn_of(self._bridge):
            return TransformerBridge.forward(self._bound, input, *args, **{**extra, **kwargs})

    def _shown(self) -> str:
        return "bound.ids" if len(self._inputs) == 1 else "bound.clean_ids or bound.corrupt_ids"

    def _with_media(self, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """The ids and the keyword arguments that go with them."""
        found = self._by_memory(ids)
        if found is None:
            given, times = self._by_value(ids)
            found = {name: repeated(value, times) for name, value in given.tensors.items()}
        return ids, {name: value for name, value in found.items() if name != "input_ids"}

    def _by_memory(self, ids: torch.Tensor) -> Mapping[str, Any] | None:
        """The keyword arguments of an id tensor that was bound, or of rows that share its memory; None for others."""
        for one in self._inputs:
            for known in one.ids:
                if ids is known:
                    return one.tensors
                rows = shared_rows(ids, known)
                if rows == (0, known.shape[0]):
                    return one.tensors
                if rows is not None and one.rows is not None:
                    return one.rows(*rows)
        return None

    def _by_value(self, ids: torch.Tensor) -> tuple[Bound, int]:
        """The one input whose ids these are, and how often they are repeated."""
        rows = ids if ids.ndim == 2 else ids[None]
        found = [(one, repetitions(rows, one.values)) for one in self._inputs]
        matches = [(one, times) for one, times in found if times]
        if len(matches) == 2:
            raise InputError(
                "the pair's two inputs have equal ids and differ only in their media, and these ids are a copy that "
                f"could be either. Pass {self._shown()} themselves; a tool that copies ids cannot be served."
            )
        if not matches:
            shapes = ", ".join(f"{one.name} {tuple(one.values.shape)}" for one in self._inputs)
            raise InputError(
                f"these ids {tuple(ids.shape)} belong to no input that was bound ({shapes}); their media are unknown. "
                f"Pass {self._shown()}, or bind the input that they come from."
            )
        return matches[0]

    def _restart(self, stream: torch.Tensor) -> dict[str, Any]:
        """Mask and positions for a stream that re-enters at a later layer; the media are in it already."""
        pos = stream.shape[-2]
        fitting = [one for one in self._inputs if one.values.shape[1] == pos]
        if not fitting or any(not torch.equal(fitting[0].position_ids, one.position_ids) for one in fitting[1:]):
            raise InputError(
                f"a stream of {pos} positions fits {len(fitting)} of the inputs that were bound, so its positions are "
                "unknown; bind the one input that it belongs to."
            )
        given, batch = fitting[0], 1 if stream.ndim == 2 else stream.shape[0]
        times, rest = divmod(batch, given.values.shape[0])
        if rest:
            raise InputError(f"a stream of {batch} examples is no repetition of the bound {given.values.shape[0]}.")
        return {
            "attention_mask": repeated(given.tensors["attention_mask"], times),
            "position_ids": given.position_ids.repeat(1, times, 1),
        }


def shared_rows(ids: torch.Tensor, known: torch.Tensor) -> tuple[int, int] | None:
    """Which rows of `known` a view of its memory shows.

    Args:
        ids: `[batch, pos]`.
        known: `[batch, pos]`, contiguous.

    Returns:
        First row and the row after the last, or None where `ids` is no such view.
    """
    if ids.ndim != 2 or ids.shape[1:] != known.shape[1:] or ids.stride() != known.stride():
        return None
    if ids.untyped_storage().data_ptr() != known.untyped_storage().data_ptr():
        return None
    first, rest = divmod(int(ids.storage_offset()) - int(known.storage_offset()), known.shape[1])
    return None if rest else (first, first + ids.shape[0])


def repetitions(ids: torch.Tensor, known: torch.Tensor) -> int:
    """How often `known` stands in `ids` one after the other along the batch; 0 where it is something else.

    Args:
        ids: `[batch, pos]`.
        known: `[batch, pos]`.

    Returns:
        A whole number.
    """
    times, rest = divmod(ids.shape[0], known.shape[0])
    if rest or ids.shape[1:] != known.shape[1:]:
        return 0
    return times if torch.equal(ids.to(known.device), known.repeat(times, 1)) else 0


def repeated(value: Any, times: int) -> Any:
    """A keyword argument of the forward for a batch repeated `times` times.

    Args:
        value: a tensor or list whose first axis runs through the examples in order, or a flag.
        times: repetitions.

    Returns:
        The longer value; flags and single use as they are.
    """
    if times == 1 or isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, torch.Tensor):
        return value.repeat(times, *[1] * (value.ndim - 1))
    return [*value] * times
