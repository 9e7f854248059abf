"""Two people agree: the figures of protocol sections 2 to 5, recomputed on av-tiny by a plain second implementation.

The second implementation (`plain_forward`, `plain_protocol`) was written from the protocol's text: HuggingFace forwards
and hooks of its own, one conflict and one edit at a time. Both must give the same numbers to 1e-4.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from plain_cases import case, checkpoint, dealt, staged, tokens, with_thirds
from plain_forward import MLP, PlainEdit, PlainModel
from plain_protocol import DIRECT, RELEASES, WRITE, Held, Plain, mean
from tiny import tiny_clip, tiny_hf_model, tiny_processor, untouched

from av_lens.inputs import Answer, Conflict
from av_lens.inputs.answers import FORMS, forms_of
from av_lens.isolation import isolate
from av_lens.isolation.measuring.behaviour import answered, rows_of, survey
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.cells import mirrored_conflict
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.measuring.effects import Request, measure_requests
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.naming.evidence import gather, hold, null_share
from av_lens.isolation.naming.roles import HELD, Evidence
from av_lens.isolation.sets.members import in_context
from av_lens.isolation.sets.sets import BuiltSet, release_of_sets
from av_lens.model import load
from av_lens.results.dealing import CONFIRMATION, DISCOVERY
from av_lens.results.exchanged import exchanged, exchanged_key
from av_lens.results.statistics import Bootstrap

ATOL = 1e-4
NODES = {"suffix": [(4, 7), (5, MLP)], "generation": [(4, 3)]}
MORE_NODES = [(1, 2), (4, 3), (4, 6), (4, 7), (5, 0), (6, 4), (4, MLP), (6, MLP)]

# Columns of the table of heads.
SIDE_BY_SIDE = {
    **{f"release_{donor}": f"release/{donor}" for donor in RELEASES},
    "release_half_dose": "release/half_dose",
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
    """Four conflicts in both hands; the first has no third clip."""
    listed = staged(tmp_path_factory.mktemp("small"), conflicts=4, seed=5)
    for i, one in enumerate(listed[1:], start=1):
        third = next(other.sound for other in listed if other.answers[0] not in one.answers)
        listed[i] = replace(one, third=third)
    return both_hands(model, listed)


class EncodedOnce(ModelEngine):
    """An engine that takes the cells that the second implementation encoded."""

    def __init__(self, model, cases, suppressed="sound"):
        super().__init__(model)
        self.cases, self.suppressed = {one.id: one for one in cases}, suppressed

    def cells(self, conflict, question):
        own = mirrored_conflict(conflict) if self.suppressed == "picture" else conflict
        asked = {own.question: "hear", own.see: "see", own.control: "control"}[question or conflict.question]
        return Encoded(self.cases[conflict.id].cells[asked], self.suppressed)


class Encoded:
    """The cells of one conflict under one question, by the names that the search has for them."""

    def __init__(self, tensors, suppressed):
        self.tensors, self.suppressed = tensors, suppressed

    def __getitem__(self, cell):
        return self.tensors.inputs(exchanged(cell) if self.suppressed == "picture" else cell)


def both_hands(model, listed, plain_model=None):
    n = len(listed)
    cases = [case(model, one) for one in listed]
    boot = Bootstrap.draw(range(n), [f"s{i}" for i in range(n)], [f"p{i}" for i in range(n)], seed=0, draws=50)
    ids = tokens(model, listed)
    read = [replace(one, answers=tuple(Answer(word, tuple(ids[word])) for word in one.answers)) for one in listed]
    return SimpleNamespace(
        listed=listed,
        cases=cases,
        plain=Plain(plain_model or PlainModel.opened(checkpoint("av-tiny")), cases, ids),
        bench=Bench(EncodedOnce(model, cases), read, Candidates.of(read, model.tokenizer)),
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
    found["dilution", "", ""] = plain.dilution(cases)
    for cell in ("va", "av", "blank_a", "blank_v", "blank_muted"):
        found["M", cell, ""] = mean(plain.m(one, cell) for one in cases)
    right = {"va": 0, "aa": 0, "vv": 1, "av": 1, "blank_a": 0, "blank_v": 1, "audio_only": 0, "audio_only_v": 1}
    seen = {"va": 1, "v_muted": 1, "a_muted": 0}
    for question, cells in (("hear", right), ("see", seen)):
        for cell, whose in cells.items():
            rates = plain.says(cases, cell, whose, question=question)
            for rule, rate in zip(("two", "vocabulary"), rates, strict=True):
                found["accuracy", cell if question == "hear" else f"{cell} (see)", rule] = rate
    for cell in ("v_muted", "a_muted", "blank_muted"):
        for whose, name in enumerate(("sound", "picture")):
            for rule, rate in zip(("two", "vocabulary"), plain.says(cases, cell, whose), strict=True):
                found[f"says {name}", cell, rule] = rate
    return found


def assert_same_figures(ours, theirs):
    assert not set(ours) - set(theirs)
    wrong = {key: (value, theirs[key]) for key, value in ours.items() if not abs(value - theirs[key]) < ATOL}
    assert not wrong


def plain_effects(plain, cases, pool, nodes, site):
    """estimand/donor -> node -> one value per conflict."""
    found = {}
    for node in nodes:
        each = [plain.node_effects(one, node, site, pool) for one in cases]
        for key in each[0]:
            found.setdefault(key, {})[node] = np.array([effects[key] for effects in each])
    return {key: values for key, values in found.items() if not key.startswith("release at the first token")}


def theirs_of(node):
    """A node as the package indexes it."""
    return node[0], -1 if node[1] == MLP else node[1]


def ours_of(layer, which):
    return int(layer), MLP if which == -1 else int(which)


def assert_same_effects(ours, arrays, prefix):
    """Every estimand of the record but the logit attribution, which is no effect of an edit."""
    recorded = {key.removeprefix(prefix) for key in arrays if key.startswith(prefix)}
    assert {key for key in recorded - {"dla/"} if not key.startswith(HELD)} == set(ours)
    for key, by_node in ours.items():
        for node, values in by_node.items():
            theirs = arrays[prefix + key][:, *theirs_of(node)]
            what = f"{prefix}{key} of {node}"
            np.testing.assert_allclose(values, theirs, rtol=0, atol=ATOL, err_msg=what)


def test_an_edit_from_the_embeddings_is_an_edit_from_the_pixels(small):
    one = small.cases[1]
    base = small.plain.run(one, "va")
    nodes = {
        node: small.plain.donor_output(one, "va", "blank_muted", node, "suffix", small.cases, "hear")
        for node in ((4, 7), (5, MLP))
    }
    held = {"hold_after": 5, "hold_mlps": frozenset({6, 7})}
    edits = [PlainEdit({node: new}, **how) for node, new in nodes.items() for how in ({}, held)]
    for edit in (*edits, PlainEdit()):
        quick, whole = (small.plain.model.edited(base, edit, whole=how) for how in (False, True))
        for one_way, other in ((quick.rows, whole.rows), (quick.frozen, whole.frozen)):
            assert float((one_way - other).abs().max()) < 1e-5
            assert (float((one_way - base.rows).abs().max()) > 0.01) == bool(edit.nodes)


def test_the_form_in_which_words_are_read(model, small):
    """The form of the largest median probability; of the others the package may give a bound."""
    words = {word for one in small.listed for word in one.answers}
    written = {word: forms_of(model.tokenizer, word) for word in words}
    forms = {form: {word: of[form] for word, of in written.items() if form in of} for form in FORMS}
    ours = small.plain.form(small.cases, forms)
    theirs = answered(small.bench.engine, small.listed).forms
    assert theirs.chosen == max(ours, key=ours.__getitem__)
    for form, p in theirs.median.items():
        assert p == pytest.approx(ours[form], rel=1e-4) or (form in theirs.at_most and p >= ours[form])


def test_section_2_on_four_conflicts(small):
    found = survey(small.bench.chunks(small.rows.tolist()), len(small.rows))
    assert found.competent.tolist() == [small.plain.competent(one) for one in small.cases]
    half = Half(DISCOVERY, small.rows, small.rows.tolist(), small.boot, found.G, found.C)
    theirs = figures(rows_of(found, half, "all"))
    assert_same_figures(plain_figures(small.plain, small.cases), theirs)


def half_of(one, name=DISCOVERY):
    g, c = (np.array([figure(x) for x in one.cases]) for figure in (one.plain.g, one.plain.c))
    return Half(name, one.rows, one.rows.tolist(), one.boot, g, c)


@pytest.mark.parametrize("site", NODES)
def test_section_4_on_a_few_nodes(small, site):
    chunks, nodes = chunks_with_means(small, site), [theirs_of(node) for node in NODES[site]]
    found = gather(chunks, half_of(small), nodes, site=site, s=0.1, family=1, seed=0)
    ours = plain_effects(small.plain, small.cases, small.cases, NODES[site], site)
    assert_same_effects(ours, found.arrays(), f"{site}/")
    assert np.isnan(ours["reads picture/wa"][NODES[site][0]]).tolist() == [True, False, False, False]


def test_releases_with_named_mlps_held(small):
    """Later ones alone; a head's own layer's is later."""
    chunks, heads, layers = chunks_with_means(small, "suffix"), [(4, 7), (6, 2)], (2, 4, 6)
    empty = Evidence({("silenced", "blank_a - blank_muted"): np.zeros((4, 7, 9))}, half_of(small), mlps=True)
    found = hold(chunks, empty, layers, dict.fromkeys(RELEASES, heads))
    for donor in RELEASES:
        for head, through in zip(heads, ({4, 6}, {6}), strict=True):
            ours = [
                small.plain.effect(one, donor, [head], "suffix", small.cases, held=Held(mlps=frozenset(layers)))["M"]
                for one in small.cases
            ]
            assert small.plain.held_mlps([head], Held(mlps=frozenset(layers))) == through
            np.testing.assert_allclose(ours, found[HELD, donor][:, *head], rtol=0, atol=ATOL)


@pytest.mark.slow
def test_members_with_the_others_edited(small):
    members, donor = [(4, 7), (3, MLP), (5, 0)], "blank_muted"
    chunks = chunks_with_means(small, "suffix")
    built = BuiltSet(tuple(theirs_of(node) for node in members), donor, 1.0)
    found = in_context(chunks, half_of(small), built, s=0.1, family=1, seed=0).evidence
    for node in members:
        others = dict.fromkeys([one for one in members if one != node], donor)

        def effect(by, of="M", *, node=node, others=others, **how):
            return [
                small.plain.effect(one, by, [node], "suffix", small.cases, context=others, **how)[of]
                for one in small.cases
            ]

        ours = {
            ("release", donor): effect(donor),
            ("direct", donor): effect(donor, held=DIRECT),
            ("write", donor): effect(donor, held=WRITE),
            ("fall of G", donor): [-one for one in effect(donor, cells=small.plain.alone)],
            ("reads picture", "wa"): effect("wa"),
            ("rise over others", donor): effect(donor, "rise"),
        }
        for key, values in ours.items():
            np.testing.assert_allclose(values, found[key][:, *theirs_of(node)], rtol=0, atol=ATOL, err_msg=f"{key}")


class FewNodes(Bench):
    """A bench that has some of the model's nodes alone."""

    nodes = [(4, 7), (5, -1)]  # noqa: RUF012


