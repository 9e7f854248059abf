"""The model's TransformerLens side: bridges for its own tools, and HookedTransformer's numerics."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from transformer_lens.model_bridge import TransformerBridge

from av_lens.errors import InputError, ModelError
from av_lens.runs.binding import Bound, bind


class TransformerLensSide:
    """What a model offers to TransformerLens's own tools."""

    bridge: Any
    name: str
    handed_in: bool
    provenance: dict[str, Any]
    compatibility_mode: Any
    tensors_of: Any
    position_ids: Any

    def bound(self, x: Any) -> TransformerBridge:
        """A real TransformerBridge that adds the media of an input, for TransformerLens's own tools.

        Args:
            x: `AVInputs`, or a `Pair` of them.

        Returns:
            A bridge with these modules and hooks. Pass it `bound.ids` (one input), or `bound.clean_ids` and
            `bound.corrupt_ids` (a pair); other ids are refused.
        """
        if hasattr(x, "clean") and hasattr(x, "corrupt"):
            return bind(self.bridge, [self._bound("clean", x.clean), self._bound("corrupt", x.corrupt)])
        return bind(self.bridge, [self._bound("ids", x)])

    def _bound(self, name: str, x: Any) -> Bound:
        tensors = self.tensors_of(x)
        own = tensors["input_ids"].clone()  # one tensor for each input: a pair's may share theirs
        several = own.shape[0] > 1 and hasattr(x, "stack")
        return Bound(
            name,
            (own,),
            {**tensors, "input_ids": own},
            self.position_ids(tensors),
            (lambda a, b: self.tensors_of(x.stack([x[i] for i in range(a, b)]))) if several else None,
        )

    def compatible(self) -> Self:
        """A new model with HookedTransformer's numerics: norms folded, weights centred; log-probs agree to 1e-5.

        Returns:
            A second model; this one stays as it is. It takes as much memory again.
        """
        other = copy.copy(self)
        for derived in ("encoder", "_names"):
            other.__dict__.pop(derived, None)
        other.bridge = copy.deepcopy(self.bridge)
        other.name = f"{self.name} (compatible)"
        other.handed_in = False
        other.provenance = {**self.provenance, "processing": "HookedTransformer numerics"}
        return other.enable_compatibility_mode()

    def enable_compatibility_mode(self, **options: Any) -> Self:
        """Give *this* model HookedTransformer's numerics, in place; its weights are rewritten.

        Args:
            **options: as TransformerLens has them (`fold_ln`, `center_unembed`, `no_processing`, ...).

        Returns:
            This model.

        Raises:
            ModelError: the caller handed the HuggingFace model in, so its weights are not ours to rewrite.
        """
        if self.handed_in:
            raise ModelError(
                "this model was handed in, and compatibility mode rewrites its weights in place. "
                "Use model.compatible(), which makes a new one."
            )
        self.bridge.enable_compatibility_mode(**{"disable_warnings": True, **options})
        self.__dict__.pop("_names", None)
        return self

    def tokens_to_residual_directions(self, tokens: Any) -> torch.Tensor:
        """Unembedding directions of tokens, for products with the normed stream.

        Args:
            tokens: a string, an id, or a tensor of ids.

        Returns:
            `[..., d_model]`.

        Raises:
            InputError: the final norm's weight is not folded into the unembedding, so the products would be wrong.
        """
        if not self.compatibility_mode:
            raise InputError(
                "unembedding directions need the final norm's weight folded into them, or every attribution made with "
                "them is wrong: use model.compatible(), or avl.direct_attribution, which folds it itself."
            )
        return self.bridge.tokens_to_residual_directions(tokens)
