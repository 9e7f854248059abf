"""Two checkpoints on one manifest: what changed by hand, nothing where nothing did, from models and from saved runs."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from fake_model import FakeModel, PaperEngine, fake_conflicts, ring
from typer.testing import CliRunner

import av_lens as avl
from av_lens.cli.main import app
from av_lens.errors import InputError, ProtocolError
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.running import comparing
from av_lens.results import Comparison, Isolation
from av_lens.results.dyadic import Dyadic
from av_lens.results.statistics import Bootstrap, holm

CONFLICTS = fake_conflicts(44, n_classes=10)
OPTIONS = {"s": 0.1}


def broken():
    """Its writer (6), gate (3) and opponent (2) silence the sound: C = 4 - 6 - 2, G = 7."""
    return FakeModel(n_classes=10)


def mended():
    """Without the writer, and with a weaker gate: C = 4 + 1.5 - 2."""
    return FakeModel(n_classes=10, writer=0.0, gate=0.5)


@pytest.fixture(scope="module", autouse=True)
def large_stacks():
    """A model on paper is small."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ModelEngine, "together", PaperEngine.together)
        yield


def compared(a, b, conflicts=CONFLICTS, **options):
    return avl.compare(a, b, conflicts, **OPTIONS | options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both models compared, their runs kept."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, compared(broken(), mended(), out=folder)


def rows(found):
    return found.nodes.set_index("name")


def test_what_was_mended_is_gone_and_the_rest_is_said_by_how_much(runs):
    found, shown = runs[1], runs[1].behaviour.set_index(["half", "quantity"])
    assert found.verdict_kind == "changed"
    for half in ("both", "discovery", "confirmation"):
        assert shown.loc[half, "C"]["change"] == pytest.approx(7.5, abs=0.1)
        assert shown.loc[half, "G"]["change"] == pytest.approx(0, abs=0.1)
        assert shown.loc[half, "gap"]["change"] == pytest.approx(-7.5, abs=0.1)
    assert shown.loc["both", "gap"]["high"] < 0
    nodes = rows(found)
    assert nodes.loc["L2H0", ["role_a", "role_b", "outcome"]].tolist() == ["picture writer", "", "gone"]
    assert nodes.loc["L2H0", "change"] == pytest.approx(-6, abs=0.1)
    assert nodes.loc["L0H1", ["role_a", "role_b", "outcome"]].tolist() == ["gate", "gate", "weaker"]
    assert nodes.loc["L0H1", "change"] == pytest.approx(-1.5, abs=0.1)
    assert nodes.loc["L2H1", "outcome"] == "unchanged"
    assert nodes.loc["L2H1", "delta"] == pytest.approx(0.7, abs=0.02)
    assert re.search(r"gone: L2H0 \(picture writer, [56]\.\d\d to -?0\.0", found.verdict)
    assert found.verdict.startswith("Exploratory, no verdict. 44 of 44 conflicts are competent in both. Hearing under")
    assert "(C) rises, from -3.99 to 3.5" in found.verdict


def test_turned_round_it_is_new(runs):
    folder = runs[0]
    found = avl.compare(folder / "b", folder / "a", CONFLICTS, models=(mended(), broken()))
    nodes = rows(found)
    assert nodes.loc["L2H0", ["role_a", "role_b", "outcome"]].tolist() == ["", "picture writer", "new"]
    assert nodes.loc["L0H1", "outcome"] == "stronger"
    assert nodes.loc["L2H0", "b"] == pytest.approx(6, abs=0.1)


def test_with_itself_nothing_is_found(runs):
    found = avl.compare(runs[0] / "a", runs[0] / "a")
    assert found.verdict_kind == "no change found"
    assert "No change is found." in found.verdict
    assert set(found.nodes["outcome"]) == {"unchanged"}
    assert len(found.nodes) > 2
    assert not found.nodes[["change", "low", "high"]].to_numpy().any()
    assert not found.behaviour[["change", "low", "high"]].to_numpy().any()
    assert (found.nodes["p_holm"] == 1).all()


def held_out(found):
    table = found.conflicts
    return table[(table["half"] == "confirmation") & table["competent"]]


def test_figures_are_those_of_a_plain_second_computation(runs):
    folder, found = runs
    a, b = (Isolation.load(folder / name) for name in "ab")
    parts = held_out(a)["component"].tolist()
    n = len(parts)
    boot = Bootstrap.draw(parts, [f"a{i}" for i in range(n)], [f"b{i}" for i in range(n)], seed=1)
    change = held_out(b)["C"].to_numpy() - held_out(a)["C"].to_numpy()
    row = found.behaviour.set_index(["half", "quantity"]).loc["confirmation", "C"]
    bounds = boot.mean(change)
    assert (row["change"], row["low"], row["high"]) == tuple(float(x) for x in (bounds.value, bounds.low, bounds.high))
    nodes = rows(found)
    for name, at in (("L0H1", (0, 1)), ("L2H1", (2, 1))):
        key = f"confirmation/suffix/release/{nodes.loc[name, 'donor']}"
        difference = (b.arrays[key] - a.arrays[key])[:, *at]
        assert nodes.loc[name, "change"] == pytest.approx(difference.mean(), abs=1e-12)
        assert nodes.loc[name, "donor"] == a.heads.set_index(["layer", "head"]).loc[at, "donor"]
    np.testing.assert_array_equal(found.nodes["p_holm"], holm(found.nodes["p"].to_numpy()))
    assert found.conflicts["C_b"].tolist() == b.conflicts["C"].tolist()


def test_shared_sources_are_judged_dyadically(runs):
    """The same record as if its deal had been of sources, each shared by two conflicts."""
    a, b = (Isolation.load(runs[0] / name) for name in "ab")
    places = {one.id: (two.sound.sha256, two.picture.sha256) for one, two in zip(CONFLICTS, ring(44), strict=True)}
    protocol = {**a.protocol, "halves": {**a.protocol["halves"], "rule": "dyadic"}}
    found = avl.compare(dataclasses.replace(a, protocol=protocol, provenance={**a.provenance, "sources": places}), b)
    table = found.conflicts[found.conflicts["half"] == "discovery"]
    rule = Dyadic.of([places[name] for name in table["id"]])
    bounds = rule.mean((table["C_b"] - table["C_a"]).to_numpy())
    row = found.behaviour.set_index(["half", "quantity"]).loc["discovery", "C"]
    assert (row["low"], row["high"]) == (float(bounds.low), float(bounds.high))


def test_saved_runs_are_enough_but_for_what_they_do_not_hold(runs, tmp_path):
    folder, found = runs
    again = avl.compare(folder / "a", str(folder / "b"))
    assert rows(again).loc["L2H0", "outcome"] == "not measured"
    assert again.reasons[-1].startswith("The run of B does not hold the held-out effects of L2H0")
    counted = mended()
    measured = avl.compare(folder / "a", folder / "b", CONFLICTS, models=(broken(), counted))
    assert counted.runs < 60  # readings and effects stand in the folder: discovery's means alone are made again
    in_memory = [Isolation.load(folder / name) for name in "ab"]
    for one in (measured, avl.compare(*in_memory, CONFLICTS, models=(broken(), mended()))):
        assert one.nodes.equals(found.nodes)
        assert one.behaviour.equals(found.behaviour)
        assert one.verdict == found.verdict
    with pytest.raises(ProtocolError, match=r"the run of B was made with other weights than the model and conflicts"):
        avl.compare(*in_memory, CONFLICTS, models=(broken(), broken()))


def test_members_of_a_set_are_measured_in_it(runs, monkeypatch):
    """The gate's row as if its set had named it: what the set loses without it, in both."""
    folder = runs[0]
    a, b = (Isolation.load(folder / name) for name in "ab")
    in_set = (a.heads["layer"] == 0) & (a.heads["head"] == 1) & (a.heads["role"] == "gate")
    a = dataclasses.replace(a, heads=a.heads.assign(estimand=a.heads["estimand"].mask(in_set, "release in the set")))
    built = a.members[a.members["chosen"]]
    assert (0, 1) in set(zip(built["layer"], built["head"], strict=True))
    row = rows(avl.compare(a, b, CONFLICTS, models=(broken(), mended()))).loc["L0H1"]
    assert row["estimand"] == "release in the set"
    assert (row["a"], row["b"]) == pytest.approx((3, 1.5), abs=0.1)
    assert (row["role_a"], row["role_b"]) == ("gate", "gate")


def test_it_is_saved_and_drawn_and_written(runs, tmp_path):
    found = runs[1]
    again = Comparison.load(found.save(tmp_path / "found"))
    for name in ("behaviour", "nodes", "captions", "conflicts"):
        assert getattr(again, name).equals(getattr(found, name)), name
    assert (again.verdict, again.reasons, again.stamps) == (found.verdict, found.reasons, found.stamps)
    figure = again.plot()
    assert list(figure.data[0].x) == found.behaviour.query("half == 'both'")["change"].tolist()
    assert [list(trace.x) for trace in figure.data[1:]] == [found.nodes[side].tolist() for side in "ab"]
    page = found.report(tmp_path / "page.html").read_text("utf-8")
    assert "Verdict: <span" in page
    for word in ("L2H0", "picture writer", "gone", "exploratory", "protocol_hash"):
        assert word in page
    with pytest.raises(InputError, match="wide"):
        found.plot(wide=True)
    with pytest.raises(InputError, match=r"table 'nodes' of a comparison has columns"):
        dataclasses.replace(found, nodes=found.nodes.drop(columns="p"))
    with pytest.raises(InputError, match=r"an outcome is one of gone, weaker"):
        dataclasses.replace(found, nodes=found.nodes.assign(outcome="better"))


def test_what_cannot_be_paired_is_refused(runs):
    folder = runs[0]
    a, b = (Isolation.load(folder / name) for name in "ab")

    def otherwise(match, **changed):
        with pytest.raises(ProtocolError, match=match):
            avl.compare(a, dataclasses.replace(b, protocol={**b.protocol, **changed}))

    other = {**b.protocol["conflicts"], "c003": {**b.protocol["conflicts"]["c003"], "sound": "another"}}
    otherwise(
        r"other conflicts: they differ in the sound of conflict 'c003'\. Compare runs of one manifest", conflicts=other
    )
    fewer = {name: parts for name, parts in other.items() if name != "c003"}
    otherwise(r"other conflicts: 'c003' is in A alone", conflicts=fewer)
    otherwise(r"layout is 'in_video' in A and 'separate' in B", layout="separate")
    otherwise(r"sites is \['suffix'\] in A and \['audio'\] in B", sites=["audio"])
    for name, value, said in (("n_heads", 8, r"numbers of heads \(4 and 8\)"), ("tokenizer", "x", "tokenizers"),
                              ("prompt", "x", "layouts of the prompt")):  # fmt: skip
        otherwise(f"other {said}.*Compare checkpoints of one architecture", model={**b.protocol["model"], name: value})
    deaf = dataclasses.replace(b, conflicts=b.conflicts.assign(competent=np.arange(len(b.conflicts)) < 30))
    with pytest.raises(ProtocolError, match=r"conflicts in the halves are competent in both models \(44 in A, 30 in B"):
        avl.compare(a, deaf)
    with pytest.raises(InputError, match=r"A is a model: give the conflicts"):
        avl.compare(broken(), b)
    with pytest.raises(InputError, match="no isolation is saved in"):
        avl.compare(a, folder / "nowhere")
    with pytest.raises(ProtocolError, match=r"B \(paper\) cannot be compared: .*conflicts were given"):
        avl.compare(a, broken(), CONFLICTS[:10])
    old = dataclasses.replace(a, provenance={k: v for k, v in a.provenance.items() if k != "sources"})
    with pytest.raises(InputError, match=r"A's record does not name its conflicts' sources: an older av_lens"):
        avl.compare(old, b)


@pytest.mark.parametrize(
    ("a", "b", "p", "said"),
    [(3, 0.5, 0.01, "gone"), (3, 1.5, 0.01, "weaker"), (0.5, 3, 0.01, "new"), (1.5, 3, 0.01, "stronger"),
     (3, 0, 0.05, "unchanged"), (3, np.nan, np.nan, "not measured"), (0.2, 0.4, 0.01, "stronger")],
)  # fmt: skip
def test_outcomes(a, b, p, said):
    assert comparing.outcome({"a": a, "b": b, "change": b - a, "delta": 1.0}, p) == said


def test_captions_are_compared_where_both_wrote_them(runs):
    folder = runs[0]
    sides = []
    for name, share in (("a", 0.0), ("b", 0.5)):
        one = Isolation.load(folder / name)
        n = int((one.conflicts["half"] == "confirmation").sum())
        heard = np.arange(n) < share * n
        table = one.captions.reindex(range(2)).assign(arm=["none", "cut"], k=0, draw=-1, n=n, members="", donor="")
        arrays = {**one.arrays, "confirmation/captions": np.stack([np.stack([heard, ~heard])] * 3).astype(float)}
        sides.append(dataclasses.replace(one, captions=table, arrays=arrays))
    found = avl.compare(*sides)
    row = found.captions.set_index(["arm", "figure"])
    assert row.loc[("none", "heard"), "change"] == pytest.approx(0.5, abs=0.02)
    assert row.loc[("cut", "seen"), "change"] == pytest.approx(-0.5, abs=0.02)
    assert row.loc[("none", "heard"), "low"] > 0
    assert "The share of captions that name what is heard rises, from 0.00 to 0.5" in found.verdict
    assert not len(avl.compare(sides[0], Isolation.load(folder / "b")).captions)


def test_the_command_reads_two_runs(runs, tmp_path):
    folder = runs[0]
    words = ["compare", str(folder / "a"), str(folder / "b"), "--out", str(tmp_path / "out")]
    made = CliRunner().invoke(app, words)
    assert made.exit_code == 0, made.output
    for said in ("competent in both", "nodes named in either", "not measured", "written"):
        assert said in made.output
    assert (tmp_path / "out" / "comparison.html").stat().st_size > 10**6
    assert Comparison.load(tmp_path / "out" / "comparison.nc").verdict
    wrong = CliRunner().invoke(app, ["compare", "nowhere", str(folder / "b")])
    assert wrong.exit_code == 2
    assert "nowhere" in wrong.output


@pytest.mark.slow
def test_av_tiny_and_the_balanced_one(tmp_path):
    """Minutes: what training with labelled conflicts mended, and in which heads; nothing between a model and itself."""
    from av_lens.lab.calibration import stage

    listed = avl.conflicts(stage(tmp_path / "clips", conflicts=132, seed=0))
    tiny, balanced = avl.load("av-tiny"), avl.load("av-tiny-balanced")
    found = avl.compare(tiny, balanced, listed, out=tmp_path / "one")
    print(found.verdict, found.nodes.to_string(), sep="\n")
    assert found.verdict_kind == "changed"
    assert not found.stamps
    assert found.behaviour.query("half == 'both' and quantity == 'gap'")["high"].item() < -2
    suppressors = found.nodes[found.nodes["role_a"].isin(["picture writer", "gate", "sound opponent"])]
    assert set(suppressors["name"]) >= {"L4H2", "L4H3", "L4H6", "L4H7"}
    assert (suppressors["change"] < 0).all()
    itself = avl.compare(tmp_path / "one" / "a", tiny, listed)
    assert itself.verdict_kind == "no change found"
    assert set(itself.nodes["outcome"]) == {"unchanged"}
