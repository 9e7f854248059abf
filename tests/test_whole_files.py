"""Files are there whole or not at all; what cannot be written or read back is one sentence that names the file."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
from pathlib import Path

import pytest

import av_lens
from av_lens.errors import FileError, InputError, MediaError
from av_lens.whole_files import (
    append_line,
    make_folder,
    read_object,
    reading,
    stored,
    sweep_partials,
    whole_file,
    whole_folder,
    write_whole,
)


def test_a_file_is_written_over_whole(tmp_path):
    write_whole(tmp_path / "a", "é")
    write_whole(tmp_path / "a", b"\xff")
    assert (tmp_path / "a").read_bytes() == b"\xff"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    write_whole(tmp_path / "a", "before")

    def stops(place):
        place.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a") as beside:
        stops(beside)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "folder") as beside:
        stops(beside / "x")
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_device_is_written_to_and_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("av_lens.whole_files.os.replace", lambda *given: pytest.fail("a device was replaced"))
    with pytest.raises(MediaError, match=r"cannot write /dev/full: No space left on device\. Mend it\."):
        write_whole(Path("/dev/full"), "x" * 10, error=MediaError, mend="Mend it.")
    with pytest.raises(FileError, match="cannot write /dev/full: No space left on device"):
        append_line(Path("/dev/full"), "x")
    assert Path("/dev/full").is_char_device()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)


def test_a_limit_of_the_system_is_a_sentence_whoever_writes(tmp_path):
    """A file may not grow over 8 kB: Python's, safetensors' and xarray's writes are all refused by the system."""
    import torch
    import xarray as xr
    from safetensors.torch import save_file

    from av_lens.results.provenance import write_netcdf

    def by_safetensors():
        with whole_file(tmp_path / "b") as beside:
            save_file({"x": torch.zeros(4096)}, beside)

    writes = {
        "a": lambda: write_whole(tmp_path / "a", b"x" * 20000),
        "b": by_safetensors,
        "c": lambda: write_netcdf(xr.Dataset({"x": ("n", [0.0] * 4096)}), tmp_path / "c"),
    }
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        for name, write in writes.items():
            with pytest.raises(FileError, match=rf"cannot write .*/{name}: .*File too large.*Make room"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match=r"cannot write .*folder: Is a directory\. Make room, or give a place"):
        write_whole(tmp_path / "folder", "x")
    with pytest.raises(FileError, match=r"cannot write .*nowhere/a: No such file or directory\."):
        write_whole(tmp_path / "nowhere" / "a", "x")
    for taken in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FileError, match=r"cannot write .*file.*: (File exists|Not a dir.*)\. Give another"):
            make_folder(taken)
    assert make_folder(tmp_path / "a" / "b").is_dir()


def test_a_link_is_written_through_and_a_long_name_fits(tmp_path):
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_whole(tmp_path / "link", "y")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "y"
    for name in ("n" * 255, "é" * 127):
        write_whole(tmp_path / name, "z")
        assert (tmp_path / name).read_text() == "z"


def test_a_folder_takes_its_files_together_and_keeps_what_else_it_holds(tmp_path):
    place = tmp_path / "made"
    for content in ("1", "2"):
        with whole_folder(place) as beside:
            (beside / "deep").mkdir()
            (beside / "deep" / "x").write_text(content)
        assert (place / "deep" / "x").read_text() == content
        (place / "other").write_text("kept")
    assert (place / "other").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_leftovers_of_killed_writers_are_swept_and_no_others(tmp_path):
    (tmp_path / ".a.0123456789ab.part").write_text("ours")
    (tmp_path / ".b.0123456789ab.part").mkdir()
    others = [".download.part", "a.part", ".a.0123456789zz.part", "a"]
    for name in others:
        (tmp_path / name).write_text("theirs")
    assert sweep_partials(tmp_path, of="b") == 1
    assert sweep_partials(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe", "is no UTF-8"),
        (b"[1]", "it should be a json object, found list"),
        (b'{"a": ', "Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b"1" * 5000, "digits"),
    ],
)
def test_foreign_bytes_are_a_sentence_or_count_as_none(content, why, tmp_path):
    place = tmp_path / "x.json"
    place.write_bytes(content)
    said = rf"x\.json is not what av_lens wrote there, or damaged \(.*{why}.*\)\. Put it back as it was, or"
    with pytest.raises(FileError, match=said):
        read_object(place)
    assert stored(place, lambda found: found) is None


def test_what_is_stored_is_made_or_counts_as_none(tmp_path):
    write_whole(tmp_path / "x", '{"a": 1}')
    assert stored(tmp_path / "x", lambda found: found["a"]) == 1
    assert stored(tmp_path / "x", lambda found: found["b"]) is None
    assert stored(tmp_path / "nowhere", lambda found: found["b"]) is None
    with pytest.raises(InputError, match="as it is"), reading(tmp_path / "x"):
        raise InputError("as it is")


def test_a_line_that_does_not_fit_leaves_none(tmp_path, monkeypatch):
    append_line(tmp_path / "a", "one")
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file, self.tell = file, file.tell

        def __enter__(self):
            return self

        def __exit__(self, *caught):
            self.file.close()

        def write(self, data):
            self.file.write(data[:2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, mode: Full(opened(self, mode)))
    with pytest.raises(FileError, match=r"cannot write .*a: No space left on device"):
        append_line(tmp_path / "a", "two")
    monkeypatch.undo()
    append_line(tmp_path / "a", "three")
    assert (tmp_path / "a").read_text() == "one\nthree\n"


# What writes past the one writer, and where it may.
BESIDE = re.compile(r"\b(save_file|save_pretrained|np\.savez)\((?!.*\b(beside|file|held)\b)")
ELSEWHERE = ("whole_files.py", "lab/replay_benchmark/peers.py")  # the writer itself; a switch of the kernel
PAST = re.compile(r"\.(write_(text|bytes|html|image)|to_(csv|netcdf)(?!\((index|engine)=))\(|os\.replace\(")


def test_every_file_is_written_by_the_one_writer():
    root = Path(av_lens.__file__).parent
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        for line in path.read_text(encoding="utf-8").splitlines() if name not in ELSEWHERE else ():
            past = PAST.search(line) if "beside" not in line else None
            assert not past, f"{name} writes past av_lens.whole_files: {line}"
            assert not BESIDE.search(line), f"{name} lets a library write in place: {line}"
