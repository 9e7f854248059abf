"""The page: complete, offline, honest about what it is, and every number of the record on it."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
from planted_record import planted_isolation, stopped_isolation

from av_lens.errors import InputError
from av_lens.media import Clip
from av_lens.reports import Calibration, sections, write_bundle, write_report
from av_lens.results.record import Isolation


class Page(HTMLParser):
    """What a browser would load, and what a reader would read."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._silent = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append((tag, found))
        self.loads += [value for key, value in attrs if key in ("src", "href", "data", "poster") and value]
        self._silent += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._silent -= tag in ("script", "style")

    def handle_data(self, data):
        if not self._silent:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def small_clip() -> Clip:
    frames = np.zeros((8, 32, 32, 3), np.uint8)
    frames[:, 8:24, 8:24] = 200
    wave = (0.2 * np.sin(np.arange(16000) / 10)).astype(np.float32)
    return Clip.from_arrays(frames=frames, fps=8.0, waveform=wave, rate=16000)


def small_calibration(passed: bool = True) -> Calibration:
    rows = [
        dict(
            rank=i + 1, layer=i // 2, head=i % 2, release=3.0 - i, share=0.3 - 0.1 * i, planted=i == 0, kind="", role=""
        )
        for i in range(4)
    ]
    return Calibration(
        sentence="The head planted in av-tiny-planted (L0 H0) came out on top.",
        passed=passed,
        model="av-tiny-planted",
        heads=pd.DataFrame(rows),
        figures={"auroc": 1.0},
        verdict="One head.",
    )


@pytest.fixture(scope="module")
def found() -> Isolation:
    return planted_isolation()


@pytest.fixture(scope="module")
def written(found, tmp_path_factory) -> tuple[str, Page]:
    path = tmp_path_factory.mktemp("page") / "report.html"
    clips = {"0000": small_clip(), "0002": small_clip()}
    caveats = ["An organism by construction."]
    write_report(found, path, clips=clips, calibration=small_calibration(), caveats=caveats)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_nothing_is_loaded_from_anywhere(written):
    text, page = written
    assert page.loads
    for target in page.loads:
        assert target.startswith(("data:", "#")), f"the page loads {target[:80]}"
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert not re.search(r"@import|url\((?!data:)", re.sub(r"<script>.*?</script>", "", text, flags=re.S))


def test_plotly_is_inside_once(written):
    text, _ = written
    assert text.count("* plotly.js v") == 1


def test_it_says_the_verdict_first_and_stamps_what_is_exploratory(written, found):
    _, page = written
    words_on_page = page.words
    assert found.verdict in words_on_page
    assert words_on_page.index(found.verdict) < words_on_page.rindex("How to read this")
    assert "exploratory 22 and 22 competent conflicts in the halves; a verdict needs 60" in words_on_page
    assert "What is named on this page is a lead" in words_on_page
    assert words_on_page.count("22 and 22 competent") == 1
    assert "An organism by construction." in words_on_page


def test_no_stamp_where_none_is_due(tmp_path):
    path = write_report(planted_isolation(stamps=()), tmp_path / "report.html")
    assert "exploratory" not in Page(path.read_text(encoding="utf-8")).words


def test_every_number_of_the_head_table_is_there(written, found):
    _, page = written
    for row in found.heads.to_dict("records"):
        assert f"L{row['layer']} H{row['head']}" in page.words
        for column in ("effect", "low", "high", "reads_picture", "reads_sound", "sufficiency", "dla", "release_zero"):
            assert sections.number(row[column], sign=True) in page.words, column
        for column in ("share", "share_low", "share_high"):
            assert sections.percent(row[column]) in page.words, column
        for column in ("q", "p_maxt", "p_holm"):
            assert sections.small(row[column]) in page.words, column


