"""What was recorded once: windows, copies and re-muxed files are one source; silence and black are no evidence."""

from __future__ import annotations

import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
from media_samples import chirp, picture

from av_lens.errors import InputError, ManifestError
from av_lens.inputs import Conflict, conflicts, sources
from av_lens.inputs.conflict import ClipKeys
from av_lens.inputs.sources import sources_of
from av_lens.media import Clip, ClipFile, fingerprints
from av_lens.media.fingerprints import fingerprint
from av_lens.results import dealing


def written(path, *, frames=None, sound=None, seed=0):
    """Two seconds of moving noise and of noise, but for what is given."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 255, (16, 48, 48, 3), dtype=np.uint8) if frames is None else frames
    sound = (0.1 * rng.standard_normal(32000)).clip(-1, 1).astype(np.float32) if sound is None else sound
    Clip.from_arrays(frames=frames, fps=8, waveform=sound).save(path)
    return path


def remuxed(source, target):
    """The same packets in another container."""
    with av.open(str(source)) as read, av.open(str(target), "w") as made:
        streams = {stream.index: made.add_stream_from_template(stream) for stream in read.streams}
        for packet in read.demux():
            if packet.size and packet.stream.index in streams:
                packet.stream = streams[packet.stream.index]
                made.mux(packet)
    return target


def dogs(*pairs, **more):
    """Conflicts between these clips."""
    return [
        Conflict(sound=a, picture=v, question="?", answers=("dog", "cat"), id=f"c{i}", **more)
        for i, (a, v) in enumerate(pairs)
    ]


def names(*clips):
    """The sources of clips."""
    found = dogs(*((clip, clips[0]) for clip in clips))
    made = sources_of(found, ClipKeys())
    return [made.of(one, "sound") for one in found]


def same(one, two):
    first, second = names(ClipFile(str(one)), ClipFile(str(two)))
    return first == second


def test_copies_and_remuxed_files_are_one_source_and_others_are_not(tmp_path):
    one = written(tmp_path / "one.mp4")
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(one.read_bytes())
    assert same(one, copy)
    assert same(one, remuxed(one, tmp_path / "one.mkv"))
    assert same(one, remuxed(one, tmp_path / "one.mov"))
    assert not same(one, written(tmp_path / "two.mp4", seed=1))


def test_an_equal_sound_or_an_equal_picture_is_enough(tmp_path):
    frames, sound = picture(), chirp()
    one = written(tmp_path / "one.mp4", frames=frames, sound=sound)
    assert same(one, written(tmp_path / "sound.mp4", sound=sound))
    assert same(one, written(tmp_path / "picture.mp4", frames=frames))
    assert fingerprint(str(one), "a")[0] == fingerprint(str(tmp_path / "sound.mp4"), "b")[0]


@pytest.mark.parametrize("what", ["black", "grey that flickers", "a still"])
def test_pictures_that_say_nothing_are_no_evidence(tmp_path, what):
    frames = np.zeros((16, 48, 48, 3), dtype=np.uint8)
    if what == "grey that flickers":
        frames += (np.arange(16) * 16).astype(np.uint8)[:, None, None, None]
    if what == "a still":
        frames += picture(1, 48, 48)
    one, two = (written(tmp_path / f"{seed}.mp4", frames=frames, seed=seed) for seed in (1, 2))
    assert fingerprint(str(one), "1")[0] is not None
    assert not same(one, two)
    assert fingerprint(str(one), "1")[1] is None


@pytest.mark.parametrize("level", [0.0, 0.25])
def test_silence_is_no_evidence(tmp_path, level):
    sound = np.full(32000, level, dtype=np.float32)
    one, two = (written(tmp_path / f"{seed}.mp4", sound=sound, seed=seed) for seed in (1, 2))
    assert not same(one, two) or level  # AAC swings in where a constant begins; true silence stays silent
    if not level:
        assert fingerprint(str(one), "1")[0] is None


def test_windows_of_one_file_that_overlap_or_lie_close_are_one_source(tmp_path):
    path = str(written(tmp_path / "long.mp4"))
    windows = [(0, 2), (1, 3), (11, 12), (22, 23), (40, 41), (55, None), (51, 52)]
    found = names(*(ClipFile(path, start=a, end=b) for a, b in windows))
    # 1-3 overlaps 0-2; 11 is 8 s after 3; 22 is 10 s after 12, 40 more after 23; 51 is 10 after 41; 55 is 3 after 52.
    assert [found.index(name) for name in found] == [0, 0, 0, 3, 4, 5, 5]
    again = str(remuxed(path, tmp_path / "again.mkv"))
    first, second, far = names(
        ClipFile(path, end=2.0), ClipFile(again, start=3.0, end=4.0), ClipFile(again, start=20.0)
    )
    assert first == second != far


def test_clips_in_memory_are_known_by_what_they_show_and_sound():
    frames, sound = picture(), chirp()
    rng = np.random.default_rng(0)
    other = rng.integers(0, 255, frames.shape, dtype=np.uint8)
    noise = rng.uniform(-0.5, 0.5, len(sound)).astype(np.float32)
    made = [
        Clip.from_arrays(frames=frames, fps=8, waveform=sound),
        Clip.from_arrays(frames=frames, fps=8, waveform=noise),
        Clip.from_arrays(frames=other, fps=8, waveform=np.zeros_like(sound)),
        Clip.from_arrays(frames=np.zeros_like(frames), fps=8, waveform=np.zeros_like(sound)),
        Clip.from_arrays(frames=np.zeros_like(frames), fps=8, waveform=sound[::-1]),
    ]
    found = names(*made)
    assert [found.index(name) for name in found] == [0, 0, 2, 3, 4]


def test_names_overrule_what_is_found_out(tmp_path):
    one = ClipFile(str(written(tmp_path / "one.mp4")))
    copy = ClipFile(str(remuxed(one.path, tmp_path / "copy.mkv")))
    other = ClipFile(str(written(tmp_path / "two.mp4", seed=1)))
    apart = [*dogs((one, other), source=("video 1", "video 9")), *dogs((copy, other), source=("video 2", "video 9"))]
    made = sources_of(apart, ClipKeys())
    assert [made.of(c, role) for c in apart for role in ("sound", "picture")] == [
        "video 1",
        "video 9",
        "video 2",
        "video 9",
    ]
    # A clip has its name wherever it stands; what has none is found out.
    mixed = [*dogs((one, other), source=("video 1", "video 9")), *dogs((one, copy))]
    made = sources_of(mixed, ClipKeys())
    assert made.of(mixed[1], "sound") == "video 1"
    assert made.of(mixed[1], "picture") not in ("video 1", "video 9")
    twice = [*dogs((one, other), source=("a", "b")), *dogs((one, copy), source=("c", "d"))]
    with pytest.raises(
        InputError, match=r"the sound of conflict 'c0' is of the source 'c', and of 'a' in conflict 'c0'"
    ):
        sources_of(twice, ClipKeys())


def test_the_manifest_names_sources(tmp_path):
    for seed in (0, 1):
        written(tmp_path / f"{seed}.mp4", seed=seed)
    line = {"sound": "0.mp4", "picture": "1.mp4", "question": "?", "answers": ["dog", "cat"]}
    (tmp_path / "good.jsonl").write_text(json.dumps(line | {"source": ["x", "y"]}))
    assert conflicts(tmp_path / "good.jsonl")[0].source == ("x", "y")
    for wrong in ("x", ["x"], ["x", 3], ["x", " "], None):
        (tmp_path / "bad.jsonl").write_text(json.dumps(line | {"source": wrong}))
        with pytest.raises(
            ManifestError, match=r"line 1: 'source' is a list of two texts, the sound's and the picture's"
        ):
            conflicts(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match=r"conflict 'c0': 'source' is a list of two texts"):
        dogs((ClipFile(str(tmp_path / "0.mp4")),) * 2, source=("x", ""))


# ---- counted as what they are, and every planted fault is seen


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    """A film, its copy, its sound and its picture elsewhere, two films in the dark, two silent ones; and windows."""
    folder = tmp_path_factory.mktemp("footage")
    frames, sound, dark = picture(), chirp(), np.zeros((16, 48, 48, 3), dtype=np.uint8)
    made = {
        "film": written(folder / "film.mp4", frames=frames, sound=sound),
        "its sound": written(folder / "sound.mp4", sound=sound, seed=1),
        "its picture": written(folder / "picture.mp4", frames=frames, seed=2),
        "dark": written(folder / "dark.mp4", frames=dark, seed=3),
        "dark too": written(folder / "dark2.mp4", frames=dark, seed=4),
        "silent": written(folder / "silent.mp4", sound=np.zeros(32000, dtype=np.float32), seed=5),
        "silent too": written(folder / "silent2.mp4", sound=np.zeros(32000, dtype=np.float32), seed=6),
    }
    made["copy"] = remuxed(made["film"], folder / "copy.mkv")
    clips = {name: ClipFile(str(path)) for name, path in made.items()}
    long = str(written(folder / "long.mp4", seed=7))
    for name, window in (("early", (0, 2)), ("overlapping", (1, 3)), ("close", (12.5, 14)), ("far", (30, 32))):
        clips[name] = ClipFile(long, start=window[0], end=window[1])
    return clips


def counted(clips):
    """Groups of clips that are one source; pairs that come twice."""
    fingerprints._decoded.cache_clear()
    listed = list(clips)
    found = sources.sources_of(dogs(*((clips[name], clips["far"]) for name in listed)), ClipKeys())
    groups = {}
    for name in listed:
        groups.setdefault(found.of(SimpleNamespace(sound=clips[name]), "sound"), set()).add(name)
    pairs = [("film", "far"), ("far", "copy"), ("early", "dark"), ("dark", "overlapping"), ("silent", "dark")]
    joined = dogs(*((clips[a], clips[v]) for a, v in pairs))
    of = sources.sources_of(joined, ClipKeys()).of
    members = [dealing.Member(c.id, of(c, "sound"), of(c, "picture"), "dog", c.question) for c in joined]
    return sorted(sorted(group) for group in groups.values() if len(group) > 1), dealing.doubled(members)


COUNTED = [["close", "early", "overlapping"], ["copy", "film", "its picture", "its sound"]], [1, 3]


def test_footage_is_counted_as_what_it_is(footage):
    assert counted(footage) == COUNTED


FAULTS = {
    "sounds are not compared": (sources, "fingerprint", lambda path, sha: (None, fingerprint(path, sha)[1])),
    "pictures are not compared": (sources, "fingerprint", lambda path, sha: (fingerprint(path, sha)[0], None)),
    "dark and silence are evidence": (fingerprints._Stream, "hash", lambda self: self.digest.hexdigest()),
    "close windows are two sources": (sources, "APART", 0.0),
    "far windows are one source": (sources, "APART", 100.0),
    "windows are not looked at": (sources, "clip_window", lambda clip: (0.0, None)),
    "names are the clips' own": (sources, "linked", lambda groups: tuple(range(len(groups)))),
    "a pair the other way round is another": (dealing, "frozenset", lambda sources: tuple(sources)),
    "nothing comes twice": (dealing, "doubled", lambda conflicts: []),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(footage, monkeypatch, fault):
    place, name, wrong = FAULTS[fault]
    monkeypatch.setattr(place, name, wrong, raising=name != "frozenset")
    assert counted(footage) != COUNTED
