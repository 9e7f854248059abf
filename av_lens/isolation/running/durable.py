"""A run's folder: one protocol, one writer, everything that was measured, a line for every conflict.

The numbers of a run that was killed and went on are those of one that never stopped (same machine, as many threads).

    DIR/protocol.json     written before the first effect; a folder that holds another protocol is refused
    DIR/measured/         the measurements (`store`)
    DIR/conflicts.jsonl   a line for each conflict, from the measurements; written anew when the run stops or goes on
    DIR/estimate.json     what the run was expected to cost, made once (`cost`)
    DIR/numbers/          the finished record
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from av_lens import whole_files
from av_lens.errors import FileError, ProtocolError, UnfinishedError
from av_lens.isolation.measuring.crew import Crew, workers_of
from av_lens.isolation.measuring.store import FOLDER, GO_ON, POLL, Measured, Store, measuring_hash
from av_lens.isolation.running.cost import ESTIMATE, Estimate, duration
from av_lens.isolation.running.preparing import Run, hash_of
from av_lens.results.record import RECORD

PROTOCOL, LEDGER, LOCK, PROGRAM = "protocol.json", "conflicts.jsonl", ".lock", "program.txt"
EFFECTS = "head effects"
MOST_SAID = 5
OTHER_FOLDER = "Give another folder (--out)"
Told = Callable[[str], None]
Clips = Mapping[tuple[str, str], str]


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds, without a protocol, files that a run would write over."""
    found = [name for name in (LEDGER, PROGRAM, ESTIMATE, RECORD) if (folder / name).exists()]
    if found and not (folder / FOLDER).is_dir():
        raise ProtocolError(
            f"{folder} holds {', '.join(found)}, and no {PROTOCOL}: no run can go on there, and a new one would write "
            f"over them. {OTHER_FOLDER}."
        )


def _same(folder: Path, protocol: Mapping[str, Any], clips: Clips) -> None:
    place = folder / PROTOCOL
    back = (
        "Put it back as it was, or delete it (then this run's own is written, and what was measured under it is kept), "
        f"or g{OTHER_FOLDER[1:]}."
    )
    there = whole_files.read_object(place, mend=back)
    with whole_files.reading(place, mend=back):
        differing = "; ".join(differences(there, protocol, clips))
        threads = [dict(side.get("model") or {}).get("threads") for side in (there, protocol)]
    if there.get("hash") != hash_of(there):
        said = f": it differs from this run's in {differing}" if differing else ""
        raise ProtocolError(
            f"{place} was changed since it was written (its hash is not that of its text){said}. {back}"
        )
    if there["hash"] == protocol["hash"]:
        return
    mend = f"{OTHER_FOLDER}, or the options and conflicts of that run."
    if threads[0] is not None and threads[0] != threads[1]:
        mend = (
            f"Sums by another number of threads differ in their last bits. Set OMP_NUM_THREADS={threads[0]} (in Python "
            f"torch.set_num_threads({threads[0]})), and the run goes on from what is kept. Or g{mend[1:]}"
        )
    raise ProtocolError(
        f"{folder} holds a run under another protocol; they differ in {differing or 'their hash'}. {mend}"
    )


def _note_program(folder: Path, told: Told | None) -> None:
    place, said = folder / PROGRAM, ""
    try:
        if place.read_text("utf-8") != measuring_hash():
            said = f"av_lens was changed since {folder} was begun: what it holds is measured again."
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = whole_files.describe(error)
        said = f"{place} cannot be read ({why}): what this very program measured is kept, all else made again."
    if said and told is not None:
        told(said)
    whole_files.write_whole(place, measuring_hash())


class Lead:
    """The lock of a run's folder: who holds it writes protocol, ledger and record; it goes with the process."""

    def __init__(self, folder: Path, told: Told | None) -> None:
        self.folder, self.held, self._told = folder, False, told
        with whole_files.writing(folder / LOCK, mend=f"{OTHER_FOLDER}."):
            self._file = (folder / LOCK).open("a")

    def __enter__(self) -> Lead:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, *, wait: bool = False) -> bool:
        """Take the lock, unless another worker has it; `wait` until it is free."""
        if self.held:
            return True
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            self.held = True
            return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if self._told is not None:
                self._told(f"{self.folder} lies on a disk without locks: let no second run write in it.")
        self.held = True
        return True


def deadline(minutes: float, store: Store, said: Callable[[], str]) -> Callable[[str], None]:
    """Stop a run before its next measurement once its minutes are spent; each run makes at least one."""
    if store.folder is None:
        raise ProtocolError(
            "a run with a budget needs a folder (out=DIR): without one nothing would be kept when it stops."
        )
    if not minutes > 0:
        raise ProtocolError(f"the budget is {minutes:g} minutes; give a number above 0, or none.")
    end = time.monotonic() + 60 * minutes

    def stop(name: str) -> None:
        if store.made and time.monotonic() > end:
            raise UnfinishedError(
                f"stopped at the budget of {minutes:g} minutes, before: {name}. {said()} "
                f"Everything is kept in {store.folder}; the same command goes on from there."
            )

    return stop


