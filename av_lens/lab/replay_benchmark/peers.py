"""The ways of patching that replay is compared with, on the same model, prompt and patches; and their memory.

Within `shared_encoders` the model's own `get_audio_features` and `get_video_features` return what they returned once.
Memory (Linux only, `/proc/self`): a process builds the case, gives freed memory back, resets the kernel's record of the
peak, does one thing of `tables.PEAKS`, and reads the peak above what was resident. What patches write is then drawn at
random, so that no other run warms the process up.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from av_lens.core.execution import run
from av_lens.errors import AvLensError
from av_lens.families.decoder import hook_name
from av_lens.interventions import Plan, Site, replace
from av_lens.lab.replay_benchmark.shapes import Case, build_case, shape_named
from av_lens.metrics.metric import logit_diff
from av_lens.replay.rerun import PROVED
from av_lens.spans import Span

Head = tuple[int, int]
Loop = Callable[[Sequence[Head]], Tensor]
_FEATURES = ("get_audio_features", "get_video_features")


@dataclass(frozen=True, eq=False)
class Patches:
    """The donor's z of every head at some positions: what each way of patching writes."""

    case: Case  # the model and its prompts
    rows: list[int]  # the positions that are patched together, ascending
    # the donor's z of each layer, `[batch, row, head, d_head]`
    given: tuple[Float[Tensor, "batch row head d_head"], ...]

    @classmethod
    @torch.no_grad()
    def at(cls, case: Case, place: Span) -> Patches:
        """Take the donor's values of every head at a place."""
        layers = range(case.model.spec.n_layers)
        taken = run(case.model, case.donor, capture=[Site("z", layer, positions=place) for layer in layers])
        given = tuple(taken.cache[hook_name("z", layer)].clone() for layer in layers)
        return cls(case, [int(p) for p in place.positions], given)

    def heads(self, *, stride: int = 1) -> list[Head]:
        """List every `stride`th head as (layer, head), layers ascending."""
        spec = self.case.model.spec
        return [(layer, head) for layer in range(spec.n_layers) for head in range(spec.n_heads)][::stride]


def spread(heads: Sequence[Head], samples: int) -> list[int]:
    """Choose some heads for a slow loop, spread evenly over layers and heads, by their numbers in `heads`."""
    count = min(samples, len(heads))
    return [round(i * (len(heads) - 1) / max(count - 1, 1)) for i in range(count)]


def by_replay(patches: Patches, heads: Sequence[Head], trace: Any) -> Float[Tensor, " patch"]:
    """Patch heads by replay of the recorded run: the metric under each patch."""
    plans = [
        Plan(replace(Site("z", layer, head, patches.rows), patches.given[layer][:, :, head])) for layer, head in heads
    ]
    return trace.score(plans, logit_diff(*patches.case.answers))[:, 0]


def by_transformer_lens(patches: Patches) -> Loop:
    """Patch heads by TransformerLens's own loop: heads to the metric under each patch."""
    import pandas
    from transformer_lens import patching

    sweep: Any = patching.generic_activation_patch  # its overloads do not know an `index_df` of one's own
    bound = patches.case.model.bound(patches.case.x)
    cache: Any = {hook_name("z", layer): value for layer, value in enumerate(patches.given)}
    first, second = patches.case.answers

    def write(activation: Tensor, index: Sequence[int], given: Tensor) -> Tensor:
        activation[:, patches.rows, index[1]] = given[:, :, index[1]]
        return activation

    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, first] - logits[:, -1, second])[0]

    @torch.no_grad()
    def loop(heads: Sequence[Head]) -> Tensor:
        listed = pandas.DataFrame(list(heads), columns=["layer", "head"])
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            return sweep(bound, bound.ids, cache, metric, write, "z", index_df=listed)

    return loop


def has_nnsight() -> bool:
    """Say whether nnsight is installed; it is no dependency (`pip install 'av-lens[bench]'`)."""
    return util.find_spec("nnsight") is not None


def by_nnsight(patches: Patches) -> Loop:
    """Patch heads by nnsight on HuggingFace's model: heads to the metric under each patch."""
    case = patches.case
    wrapped: Any = import_module("nnsight").NNsight(case.hf_model)
    tensors, width, rows = dict(case.x.tensors), case.model.spec.d_head, patches.rows

    @torch.no_grad()
    def loop(heads: Sequence[Head]) -> Tensor:
        found: list[Tensor] = []
        for layer, head in heads:
            given, start, end = patches.given[layer][:, :, head], head * width, (head + 1) * width
            with wrapped.trace(**tensors):
                wrapped.model.language_model.layers[layer].self_attn.o_proj.input[:, rows, start:end] = given
                logits = wrapped.lm_head.output[:, -1].save()
            found.append(logits[0, case.answers[0]] - logits[0, case.answers[1]])
        return torch.stack(found)

    return loop


