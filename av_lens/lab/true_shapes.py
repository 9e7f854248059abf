"""Does the whole isolation run at the size of a real checkpoint, and what would it cost on a GPU?

A thinker of the 3B's true shapes with random weights and a few layers is searched whole, past the gate; its record is
stamped "not interpretable". What is measured are seconds, memory and each stage's operations (PyTorch's counter, matrix
products alone). The towers are timed once more at their full depth.

Sources of the sizes: the configuration files of Qwen2.5-Omni-3B and -7B.
"""

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from av_lens.checks import require_choice
from av_lens.core.budget import Progress, silent
from av_lens.errors import InputError
from av_lens.inputs import conflicts
from av_lens.isolation import isolate
from av_lens.isolation.running.cost import peak_memory
from av_lens.lab.calibration import QUESTION, write_manifest
from av_lens.media import Clip, load_clip
from av_lens.model import load
from av_lens.organism import anatomy, footage
from av_lens.results.provenance import stamp
from av_lens.whole_files import make_folder, write_whole

MEL_BINS = 128
RECORD = "true_shapes.json"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a checkpoint."""

    name: str  # what tables call it
    n_layers: int  # fusion layers
    d_model: int  # width of the stream
    n_heads: int  # query heads of a layer
    n_kv_heads: int  # key-value heads
    d_mlp: int  # width of the feed-forward layers
    d_vocab: int  # tokens
    audio: tuple[int, int, int, int] = (32, 1280, 20, 5120)  # layers, width, heads and inner width of the audio tower
    vision: tuple[int, int, int, int] = (32, 1280, 16, 3420)  # the same of the vision tower

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one fusion layer."""
        d_head = self.d_model // self.n_heads
        attention = 2 * self.d_model * self.d_model + 2 * self.d_model * self.n_kv_heads * d_head
        return attention + 3 * self.d_model * self.d_mlp

    @property
    def tower_weights(self) -> int:
        """Weights of the matrices of both towers' layers."""
        layers, width, _, inner = self.audio
        audio = layers * (4 * width * width + 2 * width * inner)
        layers, width, _, inner = self.vision
        return audio + layers * (4 * width * width + 3 * width * inner)

    @property
    def weights(self) -> int:
        """Weights of all matrices: fusion layers, embedding, unembedding, towers."""
        return self.n_layers * self.layer_weights + 2 * self.d_model * self.d_vocab + self.tower_weights


SIZES = {"3B": Sizes("3B", 36, 2048, 16, 2, 11008, 151936), "7B": Sizes("7B", 28, 3584, 28, 4, 18944, 152064)}
"""Qwen2.5-Omni's thinkers."""


def build(sizes: Sizes, *, n_layers: int = 4, tower_layers: int = 2, seed: int = 0) -> Any:
    """Make a wrapped thinker of true shapes with random weights and few layers, in bfloat16."""
    config = config_of(sizes, n_layers=n_layers, tower_layers=tower_layers)
    hf_model = anatomy.build_model(config, seed=seed, dtype=torch.bfloat16).requires_grad_(False)
    return load(f"{sizes.name} shapes, {n_layers} layers", hf_model=hf_model, processor=true_processor())


def config_of(sizes: Sizes, *, n_layers: int, tower_layers: int) -> Any:
    """Describe a thinker of true shapes, as a `Qwen2_5OmniThinkerConfig`."""
    part = sizes.d_model // sizes.n_heads // 16  # of a head's width: 2 parts for time, 3 for rows, 3 for columns
    config = anatomy.thinker_config(
        n_layers=n_layers,
        n_heads=sizes.n_heads,
        n_kv_heads=sizes.n_kv_heads,
        d_model=sizes.d_model,
        d_mlp=sizes.d_mlp,
        vocab_size=sizes.d_vocab,
        initializer_range=1.8 / sizes.d_model**0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * part, 3 * part, 3 * part]},
    )
    (_, seen, seeing, fed), (_, heard, hearing, inner) = sizes.vision, sizes.audio
    whole = list(range(7, tower_layers, 8))
    config.vision_config.update(
        {"depth": tower_layers, "hidden_size": seen, "num_heads": seeing, "intermediate_size": fed}
        | {"fullatt_block_indexes": whole}
    )
    config.audio_config.update(
        {"encoder_layers": tower_layers, "d_model": heard, "encoder_attention_heads": hearing}
        | {"encoder_ffn_dim": inner, "num_mel_bins": MEL_BINS}
    )
    return config


def true_processor() -> Any:
    """Build the processor with the picture sizes and mel bins of real checkpoints, over the small vocabulary."""
    from transformers import Qwen2_5OmniProcessor

    built, real = anatomy.processor(), cast(Any, Qwen2_5OmniProcessor)
    built.videos_kwargs = {"size": dict(real.videos_kwargs["size"])}
    built.feature_extractor = anatomy.feature_extractor(MEL_BINS)
    return built


