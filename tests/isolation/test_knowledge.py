"""What is known where: the lens on the micro model's own answers, probes on streams in which the layer is known."""

from __future__ import annotations

import numpy as np
import pytest
from fake_model import FakeModel, bench_of, fake_conflicts
from micro import micro_conflict, micro_model
from tiny import letter

from av_lens.isolation.explaining import knowledge
from av_lens.isolation.explaining.knowledge import LENS_CELLS, MOST_POSITIONS, SPANS, lens_readings, spaced
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.methods.probes import Streams, probe
from av_lens.results.dealing import CONFIRMATION, DISCOVERY, Halves, Member
from av_lens.results.record import table
from av_lens.results.statistics import Bootstrap
from av_lens.spans import SpanMap

N, LAYER = 32, 2


def test_the_lens_reads_the_answer_that_the_model_gives():
    conflict, model = micro_conflict(), micro_model()
    bench = Bench(ModelEngine(model), [conflict], Candidates.of([conflict], model.tokenizer))
    (chunk,) = bench.chunks([0], "suffix")
    found = lens_readings(chunk, [letter(name) for name in "abv"], 0)
    assert set(found) == {f"{cell} {span}{end}" for cell in LENS_CELLS for span in SPANS for end in ("", " null")}
    # After the last layer OUT = -5 in va: "v" is the top and "a" the last of all tokens; in blank_a OUT = 4.
    assert found["va generation"][0, :, -1].tolist() == [0, 1]
    assert found["blank_a generation"][0, :, -1].tolist() == [1, 0]
    # Its own words are no null; "b", whose logit is 0, comes right after "v" and "z".
    assert found["va generation null"][0, -1] == 1
    # After layers 1 and 2 nothing is said yet, so no word is below another: the maximum over layers is 1 for either.
    assert found["va generation"][0, :, 0].tolist() == [1, 1]


def test_long_spans_are_read_at_evenly_spaced_positions():
    spans = SpanMap.of_roles(["boundary", *["audio"] * 200, "question", "generation"])
    chosen = spaced(spans, "audio").positions
    assert len(chosen) == MOST_POSITIONS
    assert (chosen[0], chosen[-1]) == (1, 200)
    assert set(np.diff(chosen)) <= {3, 4}
    assert spaced(spans, "question").positions.tolist() == [201]
    assert len(spaced(spans, "video|image")) == 0


def halves_of(n):
    found = []
    for number, name in enumerate((DISCOVERY, CONFIRMATION)):
        rows = np.arange(number, n, 2)
        clips = [f"s{i}" for i in rows], [f"p{i}" for i in rows]
        boot = Bootstrap.draw(rows.tolist(), *clips, seed=0, draws=200)
        found.append(Half(name, rows, rows.tolist(), boot, np.ones(len(rows)), -np.ones(len(rows))))
    return found


@pytest.fixture
def probed(monkeypatch):
    """Streams of noise, but the sound's class is written at the generation position after two layers."""
    conflicts = fake_conflicts(N, n_classes=3)
    bench = bench_of(FakeModel(n_classes=3), conflicts)
    rng = np.random.default_rng(0)

    def pooled(bench, halves):
        order = [int(i) for half in halves for i in half.examples]
        vectors = rng.normal(size=(N, 2, 4, len(SPANS), 6)).astype(np.float32)
        labels = [(str(conflicts[i].answers[0]), str(conflicts[i].answers[1])) for i in order]
        for row, label in enumerate(labels):
            for cell in range(2):
                vectors[row, cell, LAYER, 3, int(label[cell])] += 30.0
        members = tuple(Member(conflicts[i].id, f"s{i}", f"p{i}", str(conflicts[i].answers[0])) for i in order)
        return Streams(vectors, SPANS, ("va", "av"), members, tuple(labels), "streams")

    monkeypatch.setattr(knowledge, "pooled", pooled)
    return table("knowledge", knowledge._probe_rows(bench, halves_of(N), 0))


def test_probes_find_the_layer_on_discovery_and_test_it_on_confirmation(probed):
    sound = probed.query("word == 'sound' and span == 'generation'").set_index("layer")
    assert sound.index[sound["chosen"]].tolist() == [LAYER]
    assert sound.loc[LAYER, "value"] == 1.0
    assert sound.loc[LAYER, "excess_low"] > 0.2
    assert sound.loc[LAYER, "excess"] == pytest.approx(1.0 - sound.loc[LAYER, "null"])
    assert (sound["n"] == N // 2).all()
    assert (sound.drop(index=LAYER)["value"] < 0.8).all()
    assert sound.loc[LAYER, "note"].startswith("1.00 where it was chosen")
    assert probed.groupby(["word", "span"])["chosen"].sum().eq(1).all()


def test_probes_learn_and_are_tested_on_the_halves_that_they_are_given():
    halves = halves_of(N)
    order = [int(i) for half in halves for i in half.examples]
    rng = np.random.default_rng(1)
    labels = tuple((str(i % 3), str((i + 1) % 3)) for i in order)
    members = tuple(Member(f"c{i}", f"s{i}", f"p{i}", str(i % 3)) for i in order)
    streams = Streams(rng.normal(size=(N, 2, 2, 1, 4)), ("audio",), ("va", "av"), members, labels, "streams")
    given = Halves(tuple(half.name for half in halves for _ in half.examples), tuple(order), 0)
    for halved in (given, None):
        said = probe(None, streams, halves=halved, draws=1).provenance
        assert (said["conflicts"] == [f"c{i}" for i in halves[1].examples]) == (halved is given)


def test_too_few_conflicts_are_said_and_not_measured(monkeypatch):
    conflicts = fake_conflicts(8, n_classes=3)
    bench = bench_of(FakeModel(n_classes=3), conflicts)
    labels = tuple((str(c.answers[0]), str(c.answers[1])) for c in conflicts)
    members = tuple(Member(c.id, f"s{c.id}", f"p{c.id}", str(c.answers[0])) for c in conflicts)
    streams = Streams(np.zeros((8, 2, 2, len(SPANS), 3)), SPANS, ("va", "av"), members, labels, "streams")
    monkeypatch.setattr(knowledge, "pooled", lambda bench, halves: streams)
    rows = knowledge._probe_rows(bench, halves_of(8), 0)
    assert [row["word"] for row in rows] == ["sound", "picture"]
    assert all("probes need 8 in each" in row["note"] for row in rows)
    assert table("knowledge", rows)["value"].isna().all()
