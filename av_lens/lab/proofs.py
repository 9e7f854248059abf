"""What is proved of a wrapped model, each by something that it must agree with: a check gives its verdict in words.

Limits are shares of the largest number compared: kernels sum in other orders, and logits of real models reach 40. Null
edits are held to the bit, restarted ones to a tenth of `LIMITS`.
"""

from dataclasses import dataclass
from dataclasses import replace as changed
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from av_lens.core import run
from av_lens.errors import InterventionError
from av_lens.families.decoder import hook_name, layer_names
from av_lens.inputs import AVInputs, Pair
from av_lens.interventions import Plan, Site, add, cut, noise, replace, scale, zero
from av_lens.interventions.edges import KV, Cut
from av_lens.interventions.edits import Edit
from av_lens.media import Clip
from av_lens.methods import path_patch
from av_lens.model import HookedAVLLM
from av_lens.model.selfcheck import Check, examined
from av_lens.replay import Trace
from av_lens.replay.rerun import EDGES, RESTARTABLE

LIMITS = {torch.float32: 1e-4, torch.float64: 1e-4}
COARSE = 5e-2  # the limit of lower precisions
PLACES = (None, "media", "question|generation", "generation")


@dataclass(frozen=True, eq=False)
class Bench:
    """What the proofs run on."""

    model: HookedAVLLM  # the wrapped model
    x: AVInputs  # the clip's input
    question: str  # what is asked of short inputs
    plans: int  # how many random plans are replayed
    quick: bool  # hooks of the last layer alone, a few
    seed: int  # what plans are drawn from

    @property
    def limit(self) -> float:
        """The largest difference allowed, as a share."""
        return LIMITS.get(self.model.dtype, COARSE)

    @cached_property
    def trace(self) -> Trace:
        """The recorded run of the clip."""
        return self.model.trace(self.x)

    @cached_property
    def small(self) -> AVInputs:
        """A short input with media, for what takes many whole runs: a second of sound, or a picture."""
        return self._short(1)

    @cached_property
    def other(self) -> AVInputs:
        """Another one of its layout; without media the words of its question in another order."""
        found = self._short(2)
        if not len(found.spans.media):
            ids, at = found.tensors["input_ids"].clone(), found.spans.question.positions.tolist()
            ids[:, at] = ids[:, at].roll(1, -1)
            found = changed(found, tensors={**found.tensors, "input_ids": ids})
        return found

    def _short(self, seed: int) -> AVInputs:
        kinds = self.model.encoder.layout.kinds
        sound = "separate" if "audio" in kinds else None
        picture = None if sound else next((kind for kind in ("image", "video") if kind in kinds), None)
        clip = made_clip(seed, seconds=1.0) if sound or picture else None
        return self.model.encode(clip, self.question, sound=sound, picture=picture)


def made_clip(seed: int = 0, *, seconds: float = 2.0) -> Clip:
    """Make a clip that has everything and shows nothing: noise to see and to hear."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (round(seconds * 4), 56, 84, 3), dtype=np.uint8)
    waveform = rng.normal(0.0, 0.2, round(seconds * 16000)).clip(-1, 1).astype(np.float32)
    return Clip.from_arrays(frames=frames, fps=4.0, waveform=waveform, rate=16000)


def share(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number wanted."""
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


def hooks(bench: Bench) -> list[Check]:
    """Every hook is on the road."""
    report = examined(bench.model, bench.small, full=not bench.quick)
    where = "a few hooks of the last layer" if bench.quick else "every hook of every layer"
    said = f"{len(report.passed)} of {len(report.checks)} checks, {len(bench.small.spans)} positions"
    whole = Check(f"{where}: written back it changes nothing, turned it changes the logits", report.ok, said)
    return [whole, *(check for check in report.checks if check.held is False)]


def layers_of_its_own(model: HookedAVLLM) -> str:
    """That a proof does not apply, and why, where a family's layers are not of the known layout."""
    reason = model.family.replay_traits(model.config).layers
    return f"refused: {reason}" if reason else ""