@pytest.mark.slow
def test_delta_from_the_control_question(small, monkeypatch):
    """The 99th percentile, over nodes, of the largest of three releases under `control`."""
    bench = FewNodes(small.bench.engine, small.bench.conflicts, small.bench.candidates)
    chunks = chunks_with_means(SimpleNamespace(bench=bench, rows=small.rows), "suffix")
    monkeypatch.setattr(np, "percentile", np.nanpercentile)  # nodes that are not asked for are not measured
    found = null_share(chunks, small.rows, half_of(small).G)
    nodes = [ours_of(*node) for node in FewNodes.nodes]
    assert found == pytest.approx(small.plain.null_share(small.cases, nodes, "suffix", small.cases), abs=ATOL)
    assert found > 0.001


@pytest.mark.slow
def test_while_the_sound_is_being_encoded(small):
    """At media positions there are two donors; "picture encoder" is told by the same edits under `see`."""
    chunks, nodes = small.bench.chunks(small.rows.tolist(), "audio"), [(1, 3), (2, MLP)]
    for question, name in (("ask", "hear"), ("see", "see")):
        wanted = [Request("va", donor, question=question) for donor in ("blank_muted", "zero")]
        at = [theirs_of(node) for node in nodes]
        found = measure_requests(chunks, wanted, heads=at, examples=small.rows)
        for request in wanted:
            for node in nodes:
                ours = [
                    small.plain.effect(one, request.donor, [node], "audio", small.cases, question=name)["M"]
                    for one in small.cases
                ]
                theirs = found[request].margin[:, *theirs_of(node)]
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=ATOL)


