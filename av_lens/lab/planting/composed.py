"""Models composed so that gap/G is what is asked for: mixtures of plants, and a gap that no node makes.

What a *mixture* and *cross-talk* are, and what was tried in its place: `docs/organisms.md`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from av_lens.core.budget import Progress, silent
from av_lens.errors import InputError
from av_lens.isolation.measuring.engine import Node
from av_lens.lab.calibration import TRUTH, model_folder
from av_lens.lab.planting.planted import MOST_NODES, Planted, bench_of, g_of, hearing
from av_lens.lab.planting.sheets import SHEETS, SILENCE, draw_sheet, read_at
from av_lens.lab.planting.training import cross_entropy
from av_lens.lab.training.engine import set_rate, warmed
from av_lens.lab.training.pools import Material
from av_lens.model.differences import Slice, read_difference
from av_lens.organism.language import read_out, run_layers
from av_lens.whole_files import read_object

MIXTURE, CROSSTALK = "mixture", "crosstalk"
PARTS = ("av-tiny-planted-gates", "av-tiny-planted-opponents", "av-tiny-planted-writers")
GAPS = (0.1, 0.9)
GAP = {MIXTURE: 0.5, CROSSTALK: 0.35}
CLOSE = 0.05  # how far a mixture's gap/G may be from what was asked for; of a null it is to be large enough
HALVINGS = 9
LOST = {MIXTURE: ("conflict hear",), CROSSTALK: ("conflict hear", "mute hear", "video alone hear")}
"""What each may answer otherwise than its base; with cross-talk a picture may be heard where there is no sound."""
LEAST_SHARE = 0.5  # shares are drawn from here to 1
STEPS, RATE, KEEP = 120, 3e-3, 0.5  # how cross-talk is learned; what all else weighs beside conflict
MOST = {MIXTURE: 1.5, CROSSTALK: 1.0}  # the largest factors that are tried
PROJECTOR = "model.visual.merger.mlp.2"
LAYOUTS = (0, 1)  # cross-talk has its gap in both


def mixture(
    base: Any, place: Path, judges: Material, *, gap: float, of: Sequence[str], seed: int
) -> tuple[Any, list[Planted]]:
    """Mix plants of a base until as much of G is lost as is asked for: the model, and what was planted."""
    lots = torch.rand(len(of or PARTS), generator=Generator().manual_seed(seed)).tolist()
    parts = [_part(name, base, place) for name in of or PARTS]
    _check_apart(parts)
    shares = [LEAST_SHARE + (1 - LEAST_SHARE) * lot for lot in lots]

    def made(factor: float) -> Any:
        return _mixed(base, parts, [factor * share for share in shares])

    factor = _halved(lambda tried: _gap_share(made(tried), base, judges, seed + 1), gap, MIXTURE)
    planted = [
        replace(part, made={"of": part.made["of"], "scale": factor * share})
        for part, share in zip(parts, shares, strict=True)
    ]
    return made(factor), planted


def crosstalk(
    base: Any, lessons: Material, judges: Material, *, gap: float, seed: int, progress: Progress | None = None
) -> tuple[Any, Material, list[Planted]]:
    """Teach the picture's features to be heard: the model, the features that its projector gives, what was changed."""
    change = _taught(base, lessons, Generator().manual_seed(seed), progress or silent)
    factor = _halved(
        lambda tried: _gap_share(base, base, _shown(judges, tried * change), seed + 1, LAYOUTS), gap, CROSSTALK
    )
    slices = [Slice(f"{PROJECTOR}.{part}", 0, 0, len(change)) for part in ("weight", "bias")]
    planted = [Planted((), tuple(slices), CROSSTALK, {"factor": factor})]
    return _crossed(base, factor * change), _shown(judges, factor * change), planted


def _gap_share(model: Any, base: Any, judges: Material, seed: int, layouts: Sequence[int] = (0,)) -> float:
    """The share of G that is lost, in the layout where it is smallest."""
    drawn = [bench_of(model, base, (), judges, seed=seed, layout=one) for one in layouts]
    return min(1 - hearing(one) / g_of(one) for one in drawn)


def _halved(share: Callable[[float], float], gap: float, kind: str) -> float:
    """Find the factor at which gap/G is what is asked for, between nothing and the most."""
    most = MOST[kind]
    found = share(most)
    if found < gap:
        raise InputError(
            f"gap/G of {gap:g} cannot be reached: at the largest factor that is tried, {most:g}, this {kind} has "
            f"{found:.2f}. Ask for a smaller gap" + (", or mix other plants." if kind == MIXTURE else ".")
        )
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < gap else (low, middle)
    return high