@torch.no_grad()
def decomposition(bench: Bench) -> list[Check]:
    """The parts of the stream sum to it."""
    model, n = bench.model, bench.model.spec.n_layers
    if own := layers_of_its_own(model):
        return [Check("decompose_resid sums to the stream", None, own)]
    names = [
        hook_name("embed"),
        *layer_names("attn_out", n),
        *layer_names("mlp_out", n),
        hook_name("resid_post", n - 1),
    ]
    _, cache = model.run_with_cache(bench.small, names)
    parts, _ = cache.decompose_resid(return_labels=True)
    total = parts.float().sum(0)
    for added in model.trace(bench.small).added.values():
        total[:, : added.shape[1]] += added
    gap = share(total, cache["resid_post", -1])
    return [Check("decompose_resid sums to the stream", gap <= bench.limit, f"largest difference {gap:.1e} of it")]


def drawn(trace: Trace, rng: np.random.Generator) -> Plan:
    """Draw one to three edits of any kind, at any component, layer, heads and positions that the model has."""
    spec, n = trace.model.spec, len(trace.spans)
    edits: list[Edit | Cut] = []
    while not edits or (len(edits) < 3 and rng.random() < 0.5):
        component, layer = str(rng.choice(sorted(RESTARTABLE))), int(rng.integers(spec.n_layers))
        place = PLACES[rng.integers(len(PLACES))] if rng.random() < 0.7 else sorted({*rng.integers(n, size=4).tolist()})
        try:
            site = Site(component, None if component == "embed" else layer, positions=place)
            if site.has_heads and rng.random() < 0.7:
                site = Site(component, layer, int(rng.integers(site.n_heads(spec))), place)
            width = n if component in EDGES else int(getattr(spec, site.axes[-1]))
            row = torch.from_numpy(rng.normal(size=(1, 1, *[1] * site.has_heads, width))).float()
            moves: list[Edit | Cut] = [
                zero(site),
                scale(site, -1.0),
                scale(site, 2.0),
                noise(site, scale=0.5, seed=int(rng.integers(99))),
            ]
            moves.append(add(site, row) if component not in EDGES else cut("generation", [0], layers=[layer]))
            edit = moves[rng.integers(len(moves))]
            Plan(edit).compile(spec, trace.spans, batch=trace.batch)
        except InterventionError:  # a component that this layer does not have
            continue
        edits.append(edit)
    return Plan(edits)


@torch.no_grad()
def replays(bench: Bench) -> list[Check]:
    """Restarts are the hooked runs."""
    trace, rng = bench.trace, np.random.default_rng(bench.seed)
    plans = [drawn(trace, rng) for _ in range(bench.plans)]
    base, gaps, moved = trace.logits("suffix"), list[float](), 0
    for plan, found in zip(plans, trace.replay(plans, logits_at="suffix"), strict=True):
        wanted = run(bench.model, trace.x, plan=plan, logits_at="suffix").logits
        gaps.append(share(found, wanted))
        moved += not torch.equal(wanted, base)
    how = f"runs hooked: {trace.hooked_because}" if trace.hooked_because else "restarts"
    said = f"{len(plans)} random plans, {moved} of them move the logits, largest difference {max(gaps):.1e}; {how}"
    return [Check("replay is the hooked run", max(gaps) <= bench.limit and moved > 0, said)]