class Ledger:
    """What has been done for each conflict: told line by line, kept in `conflicts.jsonl` if there is a folder."""

    def __init__(self, folder: Path | None, halves: Mapping[str, str], told: Told | None = None) -> None:
        self.path = None if folder is None else folder / LEDGER
        self.halves = halves
        self.told = told
        self.estimate: Estimate | None = None
        self.figures: dict[str, dict[str, Any]] = {}
        self.done: dict[str, dict[str, float]] = {name: {} for name in halves}
        self.kept, self.kept_seconds, self.seconds = 0, 0.0, 0.0
        self._open: tuple[str, tuple[str, ...]] | None = None
        self._said: set[tuple[str, str]] = set()
        self._begun, self._anew = False, True
        self._lead: Lead | None = None

    @property
    def leads(self) -> bool:
        """Whether this worker writes what the run says."""
        return self._lead is None or self._lead.held

    def follow(self, lead: Lead) -> None:
        """Write nothing as long as another worker leads."""
        self._lead = lead

    def keep(self, save: Callable[[Path], Any], folder: Path) -> None:
        """Save the record, or leave it to who leads; who dies before it is saved is followed by another."""
        if self._lead is not None and not self.leads:
            self._lead.take(wait=True)
            if (folder / RECORD / "isolation.json").exists():
                return
        save(folder / RECORD)

    def __call__(self, measured: Measured) -> None:
        """Note a measurement."""
        ids = [str(one) for one in measured.depends.get("ids", ())]
        part = f"{measured.name} at {measured.depends['site']}" if "site" in measured.depends else measured.name
        self.seconds += measured.seconds
        if not self._begun and not measured.new:
            self.kept, self.kept_seconds = self.kept + 1, self.kept_seconds + measured.seconds
        elif not self._begun:
            self._begun = True
            if self.kept:
                self._tell(f"resumed: {self.kept} measurements of an earlier run are kept ({self.kept_seconds:.0f} s).")
        effects = (part, tuple(ids)) if measured.name == EFFECTS and ids else None
        if effects is not None and self._open not in (None, effects):
            self.close()
        known = [name for name in ids if name in self.done]
        for name in known:
            self.done[name][part] = self.done[name].get(part, 0.0) + measured.seconds / len(ids)
        if measured.new and effects is not None:
            self._open = effects
        if self._begun:
            self._note(part, known, measured.seconds)

    def _note(self, part: str, ids: list[str], seconds: float) -> None:
        """Add a measurement to the file; the first one writes down what was known before."""
        if self.path is None or not ids or not self.leads:
            return
        if self._anew:
            self.write()
            self._anew = False
        else:
            line = json.dumps({"done": part, "seconds": round(seconds, 3), "ids": ids})
            whole_files.append_line(self.path, line, error=UnfinishedError, mend=GO_ON)

    def expect(self, estimate: Estimate) -> None:
        """Tell what the run will cost."""
        self.estimate = estimate
        self._tell(str(estimate))

    def standing(self) -> str:
        """Say how far the run is."""
        finished = sum(any(part.startswith(EFFECTS) for part in parts) for parts in self.done.values())
        said = f"The effects of {finished} of {len(self.halves)} conflicts are measured."
        if self.estimate is None:
            return said
        return f"{said} {self.seconds:.0f} s of about {self.estimate.seconds:.0f} s are done."

    def close(self) -> None:
        """Tell the lines of the conflicts whose effects were being measured."""
        part, ids = self._open or ("", ())
        self._open = None
        for name in ids:
            if (name, part) not in self._said:
                self._said.add((name, part))
                figures = "".join(f"  {key} {value:.2f}" for key, value in self.figures.get(name, {}).items())
                self._tell(f"{name}  {self.halves[name]}{figures}  {part}: {self.done[name][part]:.1f} s")

    def write(self) -> None:
        """Write the file anew, whole, a line for each conflict."""
        if self.path is None or not self.leads:
            return
        rows: list[dict[str, Any]] = []
        for name, parts in self.done.items():
            if parts:
                done, seconds = {part: round(taken, 3) for part, taken in parts.items()}, round(sum(parts.values()), 3)
                of = {"id": name, "half": self.halves[name], **self.figures.get(name, {})}
                rows.append(of | {"done": done, "seconds": seconds})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        whole_files.write_whole(self.path, text, error=UnfinishedError, mend=GO_ON)

    def stop(self) -> None:
        """Leave the file whole where a run stops before its end."""
        if self._begun:
            with suppress(UnfinishedError):  # what stopped the run is told
                self.write()

    def _tell(self, line: str) -> None:
        if self.told is not None:
            self.told(line)


