"""The model's TransformerLens side: bridges for its own tools, and directions that are refused where they mislead."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from av_lens.errors import InputError
from av_lens.runs.binding import Bound, bind


class TransformerLensSide:
    """What a model offers to TransformerLens's own tools."""

    bridge: Any
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
