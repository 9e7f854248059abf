"""Sinks: found where they were put, told apart by who reads them, and fit for cuts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_av import small_inputs, small_model

from av_lens.core import run
from av_lens.errors import InputError
from av_lens.families.decoder import hook_name
from av_lens.interventions import Plan, cut
from av_lens.methods import find_sinks
from av_lens.methods.sinks import carried
from av_lens.spans import Span


def planted(model, reads, positions):
    """Hooks that let the named queries of every layer read each position with scores that no other key has."""

    def raise_scores(scores, hook=None):
        del hook
        new = scores.clone()
        for queries, key in zip(reads, positions, strict=True):
            rows = [q for q in queries if q >= key]
            new[:, :, rows, key] += 12.0
        return new

    return model.hooks(fwd_hooks=[(hook_name("scores", layer), raise_scores) for layer in range(4)])


def test_planted_sinks_are_found_and_their_readers_told_apart():
    model, x = small_model(), small_inputs((0, 1, 2))
    spans = x.spans
    suffix, video, audio = (spans[role].positions.tolist() for role in ("suffix", "video", "audio"))
    own, met = video[1], video[2]  # both before audio and before more video
    with planted(model, [[*suffix, *video], [*suffix, *audio, *video]], [own, met]):
        found = find_sinks(model, x, times=4)
    assert found.span.positions.tolist() == [own, met]
    table = found.table.set_index("position")
    assert table.loc[own, "read_by_picture"] > table.loc[own, "read_by_sound"]
    assert table["kind"].tolist() == ["unimodal", "cross-modal"]
    assert found.of("cross-modal").positions.tolist() == [met]
    assert table.loc[own, "role"] == "video"
    assert (table["times"] > 4).all()
    assert found.incoming.values.shape == (3, len(spans))


def test_readers_are_means_over_later_positions_of_a_role_without_the_sink_itself():
    model, x = small_model(), small_inputs()
    found = find_sinks(model, x, times=0.5)  # many: the rule is not what is tested
    _, cache = model.run_with_cache(x)
    whole = torch.stack([cache["pattern", layer].detach().mean((0, 1)) for layer in range(4)]).mean(0)
    checked = 0
    for row in found.table.to_dict("records"):
        key = row["position"]
        for role, column in (("video", "read_by_picture"), ("audio", "read_by_sound")):
            later = [q for q in x.spans[role].positions.tolist() if q > key]
            wanted = float(whole[later, key].mean()) if later else float("nan")
            np.testing.assert_allclose(row[column], wanted, atol=1e-6)
            checked += bool(later)
        if np.isnan(row["read_by_picture"]) or np.isnan(row["read_by_sound"]):
            assert row["kind"] == "undetermined"
        else:
            total = row["read_by_picture"] + row["read_by_sound"]
            np.testing.assert_allclose(row["score"], (row["read_by_picture"] - row["read_by_sound"]) / total)
            own = row["score"] if row["role"] == "video" else -row["score"]
            assert row["kind"] == ("unimodal" if own >= 0.5 else "cross-modal")
    assert checked > 10


def test_a_sink_in_the_text_is_told_and_is_no_media_sink():
    model, x = small_model(), small_inputs((0, 1, 2))
    suffix, system = x.spans.suffix.positions.tolist(), int(x.spans.system.positions[2])
    with planted(model, [suffix, suffix], [0, system]):
        found = find_sinks(model, x, times=4)
    assert not len(found.span)
    assert found.elsewhere["position"].tolist() == [0, system]
    assert found.elsewhere["role"].tolist() == ["boundary", "system"]
    media = found.incoming.values.values.mean(0)[x.spans.media.positions].mean()
    np.testing.assert_allclose(
        found.elsewhere["times"], found.incoming.values.values.mean(0)[[0, system]] / media, rtol=1e-6
    )
    assert repr(found).startswith("Sinks(0 media positions: none; 0 sink dimensions; 2 in the text before the suffix: ")
    assert "0 '<|im_start|>' (" in repr(found)
    assert found.provenance["elsewhere"] == [0, system]
    assert "the suffix is not judged" in found.provenance["judged"]


def test_a_sound_after_its_whole_picture_is_undetermined():
    found = find_sinks(small_model(), small_inputs(sound="separate"), times=0.5)
    audio = found.table[found.table["role"] == "audio"]
    assert len(audio)
    assert (audio["kind"] == "undetermined").all()
    assert audio["score"].isna().all()


def test_huge_dimensions_of_this_model_are_found_by_layer():
    model, x = small_model(), small_inputs()
    first = x.spans.video.positions.tolist()[0]

    def swell(stream, hook=None):
        del hook
        new = stream.clone()
        new[:, first, 17] += 60.0
        return new

    suffix = x.spans.suffix.positions.tolist()
    with planted(model, [suffix], [first]), model.hooks(fwd_hooks=[(hook_name("resid_pre", 2), swell)]):
        found = find_sinks(model, x, times=5, dimension_times=5)
    assert found.span.positions.tolist() == [first]
    rows = found.dimensions.set_index(["layer", "dimension"])
    assert (2, 17) in rows.index
    assert (1, 17) not in rows.index
    assert rows.loc[(2, 17), "at_sinks"] > 5 > rows.loc[(2, 17), "elsewhere"]


def test_what_a_dimension_carries_by_hand():
    stream = torch.tensor([[[3.0, 4.0, 0.0, 0.0]]])  # rms = sqrt(25 / 4) = 2.5
    torch.testing.assert_close(carried(stream), torch.tensor([[[1.2, 1.6, 0.0, 0.0]]]))


def test_the_span_cuts_with_and_without():
    model, x = small_model(), small_inputs()
    found = find_sinks(model, x, times=1)
    assert 0 < len(found) < len(x.spans.media)
    for keys in (found.span, x.spans.media - found.span):
        assert isinstance(keys, Span)
        out = run(model, x, plan=Plan(cut("generation", keys, layers=[3])), capture="pattern")
        at = x.spans.generation_position
        assert float(out.cache["pattern", 3][:, :, at, keys.positions.copy()].detach().abs().max()) == 0.0


def test_none_found_is_an_empty_span_and_no_dimension():
    found = find_sinks(small_model(), small_inputs(), times=1000)
    assert len(found) == 0
    assert found.table.empty
    assert found.dimensions.empty
    assert "none" in repr(found)
    assert len(found.of("cross-modal")) == 0


@pytest.mark.parametrize(
    ("given", "options", "text"),
    [
        (lambda: [small_inputs(), small_inputs(sound="separate")], {}, "another layout than the first"),
        (lambda: small_model().encode(None, "What?"), {}, "have no media"),
        (lambda: small_inputs(), {"weight": "values"}, "Did you mean 'value'"),
    ],
)
def test_what_has_no_sinks_is_refused(given, options, text):
    with pytest.raises(InputError, match=text):
        find_sinks(small_model(), given(), **options)


def test_an_unknown_kind_is_refused():
    found = find_sinks(small_model(), small_inputs(), times=1000)
    with pytest.raises(InputError, match="Did you mean 'cross-modal'"):
        found.of("crossmodal")
