"""The models and prompts that replay is measured on, their arithmetic, and timing on a machine that others use too.

*Timing.* A round is *quiet* where all others spent less than a tenth of a core on it (`/proc/stat`, ticks of 10 ms), or
where there is no such file. Rounds are repeated until enough were quiet, within a patience; the median of the quiet
ones is the figure, else the least of all, which is counted as disturbed.

*Shapes.* A *case* is a shape made real: HuggingFace's own eager model, the same weights behind our hooks, a prompt, and
one of another clip beside it. The towers are small, so that peers, which repeat them, are not made slower.

*Work.* A patch of one head's z at layer l on rows E (the positions patched), the first of which is p, on a prompt of n
positions, asked at its last. What any exact method that restarts from the recorded run must compute for each plan, as
multiply-adds times 2:

    layer l             o of the one head        |E| d_head d_model
                        MLP                      |E| 3 d_model d_mlp
    layers between      q, o                     (n - p) 2 d_model (heads d_head)
                        k, v                     (n - p) 2 d_model (kv_heads d_head)
                        attention                sum over rows r >= p of (r + 1), times 2 heads d_head
                        MLP                      (n - p) 3 d_model d_mlp
    last layer          k, v of n - p rows; q, o, MLP and attention of the asked row alone
    unembedding         d_model for each of the two answers

An edit at the last layer counts where the asked row is patched, and is nothing elsewhere. The recorded run is counted
once, apart. Norms, rotations, softmax and the towers are left out. `bare_seconds` runs these products and nothing else,
all plans of a layer stacked as one product, attention by the faster of torch's fused kernel and plain products. The
share of the bound that a sweep reaches is bare seconds over the sweep's.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from av_lens.checks import require_choice
from av_lens.errors import InputError
from av_lens.inputs.model_inputs import AVInputs
from av_lens.media import Clip, load_clip
from av_lens.model import HookedAVLLM, load
from av_lens.organism import anatomy, clip
from av_lens.spans import Span

_ACCOUNTS = Path("/proc/stat")
BUSY = 0.1  # cores that others may use in a quiet round
LONG = 4.0  # seconds: what takes longer is done once, and once again if it was disturbed
LOOK = 0.25  # seconds over which the machine is watched while waiting


@dataclass
class Stopwatch:
    """Times works in quiet rounds."""

    rounds: int = 5  # quiet rounds that are wanted of each work
    patience: float = 60.0  # seconds that may be spent on waiting for quiet, in all
    shortest: float = 0.2  # seconds that a round lasts at least; short works are repeated within it
    waited: float = 0.0  # seconds spent so
    figures: int = 0  # how many figures were taken
    disturbed: int = 0  # how many of them without enough quiet rounds
    _known: dict[Any, float] = field(default_factory=dict)

    def time(self, work: Callable[[], Any]) -> float:
        """Time one work, already warm, in seconds."""
        return self.in_turns({"work": work})["work"]

    def in_turns(self, ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Time several works, one after another in each round; each is done before it is timed, unless it is long."""
        first = {name: _round(work, 1) for name, work in ways.items()}
        every = {name: [found] if found[0] > LONG else [] for name, found in first.items()}
        wanted = {name: 1 if found[0] > LONG else self.rounds for name, found in first.items()}
        times: dict[str, int] = {}
        for name, work in ways.items():  # the second time is warm, and says how often to repeat
            seconds = first[name][0] if every[name] or first[name][0] > self.shortest else _round(work, 1)[0]
            times[name] = max(1, round(self.shortest / max(seconds, 1e-6) + 0.5))
        for _ in range(2 * self.rounds):
            for name, work in ways.items():
                tired = self.waited >= self.patience or wanted[name] == 1
                most = wanted[name] + (1 if tired else self.rounds)
                if _quiet(every[name], wanted[name]) or len(every[name]) >= most:
                    continue
                every[name].append(_round(work, times[name]))
                self._rest(every[name][-1])
        return {name: self._figure(every[name], wanted[name]) for name in ways}

    def each(self, works: Sequence[Callable[[], Any]]) -> float:
        """Time works that are alike, each once, after the first was done once to warm up: seconds of one."""
        works[0]()
        found: list[tuple[float, float]] = []
        for work in works:
            found.append(_round(work, 1))
            self._rest(found[-1])
        return self._figure(found, len(works))

    def _figure(self, found: list[tuple[float, float]], wanted: int) -> float:
        self.figures += 1
        if _quiet(found, (wanted + 1) // 2):
            return median(seconds for seconds, others in found if others < BUSY)
        self.disturbed += 1
        return min(seconds for seconds, _ in found)

    @cached_property
    def brief(self) -> Stopwatch:
        """A stopwatch for many small works, which waits for nobody; its figures count here."""
        return Stopwatch(min(self.rounds, 3), 0.0, min(self.shortest, 0.05))

    def account(self) -> dict[str, int]:
        """Say how many figures were taken, and how many without enough quiet rounds ("disturbed")."""
        return {name: getattr(self, name) + getattr(self.brief, name) for name in ("figures", "disturbed")}

    def known(self, key: Any, make: Callable[[], Callable[[], Any]]) -> float:
        """Time a work once for each key; it is made where its time is not known."""
        if key not in self._known:
            self._known[key] = self.time(make())
        return self._known[key]

    def _rest(self, found: tuple[float, float]) -> None:
        """After a round that others disturbed, wait for them to rest, while there is patience."""
        while found[1] >= BUSY and self.waited < self.patience:
            begun = time.perf_counter()
            _, others = _round(lambda: time.sleep(LOOK), 1)
            self.waited += time.perf_counter() - begun
            if others < BUSY:
                return


def _quiet(found: list[tuple[float, float]], wanted: int) -> bool:
    return sum(others < BUSY for _, others in found) >= wanted


def _round(work: Callable[[], Any], times: int) -> tuple[float, float]:
    """Seconds of one work, and how many cores others used meanwhile."""
    others, begun = _others(), time.perf_counter()
    for _ in range(times):
        work()
    seconds = time.perf_counter() - begun
    return seconds / times, (_others() - others) / seconds


def _others() -> float:
    """Seconds of core time that others than this process have used since the machine started."""
    if not _ACCOUNTS.exists():
        return 0.0
    # user nice system idle iowait irq softirq steal; guests are counted in user.
    ticks = [int(word) for word in _ACCOUNTS.read_text().split("\n", 1)[0].split()[1:9]]
    used = os.times()
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - used.user - used.system


TOKEN_SIDE = 28  # pixels of a picture behind one token, along each side
RATE = 16000
FPS = 2.0


@dataclass(frozen=True)
class Shape:
    """How large a model is and what its prompt holds."""

    name: str  # what tables call it
    seconds: float = 2.0  # length of the synthetic clip
    grid: tuple[int, int] = (3, 3)  # tokens of a picture along height and width
    question: str = "123456789012345678"  # what is asked; each digit is a token
    n_layers: int = 12  # fusion layers
    d_model: int = 512  # width of the stream
    n_heads: int = 8  # query heads
    n_kv_heads: int = 2  # key-value heads
    d_mlp: int = 1024  # width of the feed-forward layers
    d_vocab: int | None = None  # tokens of the vocabulary; None for the embedded models'
    dtype: str = "float32"  # precision of the weights
    recording: bool = False  # whether the prompt is made from a file that the caller names
    organism: str | None = None  # a short name, where the model is one that ships
    stride: int = 1  # of the plans of an early media span every so manyth is run by us too; 1 runs all
    # whether the peers are timed at every place. A loop's time does not depend on where it patches; so for the large
    # shapes it is timed at the generation position, and elsewhere results alone are compared.
    thorough: bool = True


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", organism="av-tiny"),
        Shape("wide", seconds=4.0, grid=(5, 19)),
        Shape("long", seconds=10.0, grid=(16, 17), stride=5, thorough=False),
        Shape(
            "true", grid=(8, 8), n_layers=8, d_model=2048, n_heads=16, d_mlp=11008, d_vocab=151936, dtype="bfloat16",
            recording=True, question="What do you hear in this clip?", stride=5, thorough=False,
        ),
    )
}  # fmt: skip
"""The shapes that `av-lens bench` knows."""


