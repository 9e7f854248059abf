"""Processors as the hub's checkpoints have them: the settings of their public files, over the tokens of `tiny`.

Of Qwen2.5-Omni, Qwen2.5-VL, Qwen3-Omni and Qwen3-VL: `preprocessor_config.json`, and `video_preprocessor_config.json`
where there is one. `folder_of` writes them as a checkpoint's folder has them, so that they are opened as there.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tiny_families import TINY

import av_lens as avl

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PATCHES = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, "temporal_patch_size": 2}
PIXELS = {"min_pixels": 3136, "max_pixels": 12845056}
EARS = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "dither": 0.0,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
}
PICTURES, VIDEOS = "preprocessor_config.json", "video_preprocessor_config.json"
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_5_omni": {
        PICTURES: {"processor_class": "Qwen2_5OmniProcessor", "patch_size": 14, "chunk_length": 300}
        | CLIP
        | PATCHES
        | PIXELS
        | EARS
    },
    "qwen3_omni_moe": {
        # No chunk_length: the extractor takes its class's 30 s, and the processor pads and cuts nothing.
        PICTURES: {"processor_class": "Qwen3OmniMoeProcessor", "patch_size": 16} | HALVES | PATCHES | PIXELS | EARS
    },
    "qwen2_5_vl": {PICTURES: {"processor_class": "Qwen2_5_VLProcessor", "patch_size": 14} | CLIP | PATCHES | PIXELS},
    "qwen3_vl": {
        PICTURES: {"processor_class": "Qwen3VLProcessor", "patch_size": 16}
        | HALVES
        | PATCHES
        | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}},
        VIDEOS: {"processor_class": "Qwen3VLProcessor", "patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
        | HALVES
        | {"video_processor_type": "Qwen3VLVideoProcessor"}
        | {"size": {"shortest_edge": 4096, "longest_edge": 25165824}},
    },
}


def folder_of(name: str, path: Path) -> Path:
    """Write a processor's files: its tokenizer, its template, and its settings."""
    processor = TINY[name].processor()
    processor.tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(processor.chat_template)
    for file, settings in SETTINGS[name].items():
        (path / file).write_text(json.dumps(settings))
    return path


@cache
def true_model(name: str) -> Any:
    """The tiny model of a family behind its true processor, opened from files."""
    with TemporaryDirectory() as place:
        return avl.load(folder_of(name, Path(place)), hf_model=TINY[name].hf_model(0))
