"""Write an embedded model as a checkpoint folder that `load` opens: config, float16 weights, processor and grammar.

What ships with the package lies in `checkpoints/`, listed by `index.json` (short name to folder and a sentence about
it); `load` reads that file itself, so that opening a model does not import this room.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from av_lens import checkpoints
from av_lens.model.differences import read_difference
from av_lens.model.loading import base_of
from av_lens.organism import anatomy, grammar
from av_lens.whole_files import make_folder, read_object, whole_folder, write_whole

INDEX = "index.json"
GRAMMAR = "grammar.json"


def shipped() -> Path:
    """Say where the checkpoints lie that ship with the package."""
    return Path(str(checkpoints.shipped()))


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keep HuggingFace's progress bars off the terminal, and leave its setting as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save_checkpoint(model: Any, folder: str | os.PathLike[str], *, documents: dict[str, Any] | None = None) -> Path:
    """Write a model as a checkpoint folder."""
    place = Path(folder)
    half = copy.deepcopy(model).to(torch.float16)
    with whole_folder(place) as beside:
        with _quiet():
            half.save_pretrained(beside)
        anatomy.processor().save_pretrained(beside)
        for name, content in {GRAMMAR: grammar.as_dict(), **(documents or {})}.items():
            (beside / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return place


def list_checkpoint(name: str, summary: str, *, folder: str | None = None, root: Path | None = None) -> None:
    """Enter a checkpoint in the index, so that `load(name)` finds it."""
    place = (root or shipped()) / INDEX
    listed: dict[str, Any] = read_object(place) if place.exists() else {}
    listed[name] = {"folder": folder or name, "summary": summary}
    make_folder(place.parent)
    write_whole(place, json.dumps(listed, indent=1) + "\n")


def open_checkpoint(folder: str | os.PathLike[str]) -> Any:
    """Read a checkpoint folder as a plain HuggingFace model, for training and comparison."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    difference = read_difference(folder)
    place = folder if difference is None else base_of(difference)
    with _quiet():
        model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            os.fspath(place),
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    if difference is not None:
        difference.check_base(place)
        difference.put_into(model)
    return model.eval()