def test_both_roles_and_what_became_of_each_head_are_there(written, tmp_path):
    _, page = written
    assert "✓ confirmed" in page.words
    assert "not replicated" in page.words
    found = planted_isolation()
    heads = found.heads.assign(
        role_alone="gate", role_in_set="picture writer", status="on these words", confirmed=False
    )
    sets = found.sets.assign(confirmed=False, would_confirm=True, see_release=0.123)
    changed = dataclasses.replace(found, heads=heads, sets=sets, stamps=("not interpretable",))
    words = Page(write_report(changed, tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert "alone: gate; in the set: picture writer" in words
    assert "on these words" in words
    assert "would hold" in words
    assert "+0.12" in words
    assert "confirmed" not in words


def test_the_mirrored_question_is_asked_in_its_own_words(tmp_path):
    found = planted_isolation()
    asked = dataclasses.replace(found, protocol={**found.protocol, "suppressed": "picture"})
    words = Page(write_report(asked, tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert "Which heads keep av-tiny from saying what it sees?" in words
    assert "seeing with nothing to hear" in words
    assert "what the picture does to the answer" in words  # E_V
    assert "mirrored question" in words


def test_every_number_of_behaviour_and_specificity_is_there(written, found):
    _, page = written
    for row in found.behaviour.to_dict("records"):
        rate = row["quantity"] == "accuracy"
        assert (sections.percent if rate else sections.number)(row["value"]) in page.words
        assert sections.interval(row["low"], row["high"], share=rate) in page.words
    for row in found.specificity.to_dict("records"):
        told = f"{row['control']} {sections.CONTROLS[row['control']]} {row['n']}"
        assert f"{told} {sections.percent(row['before'])} {sections.percent(row['after'])}" in page.words
        assert row["verdict"] in page.words


def test_the_figures_hold_the_records_numbers(written, found):
    text, _ = written
    specs = dict(re.findall(r'<script type="application/json" id="spec-([\w-]+)">(.*?)</script>', text, flags=re.S))
    assert set(specs) == {"behaviour", "release", "map-release", "map-dla", "confirmation", "calibration"}
    heat = json.loads(specs["map-release"])["data"][0]["z"]
    z = np.frombuffer(base64.b64decode(heat["bdata"]), heat["dtype"]).reshape(
        [int(n) for n in heat["shape"].split(",")]
    )
    np.testing.assert_array_equal(z, found.grid("release", "blank_muted"))


def test_clips_are_embedded_and_described(written):
    _, page = written
    videos = [attrs for tag, attrs in page.tags if tag == "video"]
    assert len(videos) == 2
    assert all(v["src"].startswith("data:video/mp4;base64,") for v in videos)
    assert all(v["poster"].startswith("data:image/jpeg;base64,") for v in videos)
    assert "the picture shows" in videos[0]["aria-label"]
    assert "controls" in videos[0]


def test_calibration_is_told_either_way(found, tmp_path):
    good = Page(write_report(found, tmp_path / "a.html", calibration=small_calibration()).read_text("utf-8"))
    bad = Page(write_report(found, tmp_path / "b.html", calibration=small_calibration(False)).read_text("utf-8"))
    assert "✓ calibrated" in good.words
    assert "✗ calibration failed" in bad.words


def test_a_stopped_search_still_gives_a_page(tmp_path):
    path = write_report(stopped_isolation(), tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "No head is named: the search was not begun" in page.words
    assert "Nothing was searched for, so there is none to confirm" in page.words
    assert "nothing to explain" in page.words
    assert "No head was edited" in page.words
    assert "the heads were edited" not in page.words


def test_a_reason_that_the_verdict_already_gives_is_not_given_twice(tmp_path):
    found = stopped_isolation()
    told = dataclasses.replace(found, reasons=("The gap is small.", "Another reason."), verdict="So: The gap is small.")
    page = Page(write_report(told, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.words.count("The gap is small.") == 1
    assert page.words.count("Another reason.") == 1


def test_words_that_look_like_markup_stay_words(found, tmp_path):
    nasty = "</script><img src=x onerror=alert(1)>"
    record = Isolation(
        verdict=nasty, n_layers=8, n_heads=8, summary={}, conflicts=found.conflicts.assign(says=nasty),
        provenance={"model": nasty},
    )  # fmt: skip
    page = Page(write_report(record, tmp_path / "report.html").read_text("utf-8"))
    assert not [attrs for tag, attrs in page.tags if tag == "img"]
    assert nasty in page.words


def test_it_can_be_read_without_a_mouse_or_eyes(written):
    _, page = written
    tags = [tag for tag, _ in page.tags]
    assert ("html", {"lang": "en"}) in page.tags
    assert tags.count("h1") == 1
    assert tags.count("main") == 1
    plots = [attrs for tag, attrs in page.tags if tag == "div" and "plot" in (attrs.get("class") or "")]
    assert all(len(attrs["aria-label"]) > 60 for attrs in plots)
    headings = [attrs for tag, attrs in page.tags if tag == "th"]
    assert all(attrs.get("scope") in ("col", "row") for attrs in headings)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for target in page.loads:
        if target.startswith("#"):
            assert target[1:] in ids


def test_clips_stop_at_the_budget_and_strange_ones_are_refused(found, tmp_path):
    clips = {f"{i:04d}": small_clip() for i in range(6)}
    one = len(small_clip().to_mp4_bytes()) / (1 << 20)
    page = Page(write_report(found, tmp_path / "a.html", clips=clips, budget_mb=2.5 * one).read_text("utf-8"))
    assert [tag for tag, _ in page.tags].count("video") == 2
    page = Page(write_report(found, tmp_path / "a.html", clips=clips, most_clips=3).read_text("utf-8"))
    assert [tag for tag, _ in page.tags].count("video") == 3
    with pytest.raises(InputError, match=r"does not hold: \['nobody'\]"):
        write_report(found, tmp_path / "b.html", clips={"nobody": small_clip()})
    assert not (tmp_path / "b.html").exists()


def test_the_bundle_holds_figures_and_numbers_that_open_again(found, tmp_path):
    path = write_bundle(found, tmp_path / "out", calibration=small_calibration())
    assert path == tmp_path / "out" / "report.html"
    again = Isolation.load(tmp_path / "out" / "numbers")
    pd.testing.assert_frame_equal(again.heads, found.heads)
    names = {p.stem for p in (tmp_path / "out" / "figures").glob("*.json")}
    assert names == {"behaviour", "release", "map-release", "map-dla", "confirmation", "attribution", "calibration"}
    figure = pio.read_json(tmp_path / "out" / "figures" / "confirmation.json")
    assert len(figure.data) > 3
    html = (tmp_path / "out" / "figures" / "release.html").read_text("utf-8")
    assert 'src="plotly.min.js"' in html
    assert "cdn.plot" not in html
    assert (tmp_path / "out" / "figures" / "plotly.min.js").exists()
    assert len(pd.read_csv(tmp_path / "out" / "numbers" / "calibration.csv")) == 4
    assert not list((tmp_path / "out").rglob(".*.part"))


class TestWords:
    @pytest.mark.parametrize(
        ("value", "text"),
        [(3.0, "3.00"), (-4.1, "−4.10"), (12.345, "12.3"), (0.0123, "0.012"), (0.0, "0.00"), (math.nan, "–"),
         (None, "–"), (0.00012, "0.000"), (-0.0001, "0.000"), (7, "7"), (True, "yes")],
    )  # fmt: skip
    def test_numbers(self, value, text):
        assert sections.number(value) == text

    def test_signs_percentages_and_small_numbers(self):
        assert sections.number(2.5, sign=True) == "+2.50"
        assert sections.percent(0.05) == "5%"
        assert sections.percent(0.049) == "4.9%"
        assert sections.percent(-0.123) == "−12%"
        assert sections.percent(-0.0004) == "0%"
        assert sections.interval(0.7, 0.8, share=True) == "70% to 80%"
        assert sections.interval(math.nan, 1.0) == "–"
        assert sections.small(0.0004) == "< 0.001"
        assert sections.small(0.0123) == "0.012"


def test_a_spec_is_safe_inside_a_script(found):
    from av_lens.reports.drawings import Drawing, drawings

    figure = drawings(found)["behaviour"].figure
    figure.data[0].name = "</script>&\u2028"
    spec = Drawing("x", "t", "c", figure).spec
    assert "</script" not in spec
    assert json.loads(spec)["data"][0]["name"] == "&lt;/script>&\u2028"  # as plotly shows it, not as markup