def stage_windows(recording: str | Path, folder: Path, *, n: int, seconds: float = 1.0, seed: int = 0) -> Path:
    """Cut conflicts from disjoint windows of a recording; a window serves several, each with another made sound."""
    if not Path(recording).is_file():
        raise InputError(f"the recording {recording} is not there: name a video file of at least {2 * seconds:g} s.")
    shown = load_clip(recording).require_picture()
    windows = int((shown.picture_end + 1e-3) // seconds)
    if windows < 2:
        raise InputError(f"{recording} lasts {shown.picture_end:.1f} s; two windows of {seconds:g} s are needed.")
    rng = np.random.default_rng([seed, 0x3B])
    names = [str(name) for name in footage.classes()]
    lines: list[dict[str, Any]] = []
    for index in range(n):
        places = rng.choice(windows, size=2, replace=False)
        heard, seen = (names[int(i)] for i in rng.choice(len(names), size=2, replace=False))
        lines.append({"id": f"{index:04d}", "question": QUESTION, "answers": [heard, seen]})
        for key, place, name in (("sound", places[0], heard), ("picture", places[1], seen)):
            lines[-1][key] = file = f"{index:04d}-{key}.mp4"
            part = shown.trimmed(float(place) * seconds, float(place) * seconds + seconds)
            said: Any = footage.example("discovery", name, 900_000 + 2 * index + (key == "picture")).waveform
            sound, times = said[: round(16000 * seconds)], part.times
            made = Clip.from_arrays(frames=part.frames, times=times, waveform=sound, rate=16000, duration=seconds)
            made.save(folder / file)
    return write_manifest(folder, lines)


def run_at_true_shapes(
    recording: str | Path,
    out: str | Path,
    *,
    size: str = "3B",
    n: int = 40,
    n_layers: int = 4,
    tower_layers: int = 2,
    quick: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Search a model of true shapes whole, and time its towers at full depth."""
    require_choice("size", size, SIZES)
    sizes = SIZES[size]
    clips = Path(out) / "clips"
    make_folder(clips)
    listed = conflicts(stage_windows(recording, clips, n=n, seed=seed))
    peak = product_rate()
    began = time.perf_counter()
    model = build(sizes, n_layers=n_layers, tower_layers=tower_layers, seed=seed)
    built_s = time.perf_counter() - began
    roles = Counter(sorted(map(str, listed[0].cells(model)["va"].table()["role"])))
    counted = _Counted(progress)
    began = time.perf_counter()
    with counted:
        found = isolate(model, listed, gate="report", quick=quick, seed=seed, progress=counted)
    searched_s = time.perf_counter() - began
    peak_gb = peak_memory()
    found.save(Path(out) / "numbers")
    del model
    record = stamp(
        size=size,
        layers={"fusion": n_layers, "towers": tower_layers},
        conflicts=n,
        quick=quick,
        threads=torch.get_num_threads(),
        roles=dict(roles),
        seconds={"weights": built_s, "search": searched_s, "towers": tower_seconds(sizes, listed[0], seed=seed)},
        product_gflops=peak / 1e9,
        stages=counted.stages,
        peak_gb=peak_gb,
        stamps=list(found.stamps),
        verdict=found.verdict,
    )
    write_whole(Path(out) / RECORD, json.dumps(record, indent=1) + "\n")
    return record


class _Counted:
    """Seconds and floating-point operations by stage: what passed since the last report belongs to the stage told."""

    def __init__(self, progress: Progress | None) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        self._counter = FlopCounterMode(display=False)
        self._tell = progress or silent
        self._last = (0.0, 0)
        self.stages: dict[str, dict[str, float]] = {}

    def __enter__(self) -> None:
        self._counter.__enter__()
        self._last = (time.perf_counter(), 0)

    def __exit__(self, *caught: object) -> None:
        self._note("the rest")
        self._counter.__exit__(*caught)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._note(stage)
        self._tell(stage, done, total)

    def _note(self, stage: str) -> None:
        now = (time.perf_counter(), int(self._counter.get_total_flops()))
        row = self.stages.setdefault(stage, {"seconds": 0.0, "gflop": 0.0})
        row["seconds"] += now[0] - self._last[0]
        row["gflop"] += (now[1] - self._last[1]) / 1e9
        self._last = now


def product_rate(*, side: int = 2048, rounds: int = 20) -> float:
    """Measure this machine's own peak, in operations a second: the best of some rounds of a large product."""
    factor = torch.ones(side, side, dtype=torch.bfloat16)
    times: list[float] = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        torch.mm(factor, factor)
        times.append(time.perf_counter() - began)
    return 2.0 * side**3 / min(times[1:])


def tower_seconds(sizes: Sizes, conflict: Any, *, seed: int = 0) -> dict[str, float]:
    """Time both towers at their full depth, on one conflict's clip: seconds by name."""
    model = build(sizes, n_layers=1, tower_layers=sizes.audio[0], seed=seed)
    x = conflict.cells(model)["va"]
    spent: dict[str, float] = {}

    def timed(name: str, tower: Any) -> None:
        begun: list[float] = []
        tower.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
        tower.register_forward_hook(lambda *_: spent.__setitem__(name, time.perf_counter() - begun[-1]))

    timed("audio", model.hf_model.model.audio_tower)
    timed("vision", model.hf_model.model.visual)
    with torch.no_grad():
        model(x)
    return spent