def test_the_mirrored_question(model, small):
    """`see` is asked and the picture is what is kept from being said: section 2 and the effects of one head."""
    plain = Plain(small.plain.model, small.cases, small.plain.tokens, suppressed="picture")
    read = [mirrored_conflict(one) for one in small.bench.conflicts]
    engine = EncodedOnce(model, small.cases, "picture")
    engine.everything = True
    bench = Bench(engine, read, Candidates.of(read, model.tokenizer))
    one = SimpleNamespace(bench=bench, cases=small.cases, plain=plain, boot=small.boot, rows=small.rows)
    chunks, node = chunks_with_means(one, "suffix"), (4, 7)
    found = survey(chunks, len(one.rows))
    np.testing.assert_allclose(found.C, [plain.c(x) for x in one.cases], atol=ATOL)
    np.testing.assert_allclose(found.G, [plain.g(x) for x in one.cases], atol=ATOL)
    assert found.competent.tolist() == [plain.competent(x) for x in one.cases]
    rows = figures(rows_of(found, half_of(one), "all"))
    assert rows["dilution", "", ""] == pytest.approx(plain.dilution(one.cases), abs=ATOL)
    assert found.turned.mean() == plain.behaviour(one.cases)["reversal rate"]
    evidence = gather(chunks, half_of(one), [node], site="suffix", s=0.1, family=1, seed=0)
    theirs = {exchanged_key(f"half/{key}").removeprefix("half/"): of for key, of in evidence.arrays().items()}
    ours = plain_effects(plain, one.cases, one.cases, [node], "suffix")
    assert_same_effects(ours, theirs, "suffix/")


