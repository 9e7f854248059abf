"""Two people agree: the figures of protocol sections 2 and 4, recomputed on av-tiny by a plain second implementation.

The second implementation (`plain_forward`, `plain_protocol`) was written from the protocol's text: HuggingFace forwards
and hooks of its own, one conflict and one edit at a time. Both must give the same numbers to 1e-4.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from plain_cases import case, checkpoint, dealt, staged, tokens, with_thirds
from plain_forward import PlainEdit, PlainModel
from plain_protocol import RELEASES, Plain, mean
from tiny import tiny_clip, tiny_hf_model, tiny_processor, untouched

from av_lens.inputs import Answer, Conflict
from av_lens.isolation import isolate
from av_lens.isolation.measuring.behaviour import rows_of, survey
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.measuring.effects import Request, measure_requests
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.naming.evidence import gather
from av_lens.isolation.sets.sets import release_of_sets
from av_lens.model import load
from av_lens.results.dealing import CONFIRMATION, DISCOVERY
from av_lens.results.statistics import Bootstrap

ATOL = 1e-4
HEADS = {"suffix": [(4, 7), (2, 5)], "generation": [(4, 3)]}
MORE_HEADS = [(1, 2), (4, 3), (4, 6), (4, 7), (5, 0), (6, 4)]

# Columns of the table of heads.
SIDE_BY_SIDE = {
    **{f"release_{donor}": f"release/{donor}" for donor in RELEASES},
    "question_share": "question's own/mean_other - mean_task",
    "reads_picture": "reads picture/wa",
    "reads_sound": "reads sound/vw",
    "sufficiency": "sufficiency/va",
    "silenced": "silenced/blank_a - blank_muted",
    "carries": "carries/blank_muted",
}
BY_DONOR = {
    "repair": "repair",
    "release_on_sound": "release on sound",
    "release_on_picture": "release on picture",
    "release_norm_frozen": "release (norm frozen)",
}


@pytest.fixture(scope="module")
def model():
    return load("av-tiny")


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    """Five conflicts in both hands; the first has no third clip."""
    listed = staged(tmp_path_factory.mktemp("small"), conflicts=5, seed=5)
    for i, one in enumerate(listed[1:], start=1):
        third = next(other.sound for other in listed if other.answers[0] not in one.answers)
        listed[i] = replace(one, third=third)
    return both_hands(model, listed)


def both_hands(model, listed, plain_model=None):
    n = len(listed)
    cases = [case(model, one) for one in listed]
    boot = Bootstrap.draw(range(n), [f"s{i}" for i in range(n)], [f"p{i}" for i in range(n)], seed=0, draws=50)
    ids = tokens(model, listed)
    read = [replace(one, answers=tuple(Answer(word, ((ids[word],),)) for word in one.answers)) for one in listed]
    return SimpleNamespace(
        cases=cases,
        plain=Plain(plain_model or PlainModel.opened(checkpoint("av-tiny")), cases, ids),
        bench=Bench(ModelEngine(model), read, Candidates.of(read, model.tokenizer)),
        boot=boot,
        rows=np.arange(n),
    )


def chunks_with_means(one, site):
    chunks = one.bench.chunks(one.rows.tolist(), site)
    means = Means.over(chunks)
    for chunk in chunks:
        chunk.means = means
    return chunks


def figures(rows):
    """(quantity, cell, rule) -> value, of rows of the behaviour table."""
    return {(row["quantity"], row.get("cell", ""), row.get("rule", "")): row["value"] for row in rows}


def plain_figures(plain, cases):
    """The same, by the second implementation."""
    found = {
        (name, "va" if name.startswith("median") else "", ""): value for name, value in plain.behaviour(cases).items()
    }
    for cell in ("va", "av", "blank_a", "blank_v", "blank_muted"):
        found["M", cell, ""] = mean(plain.m(one, cell) for one in cases)
    right = {"va": 0, "aa": 0, "vv": 1, "av": 1, "blank_a": 0, "blank_v": 1}
    seen = {"va": 1, "v_muted": 1, "a_muted": 0}
    for question, cells in (("asked", right), ("see", seen)):
        for cell, whose in cells.items():
            rates = plain.says(cases, cell, whose, question=question)
            for rule, rate in zip(("two", "vocabulary"), rates, strict=True):
                found["accuracy", cell if question == "asked" else f"{cell} (see)", rule] = rate
    for cell in ("v_muted", "a_muted", "blank_muted"):
        for whose, name in enumerate(("sound", "picture")):
            for rule, rate in zip(("two", "vocabulary"), plain.says(cases, cell, whose), strict=True):
                found[f"says {name}", cell, rule] = rate
    return found


def assert_same_figures(ours, theirs):
    assert not set(ours) - set(theirs)
    wrong = {key: (value, theirs[key]) for key, value in ours.items() if not abs(value - theirs[key]) < ATOL}
    assert not wrong


def plain_effects(plain, cases, pool, heads, site):
    """estimand/donor -> head -> one value per conflict."""
    found = {}
    for head in heads:
        each = [plain.head_effects(one, head, site, pool) for one in cases]
        for key in each[0]:
            found.setdefault(key, {})[head] = np.array([effects[key] for effects in each])
    return found


def assert_same_effects(ours, arrays, prefix):
    """Every estimand of the record but the logit attribution, which is no effect of an edit."""
    recorded = {key.removeprefix(prefix) for key in arrays if key.startswith(prefix)}
    assert recorded - {"dla/"} == set(ours)
    for key, by_head in ours.items():
        for (layer, head), values in by_head.items():
            theirs = arrays[prefix + key][:, layer, head]
            what = f"{prefix}{key} of L{layer}H{head}"
            np.testing.assert_allclose(values, theirs, rtol=0, atol=ATOL, err_msg=what)


def test_an_edit_from_the_embeddings_is_an_edit_from_the_pixels(small):
    one = small.cases[1]
    base = small.plain.run(one, "va")
    there = small.plain.donor_z(one, "va", "blank_muted", (4, 7), "suffix", small.cases)
    for edit in (PlainEdit({(4, 7): there}), PlainEdit({(4, 7): there}, hold_after=4)):
        pairs = zip(*(small.plain.model.edited(base, edit, whole=how) for how in (False, True)), strict=True)
        for quick, whole in pairs:
            assert float((quick - whole).abs().max()) < 1e-5
            assert float((quick - base.logits).abs().max()) > 0.01
    for unedited in small.plain.model.edited(base, PlainEdit()):
        assert float((unedited - base.logits).abs().max()) < 1e-5


def test_section_2_on_five_conflicts(small):
    found = survey(small.bench.chunks(small.rows.tolist()), len(small.rows))
    assert found.competent.tolist() == [small.plain.competent(one) for one in small.cases]
    half = Half(DISCOVERY, small.rows, small.rows.tolist(), small.boot, found.G, found.C)
    theirs = figures(rows_of(found, half, "all"))
    assert_same_figures(plain_figures(small.plain, small.cases), theirs)


@pytest.mark.parametrize("site", HEADS)
def test_section_4_on_a_few_heads(small, site):
    g, c = (np.array([figure(one) for one in small.cases]) for figure in (small.plain.g, small.plain.c))
    half = Half(DISCOVERY, small.rows, small.rows.tolist(), small.boot, g, c)
    chunks = chunks_with_means(small, site)
    found = gather(chunks, half, HEADS[site], site=site, s=0.1, family=1, seed=0)
    ours = plain_effects(small.plain, small.cases, small.cases, HEADS[site], site)
    assert_same_effects(ours, found.arrays(), f"{site}/")
    assert np.isnan(ours["reads picture/wa"][HEADS[site][0]]).tolist() == [True, False, False, False, False]


def test_a_joint_edit_of_a_group_and_of_a_set(small):
    sets = [((4, 6), (4, 7)), ((2, 5), (4, 3), (5, 0))]
    chunks = chunks_with_means(small, "suffix")
    for donor in RELEASES:
        found = release_of_sets(chunks, sets, [donor] * len(sets), small.rows)
        for heads, theirs in zip(sets, found.release, strict=True):
            ours = [small.plain.effect(one, donor, heads, "suffix", small.cases)["M"] for one in small.cases]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=ATOL)


@pytest.mark.parametrize("see", ["?", "Who is it there?"])
def test_a_question_of_another_length_is_aligned_from_the_end(see):
    """On a random model over bytes: the organisms' questions all have one length."""
    hf = tiny_hf_model(seed=1)
    plain_model = PlainModel(untouched(hf))
    model = load(hf_model=hf, processor=tiny_processor())
    answers = [("a", "b"), ("c", "d"), ("d", "e"), ("b", "f")]
    listed = [
        Conflict(
            sound=tiny_clip(seed=2 * i),
            picture=tiny_clip(seed=2 * i + 1),
            question="What?",
            answers=pair,
            see=see,
            id=f"c{i}",
        )
        for i, pair in enumerate(answers)
    ]
    one = both_hands(model, listed, plain_model)
    longer = len(see) - len("What?")
    assert [len(each.see_site["suffix"]) - len(each.site["suffix"]) for each in one.cases] == 4 * [longer]
    wanted = [Request("va", donor) for donor in ("mean_other", "mean_task")]
    heads = [(0, 1), (2, 3)]
    found = measure_requests(chunks_with_means(one, "suffix"), wanted, heads=heads, examples=one.rows)
    for request in wanted:
        for layer, head in heads:
            ours = [one.plain.effect(x, request.donor, [(layer, head)], "suffix", one.cases)["M"] for x in one.cases]
            np.testing.assert_allclose(ours, found[request].margin[:, layer, head], rtol=0, atol=ATOL)


