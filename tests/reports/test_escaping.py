"""What a file or a person wrote is shown and never obeyed: the same markup, whatever the words say."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from planted_record import planted_isolation

from av_lens import plots
from av_lens.media import Clip
from av_lens.methods.sinks import Sinks
from av_lens.plots.plant_bench import plant_bench_svg
from av_lens.reports import write_bundle, write_report
from av_lens.results import Circuit, EdgeScores, Grid, Isolation, Tabled
from av_lens.results.readouts import LensReadout
from av_lens.results.record import TABLES
from av_lens.spans import Span

EVIL = "</script></title></svg>--><img src=x onerror=alert(1)>\"' onerror='alert(1)<script>alert(1)</script>{{7*7}}"
MEEK = "a word"
# Columns whose words are the program's own: rows are looked up by them.
OWN = {"half", "site", "role", "estimand", "donor", "quantity", "cell", "rule", "arm"}


class Structure(HTMLParser):
    """The tags of a page with the names of their attributes, in order, and its scripts that are data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        assert not any(name.startswith("on") for name, _ in attrs)
        assert dict(attrs).get("src") != "x"


def grid(word: str) -> Grid:
    axes = {"layer": [0, 1], "span": [word, "b"]}
    return Grid.of(np.ones((1, 2, 2)), axes=axes, baseline=[0.0], metric=word, unit=word, direction=word)


def tabled(word: str) -> Tabled:
    return Tabled(grid(word), pd.DataFrame({"example": [0], "text": [word], word: [word]}))


def edges(word: str) -> EdgeScores:
    return EdgeScores.of(
        [[[1.0]]], senders=[word], receivers=[word], baseline=[0.0], donor=[1.0], metric=word, unit=word, direction=word
    )


def circuit(word: str) -> Circuit:
    nodes = pd.DataFrame({"node": [word], "layer": [0], "head": [0], "score": [1.0], "member": [True], "how": [word]})
    nodes = nodes.assign(low=[0.5], high=[2.0], place=[1], kept=[1.0])
    ones = [1.0, 1.0]
    areas = pd.DataFrame({"empty": "zero", "figure": ["f", "span"], "value": ones, "low": ones, "high": ones})
    values = xr.Dataset(coords={"node": [word], "empty": ["zero"]})
    rest = pd.DataFrame({"node": [word], "adds": [0.5], "low": [0.4], "high": [0.6], "removed": [word]})
    links = pd.DataFrame({"first": [word], "second": [word], "interaction": [1.0], "low": [0.5], "high": [2.0]})
    links["how"] = word
    return Circuit(values, nodes, rest, areas, rest, rest, links, rest, rest, what=word, unit=word)


def sinks(word: str) -> Sinks:
    table = pd.DataFrame({"position": [0], "token": [word], "kind": ["unimodal"], "times": [21.0]})
    return Sinks(Span(np.array([0])), table, table, grid(word), table)


def readout(word: str) -> LensReadout:
    axes = {"word": [word], "layer": [0, 1], "pos": [0]}
    ranks = Grid.of(np.ones((1, 1, 2, 1)), axes=axes, baseline=[0.0], metric=word)
    ids = np.zeros((1, 2, 1, 1), int)
    return LensReadout(ranks, ranks, ids, ids + 0.5, {0: word}, np.ones((1, 2, 1)), np.array([1.0]))


def clip(word: str) -> Clip:
    made = Clip.from_arrays(frames=np.zeros((2, 16, 16, 3), np.uint8), fps=2.0)
    return replace(made, path=f"/tmp/{word.replace('/', '')}", notes=(word,))


def strip(word: str) -> str:
    from small_av import small_inputs

    x = small_inputs((0,), question="What?")
    spans = replace(x.spans, tokens=tuple(word for _ in x.spans.tokens))
    return replace(x, questions=(word,), spans=spans, layout=word)._repr_html_()


def page_of(figure: Any) -> str:
    return figure.to_html(include_plotlyjs=False)


HTML: dict[str, Any] = {
    "Grid": lambda word: grid(word)._repr_html_(),
    "Tabled": lambda word: tabled(word)._repr_html_(),
    "EdgeScores": lambda word: edges(word)._repr_html_(),
    "Circuit": lambda word: circuit(word)._repr_html_(),
    "Sinks": lambda word: sinks(word)._repr_html_(),
    "Clip": lambda word: clip(word)._repr_html_(),
    "AVInputs": strip,
    "Grid.plot": lambda word: page_of(grid(word).plot(title=word)),
    "Circuit.plot": lambda word: page_of(circuit(word).plot()),
    "LensReadout.plot": lambda word: page_of(readout(word).plot()),
    "plant_bench_svg": lambda word: plant_bench_svg({word: {word: (0.5, 0.4, 0.6)}}, label=word),
    "attention_patterns": lambda word: plots.attention_patterns(np.ones((1, 2, 2)), [word, "b"], names=[word]).html,
}


@pytest.mark.parametrize("kind", HTML)
def test_what_shows_itself_has_the_same_markup_whatever_its_words_say(kind: str):
    evil, meek = HTML[kind](EVIL), HTML[kind](MEEK)
    assert Structure(evil).tags == Structure(meek).tags
    assert "alert(1)" in evil  # it is shown, not dropped


def hostile(word: str) -> Isolation:
    """A record with the word wherever a file or a person may write one."""
    found = planted_isolation()
    tables = {name: getattr(found, name).copy() for name in TABLES}
    for name, columns in TABLES.items():
        for column, kind in columns.items():
            if kind == "text" and column not in OWN and len(tables[name]):
                tables[name][column] = [f"{word}{i}" for i in range(len(tables[name]))]
    words = {"verdict": word, "verdict_kind": word, "reasons": (word,), "stamps": (word,)}
    protocol, provenance = {word: word, "s": 0.1}, {word: word, "model": word, "choices": [word], "created": word}
    return replace(found, **tables, **words, protocol=protocol, provenance=provenance)


def test_a_report_has_the_same_markup_whatever_its_words_say(tmp_path: Path):
    made: list[str] = []
    for word in (EVIL, MEEK):
        path = write_report(
            hostile(word), tmp_path / "report.html", clips={f"{word}0": clip(word)}, caveats=(word,), title=word
        )
        made.append(path.read_text("utf-8"))
    assert Structure(made[0]).tags == Structure(made[1]).tags
    assert "alert(1)" in made[0]
    assert "{{7*7}}" in made[0]


def test_figures_keep_our_tags_and_show_all_others():
    figure = plots._style.figure(title="<b>bold</b><br>a <a href='https://example.org'>link</a> p < .05<extra></extra>")
    said = json.loads(figure.to_json())["layout"]["title"]["text"]
    assert said == "<b>bold</b><br>a &lt;a href='https://example.org'>link&lt;/a> p &lt; .05<extra></extra>"
    assert figure.layout.title.text.endswith("p < .05<extra></extra>")  # the figure itself holds what it was given


@pytest.mark.slow
def test_a_bundle_has_the_same_markup_whatever_their_words_say(tmp_path: Path):
    pages: dict[str, list[Any]] = {}
    for word in (EVIL, MEEK):
        write_bundle(hostile(word), tmp_path / str(len(word)), clips={f"{word}0": clip(word)})
        for path in sorted((tmp_path / str(len(word))).rglob("*.html")):
            pages.setdefault(path.name, []).append(Structure(path.read_text("utf-8")).tags)
    assert len(pages) > 4
    for name, (evil, meek) in pages.items():
        assert evil == meek, name
