"""Does this model keep what av_lens promises? Every guarantee, on one model and one clip; a report to send back.

HuggingFace's model is opened, asked and left as it is; the same model is then wrapped and held against its answers. A
proof that breaks off is a guarantee that failed. The report holds sizes, versions and numbers: no path, and nothing of
the clip but its size and length. Not done: batches; media longer than the clip.

    >>> report = check("Qwen/Qwen2.5-Omni-7B", device="cuda")                                    # doctest: +SKIP
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from av_lens.checkpoints import index, located
from av_lens.checks import require_keywords
from av_lens.core import Progress, run, watched
from av_lens.errors import InputError
from av_lens.families.adapter import TowerBridge
from av_lens.families.decoder import hook_name
from av_lens.families.media_layout import Media
from av_lens.families.registry import family_of
from av_lens.inputs import AVInputs, Encoder
from av_lens.inputs.encoder import LAYOUT_NAMES
from av_lens.interventions import Plan, Site, zero
from av_lens.lab.proofs import PROOFS, Bench, made_clip, on_the_cpu, share
from av_lens.media import Clip, load_clip
from av_lens.model import HookedAVLLM, load
from av_lens.model.loading import Opened, opened
from av_lens.model.selfcheck import Check, CheckReport
from av_lens.replay.recording import record_bytes
from av_lens.results.provenance import stamp

TOKENS, FPS = 16, 2.0
KEPT = 1 << 26  # logits of HuggingFace's that are kept for one layout
SWEPT = 32  # heads of the small sweep


def check(
    name_or_path: str | Path | None = None,
    clip: Clip | str | Path | None = None,
    *,
    question: str = "What do you hear?",
    plans: int = 12,
    quick: bool = False,
    seed: int = 0,
    progress: Progress | bool | None = None,
    **how: Any,
) -> CheckReport:
    """Check what is guaranteed of a model.

    Args:
        name_or_path: as `load` takes it.
        clip: what it sees and hears: a clip, or the path of a file; None for two seconds of noise.
        question: what it is asked.
        plans: how many random plans are replayed and run hooked.
        quick: hooks of the last layer alone, a few; else each hook of each layer, a whole short run twice.
        seed: what plans are drawn from.
        progress: called as `progress(stage, done, total)`; True shows a bar.
        **how: as `load`: `device`, `dtype`, `revision`, `hf_model` (not wrapped), `processor`.

    Returns:
        The report; what failed is in it, and does not raise.

    Raises:
        InputError: an unknown keyword, no plans, or a clip of which the model takes nothing.
        ModelError: the model cannot be opened.
    """
    require_keywords("check", how, load, own=("name_or_path",))
    if plans < 1:
        raise InputError(f"plans={plans}: at least one plan is replayed.")
    shown = made_clip()
    if clip is not None:
        given = clip if isinstance(clip, Clip) else load_clip(clip)
        shown = replace(given, path=None, sha256=None, window=None, notes=())
    source = opened(name_or_path, **how)
    media = family_of(type(source.hf_model)).media
    kinds, wanted = media.kinds, dict(layouts(shown, media.kinds, woven=media.woven))
    if kinds and list(wanted) == ["text"]:
        raise InputError(f"this model takes text and {' and '.join(kinds)}, and the clip has none of it: give another.")
    made_on, checks = about(source, name_or_path, shown), list[Check]()
    secrets = [str(one) for one in (Path.home(), name_or_path, clip) if isinstance(one, str | Path)]
    bench = partial(Bench, question=question, plans=plans, quick=quick, seed=seed)
    with watched(progress) as show:
        for done, found in enumerate(_all(source, shown, wanted, question, bench)):
            checks += [replace(one, found=_told(one.found, secrets)) for one in found]
            show("guarantees", done + 1, len(wanted) * 2 + len(PROOFS) + 3)
    return CheckReport(tuple(checks), made_on)


def _all(
    source: Opened, clip: Clip, wanted: Mapping[str, Mapping[str, Any]], question: str, bench: Callable[..., Bench]
) -> Iterator[list[Check]]:
    """Every guarantee, in the order at the top of this module."""
    source.hf_model.eval().set_attn_implementation("eager")
    family, hf_model = family_of(type(source.hf_model)), source.hf_model
    ids, grammar = partial(family.position_ids, hf_model), source.more.get("grammar")
    encoder = Encoder(source.processor, hf_model.config, ids, grammar=grammar, media=family.media)
    plain = Plain(hf_model, encoder, clip, question)
    for name, options in wanted.items():  # 1
        yield _tried(f"{name}: position ids", partial(plain.keep, name, options))
    if not plain.own:
        return
    model = source.wrapped()
    for name, kept in plain.own.items():  # 2
        yield _tried(f"{name}: logits", partial(_ours, name, kept, model))
    made = bench(model, next(iter(plain.own.values())).x)
    plain.own.clear()
    for proof in PROOFS:  # 3
        yield _tried(str(proof.__doc__).splitlines()[0].rstrip("."), partial(proof, made))
    yield _tried("a trace and a sweep", partial(costs, model, made.x))  # 4
    yield _tried("the CPU agrees with the device", partial(on_the_cpu, made))  # 5


def _tried(name: str, made: Callable[[], list[Check]]) -> list[Check]:
    """Checks, or what broke them off."""
    try:
        return made()
    except Exception as error:  # whatever it is, the user should have the rest of the report
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return [Check(name, False, f"broke off: {type(error).__name__}: {first}")]


@dataclass(frozen=True, eq=False)
class Own:
    """What HuggingFace's own model made of one layout."""

    x: AVInputs  # the input
    rows: Tensor  # the positions whose logits are kept
    logits: Tensor  # its logits there, `[row, d_vocab]`
    tokens: Tensor  # its greedy tokens, the prompt's included


