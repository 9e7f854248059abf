"""The embeddings of an organism's prompt out of features: a second road to its logits, by HuggingFace's forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.errors import InputError
from av_lens.organism.language import prompt


def embed(
    model: Any,
    layout: str,
    questions: Sequence[str],
    *,
    video: Float[Tensor, "batch video_pos d_model"] | None = None,
    audio: Float[Tensor, "batch audio_pos d_model"] | None = None,
) -> tuple[Float[Tensor, "batch pos d_model"], Tensor]:
    """Make the embeddings that a forward pass starts from, out of features computed before.

    Args:
        model: a HuggingFace thinker.
        layout: one of `LAYOUTS`.
        questions: one for each example, all of the same number of tokens.
        video: what the vision tower put out; needed where the layout has a video.
        audio: what the audio tower put out; needed where the layout has a sound.

    Returns:
        The embeddings and the position ids `[3, batch, pos]`; differentiable in the embeddings and the features.

    Raises:
        InputError: if questions differ in length, or features of the layout are missing.
    """
    prompts = [prompt(question, layout) for question in questions]
    if len({len(made.ids) for made in prompts}) != 1:
        raise InputError(f"questions of one batch need the same number of tokens; found {sorted(set(questions))}.")
    ids = torch.stack([made.ids for made in prompts])
    embeddings = model.model.language_model.embed_tokens(ids)
    for kind, features, at in (("video", video, prompts[0].video), ("audio", audio, prompts[0].audio)):
        if len(at) == 0:
            continue
        if features is None:
            raise InputError(f"layout {layout!r} has {kind} tokens: pass the tower's output as {kind}=.")
        embeddings = embeddings.index_copy(1, at, features.to(embeddings.dtype))
    return embeddings, prompts[0].position_ids[:, None].expand(3, len(ids), -1)
