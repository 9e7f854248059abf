"""Clips that are labelled -> conflicts: which sound goes with which picture.

In `disjoint` kinds are joined by taking from the two largest that remain, which leaves as few clips over as can be. The
others are assignments (scipy's) that cost, for a sound and a picture, a random number or the cosine of their captions'
tf-idf; two clips of one kind, or of one source, are never joined. A caption is a label where it names one event.

Source: the exchange of least alike captions is the design of "Do Audio-Visual Large Language Models Really See and
Hear?" (2026); scipy.optimize.linear_sum_assignment.
"""

import csv
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from av_lens.checks import near_file, parse_json, require_choice
from av_lens.errors import InputError, MediaError
from av_lens.inputs.conflict import ClipKeys
from av_lens.inputs.sources import sources_of
from av_lens.media.manifest import SEE
from av_lens.media.source import ClipFile
from av_lens.results.dealing import Member, design_of
from av_lens.results.events import Lexicon
from av_lens.whole_files import make_folder, write_whole

DESIGNS = ("disjoint", "permutation", "assignment")
COLUMNS = ("file", "label", "caption", "start", "end", "source")
_ALSO = {
    "file": ("path", "filename", "file_name", "video", "video_path", "clip"),
    "label": ("category", "class", "sound"),
    "caption": ("text", "audio_caption"),
    "source": ("video_id", "youtube_id", "src_file"),
}
_NEVER = 1e6


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A clip of which is known what sounds in it.

    Attributes:
        clip: the file and its window.
        event: what sounds, in one or a few words: an answer.
        caption: a text on it; empty where there is none.
        source: what it was cut from; clips of one source are never joined.
    """

    clip: ClipFile
    event: str
    caption: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Conflicts as the lines of a manifest, and what became of the clips.

    Attributes:
        name: "disjoint", "permutation" or "assignment".
        lines: the conflicts, each what a line of a manifest holds; paths are absolute.
        left_out: why clips are in no conflict, and which.
        seed: of the draw.
        shows: what the conflicts can show.
    """

    name: str
    lines: tuple[dict[str, Any], ...]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    seed: int = 0
    shows: str = ""

    def __len__(self) -> int:
        return len(self.lines)

    def __str__(self) -> str:
        words = Counter(word for line in self.lines for word in line["answers"])
        told = [f"{len(self)} conflicts over {len(words)} kinds of sound, design {self.name!r}, seed {self.seed}."]
        for why, files in self.left_out.items():
            some = ", ".join(map(os.path.basename, files[:3])) + (", ..." if len(files) > 3 else "")
            told.append(f"Left out, {why}: {len(files)} ({some}).")
        return "\n".join([*told, self.shows] if self.shows else told)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the manifest, whole; files are named relative to its folder.

        Args:
            path: a jsonl file.

        Returns:
            The path.
        """
        target = Path(path)
        here = target.absolute().parent
        make_folder(here)
        lines = (
            dict(line) | {key: os.path.relpath(line[key], here) for key in ("sound", "picture")} for line in self.lines
        )
        write_whole(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return target


def design_conflicts(
    clips: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    design: str = "disjoint",
    seed: int = 0,
    question: str = "What do you hear?",
    prefix: str = "It is a",
    lexicon: Lexicon | None = None,
    shortest: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Design:
    """Make conflicts of labelled clips.

    Args:
        clips: a folder (each file's label is its folder's name, or, of files that lie in it directly, their own name
            without its number); a csv, tsv or jsonl file, a folder that `datasets` saved, or rows such as a HuggingFace
            data set's, with `file` and `label` or `caption`, and optionally `start`, `end` (seconds) and `source` (what
            a clip was cut from). Labels may be classes of ESC-50 or VGGSound.
        design: how sounds and pictures are joined: "disjoint", "permutation" or "assignment".
        seed: draws the joins.
        question: what is asked of the sound.
        prefix: the assistant's text before the answer, whether of what is heard or of what is seen; empty for the
            embedded models.
        lexicon: the events that labels and captions are read by; None is `Lexicon.of_sounds()`.
        shortest: clips of fewer seconds are left out: a conflict is cut to its shortest clip.
        progress: called with (stage, done, all) as files are looked at.

    Returns:
        The conflicts, and which clips were left out and why.

    Raises:
        InputError: no such file or folder, no usable row, an unknown design, or fewer than two kinds of sound.
    """
    require_choice("design", design, DESIGNS)
    known = Lexicon.of_sounds() if lexicon is None else lexicon
    left_out: dict[str, list[str]] = defaultdict(list)
    usable = _usable(list(_rows(clips)), known, shortest, left_out, progress)
    if len({one.event for one in usable}) < 2:
        said = "; ".join(f"{why}: {len(files)}" for why, files in left_out.items()) or "nothing was left out"
        raise InputError(
            f"{_named(clips)} gives {len(usable)} usable clips of {len({one.event for one in usable})} kinds of sound; "
            f"a conflict needs two kinds ({said}). Give labels, or captions that each name one sound."
        )
    rng = np.random.default_rng(seed)
    joined = _disjoint(usable, rng) if design == "disjoint" else _assigned(usable, rng, alike=design == "assignment")
    used = {index for pair in joined for index in pair}
    left_out["no clip of another kind remained"] += [c.clip.path for i, c in enumerate(usable) if i not in used]
    lines = tuple(_line(usable[a], usable[v], f"c{number}", question, prefix) for number, (a, v) in enumerate(joined))
    kept = {why: tuple(files) for why, files in left_out.items() if files}
    shown = _shown([(usable[a], usable[v]) for a, v in joined], lines, seed)
    return Design(name=design, lines=lines, left_out=kept, seed=seed, shows=shown)


def _shown(pairs: Sequence[tuple[Labelled, Labelled]], lines: Sequence[Mapping[str, Any]], seed: int) -> str:
    """Say how many sources the clips are, and what conflicts of them can show."""
    named = [
        SimpleNamespace(id=line["id"], sound=a.clip, picture=v.clip, source=line.get("source"))
        for (a, v), line in zip(pairs, lines, strict=True)
    ]
    of = sources_of(named, ClipKeys()).of
    members = [Member(line["id"], of(one, "sound"), of(one, "picture"), line["answers"][0], line["question"])
               for one, line in zip(named, lines, strict=True)]  # fmt: skip
    clips, sources = {one.clip for pair in pairs for one in pair}, {name for one in members for name in one.sources}
    fewer = "" if len(sources) == len(clips) else " (copies, or windows of one file that overlap or lie close)"
    return f"{len(clips)} clips are {len(sources)} sources{fewer}. {design_of(members, seed=seed).sentence()}"


def _named(clips: Any) -> str:
    return str(clips) if isinstance(clips, str | os.PathLike) else "the list of clips"


def _rows(clips: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows under our own column names, with whole paths."""
    if not isinstance(clips, str | os.PathLike):
        yield from (_columns(row, Path(), f"row {number}") for number, row in enumerate(clips, start=1))
        return
    path = Path(clips)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        yield from (_columns(row, path, f"{path}, row {number}") for number, row in enumerate(_saved(path), start=1))
        return
    if path.is_dir():
        for file in sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith(".")):
            above = file.parent
            label = above.name if above != path else file.stem.rstrip("0123456789 _-.")
            yield {"file": str(file), "label": label}
        return
    if not path.is_file():
        raise InputError(f"cannot read the clips {path}: there is no such file or folder. {near_file(path)}")
    for number, row in _table(path):
        yield _columns(row, path.parent, f"{path}, line {number}")


