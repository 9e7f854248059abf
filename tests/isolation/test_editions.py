"""The shipped models under both editions of the protocol, side by side (slow).

`pytest -m slow -s tests/isolation/test_editions.py` prints for every model who is named, as what, and whether that
holds, beside what is known of it.
"""

from __future__ import annotations

import pytest

import av_lens as avl
from av_lens.lab.calibration import SUBJECT, read_plant, stage
from av_lens.results.record import RELEASING

PLANTS = ("planted", "planted-writers", "planted-single", "planted-two-pairs", "planted-opponents", "planted-gates",
          "planted-redundant-writers", "planted-redundant-gates", "planted-decoy", "planted-decoy-colours",
          "planted-decoy-and-writers", "balanced")  # fmt: skip


@pytest.fixture(scope="module")
def conflicts(tmp_path_factory):
    return avl.conflicts(stage(tmp_path_factory.mktemp("clips"), conflicts=120, seed=7, split="test"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["av-tiny", *(f"av-tiny-{one}" for one in PLANTS)])
def test_who_is_named_under_either_edition(conflicts, name):
    truth, held = read_plant(name), {}
    listed = ", ".join(f"L{layer}H{head} {kind}" for (layer, head), kind in sorted(truth.kinds.items()))
    print(f"\n{name}: {listed or 'nobody known'}")
    for edition in ("1", "2"):
        found = avl.isolate(avl.load(name), conflicts, gate="report", quick=True, named_only=True, protocol=edition)
        nodes = found.nodes[found.nodes["role"].isin(RELEASING)]
        said = (f"L{row.layer}H{row.head}".replace("H-1", " MLP") + f" {row.role} ({row.status or row.confirmed}, "
                f"{row.donor} {row.effect:.2f})" for row in nodes.itertuples())  # fmt: skip
        print(f"  edition {edition}: {found.verdict_kind}; {'; '.join(said) or 'nobody'}")
        held[edition] = {(row.layer, row.head) for row in nodes[nodes["would_confirm"]].itertuples()}
    if truth.plant != SUBJECT:
        false = {edition: heads - set(truth.kinds) - set(truth.free_riders) for edition, heads in held.items()}
        assert len(false["2"]) <= len(false["1"])
        assert len(held["2"] & set(truth.kinds)) >= len(held["1"] & set(truth.kinds)) - 1
