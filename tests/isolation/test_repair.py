"""The repair plan: constants by role, worked out on paper on the fake model, and applied to a real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import FakeModel, bench_of, fake_conflicts
from small_av import small_clip, small_model

from av_lens.errors import InputError
from av_lens.isolation.explaining.units import plan_of, repair_rows, repair_values
from av_lens.isolation.measuring.donors import Means
from av_lens.isolation.measuring.halves import Half
from av_lens.results.record import Isolation, table
from av_lens.results.statistics import Bootstrap

WRITER = (2, 0)


@pytest.fixture(scope="module")
def benched():
    conflicts = fake_conflicts(30)
    bench = bench_of(FakeModel(noise=0.0), conflicts)
    clips = [one.id for one in conflicts]
    half = Half(
        "confirmation",
        np.arange(30),
        list(range(30)),
        Bootstrap.draw(range(30), clips, clips, seed=0),
        np.full(30, 7.0),
        np.full(30, -4.0),
    )
    chunks = bench.chunks(range(30))
    means = Means.over(chunks)
    for chunk in chunks:
        chunk.means = means
    return chunks, half


@pytest.mark.parametrize("donor", ["zero", "blank_muted", "mean_other"])
def test_the_plan_gives_back_what_the_writer_takes(benched, donor):
    chunks, half = benched
    values = repair_values(chunks, [WRITER], donor)
    assert set(values) == {f"repair/{donor}/2.0/question", f"repair/{donor}/2.0/generation"}
    # Without noise the writer writes nothing when it has not seen, when it is asked something else, or when zeroed.
    assert max(np.abs(value).max() for value in values.values()) == 0
    rows = {row["quantity"]: row for row in repair_rows(chunks, half, [WRITER], values)}
    assert rows["C"]["before"] == pytest.approx(-4)
    assert rows["C"]["change"] == pytest.approx(6, abs=1e-5)  # the writer's 6, and nothing else
    assert rows["says the sound under conflict"]["after"] == 1
    assert rows["see"]["change"] == 0
    assert list(table("repair", list(rows.values()))["quantity"])[:2] == ["C", "says the sound under conflict"]


def test_constants_are_averages_over_conflicts_and_positions(benched):
    chunks, _ = benched
    values = repair_values(chunks, [(0, 0)], "blank_a")  # the sound carrier: 4 x onehot(sound)
    candidates = chunks[0].bench.candidates
    share = np.bincount(candidates.ids[candidates.sound, 0], minlength=7) / 30
    np.testing.assert_allclose(values["repair/blank_a/0.0/generation"], 4 * share, atol=1e-6)


def record(**arrays):
    return Isolation(verdict="nothing", n_layers=4, n_heads=4, summary={}, arrays=arrays)


def test_the_plan_edits_prompt_and_decoding():
    model = small_model()
    x = model.encode(small_clip(0), "What?")
    rng = np.random.default_rng(0)
    d_head = model.spec.d_head
    values = {role: rng.normal(size=d_head).astype(np.float32) for role in ("question", "header", "generation")}
    found = record(**{f"repair/mean_other/1.2/{role}": value for role, value in values.items()})
    plan = found.plan()
    seen = []
    result = model.generate(x, plan=plan, max_new_tokens=3, return_type="result")
    assert set(result.fired.values()) <= {1, 3}
    hooks = [("blocks.1.attn.hook_z", lambda z, hook: seen.append(z[:, :, 2].clone()))]
    compiled = plan.compile(model.spec, x.spans)
    with torch.no_grad():
        model.run_with_hooks(x, fwd_hooks=[*compiled.fwd_hooks, *hooks])
    for role, value in values.items():
        at = x.spans[role].positions.tolist()
        np.testing.assert_allclose(seen[0][0, at].numpy(), np.broadcast_to(value, (len(at), d_head)), rtol=1e-6)


def test_the_plan_survives_its_file(tmp_path):
    model = small_model()
    found = record(**{"repair/zero/1.2/generation": np.zeros(4, dtype=np.float32)})
    plan = found.plan()
    assert [edit.kind for edit in plan] == ["zero"]
    again = type(plan).load(plan.save(tmp_path / "repair.json", model=model), model=model)
    assert [vars(edit.site) for edit in again] == [vars(edit.site) for edit in plan]


def test_nothing_to_repair_is_refused():
    with pytest.raises(InputError, match=r"no set to edit, so there is no repair plan\. Its verdict: nothing"):
        plan_of(record())
