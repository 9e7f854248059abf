"""The fixed evaluation of an embedded model: what it answers, where it keeps the sound, which heads hold it back.

Clips are written to mp4, decoded back, and known by their content hashes: the shipped weights reproduce the shipped
counts on equal clips. A sample also goes the public road; evaluation is refused if the two roads differ.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from av_lens.checks import foreign_file, parse_json, whole_object
from av_lens.core.budget import Progress, silent
from av_lens.errors import ModelError
from av_lens.organism import anatomy, answering, dissection
from av_lens.organism.anatomy import CLASSES
from av_lens.organism.answering import Asked, logits, plain
from av_lens.organism.footage import HeldOut, held_out, media, mel
from av_lens.organism.language import audio_hidden, patches, vision_features
from av_lens.results.statistics import clopper_pearson
from av_lens.whole_files import write_whole

SCHEMA = 1
ROAD_TOLERANCE = 1e-3
_TABLES = ("counts", "captions", "probes", "cuts", "heads", "ablation", "kept")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found; every count is of held-out clips.

    Attributes:
        counts: answers in every cell, from `answering.behave`.
        captions: the slots of captions.
        probes: what can be read from the stream, by layer; empty if the model was not dissected.
        cuts: answers with attention cut; empty likewise.
        heads: each head silenced alone, on discovery clips; empty likewise.
        ablation: the best heads and random ones silenced together; empty likewise.
        kept: all cells with the best heads silenced; empty likewise.
        about: split, seed, clips a class, the digest of their hashes, how far the two roads differ, versions.
    """

    counts: pd.DataFrame
    captions: pd.DataFrame
    probes: pd.DataFrame = field(default_factory=pd.DataFrame)
    cuts: pd.DataFrame = field(default_factory=pd.DataFrame)
    heads: pd.DataFrame = field(default_factory=pd.DataFrame)
    ablation: pd.DataFrame = field(default_factory=pd.DataFrame)
    kept: pd.DataFrame = field(default_factory=pd.DataFrame)
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def shares(self, table: str = "counts") -> pd.DataFrame:
        """Give every share with its exact 95% interval.

        Args:
            table: "counts" or "captions".

        Returns:
            `cell layout kind answer count n share low high`.
        """
        rows: list[dict[str, Any]] = []
        for row in getattr(self, table).to_dict("records"):
            for name in answering.COUNTED:
                low, high = clopper_pearson(int(row[name]), int(row["n"]))
                place = {key: row[key] for key in ("cell", "layout", "kind")} | {"answer": name, "count": row[name]}
                rows.append(place | {"n": row["n"], "share": row[name] / row["n"], "low": low, "high": high})
        return pd.DataFrame(rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the evaluation as json.

        Args:
            path: where to.
        """
        tables = {name: json.loads(getattr(self, name).to_json(orient="split", index=False)) for name in _TABLES}
        content = {"schema": SCHEMA, "about": dict(self.about), **tables}
        write_whole(Path(path), json.dumps(content, indent=None, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read an evaluation.

        Args:
            path: a file that `save` wrote.

        Returns:
            The evaluation.

        Raises:
            ModelError: there is no such file, it is damaged, or has another schema.
        """
        with foreign_file(path, "an evaluation", error=ModelError):
            content = whole_object(parse_json(Path(path).read_bytes(), finite=False), "it")
            if content.get("schema") != SCHEMA:
                raise ModelError(f"{path} is no evaluation of schema {SCHEMA} (found {content.get('schema')}).")
            columns = {name: [str(column) for column in content[name]["columns"]] for name in _TABLES}
            tables = {name: pd.DataFrame(content[name]["data"], columns=columns[name]) for name in _TABLES}
            return cls(**tables, about=whole_object(content["about"], "about"))


@torch.no_grad()
def road_difference(model: Any, bare: Any, clips: HeldOut, *, n: int = 6) -> float:
    """Compare the quick road with the public one, on conflict clips through files."""
    largest, step = 0.0, max(len(clips.partner) // n, 1)
    for at in range(0, step * n, step)[:n]:
        clip = clips.clip(at).with_sound(clips.clip(int(clips.partner[at])))
        video = vision_features(bare, patches(torch.from_numpy(np.array(clip.frames)[None, ::4])))
        audio = bare.model.audio_tower.proj(audio_hidden(bare, torch.from_numpy(mel([np.array(clip.waveform)]))))
        questions = [anatomy.QUESTIONS[kind][at % len(anatomy.QUESTIONS[kind])] for kind in answering.KINDS]
        for layout in answering.BOTH:
            ours = logits(bare, Asked(layout, [questions], video, audio))[0, :, 0]
            for block, question in enumerate(questions):
                public = model(model.encode(clip, question, sound=layout))[0, -1]
                largest = max(largest, (public.float().cpu() - ours[block]).abs().max().item())
    return largest


def evaluate(
    model: Any,
    *,
    seed: int = 0,
    n: int = 720,
    dissect: bool = True,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate an embedded model on held-out clips.

    Args:
        model: a `HookedAVLLM` from `load`, or a thinker that no bridge has wrapped (then nothing is compared with the
            public road).
        seed: which set of clips; the shipped tables are of seed 0.
        n: clips in each cell, rounded up to as many of each class.
        dissect: also probe, cut and silence, which takes most of the time.
        folder: where filmed clips are kept for the next time; by default they are not.
        progress: called with a stage's name, what is done and how much there is.

    Returns:
        The evaluation.

    Raises:
        ModelError: if the model is no organism, or the quick road and the public road differ.
    """
    import transformers

    bare = plain(model)
    if bare.config.text_config.vocab_size != len(anatomy.vocabulary()):
        raise ModelError(f"evaluate is for the embedded models; found {bare.config.text_config.vocab_size} tokens.")
    per_class = -(-n // len(CLASSES))
    test = held_out(split="test", seed=seed, per_class=per_class, folder=folder, progress=progress)
    outputs = media(bare, test)
    about: dict[str, Any] = {"split": "test", "seed": seed, "per_class": per_class, "clips": test.digest}
    about["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if hasattr(model, "encode"):
        about["road_difference"] = road_difference(model, bare, test)
        if about["road_difference"] > ROAD_TOLERANCE:
            raise ModelError(
                f"the quick road and encode + forward differ by {about['road_difference']:.2g} in a logit: these "
                "counts would not be the model's."
            )
    counts, captions = answering.behave(bare, test, outputs), answering.captioned(bare, test, outputs)
    if not dissect:
        return Evaluation(counts, captions, about=about)
    tell, stage = progress or silent, "dissecting the model"
    found = held_out(split="discovery", seed=seed, per_class=per_class, folder=folder, progress=progress)
    discovery = (found, media(bare, found))  # where heads are chosen
    probes = dissection.probes(bare, discovery, (test, outputs))
    tell(stage, 1, 4)
    cuts = dissection.cuts(bare, test, outputs)
    tell(stage, 2, 4)
    heads = dissection.heads(bare, *dissection.few(*discovery, min(20, per_class)))
    tell(stage, 3, 4)
    ranked = [(int(layer), int(head)) for layer, head in zip(heads["layer"], heads["head"], strict=True)]
    ablation, kept = dissection.ablation(bare, ranked, (test, outputs), seed=seed)
    tell(stage, 4, 4)
    return Evaluation(counts, captions, probes, cuts, heads, ablation, kept, about)
