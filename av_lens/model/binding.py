"""Media that come with an input: for TransformerLens's own tools, and encoders' outputs kept for many prompts.

`bind` returns a shallow copy of the bridge whose `forward` adds the media that belong to the ids. Inputs whose ids are
equal are told apart by identity (the tensor itself, or rows of it that share its memory), never guessed.

`remembered_towers` keeps an encoder's output under a hash of all its inputs. Hooks on the encoders fire as ever; hooks
inside one are part of the key. With gradients on, nothing is kept and nothing is taken from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge import TransformerBridge

from av_lens.checks import require_keywords
from av_lens.core.calls import turn_of, waiting
from av_lens.core.execution import hook_numbers
from av_lens.errors import InputError
from av_lens.families.adapter import Rows, TowerBridge
from av_lens.families.decoder import as_forward
from av_lens.inputs.model_inputs import content_hash
from av_lens.memory import Memory


class TowerMemory:
    """One encoder's outputs (without its own layers) by what it was given, up to so many bytes."""

    def __init__(self, rows: Rows, most: float) -> None:
        self._rows, self._most = rows, most
        self._kept: Memory[Any] = Memory(int(most), bytes_of)

    def __call__(self, tower: Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Encode, or give what the same input gave before."""
        key = None if torch.is_grad_enabled() else key_of(args, kwargs)
        if key is None:
            return tower(*args, **kwargs)
        kept = self._kept.once((key, hook_numbers(tower)), lambda: self._rows.lean(tower(*args, **kwargs)))
        return deepcopy(kept)  # a hook may write into it, and models write into their encoders' outputs

    def __deepcopy__(self, memo: dict[int, Any]) -> TowerMemory:
        """A copied encoder begins with an empty memory: its weights may be changed (`modes.in_precision`)."""
        return TowerMemory(self._rows, self._most)


def bytes_of(output: Any) -> int:
    """What the tensors of an encoder's output take."""
    if isinstance(output, Tensor):
        return output.nbytes
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return sum(bytes_of(part) for part in parts)


def key_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bytes | None:
    """Hash an encoder's inputs; None where one is neither a tensor nor a plain value."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.device};".encode() + content_hash(value))
        elif isinstance(value, bool | int | float | str | None):
            digest.update(f"{name} {value!r};".encode())
        else:
            return None
    return digest.digest()


@contextmanager
def remembered_towers(model: Any, *, gb: float = 1.0) -> Generator[None, None, None]:
    """Let a model's encoders, if there is a bridge and their weights stay, remember so many GB each, then forget."""
    modules = model.bridge.modules() if hasattr(model, "bridge") else ()
    towers = [module for module in modules if isinstance(module, TowerBridge) and module.memory is None]
    for tower in towers:
        tower.memory = TowerMemory(tower.rows, gb * 1e9)
    try:
        yield
    finally:
        for tower in towers:
            tower.memory = None


_RUNNERS = ("run_with_hooks", "run_with_cache", "add_hook", "reset_hooks")  # they wait for other threads' runs
_REFUSED = {
    ("generate", "generate_stream", "hf_generate", "diffusion_generate"): (
        "a bound bridge runs prompts; to generate with media, call model.generate(x, ...)."
    ),
    ("enable_compatibility_mode", "process_weights"): (
        "a bound bridge shares its model's weights; rewrite a copy: model.compatible().bound(x)."
    ),
}


@dataclass(frozen=True, eq=False)
class Bound:
    """One input as a bound bridge knows it."""

    name: str  # how errors call it
    ids: torch.Tensor  # the id tensor that stands for it, by identity
    tensors: Mapping[str, Any]  # its keyword arguments of the HuggingFace forward, ids included
    position_ids: torch.Tensor  # `[stream, batch, pos]`, for restarts from the stream
    # the keyword arguments of some of its examples, from one number up to another; None with one example
    rows: Callable[[int, int], Mapping[str, Any]] | None

    @classmethod
    def of(cls, name: str, model: Any, x: Any) -> Bound:
        """An input of a `HookedAVLLM`, with an id tensor of its own: a pair's may share theirs."""
        tensors = model.tensors_of(x)
        tensors["input_ids"] = tensors["input_ids"].clone()
        several = tensors["input_ids"].shape[0] > 1 and hasattr(x, "stack")

        def rows(start: int, stop: int) -> Mapping[str, Any]:
            return model.tensors_of(x[start:stop])

        return cls(name, tensors["input_ids"], tensors, model.position_ids(tensors), rows if several else None)


def bind(bridge: TransformerBridge, inputs: Sequence[Bound]) -> TransformerBridge:
    """Copy a bridge so that its forward adds the media of one input (`bound.ids`), or of a pair's two."""
    if len({one.ids.untyped_storage().data_ptr() for one in inputs}) < len(inputs):
        raise InputError("the two inputs of a pair need id tensors of their own, or nothing tells their media apart.")
    bound, turn = TransformerBridge.__new__(TransformerBridge), turn_of(bridge)
    names = ("ids",) if len(inputs) == 1 else ("clean_ids", "corrupt_ids")
    bound.__dict__.update(bridge.__dict__ | dict(zip(names, (one.ids for one in inputs), strict=True)))
    bound.__dict__ |= {name: waiting(turn, getattr(TransformerBridge, name).__get__(bound)) for name in _RUNNERS}
    bound.__dict__ |= {name: _refusing(why) for names, why in _REFUSED.items() for name in names}

    @contextmanager
    def hooks(*args: Any, **kwargs: Any) -> Generator[Any]:
        with turn, TransformerBridge.hooks(bound, *args, **kwargs) as hooked:
            yield hooked

    bound.__dict__ |= {"hooks": hooks, "forward": _MediaForward(bridge, bound, tuple(inputs))}
    return bound


def _refusing(why: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise InputError(why)

    return refuse


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
        known = self._restart(input) if input.is_floating_point() else self._known(input)
        extra = {name: value for name, value in known.items() if name != "input_ids"}
        with turn_of(self._bridge):
            return TransformerBridge.forward(self._bound, input, *args, **{**extra, **kwargs})

    def _shown(self) -> str:
        return "bound.ids" if len(self._inputs) == 1 else "bound.clean_ids or bound.corrupt_ids"

    def _known(self, ids: torch.Tensor) -> Mapping[str, Any]:
        """The keyword arguments of an id tensor that was bound, of rows that share its memory, or of equal ids."""
        for one in self._inputs:
            rows = shared_rows(ids, one.ids)
            if rows == (0, len(one.ids)):
                return one.tensors
            if rows is not None and one.rows is not None:
                return one.rows(*rows)
        rows = ids if ids.ndim == 2 else ids[None]
        found = [(one, repetitions(rows, one.ids)) for one in self._inputs]
        matches = [(one, times) for one, times in found if times]
        if len(matches) == 2:
            raise InputError(
                "the pair's two inputs have equal ids and differ only in their media, and these ids are a copy that "
                f"could be either. Pass {self._shown()} themselves; a tool that copies ids cannot be served."
            )
        if not matches:
            shapes = ", ".join(f"{one.name} {tuple(one.ids.shape)}" for one in self._inputs)
            raise InputError(
                f"these ids {tuple(ids.shape)} belong to no input that was bound ({shapes}); their media are unknown. "
                f"Pass {self._shown()}, or bind the input that they come from."
            )
        given, times = matches[0]
        axes = {"position_ids": -2}  # their streams may come first
        return {name: repeated(value, times, axes.get(name, 0)) for name, value in given.tensors.items()}

    def _restart(self, stream: torch.Tensor) -> dict[str, Any]:
        """Mask and positions for a stream that re-enters at a later layer; the media are in it already."""
        pos = stream.shape[-2]
        fitting = [one for one in self._inputs if one.ids.shape[1] == pos]
        if not fitting or any(not torch.equal(fitting[0].position_ids, one.position_ids) for one in fitting[1:]):
            raise InputError(
                f"a stream of {pos} positions fits {len(fitting)} of the inputs that were bound, so its positions are "
                "unknown; bind the one input that it belongs to."
            )
        given, batch = fitting[0], 1 if stream.ndim == 2 else stream.shape[0]
        times, rest = divmod(batch, given.ids.shape[0])
        if rest:
            raise InputError(f"a stream of {batch} examples is no repetition of the bound {given.ids.shape[0]}.")
        return {
            "attention_mask": repeated(given.tensors["attention_mask"], times),
            "position_ids": as_forward(given.position_ids.repeat(1, times, 1)),
        }


def shared_rows(ids: torch.Tensor, known: torch.Tensor) -> tuple[int, int] | None:
    """First and last (excluded) row of contiguous `known` of which `ids` is a view; None where it is none."""
    if ids.ndim != 2 or ids.shape[1:] != known.shape[1:] or ids.stride() != known.stride():
        return None
    if ids.untyped_storage().data_ptr() != known.untyped_storage().data_ptr():
        return None
    first, rest = divmod(int(ids.storage_offset()) - int(known.storage_offset()), known.shape[1])
    return None if rest else (first, first + ids.shape[0])


def repetitions(ids: torch.Tensor, known: torch.Tensor) -> int:
    """How often `known` stands in `ids` one after the other along the batch; 0 where it is something else."""
    times, rest = divmod(ids.shape[0], known.shape[0])
    if rest or ids.shape[1:] != known.shape[1:]:
        return 0
    return times if torch.equal(ids.to(known.device), known.repeat(times, 1)) else 0


def repeated(value: Any, times: int, axis: int = 0) -> Any:
    """A keyword argument of the forward for a batch repeated `times` times; flags and single use as they are."""
    if times == 1 or isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, torch.Tensor):
        return torch.cat([value] * times, dim=axis)
    return [*value] * times