def by_attribution(patches: Patches) -> Float[Tensor, "layer head"]:
    """Approximate the effect of patching every head: (donor z - z) . dM/dz, by one forward and one backward."""
    case = patches.case
    seen: list[Tensor] = []

    def keep(module: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        seen.append(given[0] if seen else given[0].detach().requires_grad_())
        return (seen[-1],)

    layers = case.hf_model.model.language_model.layers
    handles = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in layers]
    try:
        with torch.enable_grad():
            logits = case.hf_model(**case.x.tensors).logits[0, -1]
            slopes = torch.autograd.grad(logits[case.answers[0]] - logits[case.answers[1]], seen)
    finally:
        for handle in handles:
            handle.remove()

    def by_head(values: Tensor) -> Tensor:
        return values[:, patches.rows].unflatten(-1, (case.model.spec.n_heads, -1))

    effects = [
        (given - by_head(z)) * by_head(slope) for given, z, slope in zip(patches.given, seen, slopes, strict=True)
    ]
    return torch.stack([effect.detach().float().sum((0, 1, 3)) for effect in effects])


@torch.no_grad()
def by_forward(case: Case) -> Tensor:
    """Run HuggingFace's model once, as it is: the metric of the unpatched run."""
    logits = case.hf_model(**case.x.tensors).logits[0, -1]
    return logits[case.answers[0]] - logits[case.answers[1]]


@contextlib.contextmanager
@torch.no_grad()
def shared_encoders(case: Case) -> Generator[None, None, None]:
    """Compute the towers' outputs of the prompt once and hand them out for a while; inside, `case.x` alone may run."""
    tensors, inner = case.x.tensors, case.hf_model.model
    made = (
        inner.get_audio_features(tensors["input_features"], tensors["feature_attention_mask"], return_dict=True),
        inner.get_video_features(tensors["pixel_values_videos"], tensors["video_grid_thw"], return_dict=True),
    )
    holders = (inner, case.model.hf_model.model)
    for holder in holders:
        for name, value in zip(_FEATURES, made, strict=True):
            holder.__dict__[name] = lambda *args, value=value, **kwargs: value
    try:
        yield
    finally:
        for holder in holders:
            for name in _FEATURES:
                del holder.__dict__[name]


def towers_of(case: Case, mode: str) -> contextlib.AbstractContextManager[None]:
    """Whether everyone runs the towers ("encoders") or is given their outputs ("shared")."""
    return shared_encoders(case) if mode == "shared" else contextlib.nullcontext()


def ways(patches: Patches) -> dict[str, Callable[[], Any]]:
    """What is paid once, by name; a model's first record, which is made through hooks, stands apart."""
    case, heads = patches.case, patches.heads()

    def first_trace() -> Any:
        case.model.__dict__.pop(PROVED, None)
        return case.model.trace(case.x)

    return {
        "forward": lambda: by_forward(case),
        "attribution": lambda: by_attribution(patches),
        "first_trace": first_trace,
        "trace": lambda: case.model.trace(case.x),
        "sweep": lambda: by_replay(patches, heads, case.model.trace(case.x)),
    }


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def fresh_peak(shape: str, kind: str, *, recording: str | Path | None = None, threads: int = 2) -> dict[str, float]:
    """Measure one of `tables.PEAKS` in a fresh process: "resident" and "peak" above it, in GB (1e9 bytes), or NaN."""
    if not _RESET.exists():
        return {"resident": float("nan"), "peak": float("nan")}
    code = "import sys; from av_lens.lab.replay_benchmark.peers import report; report(*sys.argv[1:])"
    words = [shape, kind, str(recording or ""), str(threads)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AvLensError(f"measuring the memory of {kind} on shape {shape!r} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(shape: str, kind: str, recording: str, threads: str) -> None:
    """Measure in this process and write the result to standard output: what `fresh_peak` starts."""
    torch.set_num_threads(int(threads))
    case = build_case(shape_named(shape), recording=recording or None)
    spec, rows = case.model.spec, [case.x.spans.generation_position]
    generator, size = torch.Generator().manual_seed(0), (1, len(rows), spec.n_heads, spec.d_head)
    given = tuple(torch.randn(size, generator=generator).to(case.model.dtype) for _ in range(spec.n_layers))
    resident, peak = peak_of(ways(Patches(case, rows, given))[kind])
    sys.stdout.write(json.dumps({"resident": resident / 1e9, "peak": (peak - resident) / 1e9}) + "\n")


def peak_of(work: Callable[[], Any]) -> tuple[int, int]:
    """Do something and read the bytes resident before, and at the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    resident = _status("VmRSS")
    _RESET.write_text("5")
    work()
    return resident, _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
