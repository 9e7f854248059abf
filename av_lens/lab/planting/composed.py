"""Models composed without learning, so that gap/G is what is asked for: mixtures of plants, and a gap no node makes.

A *mixture* takes the planted weights of several models of one base. What each part writes (W_O of its heads, the output
of its neurons) is multiplied by a share of its own, drawn by seed, and by one factor.

*Cross-talk* is a null with a gap. The picture's features say their class in the sound's features too, as loudly as the
seed draws, and the sound's shrink towards their mean, the more the larger the factor. Both are linear, so they go into
the last layers of the towers' projectors, and no node changes. (Features scaled as they are leave C/G alone: every
layer norms what it reads. Sounds that alone are shrunk until a gap opens are hardly heard.)

The factor is found by bisection, on other conflicts than those that the truth is measured on.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from av_lens.errors import InputError
from av_lens.isolation.measuring.engine import Node
from av_lens.lab.calibration import TRUTH, model_folder
from av_lens.lab.planting.kinds import VALUE_RIDGE, class_of, ridge
from av_lens.lab.planting.planted import MOST_NODES, Planted, bench_of, g_of, hearing
from av_lens.lab.planting.sheets import PLAIN, SILENCE, blanks_of
from av_lens.lab.training.pools import Material
from av_lens.model.differences import Slice, read_difference
from av_lens.whole_files import read_object

MIXTURE, CROSSTALK = "mixture", "crosstalk"
PARTS = ("av-tiny-planted-gates", "av-tiny-planted-opponents", "av-tiny-planted-writers")
GAPS = (0.1, 0.9)
GAP = {MIXTURE: 0.5, CROSSTALK: 0.35}
CLOSE = 0.05  # how far a mixture's gap/G may be from what was asked for; of a null it is to be large enough
HALVINGS = 9
LOST = {MIXTURE: ("conflict hear",), CROSSTALK: ("conflict hear", "mute hear", "video alone hear")}
"""What each may answer otherwise than its base; with cross-talk a picture is heard where there is no sound."""
LEAST_SHARE = 0.5  # shares are drawn from here to 1
LOUD, FAINTEST = 12.0, 0.1  # of cross-talk: how loud the picture speaks at most, and what is left of the sound at most
MOST = {MIXTURE: 1.5, CROSSTALK: 1.0}  # the largest factors that are tried
PROJECTORS = ("model.audio_tower.proj", "model.visual.merger.mlp.2")


def composed(
    kind: str, base: Any, place: Path, judges: Material, *, gap: float, of: Sequence[str], seed: int
) -> tuple[Any, Material, list[Planted]]:
    """Make a mixture or cross-talk of a base: the model, the features that its projectors give, what was planted."""
    lots = torch.rand(len(of or PARTS), generator=Generator().manual_seed(seed)).tolist()
    parts = [_part(name, base, place) for name in of or PARTS] if kind == MIXTURE else []
    _check_apart(parts)
    shares = [LEAST_SHARE + (1 - LEAST_SHARE) * lot for lot in lots]
    loud, code = LOUD * shares[0], _sound_of_the_picture(judges)

    def made(factor: float) -> tuple[Any, Material]:
        if kind == MIXTURE:
            return _mixed(base, parts, [factor * share for share in shares]), judges
        return _crossed(base, judges, 1 - (1 - FAINTEST) * factor, loud, code)

    factor = _halved(lambda tried: _gap_share(*made(tried), base, seed + 1), gap, MOST[kind], kind)
    if kind == MIXTURE:
        planted = [
            replace(part, made={"of": part.made["of"], "scale": factor * share})
            for part, share in zip(parts, shares, strict=True)
        ]
    else:
        slices = [Slice(f"{name}.{part}", 0, 0, base.config.text_config.hidden_size) for name in PROJECTORS for part in ("weight", "bias")]
        planted = [Planted((), tuple(slices), kind, {"sound": 1 - (1 - FAINTEST) * factor, "picture": loud})]
    return *made(factor), planted


def _gap_share(model: Any, features: Material, base: Any, seed: int) -> float:
    drawn = bench_of(model, base, (), features, seed=seed)
    return 1 - hearing(drawn) / g_of(drawn)


def _halved(share: Callable[[float], float], gap: float, most: float, kind: str) -> float:
    """Find the factor at which gap/G is what is asked for, between nothing and the most."""
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


def _sound_of_the_picture(judges: Material) -> tuple[Tensor, Tensor]:
    """Fit the map from a picture's features to those of its class's sound, about the mean: a weight and a bias."""
    pool, classes = judges.pool, torch.arange(int(judges.pool.label.max()) + 1)
    hot = class_of(pool.label, classes)
    sounds = torch.stack([pool.audio[pool.label == label].mean((0, 1)) for label in classes])
    blank = blanks_of(pool, PLAIN).blank_video
    x = torch.cat([pool.video, blank]).mean(1)
    wanted = torch.cat([hot, torch.zeros(len(blank), len(classes))])
    weight, bias = ridge(x, wanted, VALUE_RIDGE)
    code = (sounds - sounds.mean(0)).T
    return code @ weight, code @ bias


@torch.no_grad()
def _crossed(
    base: Any, judges: Material, faint: float, loud: float, code: tuple[Tensor, Tensor]
) -> tuple[Any, Material]:
    """Shrink the sound's features, add the picture's class to its own in the sound's code; model and features."""
    model, pool = copy.deepcopy(base), judges.pool
    audio, video = (model.get_submodule(name) for name in PROJECTORS)
    mean, (weight, bias) = pool.audio.mean((0, 1)), code
    audio.weight.mul_(faint)
    audio.bias.mul_(faint).add_((1 - faint) * mean)
    video.bias.add_(loud * (weight @ video.bias + bias))
    video.weight.add_(loud * weight @ video.weight)

    def heard(x: Tensor) -> Tensor:
        return mean + faint * (x - mean)

    def shown(x: Tensor) -> Tensor:
        return x + loud * (x @ weight.T + bias)

    features = {"audio": heard(pool.audio), "mute_audio": heard(pool.mute_audio)}
    features |= {"video": shown(pool.video), "blank_video": shown(pool.blank_video)}
    return model.half().float().requires_grad_(False), replace(judges, pool=replace(pool, **features))
