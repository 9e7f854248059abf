"""From text to token ids and back, under TransformerLens's names."""

from __future__ import annotations

from typing import Any

import torch

from av_lens.errors import InputError


class TokenHelpers:
    """Tokenizer helpers of a model; they take `AVInputs` too."""

    bridge: Any
    tokenizer: Any

    def to_tokens(self, text: Any, **options: Any) -> torch.Tensor:
        """Token ids of text, or of an input.

        Args:
            text: a string, several, or `AVInputs`.
            **options: as TransformerLens has them (`prepend_bos`, ...).

        Returns:
            int64 `[batch, pos]`.
        """
        return text.tensors["input_ids"] if hasattr(text, "tensors") else self.bridge.to_tokens(text, **options)

    def to_str_tokens(self, text: Any, **options: Any) -> Any:
        """The tokens as strings.

        Args:
            text: a string, ids, or `AVInputs`.
            **options: as TransformerLens has them.

        Returns:
            A list of strings.
        """
        return list(text.tokens) if hasattr(text, "tensors") else self.bridge.to_str_tokens(text, **options)

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
            "(avl.log_prob takes answers of several tokens)."
        )
