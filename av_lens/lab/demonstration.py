"""The main job from end to end on the embedded models: `av-lens demo`.

1. Write conflict clips of the synthetic world as mp4 files, from a part of it that trained nothing, with a manifest.
2. Calibrate: isolate `av-tiny-planted`, whose guilty heads are known, on those files.
3. Isolate `av-tiny` on the same files.
4. Write the page, the figures and the numbers.

Each part is kept once finished, so that an interrupted run goes on where it stopped. A demonstration on models whose
circuits were made by their training; it shows that the instrument works, and nothing about real models.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from av_lens import __version__
from av_lens.inputs import conflicts as read_conflicts
from av_lens.isolation import isolate
from av_lens.lab.calibration import calibrate, planted_truth
from av_lens.lab.isolations import organism_caveats
from av_lens.lab.parts import Parts
from av_lens.lab.staged_conflicts import conflict_file, stage
from av_lens.model import load
from av_lens.reports import Calibration, write_bundle
from av_lens.results.record import Isolation
from av_lens.whole_files import write_whole

SUBJECT = "av-tiny"
PLANTED = "av-tiny-planted"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Demonstration:
    """What the demo found.

    Attributes:
        found: the isolation of the subject.
        calibration: how the same search did where the truth is known.
        report: the page's path.
        seconds: how long each part took, in this run.
    """

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
    progress: Progress | None = None,
) -> Demonstration:
    """Calibrate on planted heads, isolate the suppressors of av-tiny, and write the report.

    Args:
        out: the folder to write; parts that an earlier run finished under the same settings are kept.
        conflicts: how many conflicts of sound and picture: 132 are all ordered pairs of the world's twelve things. An
            isolation needs 40, and 120 for a verdict, of those whose sound is heard and whose picture is seen alone.
        seed: draws the clips, deals the halves, draws the bootstrap and the random sets.
        calibrate_on: how many of them, the first, the planted model is tested on: fewer, for time.
        quick: leave out robustness and pairs of heads (the report says so); False runs the whole protocol.
        progress: called as `progress(stage, done, total)`.

    Returns:
        The findings and the report's path.
    """
    out = Path(out)
    settings = {"conflicts": conflicts, "calibrate_on": calibrate_on, "seed": seed, "quick": quick}
    parts = Parts(out, {**settings, "version": __version__, "weights": _weights()})
    few = min(calibrate_on, conflicts)
    clips = parts.ensure("clips", lambda folder: _staged(folder, conflicts, seed, progress))
    calibrated = parts.ensure(
        "calibration",
        lambda folder: _isolated(folder, PLANTED, clips, few, progress, seed=seed, quick=True, named_only=True),
    )
    isolated = parts.ensure(
        "isolation", lambda folder: _isolated(folder, SUBJECT, clips, conflicts, progress, seed=seed, quick=quick)
    )
    found = Isolation.load(isolated)
    calibration = calibrate(Isolation.load(calibrated), planted_truth(PLANTED), model=PLANTED)
    playable = {str(name): clips / conflict_file(str(name)) for name in found.conflicts["id"]}
    begun = time.monotonic()
    report = write_bundle(found, out, calibration=calibration, clips=playable, caveats=organism_caveats(SUBJECT))
    seconds = {**parts.seconds, "report": time.monotonic() - begun}
    write_whole(out / "seconds.json", json.dumps(seconds, indent=1))
    return Demonstration(found=found, calibration=calibration, report=report, seconds=seconds)


def _staged(folder: Path, conflicts: int, seed: int, progress: Progress | None) -> None:
    stage(folder, conflicts=conflicts, seed=seed, progress=progress)


def _isolated(folder: Path, name: str, clips: Path, first: int, progress: Progress | None, **options: Any) -> None:
    model: Any = load(name)
    listed = read_conflicts(clips / "pairs.jsonl")[:first]

    def named(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{name}: {stage}", done, total)

    isolate(model, listed, progress=named, **options).save(folder)


def _weights() -> dict[str, str]:
    """Hash the weights that the demo runs on, so that new ones are never given old numbers."""
    import hashlib
    from importlib.resources import files

    found: dict[str, str] = {}
    for name in (SUBJECT, PLANTED):
        path = files("av_lens") / "organism" / "checkpoints" / name / "model.safetensors"
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "absent"
    return found
