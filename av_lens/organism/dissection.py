"""Where a model keeps the sound on conflict clips, and which heads keep it from being said.

The quick self-portrait that ships with each model; the main job (`isolate`) is the instrument.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from av_lens.organism.answering import BOTH, CELLS, Cell, Head, ask, behave, each_head, logits, streams, truth
from av_lens.organism.footage import HeldOut, Media
from av_lens.organism.language import class_ids
from av_lens.results.readouts import LinearProbe

MOST_HEADS = 4
RANDOM_SETS = 6
CUTS = {"text|audio > video": ("text|audio", "video"), "text > audio": ("text", "audio")}
_CONFLICT = CELLS["conflict"]
_UNSEEN = Cell(BOTH, "blank", "partner")
_WATCHED = ("audio_only", "video_only", "factual", "conflict")


def probes(model: Any, fit: tuple[HeldOut, Media], test: tuple[HeldOut, Media]) -> pd.DataFrame:
    """Read sound and picture from the stream where the answer to "hear" begins; layer 0 is before the first."""
    rows: list[dict[str, Any]] = []
    for layout in BOTH:
        seen = [streams(model, ask(_CONFLICT, layout, *half, kinds=("hear",)))[:, 0] for half in (fit, test)]
        facts = [truth(_CONFLICT, half[0]) for half in (fit, test)]
        for layer in range(seen[0].shape[1]):
            x, x_test = (part[:, layer].numpy() for part in seen)
            for target in ("sound", "picture"):
                y, y_test = (fact[target].numpy() for fact in facts)
                score = float((LinearProbe.fitted(x, y).predicted(x_test) == y_test).mean())
                rows.append({"layout": layout, "layer": layer, "target": target, "accuracy": score, "n": len(y_test)})
    return pd.DataFrame(rows)


def cuts(model: Any, clips: HeldOut, media: Media) -> pd.DataFrame:
    """Count answers on conflict clips with attention to a medium cut in all layers, in rows with a column `cut`."""
    parts = [
        behave(model, clips, media, cells=("conflict",), kinds=("hear", "see"), cut=edges).assign(cut=name)
        for name, edges in CUTS.items()
    ]
    return pd.concat(parts, ignore_index=True)


def margin(said: Tensor, clips: HeldOut) -> Tensor:
    """Say by how much the sound's answer leads the picture's on conflict clips: logit(sound) - logit(picture)."""
    what, tokens = truth(_CONFLICT, clips), class_ids()
    sound, picture = (said.gather(1, tokens[label][:, None])[:, 0] for label in (what["sound"], what["picture"]))
    return sound - picture


def heads(model: Any, clips: HeldOut, media: Media) -> pd.DataFrame:
    """Silence every head alone on conflict clips that are asked to hear, largest effect first.

    By how much the sound's lead grows (in logits, and as a share of the gap) and is answered; means over layouts.
    """
    found: dict[Head, list[tuple[float, float, float]]] = {}
    tokens = class_ids()[truth(_CONFLICT, clips)["sound"]]
    for layout in BOTH:
        asked = ask(_CONFLICT, layout, clips, media, ("hear",))
        before = margin(logits(model, asked)[:, 0, 0], clips)
        unseen = ask(_UNSEEN, layout, clips, media, ("hear",))
        gap = (margin(logits(model, unseen)[:, 0, 0], clips) - before).mean().item()
        for head, said in each_head(model, asked):
            effect = (margin(said[:, 0], clips) - before).mean().item()
            right = (said[:, 0].argmax(-1) == tokens).float().mean().item()
            found.setdefault(head, []).append((effect, effect / gap, right))
    means = {head: np.mean(values, 0).tolist() for head, values in found.items()}
    rows = [
        {"layer": layer, "head": head, "effect": effect, "share": share, "sound": right}
        for (layer, head), (effect, share, right) in means.items()
    ]
    return pd.DataFrame(rows).sort_values("effect", ascending=False, ignore_index=True)


def controls(
    chosen: Sequence[Head], n_layers: int, n_heads: int, *, n_sets: int = RANDOM_SETS, seed: int = 0
) -> list[tuple[Head, ...]]:
    """Draw different random sets of as many heads: half from the counterparts' layers where it can be, half near."""
    rng = np.random.default_rng([11, seed])
    sets: dict[tuple[Head, ...], None] = {}
    for attempt in range(8 * n_sets):
        nearest = 0 if attempt < 4 * n_sets else 1
        drawn: list[Head] = []
        for layer, _ in chosen:
            for distance in range(nearest, n_layers):
                near = {layer - distance, layer + distance} & set(range(n_layers))
                free = [(at, head) for at in sorted(near) for head in range(n_heads)]
                free = [head for head in free if head not in chosen and head not in drawn]
                if free:
                    drawn.append(free[int(rng.integers(len(free)))])
                    break
        full = len(sets) >= (n_sets // 2 if nearest == 0 else n_sets)
        if not full and len(drawn) == len(chosen):
            sets[tuple(sorted(drawn))] = None
    return list(sets)


def ablation(
    model: Any, ranked: Sequence[Head], test: tuple[HeldOut, Media], *, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Silence the best 1 to 4 heads together on held-out conflicts, beside random heads; other cells with all four."""
    clips, media = test
    config = model.config.text_config
    best = tuple(ranked[:MOST_HEADS])
    fewer = few(clips, media, min(clips.per_class, 30))
    arms = [("chosen", best[:count], test) for count in range(1, len(best) + 1)]
    random = controls(best, config.num_hidden_layers, config.num_attention_heads, seed=seed)
    arms += [("random", drawn, fewer) for drawn in random]
    parts: list[pd.DataFrame] = []
    for arm, silenced, half in arms:
        found = behave(model, *half, cells=("conflict",), kinds=("hear",), silenced=silenced)
        parts.append(found.assign(arm=arm, count=len(silenced), heads=name_heads(silenced)))
    kept = behave(model, clips, media, cells=_WATCHED, kinds=("hear", "see"), silenced=best)
    return pd.concat(parts, ignore_index=True), kept.assign(heads=name_heads(best))


def name_heads(chosen: Sequence[Head]) -> str:
    """Write heads as text, such as "L4H2 L4H3"."""
    return " ".join(f"L{layer}H{head}" for layer, head in chosen)


def few(clips: HeldOut, media: Media, per_class: int) -> tuple[HeldOut, Media]:
    """Take the first clips of each class, their conflicts within themselves."""
    n_classes = len(clips.partner) // clips.per_class
    keep = torch.arange(n_classes)[:, None] * clips.per_class + torch.arange(per_class)
    at = keep.flatten()
    label, place = clips.partner[at] // clips.per_class, clips.partner[at] % clips.per_class
    hashes = tuple(clips.hashes[int(one)] for one in at)
    smaller = replace(
        clips, per_class=per_class, views=clips.views.taken(at), partner=label * per_class + place, hashes=hashes
    )
    return smaller, replace(media, video=media.video[at], audio=media.audio[at])
