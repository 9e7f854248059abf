"""What was recorded once? The sources of conflicts' clips, which the two halves must not share (protocol section 7).

Equal streams: `media.fingerprints`. A name in the manifest overrules the rest, for the clip wherever it stands. A clip
without a file is known by its sound and by its picture. A source is called by its name, or by the smallest key (hash of
the file, window) of its clips.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from av_lens.errors import InputError, MediaError
from av_lens.inputs.conflict import ROLES, ClipKeys, clip_window, source_file
from av_lens.media.fingerprints import fingerprint, says_nothing
from av_lens.results.provenance import linked

APART = 10.0
"""Seconds from which windows of one file are two sources."""


@dataclass(frozen=True)
class Sources:
    """The source of every clip, by the clip's key."""

    names: Mapping[str, str]
    keys: ClipKeys

    def of(self, conflict: Any, role: str) -> str:
        """Name the source of a conflict's "sound", "picture" or "third"."""
        return self.names[self.keys.of(conflict, role)]


def sources_of(conflicts: Sequence[Any], keys: ClipKeys) -> Sources:
    """Find the sources of the conflicts' clips; each file is decoded once."""
    clips, called = dict[str, Any](), dict[str, tuple[str, str]]()
    for one in conflicts:
        given = dict(zip(ROLES, getattr(one, "source", None) or (), strict=False))
        for role in ROLES:
            if getattr(one, role, None) is None:
                continue
            key = keys.of(one, role)
            clips.setdefault(key, getattr(one, role))
            if name := given.get(role):
                before, whose = called.setdefault(key, (name, one.id))
                if before != name:
                    raise InputError(
                        f"the {role} of conflict {one.id!r} is of the source {name!r}, and of {before!r} in conflict "
                        f"{whose!r}: one clip has one source. Give it one name."
                    )
    unnamed = {key: clip for key, clip in clips.items() if key not in called}
    names = {key: name for key, (name, _) in called.items()} | _recorded(unnamed)
    return Sources(names, keys)


def _recorded(clips: Mapping[str, Any]) -> dict[str, str]:
    """Link clips that show or sound the same, and windows that lie close."""
    seen = [_evidence(key, clip) for key, clip in clips.items()]
    places = defaultdict[int, list[tuple[float, float, int]]](list)
    for number, (recording, clip) in enumerate(zip(linked(seen), clips.values(), strict=True)):
        start, end = clip_window(clip)
        places[recording].append((start, math.inf if end is None else end, number))
    listed, names = list(clips), dict[str, str]()
    for windows in places.values():
        reached, group = -math.inf, list[str]()
        for start, end, number in sorted(windows):
            if start - reached >= APART:
                group = []
            group.append(listed[number])
            reached = max(reached, end) if len(group) > 1 else end
            names |= dict.fromkeys(group, min(group))
    return names


def _evidence(key: str, clip: Any) -> list[str]:
    """What makes a clip one recording with another: its file, its sound, its picture."""
    path = source_file(clip)
    if path is not None:
        sha = key.partition(":")[0]
        try:
            sound, picture = fingerprint(path, sha)
        except MediaError:
            sound = picture = None  # what cannot be read is refused where it is read
        return [
            f"file {sha}",
            *(f"{kind} {found}" for kind, found in (("sound", sound), ("picture", picture)) if found),
        ]
    found = [f"file {sha}" if (sha := getattr(clip, "sha256", None)) else f"clip {key}"]
    for kind, name in (("sound", "waveform"), ("picture", "frames")):
        if getattr(clip, name, None) is not None and not says_nothing(clip, kind):
            found.append(f"{kind} {getattr(clip, f'{kind}_hash')}")
    return found
