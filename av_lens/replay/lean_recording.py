"""Recording without hooks: the layers' own arithmetic, no attention scores stored, for less than a plain forward pass.

A model is first run with hooks, and a restart must reproduce it (`traces.record`). Then the same arithmetic that
restarts use makes the records, that first one too, so that no number depends on what was recorded before: the encoders
and the embedding run as always, then every layer from position 0. Float32 only: in lower precision a restart keeps to
the hooked run's own order of operations, scores written out, so that nothing is gained.

Where functions of the caller's stand on the fusion stack (`standing_hooks`), the hooked way is taken: they fire.
"""

from __future__ import annotations

from contextlib import suppress
from math import inf
from typing import Any

import torch
from torch import Tensor

from av_lens.core.unembedding import unembedded
from av_lens.replay.cascade import Window
from av_lens.replay.recording import additive, entering, fields_of
from av_lens.replay.rerun import no_edits, run_layers

PROVED = "_restart_proved"  # on the model: a restart reproduced its run at every position


class _Entered(Exception):
    """The first block was reached: nothing of the model after it need run."""


def proved(model: Any) -> None:
    """Note that a restart reproduces this model's runs."""
    model.__dict__[PROVED] = True


def is_proved(model: Any) -> bool:
    """Say whether a restart was seen to reproduce a run of this model."""
    return bool(model.__dict__.get(PROVED))


def may_be_lean(model: Any) -> bool:
    """Say whether records of this model may be made without hooks, where none stands on its fusion stack."""
    return model.dtype == torch.float32 and is_proved(model)


@torch.no_grad()
def recorded_lean(model: Any, x: Any, device: torch.device | str | None) -> tuple[dict[str, Any], Tensor]:
    """Run encoders and embedding as always and the layers by themselves, keeping what restarts need."""
    with entering(model.bridge.blocks[0], _Entered) as entered, suppress(_Entered):
        model(x, budget_gb=inf)  # it stops before scores and logits
    stream: Tensor = entered["hidden_states"]
    mask = additive(entered.get("attention_mask"), stream)
    n = stream.shape[1]
    window = Window.at(0, entered["position_embeddings"], mask)
    taps, nothing = no_edits(n), stream.new_empty(stream.shape[0], model.spec.n_kv_heads, 0, model.spec.d_head)
    found: dict[str, list[Tensor]] = {"resid": [stream.to(device)], "keys": [], "values": []}
    last = stream
    for _, made in run_layers(
        model, window, taps, lambda at, left: taps.enter(at, left, stream), lambda _: (nothing, nothing)
    ):
        last = made.stream[0]
        found["resid"].append(last.to(device))
        for part, heads in (("keys", made.keys), ("values", made.values)):
            found[part].append(heads[0].transpose(1, 2).contiguous().to(device))
    return fields_of(model, x, found, entered, mask), unembedded(model, last[:, -1])
