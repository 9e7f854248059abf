"""Path patching by its definition: edit, hold everything else with plain hooks, run the whole model.

The reference never restarts and knows no key-value groups: it runs a *twin* of the model with every query head's key
and value weights written out (8 on 8), in which a key that one query head alone sees is a plain hook.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from tiny import letter, tiny_clip, tiny_hf_model, tiny_processor

import av_lens as avl
from av_lens.families.decoder import hook_name
from av_lens.interventions.edges import KV, Node, receivers
from av_lens.metrics import logit_diff

N_LAYERS, N_HEADS = 4, 8
METRIC = logit_diff(letter("a"), letter("b"))
LOGITS = Node("logits")


@cache
def models(n_kv_heads: int) -> SimpleNamespace:
    """The model, its twin without groups, a pair, and how many heads share a key."""
    sizes = {"n_layers": N_LAYERS, "d_model": 64, "n_heads": N_HEADS}
    model = avl.load("tiny", hf_model=tiny_hf_model(n_kv_heads=n_kv_heads, **sizes), processor=tiny_processor())
    source, target = tiny_hf_model(n_kv_heads=n_kv_heads, **sizes), tiny_hf_model(n_kv_heads=N_HEADS, **sizes)
    group = N_HEADS // n_kv_heads
    spread = {}
    for name, value in source.state_dict().items():
        if "language_model" in name and (".k_proj." in name or ".v_proj." in name):
            value = value.unflatten(0, (n_kv_heads, -1)).repeat_interleave(group, dim=0).flatten(0, 1)
        spread[name] = value
    target.load_state_dict(spread)
    twin = avl.load("twin", hf_model=target, processor=tiny_processor())
    encoded = [
        avl.AVInputs.stack([model.encode(tiny_clip(1.0, seed=seed), "What?") for seed in seeds])
        for seeds in ((0, 1), (2, 3))
    ]
    return SimpleNamespace(model=model, twin=twin, pair=avl.Pair(clean=encoded[0], corrupt=encoded[1]), group=group)


RECORDED = {}


class Brute:
    """The definition, run by run, on the twin."""

    def __init__(self, twin, base, donor, group, *, mlps, norms="recomputed", at=None):
        self.twin, self.x, self.group, self.mlps, self.norms = twin, base, group, mlps, norms
        self.at = list(range(len(base.spans))) if at is None else base.spans[at].positions.tolist()
        self.base, self.donor = self.recorded(base), self.recorded(donor)

    def recorded(self, x):
        """Runs 1 and 2, once for each input."""
        known = RECORDED.get((id(self.twin), id(x)))
        if known is None:
            ends = ("attn.hook_result", "hook_mlp_out", "hook_scale")
            names = [n for n in self.twin.hook_dict if n.startswith(("blocks.", "ln_final.")) and n.endswith(ends)]
            known = RECORDED[id(self.twin), id(x)] = {}
            self.run([], [*names, "hook_embed"], known, x)
        return known

    def run(self, hooks, wanted, kept, x=None):
        def keeper(name):  # by the name asked for: some hooks go by another inside
            def keep(value, hook):
                kept[name] = value.detach().clone()

            return keep

        with torch.no_grad():
            both = [*hooks, *((name, keeper(name)) for name in wanted)]
            return self.twin.run_with_hooks(self.x if x is None else x, fwd_hooks=both)

    def heads(self, node):
        """The twin's heads behind a node: all of a group, or one."""
        return range(node.index * self.group, (node.index + 1) * self.group) if node.kind == "kv" else (node.index,)

    def sender(self, nodes):
        """The changes a sender makes: `(hook name, write)`."""
        changes = []
        for node in nodes:
            if node.kind == "embed":
                at = self.x.spans[node.span].positions.tolist()
                changes.append(("hook_embed", at, slice(None), self.donor["hook_embed"][:, at]))
            elif node.kind == "mlp":
                name = hook_name("mlp_out", node.layer)
                changes.append((name, self.at, slice(None), self.donor[name][:, self.at]))
            else:
                name = hook_name("result", node.layer)
                changes.append((name, self.at, node.index, self.donor[name][:, self.at, node.index]))
        return changes

    def held(self, changes, wanted):
        """Run 3: everything that heads (and MLPs, norms) write is the base run's, but for the changes."""
        written = {hook_name("result", layer) for layer in range(N_LAYERS)}
        changed = {name for name, *_ in changes}
        outs = {hook_name("mlp_out", layer) for layer in range(N_LAYERS)}
        written |= outs if self.mlps == "frozen" else outs & changed
        if self.norms == "frozen":
            written |= {name for name in self.base if name.endswith("hook_scale")}

        def holder(name):
            def hold(value, hook):
                new = self.base[name].clone() if name in written else value.clone()
                for place, at, which, given in changes:
                    if place == name:
                        new[(slice(None), at) if which == slice(None) else (slice(None), at, which)] = given
                return new

            return hold

        kept = {}
        hooks = [(name, holder(name)) for name in sorted(written | changed)]
        kept["logits"] = self.run(hooks, wanted, kept)
        return kept

    def inputs(self, changes, nodes):
        kept = self.held(changes, sorted({self.input_name(node) for node in nodes if node != LOGITS}))
        return {node: kept["logits" if node == LOGITS else self.input_name(node)] for node in nodes}

    def input_name(self, node):
        return hook_name("mlp_in" if node.kind == "mlp" else node.input, node.layer)

    def replacing(self, read):
        """Hooks that put the receivers' inputs in place, at all positions."""
        hooks = []
        for node, given in read.items():

            def write(value, hook, node=node, given=given):
                new = value.clone()
                where = slice(None) if node.kind == "mlp" else list(self.heads(node))
                new[:, :, where] = given[:, :, where]
                return new

            hooks.append((self.input_name(node), write))
            if node.kind == "mlp" and self.norms == "frozen":  # its own norm stands between the stream and the MLP
                name = hook_name("ln2_scale", node.layer)
                hooks.append((name, lambda value, hook, name=name: self.base[name]))
        return hooks

    def hop(self, changes, nodes):
        """What the nodes write when their named inputs alone are new."""
        read = self.inputs(changes, nodes)
        following = []
        everything = list(range(len(self.x.spans)))
        for layer in sorted({node.layer for node in nodes}):
            for kind in ("attention", "mlp"):
                here = {n: v for n, v in read.items() if n.layer == layer and (n.kind == "mlp") == (kind == "mlp")}
                if not here:
                    continue
                name = hook_name("mlp_out" if kind == "mlp" else "result", layer)
                kept = {}
                self.run(self.replacing(here), [name], kept)
                heads = sorted({h for n in here for h in self.heads(n)}) if kind != "mlp" else [None]
                for head in heads:
                    which = slice(None) if head is None else head
                    value = kept[name] if head is None else kept[name][:, :, head]
                    following.append((name, everything, which, value))
        return following

    def value(self, sender, receiver, via=()):
        changes = self.sender(sender)
        for hop in via:
            changes = self.hop(changes, hop)
        read = self.inputs(changes, receiver)
        if LOGITS in read:
            return read[LOGITS][:, -1]
        return self.run(self.replacing(read), [], {})[:, -1]


def of(metric, model, logits):
    return metric.bind()(logits[:, None]).numpy()


def ends(text, spec):
    return next(iter(receivers(text, spec).values()))


def drawn_receiver(rng, first, n_kv_heads):
    """A receiver in a layer from `first` on, any kind."""
    layer = int(rng.integers(first, N_LAYERS))
    kind = rng.choice(["q", "k", "v", "kv k", "kv v", "mlp"])
    if kind == "mlp":
        return (layer, "mlp")
    if kind.startswith("kv"):
        return (layer, KV(int(rng.integers(n_kv_heads))), kind[-1])
    return (layer, int(rng.integers(N_HEADS)), str(kind))