@pytest.mark.slow
def test_the_whole_record_of_an_isolation(model, tmp_path):
    """Both sites on 44 conflicts; `confirmation` on the heads that were named."""
    listed = staged(tmp_path, conflicts=44, seed=11)
    found = isolate(model, listed, sites=tuple(HEADS), gate="report", quick=True, named_only=True)
    halves = dealt(listed, seed=0)
    assert halves == found.protocol["halves"]["dealt"]
    cases = {one.id: case(model, one) for one in with_thirds(listed, halves, seed=0)}
    plain = Plain(PlainModel.opened(checkpoint("av-tiny")), list(cases.values()), tokens(model, listed))
    table = found.conflicts.set_index("id")
    assert dict(zip(table.index, table["half"], strict=True)) == halves
    chosen = {one.id for one in cases.values() if plain.competent(one)}
    assert set(table.index[table["competent"]]) == chosen
    dealt_cases = {
        half: [one for one in cases.values() if halves[one.id] == half] for half in (DISCOVERY, CONFIRMATION)
    }
    kept = {half: [one for one in group if one.id in chosen] for half, group in dealt_cases.items()}
    for half, group in kept.items():
        assert_behaviour(plain, found, half, "all", dealt_cases[half])
        assert_behaviour(plain, found, half, "competent", group)
        for site in HEADS:
            named = sorted({(int(r.layer), int(r.head)) for r in found.heads[found.heads["site"] == site].itertuples()})
            heads = sorted({*MORE_HEADS, *named}) if half == DISCOVERY else named
            assert named
            ours = plain_effects(plain, group, kept[DISCOVERY], heads, site)
            assert_same_effects(ours, found.arrays, f"{half}/{site}/")
            assert_evidence_table(ours, found, half, site, mean(plain.g(one) for one in group))
            assert_heads_table(ours, found, half, site, mean(plain.g(one) for one in group))