def test_a_joint_edit_of_a_group_and_of_a_set(small):
    sets = [((4, 6), (4, 7)), ((2, 5), (4, MLP), (5, 0))]
    chunks = chunks_with_means(small, "suffix")
    for donor in RELEASES:
        theirs = [tuple(theirs_of(node) for node in one) for one in sets]
        found = release_of_sets(chunks, theirs, [donor] * len(sets), small.rows)
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
    sites = [[len(each.site[question]["suffix"]) for question in ("see", "hear")] for each in one.cases]
    assert [there - here for there, here in sites] == 4 * [longer]
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
    listed, engine = staged(tmp_path, conflicts=44, seed=11), ModelEngine(model)
    engine.everything = True
    found = isolate(model, listed, sites=tuple(NODES), gate="report", quick=True, named_only=True, engine=engine)
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
        for site in NODES:
            heads = found.heads[found.heads["site"] == site]
            named = dict.fromkeys(ours_of(r.layer, r.head) for r in heads.itertuples())
            assert named
            nodes = list(named | dict.fromkeys(MORE_NODES)) if half == DISCOVERY else list(named)
            ours = plain_effects(plain, group, kept[DISCOVERY], nodes, site)
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
    for key, by_node in ours.items():
        for node, values in by_node.items():
            row = rows.loc[(*key.split("/"), *theirs_of(node))]
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
            share, write = (ours[f"{name}/{row['donor']}"][head].mean() / effect for name in ("direct", "write"))
            assert row[f"{prefix}direct_share"] == pytest.approx(share, abs=ATOL)
            if half == CONFIRMATION:
                both = (row["write_share"], row["mlp_share"])
                assert both == pytest.approx((write, share - write), abs=ATOL)
            if half == DISCOVERY:
                best = max(RELEASES, key=lambda donor, head=head: ours[f"release/{donor}"][head].mean())
                assert row["donor"] == best
        if half == CONFIRMATION:
            columns = dict(SIDE_BY_SIDE)
            if row["donor"] in RELEASES:
                columns |= {column: f"{name}/{row['donor']}" for column, name in BY_DONOR.items()}
            for column, key in columns.items():
                assert row[column] == pytest.approx(ours[key][head].mean(), abs=ATOL), column