@dataclass(frozen=True, eq=False)
class Plain:
    """HuggingFace's model before it is wrapped, what it is asked, and what it said."""

    hf_model: Any  # the model
    encoder: Encoder  # what makes its inputs
    clip: Clip  # what it sees and hears
    question: str  # what it is asked
    own: dict[str, Own] = field(default_factory=dict[str, Own])  # what it said, by layout

    @torch.no_grad()
    def keep(self, name: str, options: Mapping[str, Any]) -> list[Check]:
        """Encode a layout, which compares position ids, and keep what HuggingFace makes of it."""
        layout, model = self.encoder.layout, self.hf_model
        clip = self.clip if any(options.values()) else None
        try:
            layout.require_frame_rate(FPS, interleaved=options["sound"] == "in_video")
            media = Media() if clip is None else layout.media(clip, fps=FPS, **options)
        except InputError as refused:
            return [Check(name, None, f"not taken: {refused}")]
        x = self.encoder.encode(clip, self.question, fps=FPS, **options)
        expected = layout.expected_positions(x.tensors["input_ids"][0].numpy(), media)
        x = x.to(model.device)
        logits = model(**x.tensors).logits[0]
        kept = min(len(logits), max(1, KEPT // logits.shape[1]))
        rows = torch.linspace(0, len(logits) - 1, kept).round().long()
        tokens = model.generate(**x.tensors, max_new_tokens=TOKENS, do_sample=False)
        self.own[name] = Own(x, rows, logits[rows.to(logits.device)].cpu(), tokens.cpu())
        roles = list(x.spans.roles)
        media_there = [f"{roles.count(role)} {role}" for role in layout.kinds if role in roles]
        said = ", ".join([f"{x.position_ids.shape[0]} streams", f"{len(roles)} positions", *media_there])
        return [Check(f"{name}: position ids are as derived", None if expected is None else True, said)]


@torch.no_grad()
def _ours(name: str, own: Own, model: HookedAVLLM) -> list[Check]:
    """The same input through the wrapped model."""
    towers = [f"{one}.hook_out" for one, module in model.bridge.named_modules() if isinstance(module, TowerBridge)]
    rows: dict[str, int] = {}
    stream: dict[str, Tensor] = {}

    def count(value: Tensor, hook: Any, tower: str) -> None:
        rows[tower] = rows.get(tower, 0) + value.numel() // value.shape[-1]

    def keep(value: Tensor, hook: Any, name: str) -> None:
        stream[name] = value.detach()

    looks = [(hook_name(one), partial(keep, name=one)) for one in ("embed_text", "embed")]
    with model.hooks([*((tower, partial(count, tower=tower)) for tower in towers), *looks]):
        logits = model(own.x, budget_gb=float("inf"))[0, own.rows.to(model.device)].cpu()
    tokens, n, media = model.generate(own.x, max_new_tokens=TOKENS).cpu(), len(own.x.spans), len(own.x.spans.media)
    gap, same = share(logits, own.logits), torch.equal(logits, own.logits)
    where = "every position" if len(own.rows) == n else f"{len(own.rows)} of {n} positions"
    told = ", ".join(f"{tower.removesuffix('.hook_out')} {n}" for tower, n in rows.items())
    entered = int((stream["embed"] != stream["embed_text"]).any(-1).sum())
    # More rows than tokens: of what the tower's input was padded with, which the model leaves out by itself.
    held, said = entered == media <= sum(rows.values()), f"{told}; {entered} entered at {media} tokens"
    counted = Check(f"{name}: rows out of the towers = tokens", held, said)
    said = f"{own.tokens.shape[1] - n} tokens"
    return [
        *([counted] if media else []),
        Check(f"{name}: logits are HuggingFace's to the bit", same, f"{where}, largest difference {gap:.1e}"),
        Check(f"{name}: greedy tokens are HuggingFace's", torch.equal(tokens, own.tokens), said),
    ]


def layouts(clip: Clip, kinds: Iterable[str], *, woven: bool = True) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The layouts of what a clip has and a model takes, with the keywords of `encode`; the richest first."""
    moves = clip.has_picture and not clip.is_image
    has = {"audio": clip.has_sound, "image": clip.has_picture, "video": moves}
    there = {kind for kind in kinds if has[kind]}
    for (picture, sound), name in LAYOUT_NAMES.items():
        needed = {picture, "audio" if sound else None} - {None}
        if needed <= there and (woven or sound != "in_video"):
            yield name, {"picture": picture, "sound": sound}


@torch.no_grad()
def costs(model: HookedAVLLM, x: AVInputs) -> list[Check]:
    """What a trace and a sweep of one layer's heads were estimated to cost, and what they cost."""
    model.trace(x)  # the first one proves that restarts are exact, which later ones need not
    with measured(model.device) as once:
        run(model, x)
    with measured(model.device) as spent:
        trace = model.trace(x)
    kept = (*trace.resid, *trace.keys, *trace.values, *trace.tables, *trace.added.values())
    held = sum({one.data_ptr(): one.nbytes for one in kept}.values()) / 1e9
    traced = (
        f"estimated {record_bytes(model, x) / 1e9:.3g} GB, {once['s']:.3g} s; held {held:.3g} GB, {spent['s']:.3g} s"
    )
    layer = model.spec.n_layers // 2
    plans = [Plan(zero(Site("z", layer, head, "suffix"))) for head in range(min(model.spec.n_heads, SWEPT))]
    schedule = trace.schedule(plans)
    with measured(model.device) as swept:
        trace.replay(plans)
    estimated = f"estimated up to {schedule.gigabytes:.3g} GB, {schedule.forwards * once['s']:.3g} s"
    took = f"took {swept['gb']:.3g} GB, {swept['s']:.3g} s"
    return [
        Check("a trace: memory and seconds", None, f"{traced}, {spent['gb']:.3g} GB at its height"),
        Check(f"a sweep of {len(plans)} heads of layer {layer}: memory and seconds", None, f"{estimated}; {took}"),
    ]


@contextmanager
def measured(device: torch.device) -> Generator[dict[str, float]]:
    """Seconds, and GB above what was held before: the allocator's on a GPU, else the process's, looked at often."""
    found, cuda, done = {"s": 0.0, "gb": 0.0}, device.type == "cuda", threading.Event()
    process, heights = psutil.Process(), list[int]()

    def look() -> None:
        while not done.wait(0.002):
            heights.append(process.memory_info().rss)

    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else process.memory_info().rss
    watcher = threading.Thread(target=look, daemon=True)
    begun = time.perf_counter()
    watcher.start()
    try:
        yield found
    finally:
        if cuda:
            torch.cuda.synchronize(device)
        found["s"] = time.perf_counter() - begun
        done.set()
        watcher.join()
        height = torch.cuda.max_memory_allocated(device) if cuda else max(heights, default=before)
        found["gb"] = max(0, height - before) / 1e9


def about(source: Opened, name: str | Path | None, clip: Clip) -> dict[str, Any]:
    """The model, the machine, the versions and the clip's size: what may be sent."""
    model, text = source.hf_model, source.hf_model.config.get_text_config()
    public = name is not None and (str(name) in index() or located(str(name)) is None)
    first = next(model.parameters())
    devices = sorted({str(one.device) for one in model.parameters()})
    cards = [torch.cuda.get_device_name(one) for one in devices if one.startswith("cuda")]
    seen = "no picture" if clip.frames is None else "{2} x {1}, {0} frames".format(*clip.frames.shape)
    heard = "no sound" if not clip.has_sound else f"{clip.sound_end:.1f} s of sound at {clip.rate} Hz"
    return stamp(
        model=str(name) if public else "a local one",
        architecture=family_of(type(model)).architecture,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        parameters=sum(one.numel() for one in model.parameters()),
        dtype=str(first.dtype).removeprefix("torch."),
        device=", ".join(cards) or platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        memory_gb=round(psutil.virtual_memory().total / 1e9),
        cores=os.cpu_count(),
        clip=f"{seen}; {heard}",
    )


def _told(text: str, secrets: Iterable[str]) -> str:
    """A message without the paths that it may hold."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "...")
    return text