def _saved(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set that HuggingFace's `datasets` saved, its clips not decoded."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{path} is a saved data set: to read it, pip install datasets.") from error
    rows: Any = datasets.load_from_disk(str(path))
    for name, kind in rows.features.items():
        if hasattr(kind, "decode"):
            rows = rows.cast_column(name, type(kind)(decode=False))
    yield from rows


def _table(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read a csv, tsv or jsonl file: the line's number and the row."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the clips {path}: {error}. Give a folder, or a csv or jsonl file in UTF-8."
        ) from error
    if path.suffix.lower() in (".jsonl", ".json"):
        found: list[tuple[int, dict[str, Any]]] = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                row = parse_json(line) if line.strip() else None
            except ValueError as error:
                raise InputError(f"{path}, line {number}, is not json: {error}. One object a line.") from error
            if row is not None and not isinstance(row, dict):
                raise InputError(f"{path}, line {number}, is no json object: one a line, with file and label.")
            found += [] if row is None else [(number, row)]
        return found
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", restval="")
    return [(reader.line_num, {key: value for key, value in row.items() if key is not None}) for row in reader]


def _columns(row: Mapping[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """A row under our own names of columns."""
    found: dict[str, Any] = {}
    for name in COLUMNS:
        column = next((one for one in (name, *_ALSO.get(name, ())) if row.get(one) not in (None, "")), None)
        found[name] = None if column is None else row[column]
    file = found["file"]
    if isinstance(file, Mapping):  # a data set's own kind of file
        file = file.get("path")
    if not isinstance(file, str | os.PathLike):
        listed = ", ".join(map(str, row)) or "none"
        raise InputError(
            f"{where} names no file: give a column 'file' with the clip's path (it has: {listed}). Of a data set that "
            "holds its clips inside, write them to files first."
        )
    if found["label"] is None and found["caption"] is None:
        raise InputError(f"{where} has neither label nor caption: say what sounds in {file}.")
    for name in ("start", "end"):
        try:
            found[name] = None if found[name] is None else float(found[name])
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {name} is a number of seconds, found {found[name]!r}.") from error
    return found | {"file": os.path.normpath(folder / file)}


def _usable(
    rows: Sequence[Mapping[str, Any]],
    lexicon: Lexicon,
    shortest: float,
    left_out: dict[str, list[str]],
    progress: Callable[[str, int, int], None] | None,
) -> list[Labelled]:
    """The clips that can stand in a conflict; of the others, why not."""
    found: list[Labelled] = []
    seen: set[ClipFile] = set()
    words: dict[str, set[str]] = defaultdict(set)
    for number, row in enumerate(rows):
        if progress is not None:
            progress("looking at clips", number, len(rows))
        why, event = _event(row, lexicon)
        clip = ClipFile(row["file"], start=row.get("start") or 0.0, end=row.get("end"))
        why = why or ("listed twice" if clip in seen else _fault(clip, shortest))
        if why:
            left_out[why].append(row["file"])
            continue
        seen.add(clip)
        said = {name: str(row[name]) for name in ("caption", "source") if row.get(name) is not None}
        found.append(Labelled(clip=clip, event=event, **said))
        words[event].add(event if row.get("label") is None else lexicon.own_word(str(row["label"])) or event)
    # One word an event: where all its labels are one word ("bell"), that is what the model is asked for.
    named = {event: its.pop() if len(its) == 1 else event for event, its in words.items()}
    return [replace(one, event=named[one.event]) for one in found]


def _event(row: Mapping[str, Any], lexicon: Lexicon) -> tuple[str, str]:
    """Why a row says no one sound, or "", and the sound; a label that the lexicon lacks is its own word."""
    if row.get("label") is not None:
        label = str(row["label"]).strip()
        try:
            return "", lexicon.event(label)
        except InputError:
            word = " ".join(label.replace("_", " ").casefold().split())
            return ("" if word else "its label is empty"), word
    events = {match.event for match in lexicon.found(str(row["caption"]))}
    if len(events) == 1:
        return "", events.pop()
    return ("its caption names several sounds" if events else "its caption names no sound of the lexicon"), ""


def _fault(clip: ClipFile, shortest: float) -> str:
    """Why a file cannot stand in a conflict, or ""."""
    try:
        facts = clip.probe()
    except MediaError:
        return "it cannot be read"
    if not facts.has_sound:
        return "it has no audio stream"
    if not facts.has_picture:
        return "it has no picture"
    end = min(facts.duration if clip.end is None else clip.end, facts.duration)
    return f"it is shorter than {shortest:g} s" if end - clip.start < shortest else ""


def _disjoint(clips: Sequence[Labelled], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Join each clip once: always two of the kinds of which most remain, in random order."""
    left: dict[str, list[int]] = defaultdict(list)
    for index in rng.permutation(len(clips)).tolist():
        left[clips[index].event].append(index)
    order = {event: place for place, event in enumerate(rng.permutation(sorted(left)).tolist())}
    pairs: list[tuple[int, int]] = []
    while len(left) > 1:
        one, two = sorted(left, key=lambda event: (-len(left[event]), order[event]))[:2]
        a = left[one].pop()
        other = next((i for i in reversed(left[two]) if not _same_source(clips[a], clips[i])), None)
        if other is not None:
            left[two].remove(other)
            pairs.append((a, other) if rng.random() < 0.5 else (other, a))
        left = defaultdict(list, {event: rest for event, rest in left.items() if rest})
    return [pairs[i] for i in rng.permutation(len(pairs))]


def _same_source(one: Labelled, two: Labelled) -> bool:
    return one.clip.path == two.clip.path or (bool(one.source) and one.source == two.source)


def _assigned(clips: Sequence[Labelled], rng: np.random.Generator, *, alike: bool) -> list[tuple[int, int]]:
    """Join each sound with one picture at the least cost: how alike the captions are, or a random number."""
    from scipy.optimize import linear_sum_assignment

    cost = _likeness([one.caption or one.event for one in clips]) if alike else rng.random((len(clips), len(clips)))
    events = np.array([one.event for one in clips])
    cost[events[:, None] == events] = _NEVER
    for name in ("source", "path"):
        of = np.array([one.source or f"\0{i}" if name == "source" else one.clip.path for i, one in enumerate(clips)])
        cost[of[:, None] == of] = _NEVER
    sounds, pictures = linear_sum_assignment(cost)
    return [(int(a), int(v)) for a, v in zip(sounds, pictures, strict=True) if cost[a, v] < _NEVER]


def _likeness(texts: Sequence[str]) -> np.ndarray:
    """The cosine of each two texts' tf-idf."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    made: Any = TfidfVectorizer().fit_transform(texts)
    return np.asarray((made @ made.T).todense(), dtype=np.float64)


def _line(a: Labelled, v: Labelled, name: str, question: str, prefix: str) -> dict[str, Any]:
    """One conflict as a manifest holds it."""
    line: dict[str, Any] = {"id": name, "sound": a.clip.path, "picture": v.clip.path, "question": question}
    line |= {"answers": [a.event, v.event], "prefix": prefix, "see": SEE}
    windows = {"start": [a.clip.start, v.clip.start], "end": [a.clip.end, v.clip.end]}
    line |= {key: both for key, both in windows.items() if any(both)}
    if a.source or v.source:
        line["source"] = [one.source or one.clip.path for one in (a, v)]
    if a.caption or v.caption:
        line["references"] = [a.caption, v.caption]
    return line
