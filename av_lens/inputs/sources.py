"""Which clip is it? A source clip is its file's hash and its time window, so that it is known again in any conflict."""

from __future__ import annotations

from typing import Any

from av_lens.errors import InputError, UnfinishedError
from av_lens.media.border import file_hash
from av_lens.whole_files import describe

ROLES = ("sound", "picture", "third")


def clip_key(source: Any) -> str:
    """Name a source clip by its file's hash and its time window (by its content where it has no file)."""
    path, sha = _file(source), getattr(source, "sha256", None)
    if sha is None and path is not None:
        try:
            sha = file_hash(path)
        except OSError as error:
            raise InputError(f"cannot read the clip {path}: {describe(error)}. Put it back.") from error
    if sha is None:
        return f"{getattr(source, 'picture_hash', None)}:{getattr(source, 'sound_hash', None)}"
    return _key(source, sha)


class ClipKeys:
    """The keys of a run's clips: a file is hashed once, and known to be the same while it is used."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}

    def of(self, conflict: Any, role: str) -> str:
        """The `clip_key` of a conflict's "sound", "picture" or "third"; a file that is gone is refused."""
        clip = getattr(conflict, role)
        path = _file(clip)
        if path is None:
            return clip_key(clip)
        if path not in self._files:
            try:
                self._files[path] = file_hash(path)
            except OSError as error:
                raise InputError(
                    f"{_said(conflict, role, path)} is gone since the conflicts were listed ({describe(error)}). Put "
                    "the file back, or take the conflict out."
                ) from error
        return _key(clip, self._files[path])

    def check(self, conflict: Any) -> None:
        """Refuse to go on where a conflict's file is gone, or holds something else than when it was named."""
        for role in ROLES:
            path = _file(getattr(conflict, role, None))
            if path is None or path not in self._files:
                continue
            try:
                why = "" if file_hash(path) == self._files[path] else "was changed"
            except OSError as error:
                why = f"is gone ({describe(error)})"
            if why:
                raise UnfinishedError(
                    f"{_said(conflict, role, path)} {why} since the run began. Put the file back as it was, and the "
                    "same command goes on from what was measured; or begin anew without it, in another folder."
                )


def _file(source: Any) -> str | None:
    path = getattr(source, "path", None) if hasattr(source, "load") else None
    return None if path is None else str(path)


def _key(source: Any, sha: str) -> str:
    start, end = getattr(source, "window", None) or (getattr(source, "start", 0.0), getattr(source, "end", None))
    return f"{sha}:{start}:{end}"


def _said(conflict: Any, role: str, path: str) -> str:
    return f"the clip {path}, the {role} of conflict {conflict.id!r},"
