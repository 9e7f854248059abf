"""The main job from end to end: one isolation in one folder, and `av-lens demo` on the embedded models.

Each part is kept once finished, so that an interrupted run goes on where it stopped.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from av_lens import __version__
from av_lens.core.budget import Progress, named
from av_lens.errors import InputError
from av_lens.inputs import Conflict
from av_lens.inputs import conflicts as read_conflicts
from av_lens.isolation import isolate
from av_lens.lab.calibration import calibrate, conflict_file, planted_truth, stage, weights_key
from av_lens.lab.pages import Parts
from av_lens.lab.training.courses import recipes
from av_lens.media import Clip
from av_lens.model import load
from av_lens.reports import Calibration, write_bundle
from av_lens.results.record import Isolation
from av_lens.whole_files import write_whole


def isolate_into(
    out: str | Path,
    model: Any,
    conflicts: Sequence[Conflict],
    *,
    name: str = "",
    limit: int | None = None,
    progress: Progress | None = None,
    most_clips: int = 12,
    **options: Any,
) -> tuple[Isolation, Path]:
    """Isolate, and write the page, the figures and the numbers."""
    if limit is not None and limit < 1:
        raise InputError(f"the limit is {limit} conflicts; give at least 1 (40 for an isolation), or none.")
    conflicts = conflicts[:limit]
    found = isolate(model, conflicts, progress=progress, out=out, **options)
    clips = playable(found, conflicts, most=most_clips)
    return found, write_bundle(found, out, clips=clips, caveats=organism_caveats(name), most_clips=most_clips)


def organism_caveats(name: str) -> tuple[str, ...]:
    """Say what a finding about one of the embedded models, by short name, does not show; of others there is nothing."""
    return (recipes()[name].caveat,) if name in recipes() else ()


def playable(found: Isolation, conflicts: Sequence[Conflict], *, most: int = 12) -> dict[str, Clip]:
    """Put some conflicts, competent ones first, together as they are played; `found` has a row for each in order."""
    names, competent = list(found.conflicts["id"]), list(found.conflicts["competent"])
    order = sorted(range(len(names)), key=lambda place: not competent[place])[:most]
    pairs = {str(names[place]): (conflicts[place].picture, conflicts[place].sound) for place in order}
    return {name: _loaded(picture).with_sound(_loaded(sound)) for name, (picture, sound) in pairs.items()}


def _loaded(clip: Any) -> Clip:
    return clip if isinstance(clip, Clip) else clip.load()


SUBJECT = "av-tiny"
PLANTED = "av-tiny-planted"
MOST_WORKERS = 4
GROWING = "The run goes on, and this page grows: open it again later."


@dataclass(frozen=True, eq=False)
class Demonstration:
    """What the demo found; `seconds` is how long each part took, in this run."""

    found: Isolation
    calibration: Calibration
    report: Path
    seconds: dict[str, float]


def run_demo(
    out: str | Path = "av-lens-demo",
    *,
    conflicts: int = 132,
    seed: int = 0,
    calibrate_on: int = 48,
    quick: bool = True,
    workers: int | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
) -> Demonstration:
    """Isolate the suppressors of av-tiny, calibrate on planted heads, and write the report, which grows meanwhile.

    `workers` are as many as there are threads (torch's), at most `MOST_WORKERS`: one thread each is best for a model so
    small.

    `told` is called with the verdict as soon as the behaviour is known, and once heads are confirmed.
    """
    out, workers = Path(out), min(MOST_WORKERS, torch.get_num_threads()) if workers is None else workers
    settings = {"conflicts": conflicts, "calibrate_on": calibrate_on, "seed": seed, "quick": quick}
    weights = {name: weights_key(name) for name in (SUBJECT, PLANTED)}  # new ones are never given old numbers
    parts = Parts(out, {**settings, "version": __version__, "weights": weights})
    clips = parts.ensure("clips", partial(stage, conflicts=conflicts, seed=seed, progress=progress))

    def isolated(folder: Path, *, name: str, first: int, **options: Any) -> None:
        listed = read_conflicts(clips / "pairs.jsonl")[:first]
        options |= {"seed": seed, "workers": workers, "progress": named(progress, name)}
        isolate(load(name), listed, **options).save(folder)

    def page(found: Isolation, **options: Any) -> Path:
        playable = {str(name): clips / conflict_file(str(name)) for name in found.conflicts["id"]}
        return write_bundle(found, out, clips=playable, caveats=organism_caveats(SUBJECT), **options)

    def grown(found: Isolation) -> None:
        if told is not None:
            told(f"so far: {found.verdict}")
        page(replace(found, reasons=(*found.reasons, GROWING)))

    searching = partial(isolated, name=SUBJECT, first=conflicts, quick=quick, grown=grown)
    found = Isolation.load(parts.ensure("isolation", searching))
    calibrating = partial(isolated, name=PLANTED, first=min(calibrate_on, conflicts), quick=True, named_only=True)
    calibrated = Isolation.load(parts.ensure("calibration", calibrating))
    calibration = calibrate(calibrated, planted_truth(PLANTED), model=PLANTED)
    begun = time.monotonic()
    report = page(found, calibration=calibration)
    seconds = {**parts.seconds, "report": time.monotonic() - begun}
    write_whole(out / "seconds.json", json.dumps(seconds, indent=1))
    return Demonstration(found=found, calibration=calibration, report=report, seconds=seconds)