def assert_behaviour(plain, found, half, chosen, cases):
    frame = found.behaviour[(found.behaviour["half"] == half) & (found.behaviour["chosen"] == chosen)]
    assert_same_figures(plain_figures(plain, cases), figures(frame.to_dict("records")))
    assert set(frame["n"]) == {len(cases)}
    if chosen == "competent":
        for name in ("G", "C", "gap"):
            assert found.summary[f"{name} {half}"] == pytest.approx(plain.behaviour(cases)[name], abs=ATOL)


def assert_evidence_table(ours, found, half, site, g):
    frame = found.evidence[(found.evidence["half"] == half) & (found.evidence["site"] == site)]
    rows = frame.set_index(["estimand", "donor", "layer", "head"])
    for key, by_head in ours.items():
        for (layer, head), values in by_head.items():
            row = rows.loc[(*key.split("/"), layer, head)]
            assert row["mean"] == pytest.approx(values.mean(), abs=ATOL)
            assert row["share"] == pytest.approx(values.mean() / g, abs=ATOL)
            assert row["n"] == len(values)


def assert_heads_table(ours, found, half, site, g):
    """`effect` is confirmation's, `discovery_effect` discovery's; the donor is the one that released most there.

    A head that only the search for a set named has its effect in the set, which is section 6's; its own stand beside.
    """
    for row in found.heads[found.heads["site"] == site].to_dict("records"):
        head = (row["layer"], row["head"])
        prefix = "discovery_" if half == DISCOVERY else ""
        if row["estimand"] != "release in the set":
            effect = ours[f"{row['estimand']}/{row['donor']}"][head].mean()
            assert row[f"{prefix}effect"] == pytest.approx(effect, abs=ATOL)
            assert row[f"{prefix}share"] == pytest.approx(effect / g, abs=ATOL)
        if row["estimand"] == "release":
            share = ours[f"direct/{row['donor']}"][head].mean() / effect
            assert row[f"{prefix}direct_share"] == pytest.approx(share, abs=ATOL)
            if half == DISCOVERY:
                best = max(RELEASES, key=lambda donor, head=head: ours[f"release/{donor}"][head].mean())
                assert row["donor"] == best
        if half == CONFIRMATION:
            columns = dict(SIDE_BY_SIDE)
            if row["donor"] in RELEASES:
                columns |= {column: f"{name}/{row['donor']}" for column, name in BY_DONOR.items()}
            for column, key in columns.items():
                assert row[column] == pytest.approx(ours[key][head].mean(), abs=ATOL), column
