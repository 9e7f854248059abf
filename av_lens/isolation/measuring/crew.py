"""Who measures what, where several workers share a run's folder.

Every worker runs the whole program, and opens what another has measured. What a worker is measuring it claims first; a
claim counts while its worker lives. Two workers that measure the same thing after all write the same file.

    DIR/workers/NAME            a worker's beat: its file is touched every `BEAT` seconds while it lives
    DIR/measured/NAME.claim     what a worker is measuring: the file holds its name

A worker is dead once it has not been heard of for `SILENT` seconds by the clock of the disk they share; on the same
machine, as soon as its process is gone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from av_lens.errors import FileError
from av_lens.whole_files import make_folder, write_whole

WORKERS, CLAIM = "workers", ".claim"
BEAT, SILENT = 1.0, 20.0


class Elsewhere(Exception):
    """Another worker is measuring this."""


@dataclass(frozen=True)
class Worker:
    """A worker, as others see it."""

    name: str
    alive: bool
    doing: str  # what it last claimed
    made: int  # how many measurements it has made
    since: float  # when it began, in seconds since 1970
    seen: float  # when it was last heard of


class Crew:
    """One worker among those of a run's folder, while its context is open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / WORKERS
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self._since, self._doing, self._made = time.time(), "", 0
        self._place = self.folder / self.name
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Crew:
        make_folder(self.folder)
        self._tell()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError, FileError):
            self._place.unlink(missing_ok=True)

    def claim(self, place: Path, name: str) -> bool:
        """Claim a measurement, also from a worker that is dead; False where a living one has it."""
        claim = _claim_of(place)
        with suppress(OSError, FileError):
            make_folder(place.parent)
        try:
            with claim.open("x", encoding="utf-8") as file:
                file.write(self.name)
        except FileExistsError:
            try:
                owner, age = claim.read_text("utf-8"), self._place.stat().st_mtime - claim.stat().st_mtime
            except OSError:  # let go just now
                return False
            # One that holds no name was begun just now, or by a worker that died of it.
            if (age < SILENT) if not owner else (owner != self.name and self.alive(owner)):
                return False
            with suppress(OSError, FileError):  # another may take it over too: both write the same
                write_whole(claim, self.name)
        except OSError:  # a full disk says so when the measurement is kept
            return True
        self._doing = name
        return True

    def release(self, place: Path, *, made: bool) -> None:
        """Let go of a claim."""
        self._doing, self._made = "", self._made + made
        with suppress(OSError, FileError):
            _claim_of(place).unlink(missing_ok=True)

    def alive(self, name: str) -> bool:
        """Say whether a worker lives."""
        try:
            heard = self._place.stat().st_mtime - (self.folder / name).stat().st_mtime < SILENT
        except OSError:  # it has gone, or never was there
            return False
        return heard and _here(name)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            self._tell()

    def _tell(self) -> None:
        with suppress(OSError, FileError):
            said = {"since": self._since, "doing": self._doing, "made": self._made}
            write_whole(self._place, json.dumps(said))


def _claim_of(place: Path) -> Path:
    return place.with_name(place.name + CLAIM)


def _here(name: str) -> bool:
    """Say whether a worker's process runs, where it is one of this machine's (one that ended unnoticed does not)."""
    host, _, number = name.rpartition("-")
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(number), 0)
        state = Path(f"/proc/{number}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except (ProcessLookupError, ValueError):
        return False
    except OSError:  # another user's, or no /proc
        return True
    return state != "Z"


def workers_of(folder: Path) -> list[Worker]:
    """List the workers that were heard of in a run's folder."""
    found: list[Worker] = []
    for place in sorted((folder / WORKERS).glob("[!.]*")):
        with suppress(OSError, FileError, ValueError):
            said, seen = json.loads(place.read_text("utf-8")), place.stat().st_mtime
            alive = time.time() - seen < SILENT and _here(place.name)
            found.append(Worker(place.name, alive, said["doing"], said["made"], said["since"], seen))
    return found
