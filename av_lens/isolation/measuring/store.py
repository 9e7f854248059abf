"""What has been measured already? Measurements on disk, so that a run that was killed goes on where it was.

Only what costs runs of the model is stored. A file that is damaged, or holds another measurement than its name says, is
told and measured again; one that the system does not let us read stops the run.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from av_lens.errors import FileError, UnfinishedError
from av_lens.isolation.measuring.crew import Crew, Elsewhere
from av_lens.results.provenance import plain
from av_lens.whole_files import describe, reading, write_whole

Arrays = dict[str, np.ndarray]
FOLDER = "measured"
SCHEMA = 2
"""Of measurements on disk, part of a run's key: conflicts are each array's first axis."""
MEASURES = (
    "spans.py", "media", "families", "inputs", "interventions", "core", "metrics", "replay", "model", "methods",
    "isolation",
)  # fmt: skip
_PACKAGE = Path(__file__).resolve().parents[2]
"""Files and rooms whose code measures; what plots, reports, trains or reads a command line may change meanwhile."""
SECONDS, OF = "seconds taken", "measurement of"
POLL = 0.01
GO_ON = "What was kept before is whole; make room or put the folder right, and the same command goes on from there."


@dataclass(frozen=True, eq=False)
class Measured:
    """One measurement, as those who watch a store are told of it; `new` if it was made just now."""

    name: str
    depends: Mapping[str, Any]
    seconds: float
    new: bool


@dataclass(eq=False)
class Store:
    """Measurements of one run under its `key`, in `folder` (None keeps nothing); `before` may raise to stop it."""

    folder: Path | None = None
    key: str = ""
    made: int = 0
    before: list[Callable[[str], None]] = field(default_factory=list)
    told: list[Callable[[Measured], None]] = field(default_factory=list)
    said: list[Callable[[str], None]] = field(default_factory=list)
    crew: Crew | None = None  # the worker that this is, where the folder is shared
    _within: list[float] = field(default_factory=list)
    _hurried: bool = False

    def under(self, variant: str) -> Store:
        """Give a store of measurements made under another condition, in the same folder, watched by the same."""
        watched: dict[str, Any] = {"before": self.before, "told": self.told, "said": self.said, "crew": self.crew}
        return Store(self.folder, f"{self.key}/{variant}", **watched, _hurried=self._hurried)

    @contextmanager
    def hurried(self, yes: bool) -> Generator[None]:
        """While it is open, what another worker is measuring is not waited for: `recall` raises `Elsewhere`."""
        before, self._hurried = self._hurried, yes
        try:
            yield
        finally:
            self._hurried = before

    def recall(self, name: str, depends: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Give a measurement: the stored one, or a new one, which is then stored.

        Raises:
            Elsewhere: while `hurried`, where another worker is measuring it.
        """
        text = json.dumps([self.key, name, plain(depends)], sort_keys=True)
        of = f"{name}: {hashlib.sha256(text.encode()).hexdigest()}"
        place = None if self.folder is None else self.folder / FOLDER / f"{_slug(name)}-{of[-64:][:20]}.npz"
        kept = None if place is None else self._opened(place, of)
        if kept is None and place is not None and self.crew is not None:
            kept = self._claimed(self.crew, place, of, name, damaged=place.exists())
        if kept is not None:
            found, seconds = kept, float(kept.pop(SECONDS, np.zeros(())))
        else:
            try:
                for ask in self.before:
                    ask(name)
                with self.hurried(False):  # what is begun is finished
                    found, seconds = self._timed(compute)
                if place is not None:
                    _keep(place, found | {SECONDS: np.array(seconds), OF: np.array(of)})
            except BaseException:
                self._release(place, made=False)
                raise
            self._release(place, made=True)
            self.made += 1
        for told in self.told:
            told(Measured(name, depends, seconds, new=kept is None))
        return found

    def _claimed(self, crew: Crew, place: Path, of: str, name: str, *, damaged: bool) -> Arrays | None:
        """Claim a measurement, or wait for the worker that has it; None where it is ours to make."""
        while not crew.claim(place, name):
            if self._hurried:
                raise Elsewhere
            time.sleep(POLL)
            if (kept := self._opened(place, of)) is not None:
                return kept
        kept = None if damaged else self._opened(place, of)  # finished between the look and the claim
        if kept is not None:
            crew.release(place, made=False)
        return kept

    def _release(self, place: Path | None, *, made: bool) -> None:
        if place is not None and self.crew is not None:
            self.crew.release(place, made=made)

    def _timed(self, compute: Callable[[], Arrays]) -> tuple[Arrays, float]:
        """Measure, and take the time, less that of the measurements that were made on the way."""
        self._within.append(0.0)
        begun = time.monotonic()
        try:
            made = compute()
        finally:
            taken, inner = time.monotonic() - begun, self._within.pop()
            if self._within:
                self._within[-1] += taken
        return made, taken - inner

    def _opened(self, place: Path, of: str) -> Arrays | None:
        """Read a stored measurement; None where there is none that is whole and its own."""
        try:
            held = place.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UnfinishedError(f"cannot read {place}: {describe(error)}. {GO_ON}") from error
        try:
            with reading(place, mend="It is measured again."), np.load(io.BytesIO(held), allow_pickle=False) as data:
                found = {key: data[key] for key in data.files}
                holds = str(found.pop(OF))
        except FileError as damaged:
            fault = str(damaged)
        else:
            if holds == of:
                return found
            what = f"{place} holds another measurement than its name says: {holds[:-66]}, of this run or another."
            fault = f"{what} It is measured again."
        for said in self.said:
            said(fault)
        return None


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)[:40].strip("-")


def _keep(place: Path, arrays: Arrays) -> None:
    held = io.BytesIO()
    np.savez(held, allow_pickle=False, **cast(Any, arrays))
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, held.getvalue(), error=UnfinishedError, mend=GO_ON)


@cache
def measuring_hash(package: Path = _PACKAGE, *, also: tuple[str, ...] = ()) -> str:
    """Hash the python files of the rooms that measure, and of others whose path begins with one of `also`."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name.split("/")[0] in MEASURES or name.startswith(also):
            digest.update(name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
