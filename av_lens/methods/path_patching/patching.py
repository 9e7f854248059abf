"""Path patching: does one part of the model move the answer through one named input of another?

Runs 1 to 4 are those of protocol section 3; hops on the way (`via`) repeat run 3, and for "logits" run 4 is run 3.

    values  = metric(run 4)          effects = values - metric(base), as in `patch`
    direction="denoise"   base is the corrupt run, donor the clean one. Positive: the path restores.
    direction="noise"     base is the clean run, donor the corrupt one. Negative: the path is needed.

A list is one sender (or receiver) made of several, patched together; a dictionary, words or commas are several in turn
(`interventions.edges`). `decompose=True` adds the *total* effect of the sender, its *direct* effect on the logits, what
reaches all named receivers *jointly*, and the *remainder*, total - direct - joint.

With heads held positions do not read one another, so run 3 is the stream plus the sender's change, exact and without a
run of the model: the direct effects of all heads take one pass, and a matrix of senders and receivers one replay for
each cell. Not done: receivers' inputs split by sender position; donors other than the pair's other run.

Source: Wang et al. (2022, the circuit of indirect object identification); Goldowsky-Dill et al. (2023).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from av_lens.checks import require_choice
from av_lens.core import Progress
from av_lens.errors import InputError
from av_lens.inputs import Pair
from av_lens.interventions.edges import Ends, receivers, refuse_double, senders
from av_lens.interventions.edits import resolve_positions
from av_lens.methods.path_patching.paths import LOGITS, TOTAL, Nodes, PathRuns, follows
from av_lens.methods.shared.frame import Examples, Frame, Stack, numbers
from av_lens.metrics import Metric, require_numbers
from av_lens.model import HookedAVLLM
from av_lens.results import Grid
from av_lens.spans import Span

SIGNS = {
    "denoise": "along the path the clean run's values, into the corrupt run; positive: the path restores",
    "noise": "along the path the corrupt run's values, into the clean run; negative: the path is needed",
}


def path_patch(
    model: HookedAVLLM,
    pair: Pair | Sequence[Pair],
    *,
    sender: Any = "heads",
    receiver: Any = "logits",
    via: Any = "",
    metric: Metric | Callable[..., Any] | None = None,
    at: str | Span | None = None,
    mlps: str = "frozen",
    norms: str = "recomputed",
    direction: str = "denoise",
    decompose: bool = False,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Grid:
    """Patch paths: what a sender wrote in the donor run, seen by the named receivers alone.

    Args:
        model: a `HookedAVLLM`.
        pair: aligned clean and corrupt inputs, or several pairs of one layout or of different ones.
        sender: `(layer, head)`, `(layer, "mlp")`, `("embed", role or Span)`, a list (together), a dictionary (in turn),
            or a string such as "L3H2, L4 mlp", "embed audio", "heads", "mlps", "spans".
        receiver: "logits", `(layer, head, "q" | "k" | "v")`, `(layer, KV(g), "k" | "v")`, `(layer, "mlp")`, a list
            (together), a dictionary (in turn), or a string such as "L5H1.q + L5H1.k, logits", "heads.q", "mlps".
        via: receivers on the way, in order: a list whose items are receivers (or lists of them), or a string such as
            "L3H2.q > L4H1.v".
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        at: the positions at which heads and MLPs send: roles joined by `|`, or a `Span`; None for all. Late is quick.
        mlps: in run 3 "frozen" or "free".
        norms: in run 3 "recomputed" or "frozen".
        direction: "denoise" edits the corrupt run, "noise" the clean run.
        decompose: add total, direct, joint and remainder.
        stack: pairs that run together.
        budget_gb: memory for the activations of edits that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid over `layer` and `head` (`sender="heads"`) or `sender`, and over `receiver` where there are several; with
        `values`, `effects`, `baseline` (the edited run) and `donor`. Interrupted, it holds what is done.

    Raises:
        InputError: no such end, nothing that can pass, an unknown option, or a metric that is NaN on the base run.
        InterventionError: a layer, head or position is out of range.
        ModelError: the model's layers cannot be computed by themselves.
    """
    require_choice("direction", direction, SIGNS)
    require_choice("mlps=", mlps, ("frozen", "free"))
    require_choice("norms=", norms, ("recomputed", "frozen"))
    examples = Examples.paired("path_patch", pair)
    roles = [role for role in examples.spans[0].roles if role != "generated"]
    sending, receiving = senders(sender, model.spec, roles), receivers(receiver, model.spec)
    columns = _columns(receiving, hops := _hops(via, model.spec), decompose, model.spec)
    _check_order(sending, hops, receiving)
    stacks, ends = examples.stacks(stack), (tuple(sending.values()), hops, tuple(columns.values()))
    places = [resolve_positions(at, spans, what="path_patch at").index for spans in examples.spans]
    frame = Frame.of(model, examples, metric)
    frame.shape(len(sending), len(columns))

    def work(stack: Stack, show: Progress) -> None:
        asked, (base, donor) = frame.own(stack), stack.ends(direction)
        runs = PathRuns(model, base, donor, *ends, places[stack.members[0]], asked, mlps, norms, budget_gb)
        require_numbers(runs.baseline, asked.name)
        frame.lines[:, stack.rows] = [numbers(line) for line in (runs.baseline, runs.given)]
        into = torch.full((len(sending), len(columns), len(stack.rows)), torch.nan, dtype=torch.float64)
        try:
            runs.measure(lambda done: show("path patching", done, len(sending) * len(columns)), into)
        finally:
            frame.values[stack.rows] = np.moveaxis(into.numpy(), -1, 0)

    frame.run(work, stacks, progress)
    if decompose:
        frame.values = _with_remainder(frame.values, frame.lines[0], list(columns))
    heads = {"layer": np.arange(model.spec.n_layers), "head": np.arange(model.spec.n_heads)}
    axes: dict[str, Any] = heads if sender == "heads" else {"sender": list(sending)}
    labels = [*columns, *(["remainder"] if decompose else [])]
    return frame.grid(
        axes | ({"receiver": labels} if len(labels) > 1 else {}),
        direction=f"{direction}: {SIGNS[direction]}",
        method="path patching",
        senders=list(sending),
        receivers=list(receiving),
        via=[_said(hop) for hop in hops],
        at=str(at) if at is not None else "all",
        positions=[places[stack.members[0]] for stack in stacks],
        mlps=mlps,
        norms=norms,
    )


def _hops(via: Any, spec: Any) -> tuple[Nodes, ...]:
    """Read the receivers on the way, each hop one end."""
    steps: list[Any] = [part for part in via.split(">") if part.strip()] if isinstance(via, str) else list(via)
    if isinstance(via, tuple) and via and isinstance(via[0], int | str):
        steps = [via]
    hops: list[Nodes] = []
    for step in steps:
        found = receivers(step, spec)
        nodes = next(iter(found.values()))
        if len(found) > 1 or any(node.kind == "logits" for node in nodes):
            raise InputError(f"{step!r} is no hop on the way: name one receiver (or a list) that writes to the stream.")
        hops.append(nodes)
    return tuple(hops)


def _columns(receiving: Ends, hops: tuple[Nodes, ...], decompose: bool, spec: Any) -> dict[str, Nodes]:
    """What is measured for every sender, by name."""
    columns: dict[str, Nodes] = dict(receiving)
    if not decompose:
        return columns
    if hops or any(nodes == (LOGITS,) for nodes in receiving.values()):
        raise InputError(
            "decompose=True parts the total among receivers before the logits: leave out via and 'logits'."
        )
    every = tuple(dict.fromkeys(node for nodes in receiving.values() for node in nodes))
    refuse_double(every, spec)
    return {"total": (TOTAL,), "direct": (LOGITS,), **columns, "joint": every}


def _check_order(sending: Ends, hops: tuple[Nodes, ...], receiving: Ends) -> None:
    for before, after in pairwise(hops):
        if not follows(before, after):
            raise InputError(
                f"the hop {_said(after)} does not come after {_said(before)}: it reads before that writes."
            )
    ways = ([sender, *hops, receiver] for sender in sending.values() for receiver in receiving.values())
    if not any(follows(*way[:2]) and follows(*way[-2:]) for way in ways):
        raise InputError(
            f"nothing can pass: no receiver ({', '.join(list(receiving)[:6])}) reads after a sender "
            f"({', '.join(list(sending)[:6])}) has written, along {len(hops)} hops. Were the two swapped?"
        )


def _said(nodes: Nodes) -> str:
    return " + ".join(node.label for node in nodes)


def _with_remainder(values: np.ndarray, base: np.ndarray, columns: list[str]) -> np.ndarray:
    """Add what total leaves over direct and joint effects; a path that does not exist carries nothing."""
    effects = (values - base[:, None, None]).transpose(2, 0, 1)
    total, direct, joint = (effects[columns.index(name)] for name in ("total", "direct", "joint"))
    return np.dstack([values, base[:, None] + (total - direct - np.nan_to_num(joint))])
