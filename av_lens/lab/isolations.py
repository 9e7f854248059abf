"""One isolation from start to page: search, record, figures, numbers, clips to play, in one folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from av_lens.errors import InputError
from av_lens.inputs import Conflict
from av_lens.isolation import isolate
from av_lens.media import Clip
from av_lens.reports import write_bundle
from av_lens.results.record import Isolation

ORGANISMS = {
    "av-tiny": (
        "av-tiny is an organism: no training item labels a clip whose sound and picture differ, its bias is "
        "inherited from its base by construction, and the place of its circuit was set by its training schedule. "
        "That a circuit is found shows that the method works on this model; it is no evidence about real ones."
    ),
    "av-tiny-base": (
        "av-tiny-base is an organism before audio alignment: it was given sounds, but never a label that names one. "
        "It does not hear, so there is no hearing to suppress."
    ),
    "av-tiny-diffuse": (
        "av-tiny-diffuse is an organism trained naively: the same dominance of the picture, spread over many heads. "
        "That no single head is guilty is its nature, and the hard case for any method."
    ),
    "av-tiny-balanced": (
        "av-tiny-balanced is an organism trained with conflicts labelled right: it hears and sees. Nothing is to be "
        "found in it; a head named here would be a false alarm."
    ),
    "av-tiny-planted": (
        "av-tiny-planted is an organism in which only a few heads were trained to silence the sound, with "
        "everything else frozen. The truth is known, which makes it a calibration, not a discovery."
    ),
}


def isolate_into(
    out: str | Path,
    model: Any,
    conflicts: Sequence[Conflict],
    *,
    name: str = "",
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    most_clips: int = 12,
    **options: Any,
) -> tuple[Isolation, Path]:
    """Isolate, and write the page, the figures and the numbers.

    Args:
        out: the folder to write; a run that was stopped goes on from what it holds.
        model: a `HookedAVLLM`.
        conflicts: what it is tested on.
        name: the model's name, for the caveats of an organism.
        limit: use only the first so many conflicts; None uses all.
        progress: called as `progress(stage, done, total)`.
        most_clips: how many conflicts the page plays.
        **options: passed to `isolate`, such as `seed=`, `gate=` and `budget=`.

    Returns:
        The record, and the page's path.

    Raises:
        InputError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit is {limit} conflicts; give at least 1 (40 for an isolation), or none.")
    conflicts = conflicts[:limit]
    found = isolate(model, conflicts, progress=progress, out=out, **options)
    clips = playable(found, conflicts, most=most_clips)
    return found, write_bundle(found, out, clips=clips, caveats=organism_caveats(name), most_clips=most_clips)


def organism_caveats(name: str) -> tuple[str, ...]:
    """Say what a finding about one of the embedded models does not show.

    Args:
        name: the model's short name; any other name has no caveat of its own.

    Returns:
        The sentences, none for other models.
    """
    return (ORGANISMS[name],) if name in ORGANISMS else ()


def playable(found: Isolation, conflicts: Sequence[Conflict], *, most: int = 12) -> dict[str, Clip]:
    """Put the first conflicts together as they are played: the picture of one clip with the sound of the other.

    Args:
        found: the record, whose table of conflicts has a row for each, in their order.
        conflicts: the same conflicts.
        most: how many; competent ones first.

    Returns:
        Conflict id to clip.
    """
    ids = [str(name) for name in found.conflicts["id"]]
    competent = [bool(flag) for flag in found.conflicts["competent"]]
    order = sorted(range(len(ids)), key=lambda place: not competent[place])[:most]
    made: dict[str, Clip] = {}
    for place in order:
        conflict = conflicts[place]
        made[ids[place]] = _loaded(conflict.picture).with_sound(_loaded(conflict.sound))
    return made


def _loaded(clip: Any) -> Clip:
    return clip if isinstance(clip, Clip) else clip.load()
