"""The cards of av-tiny's heads: gates that read the picture by their keys and turn later heads' queries (slow).

`pytest -m slow -s` prints a card.
"""

from __future__ import annotations

import pytest
from organism_conflicts import drawn_conflicts

from av_lens.isolation import isolate
from av_lens.model import load

pytestmark = pytest.mark.slow
GATES, WRITERS = ((4, 6), (4, 7)), ((4, 2), (4, 3))


@pytest.fixture(scope="module")
def found():
    return isolate(load("av-tiny"), drawn_conflicts(48), quick=True)


def of(found, head, part):
    return found.cards.query("layer == @head[0] and head == @head[1] and part == @part")


def one(rows, what, unit=None):
    rows = rows[(rows["what"] == what) & (rows["unit"] == unit if unit else True)]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def test_gates_read_the_picture_by_their_keys_and_turn_later_heads_queries(found):
    for gate in GATES:
        attention = of(found, gate, "attention").query("cell == 'va'")
        assert one(attention, "generation -> video").value > 0.9
        for query in ("generation", "site"):
            parts = attention[attention["what"].str.startswith(f"{query} ->")]
            assert parts["value"].sum() == pytest.approx(1, abs=1e-4)
        pattern = of(found, gate, "pattern")
        assert one(pattern, "driven by the queries (blank_muted)").note == "keys"
        paths = of(found, gate, "path")
        share = {w: one(paths, w, "share of total") for w in ("direct", "queries", "joint", "remainder")}
        assert share["direct"].high < 0.5
        assert share["queries"].low > 0.25
        assert abs(share["joint"].value - share["queries"].value) < 0.1
        assert share["direct"].value + share["joint"].value + share["remainder"].value == pytest.approx(1, abs=1e-4)
    columns = ["part", "cell", "what", "value", "low", "high", "unit", "note"]
    card = found.cards.query("layer == 4 and head == 7")[columns]
    print("\n" + card[card["value"].abs() > 0.02].round(2).to_string(index=False))


def test_writers_put_the_pictures_answer_on_the_logits(found):
    for head in WRITERS:
        paths = of(found, head, "path")
        if paths.empty:  # not named on these conflicts
            continue
        assert one(paths, "direct", "share of total").low > 0.5
        ov = of(found, head, "ov")
        assert one(ov, "from the picture, on the picture's answer").low > 0
        whole = one(ov, "its write, on the sound's - picture's").value
        parts = [f"from {word}, on the sound's - picture's" for word in ("the picture", "the sound", "text")]
        assert sum(one(ov, part).value for part in parts) == pytest.approx(whole, abs=1e-4)
    assert set(WRITERS) & {(r.layer, r.head) for r in found.cards.itertuples()}


def test_cutting_a_gate_from_the_picture_releases_and_from_the_sound_does_not(found):
    cuts = found.cuts.query("heads == 'L4H7' and arm == 'cut'").set_index("edges")
    release = one(of(found, (4, 7), "path"), "total").value
    assert cuts.loc["video -> suffix", "release"] > 0.7 * release
    assert abs(cuts.loc["audio -> suffix", "release"]) < 0.1 * release


def test_the_answers_own_position_is_the_road_and_the_question_is_none(found):
    routes = found.routes.query("arm == 'cut' and edges.str.contains('all layers')").set_index("route")
    assert routes.loc["generation", "share"] > 0.8
    assert abs(routes.loc["relay", "share"]) < 0.1
    assert routes.loc["generation", "says_sound"] > 0.9
    sound = found.routes.query("route == 'generation' and arm == \"the sound's\" and edges.str.contains('all layers')")
    assert (sound["effect"] < 0).all()


def test_the_sound_is_known_at_its_own_positions_and_lost_at_the_generation_position(found):
    chosen = found.knowledge.query("method == 'probe' and chosen").set_index(["word", "span"])["excess"]
    assert chosen["sound", "audio"] > 0.3
    assert chosen["picture", "generation"] > chosen["sound", "generation"]
    lens = found.knowledge.query("method == 'lens' and span == 'generation'")
    last = lens[lens["layer"] == lens["layer"].max()].set_index(["cell", "word"])["value"]
    assert last["va", "picture"] > 0.9
    assert last["blank_a", "sound"] > 0.9
