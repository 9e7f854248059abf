"""The json form of MIB's circuit track, worked out by hand for one layer of two heads."""

from __future__ import annotations

import json

import pytest
from micro import micro_conflict, micro_model

import av_lens as avl
from av_lens.errors import InputError
from av_lens.methods.circuits.edge_runs import Edges
from av_lens.results.mib import mib_form, mib_name

SIZES = {"n_layers": 1, "n_heads": 2, "d_model": 8}
EDGES = [
    *(f"input->a0.h{head}<{kind}>" for head in (0, 1) for kind in "qkv"),
    *("input->m0", "a0.h0->m0", "a0.h1->m0"),
    *("input->logits", "a0.h0->logits", "a0.h1->logits", "m0->logits"),
]


def test_names():
    assert [mib_name(one) for one in ("embed", "L3H15", "L3 mlp")] == ["input", "a3.h15", "m3"]
    assert mib_name("L0H1 -> L12H0.q") == "a0.h1->a12.h0<q>"
    assert mib_name("L1 mlp -> logits") == "m1->logits"


def test_a_circuit_of_heads():
    form = mib_form({"L0H1": (2.5, True), "L0H0": (-1.0, False)}, **SIZES)
    assert form["cfg"] == {**SIZES, "parallel_attn_mlp": False}
    assert form["nodes"] == {
        "input": {"in_graph": True},
        "a0.h0": {"score": -1.0, "in_graph": False},
        "a0.h1": {"score": 2.5, "in_graph": True},
        "m0": {"in_graph": True},  # no candidate: it stays
        "logits": {"in_graph": True},
    }
    assert list(form["edges"]) == EDGES
    assert {name for name, one in form["edges"].items() if not one["in_graph"]} == {one for one in EDGES if "h0" in one}


def test_a_circuit_of_edges_and_every_edge_of_a_model():
    ours = [f"embed -> L0H{head}.{kind}" for head in (0, 1) for kind in "qkv"] + ["embed -> L0 mlp", "L0H0 -> L0 mlp"]
    ours += ["L0H1 -> L0 mlp", "embed -> logits", "L0H0 -> logits", "L0H1 -> logits", "L0 mlp -> logits"]
    form = mib_form({name: (float(i), name == "L0H1 -> logits") for i, name in enumerate(ours)}, **SIZES)
    assert form["edges"] == {name: {"score": float(i), "in_graph": i == 11} for i, name in enumerate(EDGES)}
    assert [name for name, one in form["nodes"].items() if one["in_graph"]] == ["a0.h1", "logits"]
    assert "score" not in form["nodes"]["a0.h1"]
    spec = micro_model().spec
    sizes = {name: getattr(spec, name) for name in ("n_layers", "n_heads", "d_model")}
    names = Edges.of(spec).names
    assert sorted(mib_form(dict.fromkeys(names, (0.0, False)), **sizes)["edges"]) == sorted(map(mib_name, names))


def test_a_found_circuit_writes_itself_and_an_old_one_is_refused(tmp_path):
    from dataclasses import replace

    circuit = avl.find_circuit(micro_model(), micro_conflict(), random=0, subsets=0, size=3)
    form = json.loads(circuit.to_mib(tmp_path / "circuit.json").read_text())
    assert {name for name, one in form["nodes"].items() if one["in_graph"] and "score" in one} == {
        mib_name(one) for one in circuit.members
    }
    assert form["cfg"]["d_model"] == 16
    with pytest.raises(InputError, match="does not say its model's sizes"):
        replace(circuit, provenance={}).to_mib(tmp_path / "old.json")