@dataclass(frozen=True, eq=False)
class Case:
    """A shape made real."""

    shape: Shape  # the shape
    hf_model: Any  # HuggingFace's model with eager attention, never wrapped
    model: HookedAVLLM  # the same weights behind our hooks
    x: AVInputs  # the prompt whose run is edited
    donor: AVInputs  # the prompt of another clip, in the same layout, whose values are written
    answers: tuple[int, int]  # two tokens whose logits are compared

    def places(self) -> dict[str, Span]:
        """Name the positions that are patched together, the latest first."""
        spans = self.x.spans
        audio, video = spans["audio"].runs, spans["video"].runs
        return {
            "generation": spans["generation"],
            "question": spans["question"],
            "last sound": spans.span(range(*audio[-1])),
            "first sound": spans.span(range(*audio[0])),
            "first picture": spans.span(range(*video[0])),
        }


def build_case(shape: Shape, *, recording: str | Path | None = None, seed: int = 0) -> Case:
    """Make a shape real; `seed` decides weights, pictures and sounds, and no parameter asks for gradients."""
    if shape.organism is not None:
        plain, processor = anatomy.open_checkpoint(anatomy.shipped() / shape.organism), anatomy.processor()
    else:
        sizes = {name: getattr(shape, name) for name in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_mlp")}
        more = {} if shape.d_vocab is None else {"vocab_size": shape.d_vocab}
        # Scores of unit size: patches then have effects to compare.
        config = anatomy.thinker_config(**sizes, initializer_range=1.8 / shape.d_model**0.5, **more)
        plain = anatomy.build_model(config, seed=seed, dtype=getattr(torch, shape.dtype))
        processor = anatomy.processor(most_pixels=shape.grid[0] * shape.grid[1] * TOKEN_SIDE**2)
    plain.requires_grad_(False)
    shown, heard = _clips(shape, recording, seed)
    weights = {id(weight): weight for weight in (*plain.parameters(), *plain.buffers())}  # of both, one copy
    model = load(shape.name, hf_model=copy.deepcopy(plain, weights), processor=processor)
    question = "What do you hear?" if shape.organism else shape.question
    x, donor = (model.encode(one, question, fps=FPS) for one in (shown, heard))
    answers = [processor.tokenizer(word)["input_ids"][0] for word in (" siren", " dog")]
    return Case(shape, plain, model, x, donor, (answers[0], answers[1]))


def shape_named(name: str) -> Shape:
    """Find one of `SHAPES`."""
    require_choice("shape", name, SHAPES)
    return SHAPES[name]


def _clips(shape: Shape, recording: str | Path | None, seed: int) -> tuple[Clip, Clip]:
    """Two clips of one length that differ in picture and sound."""
    if shape.organism is not None:
        return clip("dog", seed=seed).with_sound(clip("siren", seed=seed)), clip("bell", seed=seed)
    rng = np.random.default_rng(seed)
    if shape.recording:
        if recording is None or not Path(recording).exists():
            raise InputError(f"shape {shape.name!r} needs a recording; {recording} is not there. Name a video file.")
        shown = load_clip(recording).require_sound()
        noise = rng.normal(0.0, 0.2, round(shown.sound_end * shown.rate)).clip(-1, 1).astype(np.float32)
        frames = shown.require_picture().frames
        assert frames is not None
        same: dict[str, Any] = {"times": shown.times, "rate": shown.rate, "duration": shown.duration}
        return shown, Clip.from_arrays(frames=frames[::-1], waveform=noise, **same)
    side = (shape.grid[0] * TOKEN_SIDE, shape.grid[1] * TOKEN_SIDE, 3)
    pictures = rng.integers(0, 256, (2, round(shape.seconds * FPS), *side), dtype=np.uint8)
    sounds = rng.normal(0.0, 0.2, (2, round(shape.seconds * RATE))).clip(-1, 1).astype(np.float32)
    first, second = (
        Clip.from_arrays(frames=frames, fps=FPS, waveform=sound, rate=RATE)
        for frames, sound in zip(pictures, sounds, strict=True)
    )
    return first, second


PIECE = 4096  # rows of a product that is timed; larger ones are made of such pieces


class Block(NamedTuple):
    """What one layer computes for all plans of a sweep together."""

    keyed: int  # rows whose keys and values are projected, over all plans
    asked: int  # rows whose queries, attention and write are computed, over all plans
    fed: int  # rows that pass the MLP
    edited: int  # rows of one head's write, in the layer that is edited
    plans: int  # plans that run this layer whole
    own: int  # new rows of each of these plans
    queries: int  # rows of each of these plans that attend
    prefix: int  # recorded rows before them

    @property
    def attended(self) -> int:
        """Pairs of query and key for each plan: the last `queries` rows, each seeing the rows up to itself."""
        last = self.prefix + self.own
        return sum(range(last - self.queries + 1, last + 1))


def sweep_blocks(heads: Sequence[tuple[int, int]], rows: Sequence[int], *, n_layers: int, n: int) -> list[Block]:
    """Count what each layer computes for a sweep of single heads, a plan each, at one set of rows of `n`."""
    first, last = rows[0], n_layers - 1
    made: list[Block] = []
    for layer in range(n_layers):
        before, here = sum(at < layer for at, _ in heads), sum(at == layer for at, _ in heads)
        new = n - first
        queries = 1 if layer == last else new
        touched = here * (len(rows) if layer < last else int(rows[-1] == n - 1))
        asked = before * queries
        made.append(Block(before * new, asked, asked + touched, touched, before, new, queries, first))
    return made


def run_blocks(*, n_layers: int, n: int) -> list[Block]:
    """Count what each layer computes for the recorded run; of the last one only keys, values and the asked row."""
    whole = Block(n, n, n, 0, 1, n, n, 0)
    return [whole] * (n_layers - 1) + [Block(n, 1, 1, 0, 1, n, 1, 0)]


def flops(blocks: Sequence[Block], spec: Any) -> int:
    """Count floating-point operations, a multiply-add being two."""
    queries, keys = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    total = 0
    for block in blocks:
        total += block.asked * 2 * spec.d_model * queries + block.keyed * 2 * spec.d_model * keys
        total += block.fed * 3 * spec.d_model * spec.d_mlp + block.edited * spec.d_head * spec.d_model
        total += block.plans * block.attended * 2 * queries
    return 2 * total


def unembedding_flops(plans: int, spec: Any, *, answers: int = 2) -> int:
    """Count the operations of reading the logits of a few answers at one position, for each plan."""
    return 2 * plans * answers * spec.d_model


def bare_seconds(blocks: Sequence[Block], spec: Any, dtype: torch.dtype, watch: Stopwatch) -> dict[str, float]:
    """Time the bare "products" and "attention" of these row counts; sizes that the watch knows are not timed again."""
    timer = _Timer(dtype, watch)
    queries, keys = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    products = attention = 0.0
    for block in blocks:
        sizes = [(block.asked, spec.d_model, queries), (block.asked, queries, spec.d_model)]
        sizes += 2 * [(block.keyed, spec.d_model, keys)] + 2 * [(block.fed, spec.d_model, spec.d_mlp)]
        sizes += [(block.fed, spec.d_mlp, spec.d_model), (block.edited, spec.d_head, spec.d_model)]
        products += sum(timer.product(*size) for size in sizes)
        attention += timer.attention(block, spec)
    return {"products": products, "attention": attention}


@dataclass(frozen=True, eq=False)
class _Timer:
    """Times bare operations."""

    dtype: torch.dtype
    watch: Stopwatch

    def product(self, rows: int, inner: int, outer: int) -> float:
        """Seconds of `[rows, inner] @ [inner, outer]`, the weight stored as a layer stores it."""
        if not rows:
            return 0.0
        timed, factor = min(rows, PIECE), max(1.0, rows / PIECE)

        def make() -> Callable[[], Any]:
            left, weight = self._made(timed, inner), self._made(outer, inner)
            return lambda: functional.linear(left, weight)

        return factor * self.watch.known(("product", timed, inner, outer), make)

    def attention(self, block: Block, spec: Any) -> float:
        """Seconds of the attention of a block's plans: on the recorded rows, shared, and on each plan's own."""
        if not block.plans:
            return 0.0
        plans = min(block.plans, max(1, PIECE // block.queries))
        group, width = spec.n_heads // spec.n_kv_heads, spec.d_head
        ways = ("fused", "plain") if block.queries == 1 else ("fused", "plain", "causal")
        parts = [((plans, spec.n_kv_heads, group * block.queries, width, block.own), ways)]
        if block.prefix:
            parts.append(((1, spec.n_kv_heads, group * plans * block.queries, width, block.prefix), ways[:2]))
        best = (min(self.watch.known((way, *s), self._maker(way, s, group)) for way in ways) for s, ways in parts)
        return sum(best) * block.plans / plans

    def _maker(self, way: str, shape: tuple[int, ...], group: int) -> Callable[[], Callable[[], Any]]:
        plans, heads, rows, width, n_keys = shape

        def make() -> Callable[[], Any]:
            if way == "causal":
                q, k, v = (
                    self._made(plans, h, rows // group, width) for h in (heads * group, heads, heads)
                )  # every query head with its key-value head
                return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            q, k, v = (self._made(plans, heads, n, width) for n in (rows, n_keys, n_keys))
            if way == "fused":
                return lambda: functional.scaled_dot_product_attention(q, k, v)
            return lambda: torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v

        return make

    def _made(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.dtype)
