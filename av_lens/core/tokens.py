"""From text to token ids and back, under TransformerLens's names; and text or ids as the model takes them.

A list of prompts is padded on the side that `model.tokenizer.padding_side` names: the left, unless it was set
otherwise, so that `logits[:, -1]` is every prompt's last. The mask of the pads goes to the model, whose own position
ids count from it: every prompt gives what it gives alone, on either side. With right padding position -1 of a shorter
prompt is a pad. Ids that are given without a mask are read as TransformerLens's HookedTransformer reads them: a run of
pad tokens at an end of a row is padding. `attention_mask=` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from av_lens.checks import require_choice, require_keywords
from av_lens.errors import InputError

SIDES = ("left", "right")


class TokenHelpers:
    """Tokenizer helpers of a model; they take `AVInputs` too."""

    bridge: Any
    tokenizer: Any
    device: Any
    placeholders: Any

    def to_tokens(self, text: Any, **options: Any) -> torch.Tensor:
        """Token ids of text, or of an input; a list is padded on the tokenizer's side.

        Args:
            text: a string, several, or `AVInputs`.
            **options: as TransformerLens has them (`prepend_bos`, `padding_side`, ...), for text.

        Returns:
            int64 `[batch, pos]`.

        Raises:
            InputError: an option that is unknown, or has nothing to act on.
        """
        require_keywords("to_tokens", options, self.bridge.to_tokens, own=("input",))
        if hasattr(text, "tensors"):
            _refuse_text_options(options, "AVInputs are tokens already")
            return text.tensors["input_ids"]
        if options.get("padding_side") is not None:
            require_choice("padding_side", options["padding_side"], SIDES)
        self._refuse_bos(options.get("prepend_bos"))
        return self.bridge.to_tokens(text, **options)

    def to_str_tokens(self, text: Any, **options: Any) -> Any:
        """The tokens as strings.

        Args:
            text: a string, ids, or `AVInputs`.
            **options: as TransformerLens has them, for text.

        Returns:
            A list of strings.

        Raises:
            InputError: an option that is unknown, or has nothing to act on.
        """
        require_keywords("to_str_tokens", options, self.bridge.to_str_tokens, own=("input",))
        if hasattr(text, "tensors"):
            _refuse_text_options(options, "AVInputs are tokens already")
            return list(text.tokens)
        self._refuse_bos(options.get("prepend_bos"))
        return self.bridge.to_str_tokens(text, **options)

    def _refuse_bos(self, prepend_bos: bool | None) -> None:
        if prepend_bos and self.tokenizer.bos_token is None:  # TransformerLens would leave it out in silence
            raise InputError("prepend_bos=True: this tokenizer has no token for a text's beginning; leave it out.")

    def to_single_token(self, text: str) -> int:
        """The id of a string that is one token: as it is written, else with a leading space.

        Args:
            text: the string.

        Returns:
            The id.

        Raises:
            InputError: it is several tokens either way; the message shows them.
        """
        for written in (text, f" {text}"):
            ids = self.tokenizer(written, add_special_tokens=False)["input_ids"]
            if len(ids) == 1:
                return int(ids[0])
        shown = " ".join(repr(token) for token in self.bridge.to_str_tokens(text, prepend_bos=False))
        raise InputError(
            f"{text!r} is no single token: {shown}. Where one token is needed choose another word, or use a metric "
            "(avl.metrics.log_prob takes answers of several tokens)."
        )

    def tensors_of(
        self,
        x: Any,
        *,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments of the HuggingFace forward, on the model's device.

        Args:
            x: `AVInputs`, or ids `[batch, pos]` or text without media; a list of prompts is padded.
            attention_mask: which ids are read, `[batch, pos]` of 0 and 1; with ids only. None: a run of pad tokens at
                either end of a row is not read.
            prepend_bos: as TransformerLens has it; with text only.
            padding_side: "left" or "right"; with text only. None for `model.tokenizer.padding_side`.

        Returns:
            A fresh dictionary, `input_ids` and `attention_mask` among it.

        Raises:
            InputError: ids that hold placeholders of media which are not there, an empty prompt, a mask that does not
                fit, an option that has nothing to act on, or something else altogether.
        """
        text = {"prepend_bos": prepend_bos, "padding_side": padding_side}
        if hasattr(x, "tensors"):
            _refuse_text_options({**text, "attention_mask": attention_mask}, "AVInputs hold their tokens and mask")
            return {name: v.to(self.device) if isinstance(v, torch.Tensor) else v for name, v in x.tensors.items()}
        if isinstance(x, str) or (isinstance(x, list | tuple) and x and all(isinstance(part, str) for part in x)):
            _refuse_text_options({"attention_mask": attention_mask}, "text gets the mask of its own padding")
            return self._read(self._padded([x] if isinstance(x, str) else list(x), text), None)
        _refuse_text_options(text, "ids are tokens already")
        if not isinstance(x, torch.Tensor) or x.is_floating_point() or x.dtype == torch.bool or x.ndim not in (1, 2):
            shown = f"a tensor {tuple(x.shape)} of {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputError(f"a model runs AVInputs (model.encode makes them), ids [batch, pos] or text, not {shown}.")
        return self._read((x if x.ndim == 2 else x[None]).to(self.device), attention_mask)

    def _padded(self, prompts: list[str], options: Mapping[str, Any]) -> Int64[Tensor, "batch pos"]:
        """Ids of prompts; each has at least one, and no more than the model has positions for."""
        ids = self.to_tokens(prompts, truncate=False, **options)
        for number, prompt in enumerate(prompts):
            if not prompt:
                where = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
                raise InputError(f"{where} is empty, so there is no position to run: leave it out.")
        most = self.bridge.cfg.n_ctx
        if ids.shape[1] > most:
            raise InputError(f"this text has {ids.shape[1]} tokens, and the model {most} positions: shorten it.")
        return ids.to(self.device)

    def _read(self, ids: Int64[Tensor, "batch pos"], mask: Any) -> dict[str, Any]:
        """Ids with the mask of those that are read."""
        if any(bool((ids == placeholder).any()) for placeholder in self.placeholders):
            raise InputError(
                "these ids hold placeholders of media, but no media: the model would read bare placeholders. "
                "Pass the AVInputs that they come from, or use model.bound(x) for tools that take ids."
            )
        if mask is None:
            mask = unpadded(ids, self.tokenizer.pad_token_id)
        elif not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or bool(((mask != 0) & (mask != 1)).any()):
            shown = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise InputError(
                f"attention_mask= takes 0 and 1 for each of the ids {tuple(ids.shape)}, and got {shown}. To cut single "
                "edges use avl.cut or a hook at hook_attn_scores."
            )
        mask = mask.to(self.device, torch.long)
        if not bool(mask.any(dim=-1).all()):
            row = int((~mask.any(dim=-1)).nonzero()[0])
            raise InputError(f"row {row} of the ids is padding alone, so there is no position to run: leave it out.")
        return {"input_ids": ids, "attention_mask": mask}


def unpadded(ids: Int64[Tensor, "batch pos"], pad: int | None) -> Int64[Tensor, "batch pos"]:
    """Mark what is not a run of pad tokens at an end of its row."""
    if pad is None:
        return torch.ones_like(ids)
    real = (ids != pad).long()
    return ((real.cumsum(-1) > 0) & (real.flip(-1).cumsum(-1).flip(-1) > 0)).long()


def left_padded(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Bring every row's pads to its left, where generation needs them."""
    mask: Tensor = tensors["attention_mask"]
    if bool(mask[:, -1].all()):
        return dict(tensors)
    order = mask.argsort(dim=-1, stable=True)  # pads first, what is read after them in order
    return {**tensors, **{name: tensors[name].gather(1, order) for name in ("input_ids", "attention_mask")}}


def _refuse_text_options(options: Mapping[str, Any], because: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name}= has nothing to act on here: {because}.")


def require_inputs(verb: str, x: Any) -> None:
    """Refuse what does not say what its positions are."""
    if not (hasattr(x, "tensors") and hasattr(x, "spans")):
        raise InputError(
            f"{verb} takes AVInputs, which know what each position is, not {type(x).__name__}. Make them with "
            "model.encode(clip, question); for text alone model.encode(None, question)."
        )
