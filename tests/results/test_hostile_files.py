"""Every kind of saved result after thousands of mutations: a refusal in our words, or a result that can be used."""

from __future__ import annotations

import collections
import contextlib
import io
import resource
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from mutations import mutated
from planted_record import planted_isolation

from av_lens.errors import AvLensError, InputError
from av_lens.results import Circuit, EdgeScores, Grid, Isolation, Tabled
from av_lens.results.readouts import LensReadout

FEW, MANY = 12, 2000
ROWS = pd.DataFrame({"example": [0, 1], "text": ["a", None], "n": [1, 2]})


def grid() -> Grid:
    values = np.arange(24.0).reshape(2, 3, 4)
    axes = {"layer": [0, 1, 2], "span": ["video", "audio", "question", "generation"]}
    return Grid.of(values, axes=axes, baseline=[1.0, 2.0], donor=[3.0, np.nan], metric="M", provenance={"seed": [1]})


def edges() -> EdgeScores:
    return EdgeScores.of(
        np.arange(12.0).reshape(2, 2, 3), senders=["embed", "L0H1"], receivers=["L0H1.q", "L1 mlp", "logits"],
        baseline=[0.0, 1.0], donor=[2.0, 3.0], metric="M", provenance={"a": "b"},
    )  # fmt: skip


def circuit() -> Circuit:
    names = ["L0H0", "L0 mlp"]
    nodes = pd.DataFrame({"node": names, "layer": [0, 0], "score": [1.0, np.nan], "member": [True, False]})
    areas = pd.DataFrame({"empty": ["zero"], "figure": ["f"], "value": [0.9], "low": [0.8], "high": [1.0]})
    rest = pd.DataFrame({"node": ["L0H0"], "adds": [0.5]})
    values = xr.Dataset(
        {"scores": (("example", "node"), [[1.0, 2.0]])}, coords={"node": names, "empty": ["zero"], "example": [0]}
    )
    return Circuit(values, nodes, rest, areas, rest, rest, rest, rest, rest, what="C", provenance={"order": "signed"})


def readout() -> LensReadout:
    axes = {"word": ["dog", "cat"], "layer": np.arange(2), "pos": np.arange(3)}
    ranks = Grid.of(np.arange(12.0).reshape(1, 2, 2, 3), axes=axes, baseline=[0.0], provenance={"k": 5})
    ids = np.arange(12).reshape(1, 2, 3, 2)
    texts = {token: f"t{token}" for token in range(12)}
    return LensReadout(ranks, ranks, ids, ids / 12, texts, np.ones((1, 2, 3)), np.array([1.0]))


def shown_grid(found: Grid) -> None:
    for made in (found.effects, found.normalized(), found.mean(), found.closure_error, found.interval()):
        assert made is not None
    assert found.to_frame() is not None
    assert found._repr_html_()


def shown_isolation(found: Isolation) -> None:
    assert len(found.suppressors) <= len(found.heads)
    with contextlib.suppress(InputError):  # an effect that was renamed is not there
        found.grid("release", "blank_muted")


SAVED: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any], Callable[[Any], Any]]] = {
    "Grid": (lambda place: grid().save(place / "a"), Grid.load, shown_grid),
    "EdgeScores": (
        lambda place: edges().save(place / "a"), EdgeScores.load,
        lambda found: (found.top(3), found.nodes(), found.closure_error, found._repr_html_()),
    ),
    "Tabled": (
        lambda place: Tabled(grid(), ROWS).save(place / "a"),
        Tabled.load, lambda found: (found.to_frame(), found._repr_html_()),
    ),
    "Circuit": (
        lambda place: circuit().save(place / "a"), Circuit.load,
        lambda found: (found.members, found.faithfulness(), found._repr_html_()),
    ),
    "LensReadout": (
        lambda place: readout().save(place / "a"), LensReadout.load,
        lambda found: (found.best(), found.top(), found.understanding(5), repr(found)),
    ),
    "Isolation": (lambda place: planted_isolation().save(place / "a"), Isolation.load, shown_isolation),
}  # fmt: skip


def survive(kind: str, place: Path, seeds: range) -> collections.Counter[str]:
    """Load one mutated copy for each seed; anything but a refusal or a usable result is an error of the test."""
    save, load, use = SAVED[kind]
    saved = save(place)
    files = sorted(path for path in (saved.rglob("*") if saved.is_dir() else [saved]) if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        path = files[seed % len(files)]
        path.write_bytes(mutated(whole[path], seed))
        try:
            found = load(saved)
        except AvLensError:
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    use(found)
                except BaseException as error:
                    raise AssertionError(f"{kind}, seed {seed}, loaded: {type(error).__name__}: {error}") from error
            outcomes["a usable result"] += 1
        path.write_bytes(whole[path])
    load(saved)
    return outcomes


@pytest.mark.parametrize("kind", SAVED)
def test_a_damaged_file_is_refused_in_words_or_can_be_used(kind: str, tmp_path: Path):
    few = FEW // 4 if kind == "Isolation" else FEW
    assert survive(kind, tmp_path, range(few))["refused"] > few // 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVED)
def test_two_thousand_mutations_of_each_kind(kind: str, tmp_path: Path):
    outcomes = survive(kind, tmp_path, range(FEW, FEW + MANY))
    print(kind, dict(outcomes), "peak MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    assert sum(outcomes.values()) == MANY


def bomb(name: str, place: Path) -> Path:
    """Small files that say that they hold much."""
    if name == "archive":
        saved = planted_isolation().save(place / "a")
        with zipfile.ZipFile(saved / "arrays.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            held = io.BytesIO()
            np.lib.format.write_array_header_1_0(held, {"descr": "<f8", "fortran_order": False, "shape": (2**28,)})
            with archive.open("a.npy", "w", force_zip64=True) as file:
                file.write(held.getvalue())
                for _ in range(2**5):
                    file.write(bytes(2**26))
        return saved
    if name == "array header":
        saved = planted_isolation().save(place / "a")
        held = io.BytesIO()
        np.lib.format.write_array_header_1_0(held, {"descr": "<f8", "fortran_order": False, "shape": (2**31,)})
        with zipfile.ZipFile(saved / "arrays.npz", "w") as archive:
            archive.writestr("a.npy", held.getvalue() + bytes(64))
        return saved
    if name == "short rows":
        saved = planted_isolation().save(place / "a")
        lines = (saved / "evidence.csv").read_text().splitlines()[0] + "\n" + "1\n" * 500_000
        (saved / "evidence.csv").write_text(lines)
        return saved
    saved = grid().save(place / "a")
    content = bytearray(saved.read_bytes())
    for at in range(4, 400, 4):
        if content[at : at + 4] in (struct.pack(">I", 3), struct.pack(">I", 4)):
            content[at : at + 4] = struct.pack(">I", 2**28)
    saved.write_bytes(content)
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["archive", "array header", "short rows", "dimensions"])
def test_a_small_file_never_takes_much_memory(name: str, tmp_path: Path):
    """In a process of its own: at most 300 MB more than before, whatever the file says."""
    saved = bomb(name, tmp_path)
    code = (
        "import resource, sys\nfrom av_lens.results import Grid, Isolation\nfrom av_lens.errors import AvLensError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\nbefore = peak()\n"
        "try: (Isolation if sys.argv[2] != 'dimensions' else Grid).load(sys.argv[1])\n"
        "except AvLensError as refused: print(peak() - before, refused)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved), name], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) < 300, done.stdout
    print(name, done.stdout)
