"""Attention flow: which roles does each role read, layer by layer?

    weight="attention"   mass(Q, K) = mean over q in Q of the sum over k in K of p[q, k]          (sums to 1 over roles)
    weight="value"       mass(Q, K) = mean over q in Q of the sum over k in K of p[q, k] |v_k W_O|

Both are sums over keys: a role of many positions gets much by its size alone. Values are the masses, the baseline is 0.

Source: the study (arXiv 2604.02605) for masses by role; Kobayashi et al. (2020) for the norm. Not done: attention over
several layers (rollout).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from av_lens.checks import require_choice
from av_lens.core import Progress
from av_lens.core.budget import listed
from av_lens.core.readings import SINK_TIMES, WEIGHTS, attention_mass, sinks_by_layout, sinks_of
from av_lens.errors import InputError
from av_lens.inputs import AVInputs
from av_lens.methods.shared.frame import Examples, Frame, Stack, answer_lengths
from av_lens.methods.shared.places import SINKS, named_span
from av_lens.model import HookedAVLLM
from av_lens.results import Grid
from av_lens.spans import ROLES, Span

UNITS = {"attention": "share of attention", "value": "norm of what is moved"}


def attention_flow(
    model: HookedAVLLM,
    x: Any,
    *,
    queries: str | Sequence[str] = "generation",
    by: str = "layer",
    weight: str = "attention",
    sinks: bool | Span = False,
    max_new_tokens: int = 0,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> Grid:
    """Measure how much attention each role pays to each other role.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, conflicts (their cell `va` is taken), or several of either, also of different layouts.
        queries: who reads: role names joined by `|`, one expression or several.
        by: "layer" (the mean over heads) or "head" (every head by itself).
        weight: "attention" or "value" (times the norm of what is moved).
        sinks: show sinks as a role of their own: True finds them in these inputs, a `Span` names them.
        max_new_tokens: let the model answer greedily first, with at most so many tokens.
        stack: examples that run together, at most.
        budget_gb: memory for the attention of one layer.
        progress: called as `progress(stage, done, total)`; True shows a bar.

    Returns:
        A grid over `[example, query, key, layer]` (and `head`); NaN where an example lacks a role.

    Raises:
        InputError: an unknown role, weight or `by`, or a query that no example has.
    """
    require_choice("by", by, ("layer", "head"))
    require_choice("weight", weight, WEIGHTS)
    asked = listed(queries)
    examples = Examples.of(model, x)
    if max_new_tokens:
        examples = _answered(model, examples, max_new_tokens, stack)
    if not asked:
        raise InputError("queries names nothing: name at least one role, such as 'generation'.")
    for words in asked:
        if not any(len(named_span(words, x.spans)) for x in examples.inputs):
            hint = " Give max_new_tokens to let the model answer first." if "generated" in words else ""
            raise InputError(f"queries={words!r}: no input has such a position; look at x.spans.{hint}")
    size = examples.stack_size(model, stack, budget_gb)
    roles = [role for role in ROLES if any(role in one.spans.roles for one in examples.inputs)]
    keys = [*roles, SINKS] if sinks is not False else roles
    spec, found_sinks, known = model.spec, dict[str, list[int]](), list[Any]()
    frame = Frame.of(model, examples, measured=False)
    frame.shape(len(asked), len(keys), spec.n_layers, spec.n_heads)
    stacks = examples.stacks(size)

    def work(stack: Stack, _: Progress) -> None:
        if sinks is True and not known:
            known.extend(sinks_by_layout(model, (one.x for one in stacks)))
        x = stack.x
        positions = sinks.positions.tolist() if isinstance(sinks, Span) else sinks_of(x.spans, known)
        frame.values[stack.rows] = _masses(model, x, asked, keys, positions, weight)
        found_sinks[f"{x.layout}, {len(x.spans)} positions"] = positions

    frame.run(work, stacks, progress, stage="attention flow")
    axes: dict[str, Any] = {"query": asked, "key": keys, "layer": np.arange(spec.n_layers)}
    if by == "head":
        axes["head"] = np.arange(spec.n_heads)
    else:
        frame.values = frame.values.mean(-1)
    return frame.grid(
        axes,
        named=(f"attention flow ({weight})", UNITS[weight]),
        direction="what the query reads from the key; no edit, so the effects are the values",
        method="attention flow",
        weight=weight,
        by=by,
        max_new_tokens=max_new_tokens,
        sinks=found_sinks if sinks is not False else "left in their roles",
        sink_times=SINK_TIMES,
    )


def _masses(
    model: Any, x: AVInputs, asked: Sequence[str], keys: Sequence[str], sinks: Sequence[int], weight: str
) -> np.ndarray:
    """One stack's masses `[example, query, key, layer, head]`."""
    apart = set(x.spans.span(sinks).positions.tolist())
    queries = {words: named_span(words, x.spans).positions.tolist() for words in asked}
    groups = {
        key: list(sinks) if key == SINKS else [p for p in x.spans[key].positions.tolist() if p not in apart]
        for key in keys
    }
    mass = attention_mass(model, x, queries, keys=groups, weight=weight).numpy().astype(np.float64)
    counts = np.array([len(positions) or np.nan for positions in queries.values()])
    present = [np.nan if key != SINKS and key not in x.spans.roles else 1.0 for key in keys]
    return np.moveaxis(mass / counts[:, None] * np.array(present), (3, 4), (1, 2))


def _answered(model: Any, examples: Examples, n: int, stack: int) -> Examples:
    """Put the model's own greedy answer after every prompt, up to its end; its last token produced nothing."""
    answered: dict[int, AVInputs] = {}
    for one in examples.stacks(stack):
        x = one.x
        tokens = model.generate(x, max_new_tokens=n)[:, len(x.spans) :]
        for i, (length, _) in enumerate(answer_lengths(model, tokens)):
            new = tokens[i : i + 1, : length - 1]
            answered[int(one.rows[i])] = x[i].continued(new) if new.shape[1] else x[i]
    return Examples(tuple(answered[row] for row in range(len(examples))))