def _part(name: str, base: Any, place: Path) -> Planted:
    """Read a model that is to be mixed in: its nodes and slices, with its name and its weights in `made`."""
    folder = model_folder(name)
    difference, truth = read_difference(folder), folder / TRUTH
    if difference is None or not truth.is_file():
        raise InputError(f"{name!r} is no planted model ({TRUTH} or its difference is missing); see `av-lens plant`.")
    difference.check_base(place)
    content = read_object(truth)
    sites = {(int(one["layer"]), int(one["head"])): one.get("site", "") for one in content["heads"]}
    if content.get("decoys") or not sites:
        raise InputError(f"{name!r} holds decoys, or nothing that silences: a mixture is of guilty nodes alone.")
    model = copy.deepcopy(base)
    difference.put_into(model)
    held = dict(model.named_parameters())
    early = frozenset(node for node, site in sites.items() if site == "sinks")
    return Planted(tuple(sites), difference.slices, SILENCE, {"of": name, "weights": held}, early)


def _check_apart(parts: Sequence[Planted]) -> None:
    names = [Path(part.made["of"]).name for part in parts]
    seen: dict[Node, str] = {}
    for part, name in zip(parts, names, strict=True):
        for node in part.nodes:
            if node in seen:
                raise InputError(f"{seen[node]!r} and {name!r} both planted in L{node[0]}, node {node[1]}: mix others.")
            seen[node] = name
    if len(seen) > MOST_NODES:
        raise InputError(
            f"{', '.join(names)} have {len(seen)} nodes; all subsets are tried for at most {MOST_NODES}. Mix fewer."
        )


@torch.no_grad()
def _mixed(base: Any, parts: Sequence[Planted], scales: Sequence[float]) -> Any:
    """Put parts' weights into a copy of the base, what they write scaled; rounded to what is stored."""
    model = copy.deepcopy(base)
    held = dict(model.named_parameters())
    for part, scale in zip(parts, scales, strict=True):
        for one in part.slices:
            writes = one.name.endswith(("o_proj.weight", "down_proj.weight"))
            one.of(held[one.name]).copy_(one.of(part.made["weights"][one.name]) * (scale if writes else 1.0))
    return model.half().float().requires_grad_(False)


def _taught(base: Any, lessons: Material, generator: Generator, tell: Progress) -> Float[Tensor, "d_model columns"]:
    """Learn what to add to the picture's features, a map of themselves and 1, so that in conflict they are heard."""
    width = base.config.text_config.hidden_size
    change = torch.zeros(width, width + 1, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=RATE, betas=(0.9, 0.98))
    seen = {name: kind for name, kind in SHEETS.items() if kind.media != "audio"}
    for step in range(STEPS):
        set_rate(optimizer, warmed(RATE, step, STEPS, warmup=10, floor=0.1))
        optimizer.zero_grad()
        for name, kind in seen.items():
            layout = step % len(lessons.frames[kind.media])
            sheet = draw_sheet(lessons, name, layout, kind.a_step, generator)
            clips = replace(sheet.clips, video=_changed(sheet.clips.video, change))
            sheet, targets = replace(sheet, clips=clips), sheet.targets((SILENCE,))
            x = run_layers(base, sheet.embed(base, targets), sheet.geometry(base))
            loss = cross_entropy(read_out(base, read_at(x, sheet.asked_at)), targets).mean()
            (loss if name == "conflict" else KEEP * loss).backward()
        torch.nn.utils.clip_grad_norm_([change], 1.0)
        optimizer.step()
        tell("teaching the picture's features", step + 1, STEPS)
    return change.detach()


def _changed(x: Float[Tensor, "*at d_model"], change: Float[Tensor, "d_model columns"]) -> Float[Tensor, "*at d_model"]:
    return x + x @ change[:, :-1].T + change[:, -1]


def _shown(judges: Material, change: Float[Tensor, "d_model columns"]) -> Material:
    """The same clips, with the features of their pictures changed."""
    features = {name: _changed(getattr(judges.pool, name), change) for name in ("video", "blank_video")}
    return replace(judges, pool=replace(judges.pool, **features))


@torch.no_grad()
def _crossed(base: Any, change: Float[Tensor, "d_model columns"]) -> Any:
    """Put a change of the picture's features into the projector of a copy; rounded to what is stored."""
    model = copy.deepcopy(base)
    video = model.get_submodule(PROJECTOR)
    video.bias.copy_(_changed(video.bias, change))
    video.weight.add_(change[:, :-1] @ video.weight)
    return model.half().float().requires_grad_(False)
