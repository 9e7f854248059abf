"""Edge attribution by its definition: every write, every gradient at a forked input of one hooked full forward."""

from __future__ import annotations

from functools import partial

import torch

from av_lens.core import run
from av_lens.families.decoder import hook_name
from av_lens.interventions import Plan, replace


def writes_of(model, x):
    """What every sender writes to the stream, `[batch, pos, d_model]`, by name."""
    with torch.no_grad():
        cache = run(model, x, capture=["embed", "z", "mlp_out"]).cache
        found = {"embed": cache[hook_name("embed")]}
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):
                found[f"L{layer}H{head}"] = cache["z", layer][:, :, head] @ model.W_O[layer, head]
            found[f"L{layer} mlp"] = cache[hook_name("mlp_out", layer)]
    return found


def gradients_of(model, x, metric):
    """The gradient at every forked input in one hooked full forward; keys and values by key-value head."""
    kept = {}

    def keep(name):
        def fn(activation, hook):
            kept[name] = activation
            return activation

        return fn

    layers = range(model.spec.n_layers)
    forks = ("q_input", "k_input", "v_input", "mlp_in")
    names = [hook_name(fork, layer) for fork in forks for layer in layers] + [hook_name("resid_post", layers[-1])]
    with torch.enable_grad():
        logits = model.run_with_hooks(x, fwd_hooks=[(name, keep(name)) for name in names])
        measured = metric.bind()(logits[:, -1:])
        grads = dict(zip(names, torch.autograd.grad(measured.sum(), [kept[name] for name in names]), strict=True))
    found = {"logits": grads[names[-1]]}
    for layer in layers:
        found[f"L{layer} mlp"] = grads[hook_name("mlp_in", layer)]
        for kind in "qkv":
            fork = grads[hook_name(f"{kind}_input", layer)]
            found |= {f"L{layer}H{head}.{kind}": fork[:, :, head] for head in range(fork.shape[2])}
    return found


def order(name):
    """When a sender writes or a receiver reads, in half layers: a receiver sees what was written before."""
    if name in ("embed", "logits"):
        return -1.0 if name == "embed" else 1000.0
    layer = int(name.removeprefix("L").replace("H", " ").split()[0])
    return layer + (0.0 if "." in name else 0.25 if "H" in name else 0.5)


def naive(model, donor, base, metric):
    """The definition, sender by sender and receiver by receiver."""
    given, own, grads = writes_of(model, donor), writes_of(model, base), gradients_of(model, base, metric)
    found = {}
    for sender, there in given.items():
        for receiver, gradient in grads.items():
            if order(sender) < order(receiver):
                found[sender, receiver] = ((there - own[sender]) * gradient).sum((1, 2))
    return found


def naive_integral(model, ends, metric, steps, site, sender, receiver):
    """The mean gradient at a receiver over runs with a site's value between base and donor, times the change."""
    base, donor = ends
    with torch.no_grad():
        own, there = (run(model, x, capture=[site]).cache[hook_name(site.component, site.layer)] for x in ends)
    total = 0.0
    for step in range(steps):
        value = own + (step + 0.5) / steps * (there - own)
        plan = Plan(replace(site, value)).compile(model.spec, base.spans, batch=len(base))
        kept = []
        hook = hook_name("resid_post", 3) if receiver == "logits" else hook_name("mlp_in", int(receiver[1]))
        with torch.enable_grad():
            hooks = [*plan.fwd_hooks, (hook, lambda activation, hook, kept=kept: kept.append(activation))]
            logits = model.run_with_hooks(base, fwd_hooks=hooks)
            measured = metric.bind()(logits[:, -1:]).sum()
            total = total + torch.autograd.grad(measured, kept[0])[0] / steps
    change = writes_of(model, donor)[sender] - writes_of(model, base)[sender]
    return (change * total).sum((1, 2)).numpy()


def circuit_logits(model, base, donor, kept, positions):
    """One hooked full forward in which every reader reads what senders outside `kept` write as in the donor's run."""
    given, now, layers = writes_of(model, donor), {}, range(model.spec.n_layers)

    def less(receiver):
        change = 0
        for sender, written in now.items():
            if order(sender) < order(receiver) and (sender, receiver) not in kept:
                change = change + (written - given[sender])[:, positions]
        return change

    def keep(names, activation, hook):
        for i, name in enumerate(names):
            layer = order(name)
            part = activation if layer != int(layer) + 0.25 else activation[:, :, i] @ model.W_O[int(layer), i]
            now[name] = part.clone()

    def read(names, activation, hook):
        made = activation.clone()
        for i, name in enumerate(names):
            if made.ndim == 4:
                made[:, positions, i] -= less(name)
            else:
                made[:, positions] -= less(name)
        return made

    hooks = [(hook_name("embed"), partial(keep, ["embed"]))]
    for layer in layers:
        heads = [f"L{layer}H{head}" for head in range(model.spec.n_heads)]
        hooks += [(hook_name(f"{k}_input", layer), partial(read, [f"{head}.{k}" for head in heads])) for k in "qkv"]
        hooks += [
            (hook_name("mlp_in", layer), partial(read, [f"L{layer} mlp"])),
            (hook_name("z", layer), partial(keep, heads)),
        ]
        hooks += [(hook_name("mlp_out", layer), partial(keep, [f"L{layer} mlp"]))]
    hooks += [(hook_name("resid_post", layers[-1]), partial(read, ["logits"]))]
    with torch.no_grad():
        return model.run_with_hooks(base, fwd_hooks=hooks)[:, -1:]
