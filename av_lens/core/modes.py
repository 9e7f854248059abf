"""A model in another mode, precision, place or numerics; and a second one with the same weights beside it.

What was derived from changed weights is derived anew; traces that were recorded before are of the old ones.
"""

import copy
from typing import Any, TypeVar

import psutil
import torch

from av_lens.checks import require_keywords
from av_lens.core.calls import require_known_layers
from av_lens.core.placement import require_movable
from av_lens.errors import InputError, ModelError

OF_WEIGHTS = ("_names", "_restart_proved")
"""What a model derives from its bridge and weights, anew where they were rewritten."""
DERIVED = ("encoder", *OF_WEIGHTS)  # what a copy must derive anew


def copied(model: Any, note: str) -> Any:
    """Copy a model."""
    require_movable(model.hf_model)
    other = copy.copy(model)
    for derived in DERIVED:
        other.__dict__.pop(derived, None)
    other.bridge = copy.deepcopy(model.bridge)
    other.name = f"{model.name} ({note})"
    return other


def other_precision(dtype: torch.dtype) -> torch.dtype:
    """Choose the precision that a model is compared with."""
    return torch.bfloat16 if dtype == torch.float32 else torch.float32


def in_precision(model: Any, dtype: torch.dtype) -> Any:
    """Make a second model with the same weights in another precision."""
    precision = str(dtype).removeprefix("torch.")
    device = next(model.hf_model.parameters()).device
    taken, free = weights_bytes(model, dtype), free_bytes(device)
    if taken > free:
        raise ModelError(
            f"the weights of {model.name} in {precision} take {taken / 1e9:.1f} GB and {free / 1e9:.1f} GB of "
            f"{device.type} memory are free: use a machine with more."
        )
    other = copied(model, precision)
    cast(other.hf_model, dtype)  # not the bridge's own `to`, which prints
    other.bridge.cfg.dtype = dtype
    return other


def cast(hf_model: Any, dtype: torch.dtype) -> None:
    """Change the precision of a model's weights, in place.

    Rotary tables and other constants that no checkpoint holds keep theirs: in bfloat16 they alone move logits by a
    tenth.
    """
    tables = [
        (module, name, module._buffers[name])
        for module in hf_model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers[name] is not None
    ]
    hf_model.to(dtype)
    for module, name, table in tables:
        module._buffers[name] = table


def weights_bytes(model: Any, dtype: torch.dtype) -> int:
    """Say how much memory a model's weights take in a precision."""
    return sum(p.numel() * max(dtype.itemsize, p.dtype.itemsize) for p in model.hf_model.parameters())


def free_bytes(device: torch.device) -> int:
    """Ask for the memory that is free."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)


M = TypeVar("M", bound="TorchModes")


class TorchModes:
    """`eval`, `train`, `to` and their kin, and HookedTransformer's numerics."""

    bridge: Any
    hf_model: Any
    handed_in: Any
    compatibility_mode: Any
    provenance: Any

    def eval(self: M) -> M:
        """Switch to evaluation mode, in which models are loaded, and return this model."""
        return self.train(False)

    def train(self: M, mode: bool = True) -> M:
        """Switch to training mode: dropout acts, where the configuration has any; hooks fire as ever.

        Args:
            mode: False for evaluation mode.

        Returns:
            This model.
        """
        self.bridge.train(mode)
        return self

    def requires_grad_(self: M, requires_grad: bool = True) -> M:
        """Choose whether gradients reach the weights.

        Args:
            requires_grad: whether they do.

        Returns:
            This model.
        """
        self.hf_model.requires_grad_(requires_grad)
        return self

    def to(
        self: M,
        *places: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> M:
        """Move this model, or change its precision, in place.

        Args:
            *places: a device, a dtype, or both, as torch takes them.
            device: where to.
            dtype: the precision of the weights; tables of positions keep theirs, as in a checkpoint loaded with it.

        Returns:
            This model.

        Raises:
            InputError: neither a device nor a floating-point dtype.
            ModelError: the caller handed the model in and its weights are not ours to rewrite, or they were processed.
        """
        for place in places:
            device, dtype = (device, place) if isinstance(place, torch.dtype) else (place, dtype)
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"{dtype} is no precision for weights: use torch.float32, bfloat16 or float16.")
        require_movable(self.hf_model)
        if dtype is not None and self.handed_in:
            raise ModelError(
                "this model was handed in, and another precision rewrites its weights in place. Pass dtype= to "
                "avl.load, or cast the HuggingFace model before."
            )
        if self.compatibility_mode:
            raise ModelError("the weights were processed as they were: first model.to(...), then model.compatible().")
        if device is not None:
            try:
                self.hf_model.to(torch.device(device))
            except (RuntimeError, AssertionError) as error:
                first = str(error).splitlines()[0]
                raise InputError(f"this model cannot be moved to {str(device)!r}: {first}") from error
            self.bridge.cfg.device = str(device)
        if dtype is not None:
            cast(self.hf_model, dtype)
            self.bridge.cfg.dtype = dtype
        for derived in OF_WEIGHTS:
            self.__dict__.pop(derived, None)
        return self

    def cpu(self: M) -> M:
        """Move this model to the CPU, and return it."""
        return self.to("cpu")

    def cuda(self: M, device: int | str | torch.device | None = None) -> M:
        """Move this model to a GPU.

        Args:
            device: which; the current one when None.

        Returns:
            This model.
        """
        return self.to(f"cuda:{device}" if isinstance(device, int) else device or "cuda")

    def half(self: M) -> M:
        """Change the weights to float16, and return this model."""
        return self.to(torch.float16)

    def bfloat16(self: M) -> M:
        """Change the weights to bfloat16, and return this model."""
        return self.to(torch.bfloat16)

    def float(self: M) -> M:
        """Change the weights to float32, and return this model."""
        return self.to(torch.float32)

    def double(self: M) -> M:
        """Change the weights to float64, and return this model."""
        return self.to(torch.float64)

    def compatible(self: M) -> M:
        """A new model with HookedTransformer's numerics: norms folded, weights centred; log-probs agree to 1e-5.

        Returns:
            A second model; this one stays as it is. It takes as much memory again.

        Raises:
            ModelError: layers of a layout that is not known, whose norms cannot be folded.
        """
        require_known_layers(self, "compatibility mode")
        other = copied(self, "compatible")
        other.handed_in = False
        other.provenance = {**self.provenance, "processing": "HookedTransformer numerics"}
        return other.enable_compatibility_mode()

    def enable_compatibility_mode(self: M, **options: Any) -> M:
        """Give *this* model HookedTransformer's numerics, in place; its weights are rewritten.

        Args:
            **options: as TransformerLens has them (`fold_ln`, `center_unembed`, `no_processing`, ...).

        Returns:
            This model.

        Raises:
            InputError: an unknown keyword.
            ModelError: the caller handed the HuggingFace model in, so its weights are not ours to rewrite; or layers of
                a layout that is not known.
        """
        require_keywords("enable_compatibility_mode", options, self.bridge.enable_compatibility_mode)
        require_movable(self.hf_model)
        require_known_layers(self, "compatibility mode")
        if self.handed_in:
            raise ModelError(
                "this model was handed in, and compatibility mode rewrites its weights in place. "
                "Use model.compatible(), which makes a new one."
            )
        self.bridge.enable_compatibility_mode(**{"disable_warnings": True, **options})
        for derived in OF_WEIGHTS:
            self.__dict__.pop(derived, None)
        return self
