"""A circuit in the json form that the circuit track of MIB evaluates (its `Graph.from_json`).

    cfg     n_layers, n_heads, d_model, parallel_attn_mlp
    nodes   "input", "a3.h5", "m3", "logits": in_graph, and score where the node was a candidate
    edges   "a0.h1->a2.h0<q>", "m1->logits": in_graph and score

Of a circuit of nodes an edge is in it where both its ends are, and scores 0; nodes that were no candidates stay. Of a
circuit of edges a node is in it where an edge of it is.

Source: Mueller et al. (2025, 2504.13151).
"""

import re
from typing import Any


def mib_name(name: str) -> str:
    """Write a node's or an edge's name as MIB does."""
    name = name.replace("embed", "input").replace(" -> ", "->")
    name = re.sub(r"L(\d+)H(\d+)", r"a\1.h\2", re.sub(r"L(\d+) mlp", r"m\1", name))
    return re.sub(r"\.([qkv])$", r"<\1>", name)


def mib_form(rows: dict[str, tuple[float, bool]], *, n_layers: int, n_heads: int, d_model: int) -> dict[str, Any]:
    """Bring a circuit's nodes or edges, each with its score and whether it is a member, to the form."""
    given = {mib_name(name): {"score": float(score), "in_graph": member} for name, (score, member) in rows.items()}
    senders, edges = ["input"], list[str]()
    for layer in range(n_layers):
        heads = [f"a{layer}.h{head}" for head in range(n_heads)]
        edges += [f"{sender}->{head}<{kind}>" for sender in senders for head in heads for kind in "qkv"]
        edges += [f"{sender}->m{layer}" for sender in (*senders, *heads)]
        senders += [*heads, f"m{layer}"]
    edges += [f"{sender}->logits" for sender in senders]
    if edges[0] in given:
        ends = {end for name in edges if given[name]["in_graph"] for end in name.split("<")[0].split("->")}
        nodes: dict[str, dict[str, Any]] = {name: {"in_graph": name in ends} for name in (*senders, "logits")}
        listed = {name: given[name] for name in edges}
    else:
        nodes = {name: given.get(name, {"in_graph": True}) for name in (*senders, "logits")}
        whole = {name: all(nodes[end]["in_graph"] for end in name.split("<")[0].split("->")) for name in edges}
        listed = {name: {"score": 0.0, "in_graph": inside} for name, inside in whole.items()}
    cfg = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model, "parallel_attn_mlp": False}
    return {"cfg": cfg, "nodes": nodes, "edges": listed}
