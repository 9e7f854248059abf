"""Which heads of av-tiny do what it does under conflict, by every way of scoring? Prints the table of docs/toolbox.md.

pytest -m slow -s tests/methods/test_circuits_on_the_organism.py
"""

from __future__ import annotations

import sys

import pytest

import av_lens as avl
from av_lens.lab.calibration import stage
from av_lens.methods.circuits.scores import KINDS
from av_lens.model import short_names

CONFLICTS = 12
SUPPRESSORS = {"L4H7", "L4H6", "L4H3", "L4H2"}


@pytest.mark.slow
def test_few_heads_of_the_organism_do_what_it_does(tmp_path):
    if "av-tiny" not in short_names():
        pytest.skip("av-tiny is not shipped")
    model, listed = avl.load("av-tiny"), []
    for seed, split in ((5, "discovery"), (6, "test")):
        folder = tmp_path / split
        folder.mkdir()
        listed.append(avl.conflicts(stage(folder, conflicts=CONFLICTS, seed=seed, split=split)))
    scored, held_out = listed
    found = {
        kind: avl.find_circuit(model, scored, test=held_out, scores=kind, random=5, subsets=4, progress=None)
        for kind in KINDS
    }
    write = sys.stdout.write
    write(
        f"\nscores on {CONFLICTS} conflicts of av-tiny, circuits measured on {CONFLICTS} others; empty: blank_muted\n"
    )
    for kind, circuit in found.items():
        (cpr, cpr_low, cpr_high), (cmd, cmd_low, cmd_high) = (circuit.figure(name) for name in ("CPR", "CMD"))
        random = circuit.areas.set_index(["empty", "figure"])["random"]["blank_muted"]
        curve = circuit.curve.set_index(["empty", "order", "k"])["f"]["blank_muted"]["magnitude"]
        write(
            f"{kind:9} CPR {cpr:.2f} ({cpr_low:.2f} to {cpr_high:.2f}; random {random['CPR']:.2f})"
            f"  CMD {cmd:.2f} ({cmd_low:.2f} to {cmd_high:.2f}; random {random['CMD']:.2f})"
            f"  f of 4 heads {curve[4]:.2f}, of 12 {curve[12]:.2f}  {circuit!r}\n"
        )
    kept = found["exact"].stability.set_index("k")["jaccard"]
    gaps = found["greedy"].completeness.set_index("removed")["difference"]
    write(f"exact: the first 4 and 12 heads over bootstraps overlap by {kept[4]:.2f} and {kept[12]:.2f}\n")
    write(f"greedy: circuit less model, all members taken away: {gaps['all']:.2f}\n")
    assert set(found["exact"].nodes["node"][:4]) == SUPPRESSORS
    assert kept[4] > 0.8
    assert set(found["greedy"].members) >= SUPPRESSORS
    assert len(found["greedy"].members) <= 16
    assert found["greedy"].faithfulness()[0] == pytest.approx(1, abs=0.3)
    for kind, circuit in found.items():
        random = circuit.areas.set_index(["empty", "figure"])["random"]["blank_muted"]
        assert circuit.figure("CMD")[0] < random["CMD"], kind
        assert circuit.figure("CPR")[0] > random["CPR"], kind
