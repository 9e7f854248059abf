"""What else does the set's edit break? Non-inferiority, control by control (protocol section 8, second point).

| control | cell, question | right |
|---|---|---|
| see | `va`, see | the picture's answer |
| audio-only | `audio_only`, its own question | the sound's answer |
| factual heard | `aa`, its own question | the (one) answer |
| factual seen | `aa`, see | the (one) answer |
| control | `va`, control | the unedited run's own most likely token |
| silent video | `v_muted`, its own question | none: the rate of any candidate answer must not *rise* |
| text-only | the bare question | none: KL(edited || unedited) is reported |

One item per conflict. Right means that the most likely token of the whole vocabulary belongs to the answer. Choices
where the protocol is silent: the donor `blank_muted` is asked the control's own question where the layout is the same
(audio alone and bare text: the conflict's own question, aligned from the end); `mean_other` is the same z everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from av_lens.errors import AvLensError
from av_lens.isolation.measuring.bench import Chunk, gathered
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.recordings import Head
from av_lens.isolation.measuring.scoring import UNREAD
from av_lens.results.statistics import Bootstrap, non_inferiority

MARGIN = 0.05
CONTROLS: tuple[tuple[str, str, str, str], ...] = (
    ("see", "va", "see", "picture"),
    ("audio-only", "audio_only", "ask", "sound"),
    ("factual heard", "aa", "ask", "sound"),
    ("factual seen", "aa", "see", "sound"),
    ("control", "va", "control", "own"),
    ("silent video", "v_muted", "ask", "none"),
    ("text-only", "text_only", "ask", "kl"),
)


def _items(
    chunk: Chunk, before: Tensor, after: Tensor, right: str
) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
    """What counts as right before and after, 1 or 0 per conflict (for KL: 0 and the divergence)."""
    candidates, examples = chunk.bench.candidates, chunk.examples
    if right == "kl":
        log_p, log_q = after.double().log_softmax(-1), before.double().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1).cpu().numpy()
        return np.zeros(len(examples)), divergence
    tops = [candidates.read(logits, examples).top for logits in (before, after)]
    missing = tops[1] == UNREAD  # this conflict has no such edit (a mean that leaves every other conflict out)
    if right == "own":
        was, now = np.ones(len(examples)), (before.argmax(-1) == after.argmax(-1)).cpu().numpy()
    elif right == "none":
        # The rate that must not rise, turned round so that a rise of it is a fall here.
        was, now = (top < 0 for top in tops)
    else:
        answer = candidates.sound[examples] if right == "sound" else candidates.picture[examples]
        was, now = (top == answer for top in tops)
    return was.astype(np.float64), np.where(missing, np.nan, now)


def _measured(
    chunk: Chunk, control: tuple[str, str, str, str], heads: Sequence[Head], donor: str
) -> dict[str, Float[np.ndarray, " batch"]]:
    _, cell, question, right = control
    run = chunk.run(cell, question)
    (edited,) = chunk.bench.engine.changed(run, [run.plan(chunk.z(cell, heads, donor, question))])
    before, after = _items(chunk, run.logits, edited.logits, right)
    return {"before": before, "after": after}


def controls(chunks: Sequence[Chunk], heads: Sequence[Head], donor: str, half: Half) -> list[dict[str, Any]]:
    """Run every control with the set edited: a row of `specificity` each; what cannot be measured is said there."""
    rows: list[dict[str, Any]] = []
    for control in CONTROLS:
        name, *_, right = control
        depends = {"control": control, "heads": [list(head) for head in heads], "donor": donor}
        compute = partial(_measured, control=control, heads=heads, donor=donor)
        try:
            found = gathered(chunks, half.examples, "a control", depends, compute)
            rows.append(_row(name, right, found["before"], found["after"], half.boot))
        except AvLensError as refused:
            rows.append({"control": name, "n": 0, "verdict": f"not measured: {refused}"})
    return rows


def _row(name: str, right: str, before: np.ndarray, after: np.ndarray, boot: Bootstrap) -> dict[str, Any]:
    if right == "kl":
        n, mean = int((~np.isnan(after)).sum()), float(np.nanmean(after))
        return {"control": name, "n": n, "before": 0.0, "after": mean, "verdict": "reported: KL in nats"}
    harm = non_inferiority(before, after, boot, margin=MARGIN)
    was, now = (1 - harm.before, 1 - harm.after) if right == "none" else (harm.before, harm.after)
    return {
        "control": name,
        "n": harm.n,
        "before": was,
        "after": now,
        "fall": harm.fall,
        "bound": harm.bound,
        "margin": MARGIN,
        "verdict": harm.verdict,
    }
