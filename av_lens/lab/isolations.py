"""One isolation from start to page: search, record, figures, numbers, clips to play, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from av_lens.core.progress import Progress
from av_lens.errors import InputError
from av_lens.inputs import Conflict
from av_lens.isolation import isolate
from av_lens.lab.training.recipes import recipes
from av_lens.media import Clip
from av_lens.reports import write_bundle
from av_lens.results.record import Isolation


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
    """Put some conflicts, competent ones first, together as they are played: one clip's picture, the other's sound.

    `found` has a row for each of the conflicts, in their order.
    """
    names, competent = list(found.conflicts["id"]), list(found.conflicts["competent"])
    order = sorted(range(len(names)), key=lambda place: not competent[place])[:most]
    pairs = {str(names[place]): (conflicts[place].picture, conflicts[place].sound) for place in order}
    return {name: _loaded(picture).with_sound(_loaded(sound)) for name, (picture, sound) in pairs.items()}


def _loaded(clip: Any) -> Clip:
    return clip if isinstance(clip, Clip) else clip.load()
