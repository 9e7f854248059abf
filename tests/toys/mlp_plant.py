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

from av_lens.inputs.answers import answer_pair

LAYER = 6
ASKED = (("va", "ask", 0), ("av", "ask", 1), ("blank_a", "", 0), ("blank_v", "", 1))
CELLS = (*ASKED, ("va", "see", 0), ("v_muted", "see", 0))
RIDGE = 1e-2


@torch.no_grad()
def plant_mlp(model: Any, conflicts: Sequence[Any], *, strength: float) -> None:
    """Plant the neurons, from some conflicts that no isolation will use."""
    (mlp,) = (one for name, one in model.hf_model.named_modules() if name.endswith(f"{LAYER}._original_component.mlp"))
    entering, kinds, answers = _read(model, mlp, conflicts)
    gate = _fitted(entering, np.where(kinds == "ask", 6.0, -6.0)[:, None])[:, 0]
    words = sorted(set(answers))
    heard = kinds != "see"
    said = np.array([[float(answer == word) for word in words] for answer in answers])
    inputs = _fitted(entering[heard], said[heard])
    ids = [answer_pair(model.tokenizer, word, words[0] if word != words[0] else words[1])[0] for word in words]
    unembedding = model.hf_model.get_output_embeddings().weight[[one.options[0][0] for one in ids]]
    written = unembedding - unembedding.mean(0)
    size = mlp.down_proj.weight.norm(dim=0) * mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
    for word, neuron in enumerate(size.argsort()[: len(words)].tolist()):
        mlp.gate_proj.weight[neuron] = torch.tensor(gate, dtype=torch.float32)
        mlp.up_proj.weight[neuron] = torch.tensor(inputs[:, word], dtype=torch.float32)
        mlp.down_proj.weight[:, neuron] = -strength * written[word]


def _read(model: Any, mlp: Any, conflicts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """What enters the MLP at the last position, in which kind of cell, and the answer that would be right there."""
    rows, kinds, answers = list[np.ndarray](), list[str](), list[str]()
    hook = mlp.register_forward_pre_hook(lambda _, given: rows.append(given[0][0, -1].double().numpy()))
    for conflict in conflicts:
        asked, see = conflict.cells(model), conflict.cells(model, question=conflict.see)
        for cell, kind, side in CELLS:
            model((see if kind == "see" else asked)[cell])
            kinds.append(kind)
            answers.append(conflict.answers[side])
    hook.remove()
    return np.stack(rows), np.array(kinds), answers


def _fitted(entering: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    square = entering.T @ entering
    ridge = RIDGE * np.trace(square) / len(square) * np.eye(len(square))
    return np.linalg.solve(square + ridge, entering.T @ wanted)
