"""Decoders whose positions are counted: one stream, whatever stands there.

`Counted` counts positions from the mask, so that padding moves nothing, and refuses placeholders without their media or
in another number than the tower's `rows`: HuggingFace would drop or spread rows, some in silence.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from av_lens.errors import InputError
from av_lens.families.adapter import bare_placeholders

WORDS = {"audio": "sound", "image": "picture", "video": "video"}


def position_ids(hf_model: Any, tensors: Mapping[str, Any]) -> Int64[Tensor, "1 batch pos"]:
    """The positions of an input, counted from its mask."""
    del hf_model
    return counted(tensors["attention_mask"])[None]


def from_zero(hf_model: Any, tensors: Mapping[str, Any]) -> Int64[Tensor, "1 batch pos"]:
    """The positions of an input, counted from 0 whatever its mask: where HuggingFace's forward does no other."""
    del hf_model
    ids = tensors["input_ids"]
    return torch.arange(ids.shape[1], device=ids.device).expand(1, *ids.shape).clone()


def counted(mask: Tensor) -> Int64[Tensor, "batch pos"]:
    """Number what a mask shows from 0; padding before it is 0 as well."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def placeholder(config: Any, kind: str) -> int:
    """The token id that stands for a kind, from a configuration or from those of its towers."""
    levels = [config, *(getattr(config, f"{tower}_config", None) for tower in ("audio", "vision"))]
    name = f"{kind}_token_id"
    return next(int(getattr(level, name)) for level in levels if hasattr(level, name))


class Counted:
    """Mixed into an inner model with one stream of positions."""

    media_tensors: Mapping[str, str]
    config: Any

    def rows(self, told: Mapping[str, Any]) -> Mapping[str, Int64[Tensor, " item"]]:
        """What rows the towers will give, by kind, for each sound or picture."""
        raise NotImplementedError

    def forward(self, **kwargs: Any) -> Any:
        """Run the model."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if ids is not None:
            if not past:
                self._require_media(ids, kwargs)
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = ids.new_ones(ids.shape[0], past + ids.shape[1])
            if kwargs.get("position_ids") is None:
                kwargs["position_ids"] = counted(kwargs["attention_mask"])[:, -ids.shape[1] :]
        return super().forward(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _require_media(self, ids: Tensor, kwargs: Mapping[str, Any]) -> None:
        given = self.rows(kwargs)
        for kind, tensor in self.media_tensors.items():
            tokens = (ids == placeholder(self.config, kind)).sum(-1)
            if kwargs.get(tensor) is None:
                if bool(tokens.any()):
                    raise bare_placeholders(kind, tensor)
                continue
            ends, told = given[kind].cumsum(0).tolist(), tokens.cumsum(0).tolist()
            if told[-1] != ends[-1] or not {*told} <= {0, *ends}:  # an example's tokens end where one of its media does
                word = WORDS[kind]
                raise InputError(
                    f"the prompt has {_listed(tokens)} tokens of {word} and the {word}'s tower gives "
                    f"{_listed(given[kind])} rows: they would not stand at their own places. Make the input with "
                    "model.encode, or by one call of the checkpoint's processor."
                )


def _listed(counts: Tensor) -> str:
    return " and ".join(str(count) for count in counts.tolist())
