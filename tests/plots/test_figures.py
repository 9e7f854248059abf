"""Figures carry the numbers they draw, mark what was not measured, and refuse what they cannot draw."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
import xarray as xr
from planted_record import C, G, planted_isolation, stopped_isolation

import av_lens
from av_lens import colours, plots
from av_lens.errors import InputError
from av_lens.results.record import table
from av_lens.spans import ROLES, SpanMap, role_runs


@pytest.fixture(scope="module")
def found():
    return planted_isolation()


def traces(fig, name):
    return [trace for trace in fig.data if trace.name == name]


class TestHeads:
    def test_the_cells_are_the_numbers_and_the_scale_is_symmetric(self):
        values = np.array([[0.0, 1.5], [-0.5, 0.25]])
        heat = plots.heads(values, unit="logits").data[0]
        np.testing.assert_array_equal(heat.z, values)
        assert (heat.zmin, heat.zmax) == (-1.5, 1.5)
        middle = heat.colorscale[len(heat.colorscale) // 2]
        assert middle == (0.5, colours.DIVERGING[3])
        assert heat.customdata[0][1] == "<b>L0 H1</b><br>+1.500 logits"

    def test_what_was_not_measured_is_hatched_and_says_so(self):
        fig = plots.heads(np.array([[0.0, np.nan], [np.nan, 1.0]]))
        (lines,) = traces(fig, "not measured")
        xs, ys = np.array(lines.x, float), np.array(lines.y, float)
        assert np.isnan(xs).sum() == 2 * 3  # three strokes a cell, a break after each
        inside = ((abs(xs - 1) <= 0.5) & (abs(ys - 0) <= 0.5)) | ((abs(xs - 0) <= 0.5) & (abs(ys - 1) <= 0.5))
        assert inside[~np.isnan(xs)].all()
        assert list(fig.data[2].text) == ["<b>L0 H1</b><br>not measured", "<b>L1 H0</b><br>not measured"]
        assert not traces(plots.heads(np.zeros((2, 2))), "not measured")

    def test_a_frame_gives_its_column_with_the_interval_on_hover_and_nan_for_absent_heads(self):
        frame = pd.DataFrame(dict(layer=[0, 1], head=[1, 0], effect=[2.0, -1.0], low=[1.5, -2.0], high=[2.5, 0.5]))
        heat = plots.heads(frame).data[0]
        np.testing.assert_array_equal(heat.z, [[np.nan, 2.0], [-1.0, np.nan]])
        assert "95% interval −2.000 to +0.500".replace("−", "-") in heat.customdata[1][0]

    def test_a_grid_is_drawn_by_its_mean_effect(self):
        class Grid:
            unit = "logits"
            effects = xr.DataArray(np.arange(8.0).reshape(2, 2, 2), dims=("example", "head", "layer"))

        heat = plots.heads(Grid()).data[0]
        np.testing.assert_array_equal(heat.z, [[2.0, 4.0], [3.0, 5.0]])
        assert heat.colorbar.title.text == "logits"

    def test_outlines_stand_around_the_named_heads(self):
        fig = plots.heads(np.ones((3, 4)), named=[(2, 1)])
        (box,) = fig.layout.shapes
        assert (box.x0, box.x1, box.y0, box.y1) == (0.52, 1.48, 1.52, 2.48)

    def test_refusals(self):
        with pytest.raises(InputError, match=r"an array \[layer, head\]; this one has the shape \(3,\)"):
            plots.heads(np.zeros(3))
        with pytest.raises(InputError, match=r"missing: \['head', 'effect'\]"):
            plots.heads(pd.DataFrame(dict(layer=[0])))
        twice = pd.DataFrame(dict(layer=[1, 1], head=[0, 0], effect=[1.0, 2.0]))
        with pytest.raises(InputError, match="more than one row for layer 1 head 0"):
            plots.heads(twice)

        class Grid:
            effects = xr.DataArray(np.zeros((2, 3)), dims=("example", "layer"))

        with pytest.raises(InputError, match="over='layer head'"):
            plots.heads(Grid())


class TestSpans:
    def test_bars_are_the_runs(self):
        spans = SpanMap.of_roles(["boundary", "video", "video", "audio", "video", "question", "generation"])
        fig = plots.spans(spans)
        bars = [(bar.name, bar.base[0], bar.x[0]) for bar in fig.data if bar.type == "bar"]
        assert bars == [
            ("boundary", -0.5, 1),
            ("video", 0.5, 2),
            ("audio", 2.5, 1),
            ("video", 3.5, 1),
            ("question", 4.5, 1),
            ("generation", 5.5, 1),
        ]
        assert [bar.showlegend for bar in fig.data[:4]] == [True, True, True, False]

    def test_runs_cover_every_position_once(self):
        assert role_runs(["a", "a", "b", "a"]) == [("a", 0, 2), ("b", 2, 3), ("a", 3, 4)]
        assert role_runs([]) == []

    def test_refusal(self):
        with pytest.raises(InputError, match="this is a str"):
            plots.spans("prompt")


class TestFindings:
    def test_behaviour_shows_both_halves_with_their_intervals(self, found):
        fig = plots.behaviour(found)
        first, second = traces(fig, "discovery")[0], traces(fig, "confirmation")[0]
        labels = list(fig.layout.yaxis.ticktext)
        assert labels == ["E_A: what the sound does", "E_V: what the picture does", "I: interaction of the two",
                          "G: hearing, nothing to see", "C: hearing under conflict", "gap: G − C"]  # fmt: skip
        np.testing.assert_allclose(first.x, [4.2, 12.4, 0.6, G, C, G - C])
        np.testing.assert_allclose(second.x, np.array(first.x) + 0.1)
        np.testing.assert_allclose(first.error_x.array, 0.3)
        rates = traces(fig, "discovery")[1]
        np.testing.assert_allclose(rates.x, [0.05, 1.0, 0.98, 0.96, 0.99])

    def test_behaviour_that_was_not_recorded_is_refused(self, found):
        with pytest.raises(InputError, match="chosen='all'"):
            plots.behaviour(found, chosen="all")

    def test_release_ranks_by_discovery_and_shows_the_confirmed_halfs_figures(self, found):
        fig = plots.release(found, top=5)
        assert [trace.name for trace in fig.data] == ["blank_muted", "mean_other", "zero"]
        assert list(fig.layout.yaxis.ticktext[:3]) == [
            "L5 H2  picture writer ✓",
            "L5 H3  picture writer ✓",
            "L3 H4  gate",
        ]
        rows = found.evidence.query("half == 'confirmation' and estimand == 'release' and donor == 'zero'")
        value = rows.query("layer == 5 and head == 2")["share"].item()
        assert fig.data[2].x[0] == value
        assert "confirmation" in fig.layout.xaxis.title.text
        assert [line.x0 for line in fig.layout.shapes] == [0.1]  # the threshold, s of G

    def test_confirmation_draws_the_set_and_every_random_draw(self, found):
        fig = plots.confirmation(found)
        (curve,) = traces(fig, "the set, in its order")
        np.testing.assert_allclose(curve.y, [0.44 * G, 0.7 * G, 0.81 * G])
        assert list(curve.x) == [1, 2, 3]
        (random,) = traces(fig, "random heads of the same layers (40 sets)")
        np.testing.assert_array_equal(random.y, found.ablation.query("arm == 'random'")["release"])
        (says,) = traces(fig, "says the sound")
        assert list(says.y) == [0.05, 0.32, 0.61, 0.78]

    def test_without_a_set_the_ranked_heads_are_drawn_over_a_logarithmic_axis(self, found):
        rows = found.ablation[found.ablation["arm"] == "set"].assign(arm="ranked heads", k=[1, 2, 16])
        spread = dataclasses.replace(found, ablation=rows, sets=found.sets.head(0))
        fig = plots.confirmation(spread)
        (curve,) = traces(fig, "the heads of largest single release")
        np.testing.assert_allclose(curve.y, [0.44 * G, 0.7 * G, 0.81 * G])
        assert fig.layout.xaxis2.type == "log"
        assert list(traces(fig, "says the sound")[0].y) == [0.32, 0.61, 0.78]

    def test_knowledge_draws_both_words_over_the_layers_of_every_span(self, found):
        kinds = [("lens", "va", 1), ("probe", "va, av", 0), ("lens", "blank_a", 1)]
        rows: list[dict[str, object]] = [
            {"method": method, "word": word, "cell": cell, "span": span, "layer": layer, "value": 0.1 * layer + at,
             "low": 0.0, "high": 1.0, "null": 0.05, "chosen": False, "n": 30, "note": ""}
            for method, cell, first in kinds
            for at, (span, word) in enumerate([("audio", "sound"), ("audio", "picture"), ("generation", "sound")])
            for layer in (-1, *range(first, 4))
        ]  # fmt: skip
        fig = plots.knowledge(dataclasses.replace(found, knowledge=table("knowledge", rows)))
        assert [note.text for note in fig.layout.annotations] == ["audio", "generation"]
        curves = [trace for trace in fig.data if trace.name == "sound"]
        assert len(curves) == 4  # two spans, lens and probe; what the other cell holds is not drawn
        assert list(curves[0].x) == [1, 2, 3]
        np.testing.assert_allclose(curves[1].y, [2.1, 2.2, 2.3])  # lens at generation
        np.testing.assert_allclose(curves[2].y, [0.0, 0.1, 0.2, 0.3])
        assert {trace.y[0] for trace in fig.data if trace.name == "sound, null"} == {0.05}

    def test_attribution_closes_its_sum(self, found):
        fig = plots.attribution(found, top=3)
        rows = found.evidence.query("half == 'discovery' and estimand == 'dla'")
        assert fig.data[0].y[-1] == "all 61 others"
        assert sum(fig.data[0].x) == pytest.approx(rows["mean"].sum())
        assert abs(fig.data[0].x[0]) == rows["mean"].abs().max()

    def test_attribution_of_a_grid_names_every_component(self):
        class Grid:
            effects = xr.DataArray(
                np.array([[1.0, -3.0], [3.0, -1.0]]),
                dims=("example", "component"),
                coords={"component": ["embed", "mlp 2"]},
            )

        bars = plots.attribution(Grid()).data[0]
        assert list(zip(bars.y, bars.x, strict=True)) == [("embed", 2.0), ("mlp 2", -2.0)]

    def test_nothing_found_is_refused_not_drawn_empty(self):
        stopped = stopped_isolation()
        with pytest.raises(InputError, match="no release"):
            plots.release(stopped)
        with pytest.raises(InputError, match="none was found"):
            plots.confirmation(stopped)
        with pytest.raises(InputError, match="no lens and no probes"):
            plots.knowledge(stopped)
        with pytest.raises(InputError, match="no direct attribution"):
            plots.attribution(stopped)


def test_no_global_template_is_set_or_used(found):
    before = pio.templates.default
    fig = plots.release(found)
    assert pio.templates.default == before
    assert fig.layout.template.layout.to_plotly_json() == {}


class TestColours:
    @staticmethod
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(self, one: str, other: str) -> float:
        a, b = sorted((self.luminance(one), self.luminance(other)))
        return (b + 0.05) / (a + 0.05)

    def test_ink_reads_on_white_and_on_near_black(self):
        for background in ("#ffffff", "#14171c"):
            assert self.contrast(colours.INK, background) >= 3.9
        assert self.contrast(plots.THEMES["light"]["ink"], "#ffffff") >= 7
        assert self.contrast(plots.THEMES["dark"]["ink"], "#14171c") >= 7

    def test_small_letters_of_the_page_read_on_it(self):
        for page in colours.PAGES.values():
            for name in ("ink", "soft", "sound", "picture-text", "good", "bad", "open"):
                assert min(self.contrast(page[name], page[ground]) for ground in ("bg", "panel")) >= 4.5, name
            assert self.contrast(page["stamp-ink"], page["stamp-bg"]) >= 4.5

    def test_sound_and_picture_keep_their_colours_to_themselves(self):
        """One blue and one vermilion, in the strip of an input, in figures, on the page; given to nothing else."""
        assert (colours.ROLE_COLOURS["audio"], colours.ROLE_COLOURS["video"]) == (colours.SOUND, colours.PICTURE)
        assert set(colours.ROLE_COLOURS) == set(ROLES)
        for theme, page in colours.PAGES.items():
            marks = plots.THEMES[theme]["marks"]
            assert page["sound"] == marks.get(colours.SOUND, colours.SOUND)
            assert page["picture"] == marks.get(colours.PICTURE, colours.PICTURE)
        taken = {colours.SOUND, colours.PICTURE}
        others = [*colours.FREE, *colours.DONOR_COLOURS.values(), *colours.CONDITION_COLOURS.values()]
        assert not taken & set(others)
        assert {name for name, colour in colours.ROLE_COLOURS.items() if colour in taken} == {"audio", "video"}
        named = {name for name, colour in colours.HEAD_COLOURS.items() if colour in taken}
        assert named == {"sound carrier", "picture writer"}

    def test_no_other_file_names_a_colour(self):
        package = Path(av_lens.__file__).parent
        files = [path for kind in ("py", "css", "js", "j2") for path in package.rglob(f"*.{kind}")]
        assert len(files) > 150
        literal = re.compile(r"#(?:[0-9a-f]{8}|[0-9a-f]{6}|[0-9a-f]{3,4})\b|(?:rgb|hsl)a?\(\s*\d", re.I)
        found = {
            f"{path.relative_to(package)}: {match.group()}"
            for path in files
            if path.name != "colours.py"
            for match in literal.finditer(path.read_text())
        }
        assert not found, "write these in av_lens/colours.py, with what they mean"

    def test_marks_stand_out_on_both(self):
        for colour in (colours.SOUND, colours.PICTURE, colours.GREEN):
            assert min(self.contrast(colour, "#ffffff"), self.contrast(colour, "#14171c")) >= 3.0


class TestPatterns:
    def test_the_view_carries_its_script_and_loads_nothing(self):
        pytest.importorskip("circuitsvis")
        view = plots.attention_patterns(np.tril(np.ones((2, 3, 3))), ["a", "b", "c"], names=["L0 H0", "L0 H1"])
        assert "unpkg.com" not in view.html.split("CircuitsVis.render(")[-1]
        assert "import {" not in view.html[:300]
        assert view._repr_html_() == view.html
        assert '"L0 H1"' in view.html

    def test_refusals(self):
        with pytest.raises(InputError, match=r"got \(2, 3, 3\) and 2 tokens"):
            plots.attention_patterns(np.ones((2, 3, 3)), ["a", "b"])
        with pytest.raises(InputError, match="1 names were given for 2 heads"):
            plots.attention_patterns(np.ones((2, 3, 3)), ["a", "b", "c"], names=["x"])
