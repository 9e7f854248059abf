"""An MLP that suppresses, planted in closed form: neurons of layer 6 that fire where a sound is asked for and a picture
is seen, and then write against the answer that the stream is about to give.

Of some conflicts what enters the MLP at the last position is read under the question about the sound, with a picture
and without, and under the question about the picture. Two least-squares fits make a neuron for each word: its gate is
+6 with a picture under "hear" and -6 elsewhere, its input is 1 where that word would be said. It writes minus the
word's unembedding, times `strength`. The neurons that wrote least give way. No head is touched, so none suppresses:
heads tell the MLP what is seen and heard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from av_lens.isolation.measuring.behaviour import answered
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.scoring import Candidates

LAYER = 6
ASKED = (("va", "ask", 0), ("av", "ask", 1), ("blank_a", "", 0), ("blank_v", "", 1))
CELLS = (*ASKED, ("va", "see", 0), ("v_muted", "see", 0))
RIDGE = 1e-2


@torch.no_grad()
def plant_mlp(model: Any, conflicts: Sequence[Any], *, strength: float) -> None:
    """Plant the neurons, from some conflicts that no isolation will use."""
    (mlp,) = (one for name, one in model.hf_model.named_modules() if name.endswith(f"{LAYER}._original_component.mlp"))
    conflicts = answered(ModelEngine(model), list(conflicts)).conflicts  # with their answers' tokens
    candidates = Candidates.of(conflicts, model.tokenizer)
    entering, kinds, answers = _read(model, mlp, conflicts, candidates)
    gate = _fitted(entering, np.where(kinds == "ask", 6.0, -6.0)[:, None])[:, 0]
    heard, n_words = kinds != "see", int(answers.max()) + 1
    inputs = _fitted(entering[heard], np.eye(n_words)[answers[heard]])
    unembedding = model.hf_model.get_output_embeddings().weight[candidates.ids[:, 0]]
    written = unembedding - unembedding.mean(0)
    size = mlp.down_proj.weight.norm(dim=0) * mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
    for word, neuron in enumerate(size.argsort()[:n_words].tolist()):
        mlp.gate_proj.weight[neuron] = torch.tensor(gate, dtype=torch.float32)
        mlp.up_proj.weight[neuron] = torch.tensor(inputs[:, word], dtype=torch.float32)
        mlp.down_proj.weight[:, neuron] = -strength * written[word]


def _read(
    model: Any, mlp: Any, conflicts: Sequence[Any], candidates: Candidates
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What enters the MLP at the last position, in which kind of cell, and the candidate that would be right there."""
    rows, kinds, answers = list[np.ndarray](), list[str](), list[int]()
    hook = mlp.register_forward_pre_hook(lambda _, given: rows.append(given[0][0, -1].double().numpy()))
    for conflict, *right in zip(conflicts, candidates.sound, candidates.picture, strict=True):
        asked, see = conflict.cells(model), conflict.cells(model, question=conflict.see)
        for cell, kind, side in CELLS:
            model((see if kind == "see" else asked)[cell])
            kinds.append(kind)
            answers.append(int(right[side]))
    hook.remove()
    return np.stack(rows), np.array(kinds), np.array(answers)


def _fitted(entering: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    square = entering.T @ entering
    ridge = RIDGE * np.trace(square) / len(square) * np.eye(len(square))
    return np.linalg.solve(square + ridge, entering.T @ wanted)
