"""A run's folder under faults of the disk, foreign bytes and changed files: a sentence, nothing lost, nothing wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from disk_faults import failing, kinds_at
from fake_model import FakeModel, fake_conflicts, isolated
from same_isolation import assert_same

from av_lens import whole_files
from av_lens.errors import AvLensError, FileError, InputError, ProtocolError, UnfinishedError
from av_lens.inputs.conflict import ClipKeys, clip_key
from av_lens.isolation.measuring.store import Store
from av_lens.isolation.running import cost, durable
from av_lens.isolation.running.durable import LEDGER, LOCK, differences, watched_run
from av_lens.isolation.running.preparing import Run, hash_of
from av_lens.results.record import RECORD
from av_lens.results.statistics import Bootstrap
from av_lens.whole_files import make_folder, write_whole

IDS = ["c0", "c1", "c2"]


def protocol_of(**more):
    made = {"s": 0.1, "model": {"n_layers": 2, "threads": 1}, "conflicts": {}} | more
    return made | {"hash": hash_of(made)}


class Small(Run):
    """A run of three conflicts that needs no model."""

    key = clips = None
    members = tuple(SimpleNamespace(id=one) for one in IDS)
    halves = SimpleNamespace(half=["discovery"] * 2 + ["confirmation"])

    def __init__(self, store, protocol, clips):
        self.bench = SimpleNamespace(store=store)
        self.protocol, self.key, self.clips = protocol, protocol["hash"], clips


def small(folder, told=None, *, names=("reading", "head effects"), protocol=None, clips=None):
    """A run of two measurements a conflict, as `isolate` makes them; what it measured, and how many anew."""
    store, protocol = Store(), protocol or protocol_of()
    with watched_run(Small(store, protocol, clips or {}), folder, budget=None, told=told) as ledger:
        found = {
            (name, one): store.recall(name, {"ids": [one]}, lambda x=f"{name} {one}": {"x": np.array(x)})["x"].item()
            for name in names
            for one in IDS
        }
        ledger.figures = {one: {"G": 7.0} for one in IDS}
        write_whole(make_folder(folder / RECORD) / "isolation.json", "{}")
    return found, store.made


WHOLE = {(name, one): f"{name} {one}" for name in ("reading", "head effects") for one in IDS}


def rows_of(folder, *, times=True):
    rows = [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()]
    return rows if times else [{**row, "done": list(row["done"]), "seconds": 0} for row in rows]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Faults of the disk


def test_a_fault_at_any_file_is_a_sentence_and_the_next_run_goes_on(tmp_path):
    with failing(None) as seen:
        small(tmp_path / "counted")
    beat = f"{socket.gethostname()}-{os.getpid()}"
    points = [name for name in dict.fromkeys(seen) if name != beat]
    with failing(beat, "full"):  # a worker that nobody hears of goes on
        assert small(tmp_path / "silent")[0] == WHOLE
    assert {LOCK, "protocol.json", "program.txt", LEDGER, "isolation.json"} < set(points)
    assert sum(name.startswith(("reading-", "head-effects-")) for name in points) == 6
    for target in points:
        for kind in kinds_at(target, LOCK):
            folder = tmp_path / f"{target} {kind}"
            with failing(target, kind), pytest.raises((AvLensError, UnfinishedError)) as said:
                small(folder)
            text = str(said.value)
            assert f"cannot write {folder}" in text
            assert target in text
            assert ("same command goes on" in text) == isinstance(said.value, UnfinishedError)
            assert not list(folder.rglob("*.part"))
            for path in (folder / "measured").glob("*"):
                np.load(path).close()
            kept = len(list((folder / "measured").glob("*")))
            found, made = small(folder)
            assert (found, made) == (WHOLE, 6 - kept), (target, kind)
            assert rows_of(folder, times=False) == rows_of(tmp_path / "counted", times=False)


def test_a_ledger_on_a_full_disk_keeps_no_half_line(tmp_path):
    small(tmp_path, names=("reading",))
    lines = (tmp_path / LEDGER).read_text().splitlines()
    assert len(lines) == 3
    with failing("head-effects-", ""), pytest.MonkeyPatch.context() as patched:
        patched.setattr(durable.Ledger, "stop", lambda self: None)
        with failing(LEDGER, "full"), pytest.raises(UnfinishedError, match="No space left on device"):
            small(tmp_path)
    assert (tmp_path / LEDGER).read_text().splitlines() == lines


def test_what_is_no_folder_or_holds_other_peoples_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "taken").write_text("mine")
    for place in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(FileError, match=r"cannot write .*taken.*: (File exists|Not a directory).*another folder"):
            small(place)
    for name in ("conflicts.jsonl", "estimate.json", "program.txt"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        (folder / ".half.part").write_text("mine")
        before = contents(folder)
        with pytest.raises(
            ProtocolError, match=rf"holds {name}, and no protocol\.json: .*Give another folder \(--out\)"
        ):
            small(folder)
        assert {**before, folder / LOCK: b""} == contents(folder)
    folder = tmp_path / "with clips"
    folder.mkdir()
    for name in ("pairs.jsonl", ".half.part"):
        (folder / name).write_text("mine")
    assert small(folder)[0] == WHOLE
    assert (folder / ".half.part").read_text() == (folder / "pairs.jsonl").read_text() == "mine"


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch):
    import fcntl

    def refuses(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    lines = []
    assert small(tmp_path, lines.append)[0] == WHOLE
    assert any("lies on a disk without locks: let no second run write in it." in line for line in lines)


# Foreign bytes

DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "foreign": lambda data: b"\xff\xfe" * 40,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_measurement_is_named_and_made_again(damage, tmp_path):
    small(tmp_path)
    place = next((tmp_path / "measured").glob("reading-*"))
    place.write_bytes(DAMAGE[damage](place.read_bytes()))
    lines = []
    assert small(tmp_path, lines.append) == (WHOLE, 1)
    (said,) = [line for line in lines if "measured again" in line]
    assert said.startswith(f"{place} is not what av_lens wrote there, or damaged (")
    lines = []
    assert small(tmp_path, lines.append) == (WHOLE, 0)
    assert not [line for line in lines if "again" in line]


def test_exchanged_measurements_are_named_and_made_again(tmp_path):
    small(tmp_path)
    one, two, three = sorted((tmp_path / "measured").glob("reading-*"))
    os.replace(one, tmp_path / "held")
    os.replace(two, one)
    os.replace(tmp_path / "held", two)
    shutil.copy(next((tmp_path / "measured").glob("head-effects-*")), three)
    lines = []
    assert small(tmp_path, lines.append) == (WHOLE, 3)
    said = sorted(line for line in lines if "holds another measurement than its name says" in line)
    assert [line.split(" holds")[0] for line in said] == [str(one), str(two), str(three)]
    assert "says: reading, of this run or another. It is measured again." in said[0]
    assert "says: head effects, of" in said[2]


def test_a_measurement_of_another_run_is_not_taken(tmp_path):
    small(tmp_path / "a")
    small(tmp_path / "b", protocol=protocol_of(s=0.2))
    for mine in (tmp_path / "a" / "measured").iterdir():
        theirs = next((tmp_path / "b" / "measured").glob(f"{mine.name[:8]}*"))
        shutil.copy(theirs, mine)
    assert small(tmp_path / "a") == (WHOLE, 6)


def test_a_measurement_that_cannot_be_read_stops_the_run(tmp_path):
    small(tmp_path)
    place = next((tmp_path / "measured").glob("reading-*"))
    place.unlink()
    place.mkdir()
    with pytest.raises(UnfinishedError, match=r"cannot read .*reading-.*: Is a directory\. What was kept"):
        small(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"[]", b"{", b'{"halves": [1]}', b'{"model": 3}'])
def test_a_damaged_protocol_is_refused_and_once_deleted_nothing_is_lost(content, tmp_path):
    small(tmp_path)
    (tmp_path / "protocol.json").write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(
        FileError, match=r"protocol\.json is not what av_lens wrote.*or delete it \(then this run's own"
    ):
        small(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / "protocol.json").unlink()
    assert small(tmp_path) == (WHOLE, 0)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"x" * 64])
def test_a_damaged_note_of_the_program_loses_nothing(content, tmp_path):
    small(tmp_path)
    (tmp_path / "program.txt").write_bytes(content)
    lines = []
    assert small(tmp_path, lines.append) == (WHOLE, 0)
    assert (
        len([line for line in lines if "av_lens was changed since" in line or "program.txt cannot be read" in line])
        == 1
    )


def test_a_folder_in_a_files_place_is_a_sentence(tmp_path):
    for name in ("program.txt", "protocol.json", LEDGER):
        folder = tmp_path / name.replace(".", "-")
        small(folder)
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises((AvLensError, UnfinishedError), match=rf"{name}.* Is a directory"):
            small(folder)


@pytest.mark.parametrize(
    "content", [b"\xff", b"[]", b"{}", b'{"key": "k", "gigabytes": "x", "parts": {}}', b"1" * 9999]
)
def test_a_damaged_estimate_counts_as_none(content, tmp_path):
    (tmp_path / "estimate.json").write_bytes(content)
    assert cost.stored(tmp_path / "estimate.json", lambda found: cost._estimate(found, "k")) is None


# The protocol


def test_a_protocol_that_was_edited_is_found(tmp_path):
    small(tmp_path)
    written = json.loads((tmp_path / "protocol.json").read_text())
    (tmp_path / "protocol.json").write_text(json.dumps(written | {"s": 0.2}))
    with pytest.raises(ProtocolError, match=r"its hash is not that of its text\): it .* in s \(0\.2 there, 0\.1"):
        small(tmp_path)
    (tmp_path / "protocol.json").write_text(json.dumps(protocol_of(s=0.2)))
    with pytest.raises(
        ProtocolError, match=r"under another protocol; they differ in s \(0\.2 there, 0\.1 here\)\. Give"
    ):
        small(tmp_path)
    (tmp_path / "protocol.json").write_text(json.dumps(written, indent=4, sort_keys=True))  # says the same
    assert small(tmp_path) == (WHOLE, 0)


def test_another_number_of_threads_is_told_with_how_to_go_on(tmp_path):
    small(tmp_path, protocol=protocol_of(model={"n_layers": 2, "threads": 4}))
    with pytest.raises(
        ProtocolError, match=r"model \(threads: 4 there, 1 here\)\. .*Set OMP_NUM_THREADS=4 \(in Python"
    ):
        small(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "protocol.json").write_text(json.dumps(protocol_of(model={"n_layers": 2}, conflicts="hash")))
    with pytest.raises(ProtocolError, match=r"model \(threads: not noted there, 1 here\); conflicts.*\. Give another"):
        small(tmp_path / "old")


# The clips


def run(out=None, conflicts=None, model=None):
    """A run that stops where there is nothing to explain: all cells are read, and no head is edited."""
    model = model or FakeModel(writer=0.0, gate=0.0, opponent=0.0)
    with pytest.MonkeyPatch.context() as patched:
        draw = Bootstrap.draw
        patched.setattr(Bootstrap, "draw", lambda *given, **more: draw(*given, **({"draws": 100} | more)))
        listed = fake_conflicts(44) if conflicts is None else conflicts
        return isolated(model, listed, out=out, s=0.1, quick=True)


def on_disk(conflict, folder):
    """A fake conflict whose clips are files."""
    clips = {
        role: SimpleNamespace(
            path=f"{folder}/{conflict.id}-{role}.mp4",
            start=0.0,
            end=1.0,
            load=None,
            answer=getattr(conflict, role).answer,
        )
        for role in ("sound", "picture")
    }
    return replace(conflict, **clips)


def test_clips_are_known_by_content_and_window(tmp_path):
    (tmp_path / "x.mp4").write_text("x")
    clip = SimpleNamespace(path=str(tmp_path / "x.mp4"), start=0.0, end=1.0, load=None)
    keys, conflict = ClipKeys(), SimpleNamespace(id="c", sound=clip, picture=clip)
    assert keys.of(conflict, "sound") == clip_key(clip)
    os.utime(clip.path, (0, 0))
    keys.check(conflict)  # another date, the same bytes
    (tmp_path / "x.mp4").write_text("y")
    with pytest.raises(
        UnfinishedError, match=r"the clip .*x\.mp4, the sound of conflict 'c', was changed since the run"
    ):
        keys.check(conflict)
    (tmp_path / "x.mp4").unlink()
    with pytest.raises(UnfinishedError, match=r"x\.mp4, the sound of conflict 'c', is gone \(No such file"):
        keys.check(conflict)
    with pytest.raises(
        InputError, match=r"x\.mp4, the picture of conflict 'c', is gone since the conflicts were listed"
    ):
        ClipKeys().of(conflict, "picture")
    with pytest.raises(InputError, match=r"cannot read the clip .*x\.mp4: No such file"):
        clip_key(clip)


def test_protocols_name_the_clips_that_changed():
    one = {f"c{i}": {"sound": "1", "picture": "2", "third": "3", "words": "4"} for i in range(9)}
    two = {name: dict(parts) for name, parts in one.items()}
    two["c3"] |= {"sound": "5", "third": "6"}
    paths = {("c3", "sound"): "bark.mp4"}
    assert differences({"conflicts": one}, {"conflicts": two}, paths) == ["the sound of conflict 'c3' (bark.mp4)"]
    two["c3"]["sound"] = "1"
    assert differences({"conflicts": one}, {"conflicts": two}) == ["the third of conflict 'c3'"]
    for parts in two.values():
        parts["words"] = "7"
    assert differences({"conflicts": one}, {"conflicts": two})[-2:] == [
        "the words of conflict 'c4'",
        "4 more clips or words",
    ]


@pytest.mark.slow
def test_a_clip_that_vanishes_or_changes_stops_the_run_by_name(tmp_path):
    (tmp_path / "clips").mkdir()
    listed = [on_disk(one, tmp_path / "clips") for one in fake_conflicts(44)]
    for one in listed:
        for clip in (one.sound, one.picture):
            Path(clip.path).write_text(clip.path)
    whole = run(conflicts=listed)
    gone = tmp_path / "clips" / f"{listed[40].id}-sound.mp4"
    held = gone.read_bytes()

    class Vanishing(FakeModel):
        def run_with_hooks(self, *given, **options):
            gone.unlink(missing_ok=True)
            return super().run_with_hooks(*given, **options)

    with pytest.raises(UnfinishedError, match=f"{gone.name}, the sound of conflict {listed[40].id!r}, is gone"):
        run(tmp_path / "out", listed, Vanishing(writer=0.0, gate=0.0, opponent=0.0))
    with pytest.raises(InputError, match=f"{gone.name}, the sound of conflict {listed[40].id!r}, is gone since"):
        run(tmp_path / "out", listed)
    gone.write_bytes(b"another sound")
    with pytest.raises(ProtocolError, match=rf"differ in the sound of conflict {listed[40].id!r} \(.*{gone.name}\)"):
        run(tmp_path / "out", listed)
    gone.write_bytes(held)
    assert_same(run(tmp_path / "out", listed), whole)


# The ledger


def test_the_ledger_is_appended_and_in_the_end_a_line_for_each_conflict(tmp_path, monkeypatch):
    known, append = [], whole_files.append_line

    def growing(path, line, **more):
        known.append(path.read_bytes())
        append(path, line, **more)
        assert path.read_bytes() == known[-1] + f"{line}\n".encode()

    monkeypatch.setattr(whole_files, "append_line", growing)
    with failing(None) as seen:
        small(tmp_path)
    assert (len(known), seen.count(LEDGER)) == (5, 1 + 5 + 1)  # anew at the first measurement and at the end
    assert rows_of(tmp_path, times=False) == [
        {"id": one, "half": half, "G": 7.0, "done": ["reading", "head effects"], "seconds": 0}
        for one, half in zip(IDS, ("discovery", "discovery", "confirmation"), strict=True)
    ]
    for row in rows_of(tmp_path):
        assert row["seconds"] == pytest.approx(sum(row["done"].values()), abs=0.01)


def test_a_line_that_a_kill_tore_is_healed(tmp_path, monkeypatch):
    small(tmp_path, names=("reading",))
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"done": "head effects", "seconds": 0.1, "ids": ["c')
    lines = []
    with monkeypatch.context() as patched:
        patched.setattr(whole_files, "append_line", lambda path, line, **more: lines.append(path.read_text()))
        small(tmp_path)
    assert len(lines) == 2
    assert [len(list(map(json.loads, text.splitlines()))) for text in lines] == [3, 3]
    assert [row["done"].keys() for row in rows_of(tmp_path)] == [{"reading", "head effects"}] * 3


def test_a_run_that_stops_before_anything_new_leaves_the_ledger(tmp_path, monkeypatch):
    small(tmp_path)
    before = (tmp_path / LEDGER).read_bytes()

    def interrupt(self, measured):
        raise KeyboardInterrupt

    monkeypatch.setattr(durable.Ledger, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path)
    assert (tmp_path / LEDGER).read_bytes() == before