@torch.no_grad()
def null_edits(bench: Bench) -> list[Check]:
    """Edits that change nothing have no effect: none in a whole run, in a restart none but float32's rounding."""
    model, trace, n = bench.model, bench.trace, bench.model.spec.n_layers
    layers = sorted({0, n // 2, n - 1})
    sites = [Site(component, layer) for component in ("z", "resid_pre", "mlp_out") for layer in layers]
    base, told = run(model, trace.x).logits, float(trace.logits().abs().max())
    effects = [run(model, trace.x, plan=Plan(scale(site, 1.0))).logits - base for site in sites]
    largest = max(float(one.abs().max()) for one in effects)
    said = f"{len(sites)} edits, largest effect {largest:g}"
    found = [Check("edits that change nothing have no effect", largest == 0, said)]
    late = [Plan(scale(Site("z", layer, positions="generation"), 1.0)) for layer in layers]
    largest = float((trace.replay(late) - trace.logits()).abs().max()) / told
    exact = model.dtype not in LIMITS and model.device.type == "cpu"  # where base and edits are computed alike
    most = 0.0 if exact else bench.limit / 10
    said = f"{len(late)} edits, largest effect {largest:.1e} of the largest logit (at most {most:g})"
    return [*found, Check("replayed, they have none but rounding", largest <= most, said)]


@torch.no_grad()
def a_path(bench: Bench) -> list[Check]:
    """Path patching is its definition: from the first head to a later layer's values, of three the largest effect."""
    model, n, name = bench.model, bench.model.spec.n_layers, "path patching is its definition"
    if own := layers_of_its_own(model):
        return [Check(name, None, own)]
    if n == 1:
        return [Check(name, None, "not checked: a model of one layer has no path")]
    base = run(model, bench.other).logits
    first, second = base[0, -1].topk(2).indices.tolist()

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, first] - logits[:, -1, second]

    receivers = {str(layer): (layer, KV(0), "v") for layer in sorted({1, n // 2, n - 1})}
    pair = Pair(clean=bench.small, corrupt=bench.other)
    grid = path_patch(model, pair, sender=(0, 0), receiver=receivers, metric=metric)
    effects, values = grid.effects.values.reshape(-1), grid.values.values.reshape(-1)
    chosen = int(np.abs(effects).argmax())
    wanted = metric(by_definition(model, bench.other, bench.small, int([*receivers][chosen])))
    gap, effect = abs(float(values[chosen] - wanted)), abs(float(effects[chosen]))
    held = gap <= bench.limit / 10 * float(base.abs().max())
    said = f"to layer {[*receivers][chosen]}: effect {effect:.1e} logits, {gap:.1e} from its definition"
    if held and effect <= 3 * gap:
        return [Check(name, None, f"{said}: too small to tell")]
    return [Check(name, held, said)]


def by_definition(model: HookedAVLLM, base: AVInputs, donor: AVInputs, layer: int) -> Tensor:
    """Logits when a change of the first head reaches one layer's first values alone, by whole hooked runs."""
    kept = run(model, base, capture=["z", "mlp_out"]).cache
    held = {
        (name, number): kept[name, number].clone() for name in ("z", "mlp_out") for number in range(model.spec.n_layers)
    }
    held["z", 0][:, :, 0] = run(model, donor, capture=[Site("z", 0)]).cache["z", 0][:, :, 0]
    edits = [replace(Site(*place), value) for place, value in held.items()]
    read = run(model, base, plan=Plan(edits), capture=[Site("v", layer)]).cache["v", layer]
    return run(model, base, plan=Plan(replace(Site("v", layer, 0), read[:, :, [0]]))).logits


@torch.no_grad()
def on_the_cpu(bench: Bench) -> list[Check]:
    """The same on the CPU; the model stays there."""
    name, model = "the CPU agrees with the device", bench.model
    places = {str(one) for one in (getattr(model.hf_model, "hf_device_map", None) or {}).values()}
    if model.device.type == "cpu" or len(places) > 1:
        why = "the model is split over several places" if len(places) > 1 else "the model is on the CPU"
        return [Check(name, None, f"not checked: {why}")]
    here = run(model, bench.small).logits
    model.to("cpu")
    there = run(model, bench.small.to("cpu")).logits
    gap, same = share(here, there), bool((here.argmax(-1).cpu() == there.argmax(-1)).all())
    said = f"largest difference {gap:.1e} of the largest logit; likeliest token {'the same' if same else 'another'}"
    return [Check(name, gap <= max(bench.limit, 1e-3), said)]


PROOFS = (hooks, decomposition, replays, null_edits, a_path)