@contextmanager
def watched_run(
    run: Run, folder: Path | None, *, budget: float | None, told: Told | None, join: bool = False
) -> Generator[Ledger]:
    """Go on with a run in its folder, with its protocol, its ledger and its deadline: lead it, or `join` who leads."""
    store = run.bench.store
    store.folder, store.key = folder, run.key
    ledger = Ledger(folder, dict(zip((one.id for one in run.members), run.halves.half, strict=True)), told)
    if budget is not None:
        store.before.append(deadline(budget, store, ledger.standing))
    store.told.append(ledger)
    if told is not None:
        store.said.append(told)
    if folder is None:
        yield ledger
        return
    whole_files.make_folder(folder)
    with Lead(folder, told) as lead:
        if not lead.take() and not join:
            raise ProtocolError(
                f"another process is writing in {folder}. Wait until it is done, join it (--join, in Python "
                "join=True), or give another folder."
            )
        while not (lead.held or (folder / PROTOCOL).exists() or lead.take()):
            time.sleep(POLL)
        if (folder / PROTOCOL).exists():
            _same(folder, run.protocol, run.clips)
        else:
            _refuse_foreign(folder)
            whole_files.write_whole(folder / PROTOCOL, json.dumps(run.protocol, indent=1))
        if lead.held:
            for place in (folder, folder / FOLDER, folder / RECORD):
                whole_files.sweep_partials(place)
            _note_program(folder, told)
        ledger.follow(lead)
        try:
            with Crew(folder) as store.crew:
                yield ledger
        except FileError as error:  # of the record
            ledger.stop()
            raise UnfinishedError(f"{error} Every measurement is kept; the same command goes on from there.") from error
        except BaseException:
            ledger.stop()
            raise
        finally:
            store.crew = None
        ledger.write()


def standing(folder: Path) -> str:
    """Say how far the run in a folder is, and who works on it, at what."""
    if not (folder / PROTOCOL).exists():
        raise ProtocolError(f"no run was begun in {folder}: {PROTOCOL} is not there. Give the folder of `isolate`.")
    dealt = whole_files.read_object(folder / PROTOCOL)["halves"]["dealt"]
    n_made, done = len(list((folder / FOLDER).glob("*.npz"))), (folder / RECORD / "isolation.json").exists()
    lines = [f"{len(dealt)} conflicts, {n_made} measurements on disk; the record is {'there' if done else 'to come'}."]
    with suppress(OSError, ValueError, KeyError):
        expected = float(json.loads((folder / ESTIMATE).read_text("utf-8"))["seconds"])
        lines.append(f"Expected of one worker, in all: {duration(expected)}.")
    workers = workers_of(folder)
    for one in workers:
        taken = duration(one.seen - one.since)
        state = f"for {taken}, at: {one.doing or 'statistics, or waiting'}" if one.alive else "no longer there"
        lines.append(f"{one.name}: {one.made} measurements, {state}")
    if not done and not any(one.alive for one in workers):
        lines.append("Nobody works on it: the same command goes on from there.")
    return "\n".join(lines)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], clips: Clips | None = None) -> list[str]:
    """Say in what two protocols differ."""
    out: list[str] = []
    for name in dict.fromkeys([*here, *there]):
        one, two = there.get(name), here.get(name)
        if one == two or name in ("hash", "power", "family"):
            continue
        if name == "conflicts" and isinstance(one, Mapping) and isinstance(two, Mapping):
            out += _changed(one, two, clips or {})
        elif name == "halves":
            dealt = [len((side or {}).get("dealt", {})) for side in (one, two)]
            out.append(f"conflicts or halves ({dealt[0]} conflicts there, {dealt[1]} here)")
        elif isinstance(one, Mapping) and isinstance(two, Mapping):
            out.append(f"{name} ({', '.join(_inner(one, two))})")
        elif len(f"{one}{two}") > 60:
            out.append(str(name))
        else:
            out.append(f"{name} ({one} there, {two} here)")
    return out


def _inner(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """The keys under which two mappings differ, with what is a number."""
    found: list[str] = []
    for key in dict.fromkeys([*two, *one]):
        sides = one.get(key, "not noted"), two.get(key, "not noted")
        if sides[0] != sides[1]:
            number = any(isinstance(side, int | float) for side in sides)
            found.append(f"{key}: {sides[0]} there, {sides[1]} here" if number else str(key))
    return found


def _changed(one: Mapping[str, Any], two: Mapping[str, Any], clips: Clips) -> list[str]:
    """The clips and words that changed of conflicts that both have; a third that was drawn anew is no cause."""
    both = [name for name in two if isinstance(one.get(name), Mapping)]
    found = [(name, part) for name in both for part in two[name] if one[name].get(part) != two[name][part]]
    found = [place for place in found if place[1] != "third"] or found
    said = [
        f"the {part} of conflict {name!r}" + (f" ({clips[name, part]})" if (name, part) in clips else "")
        for name, part in found[:MOST_SAID]
    ]
    return said + ([f"{len(found) - MOST_SAID} more clips or words"] if len(found) > MOST_SAID else [])
