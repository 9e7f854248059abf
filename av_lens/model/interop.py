"""The model's TransformerLens side: bridges for its own tools, and directions that are refused where they mislead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from av_lens.checks import require_choice
from av_lens.core.gates import gates_of_hooks, only_open
from av_lens.core.turns import in_turn
from av_lens.errors import InputError, InterventionError
from av_lens.model.binding import Bound, bind


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

    @in_turn
    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook_fn: Callable[..., Any],
        dir: str = "fwd",
        is_permanent: bool = False,
    ) -> None:
        """Attach a hook until `reset_hooks`; traces that are recorded meanwhile run under it.

        Args:
            name: a hook's name, or a function of a name.
            hook_fn: function(activation, hook) -> new activation or None.
            dir: "fwd", or "bwd" for gradients.
            is_permanent: whether it survives `reset_hooks`.

        Raises:
            InputError: another direction.
            InterventionError: no hook of the model, a function that accepts none, or a gated hook that is switched off.
        """
        require_choice("dir", dir, ("fwd", "bwd"))
        known = tuple(self.bridge.hook_dict)
        shut = [gate for gate in gates_of_hooks([(name, hook_fn)], known) if not getattr(self.bridge.cfg, gate)]
        if shut:
            raise InterventionError(
                f"this hook fires only while {shut[0]} is on: call model.set_{shut[0]}(True) first, or use "
                "model.hooks or run_with_hooks, which switch it on for their run."
            )
        accept = only_open(self.bridge, name) if callable(name) else name
        self.bridge.add_hook(accept, hook_fn, dir=dir, is_permanent=is_permanent)

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
