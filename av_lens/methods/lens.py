"""Logit lens: what would the model say here, if it stopped after this layer?

    logits(l, p) = unembed(final_norm(stream after layer l at position p))

with the final norm's scale computed anew for each stream. *Latent audio understanding* (`readout.understanding(k)`) is
the fraction of clips in which the sound's word is in the top k at some audio position and layer, beside the null of
protocol section 8. Of an answer of several tokens the first is read; of synonyms the best rank, and the sum of
probabilities.

`norm=False` is there to reproduce the study's code (arXiv 2604.02605), not to be used: ranks then depend on what the
norm's weights would have turned down. The study's own rule for its 61.4% was not found.

Source: nostalgebraist (2020). Not done: tuned lenses (a translator fitted to each layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from av_lens.checks import require_at_least
from av_lens.core import Progress, read_layers
from av_lens.core.calls import unembedded
from av_lens.errors import InputError
from av_lens.inputs import AVInputs
from av_lens.inputs.answers import resolve, spelled
from av_lens.interventions.edits import resolve_positions
from av_lens.methods.shared.frame import Examples, Frame, Stack
from av_lens.metrics.forms import Each, Forms, asked_words, read_forms, shown
from av_lens.model import HookedAVLLM
from av_lens.results.readouts import LensReadout, readings
from av_lens.spans import Span

MOST_OTHERS = 32
Ids = tuple[int, ...]


def logit_lens(
    model: HookedAVLLM,
    x: Any,
    *,
    at: str | Span = "audio",
    words: Sequence[Any] | None = None,
    others: Sequence[Any] | None = None,
    top: int = 5,
    norm: bool = True,
    seed: int = 0,
    stack: int = 16,
    budget_gb: float | int = 1.0,
    progress: Progress | bool | None = None,
) -> LensReadout:
    """Read every layer's stream through the final norm and the unembedding.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, conflicts (their cell `va` is taken), or several of either, also of different layouts.
        at: where to read: roles joined by `|`, or a `Span`.
        words: answers whose ranks and probabilities are wanted, each a word, a token id, a list of synonyms, or
            `each([...])` with one for every example; None takes the two answers of conflicts.
        others: words for the null; None takes the sounds' answers of all conflicts. An example's own words are left
            out of its null.
        top: how many of the likeliest tokens are kept in words.
        norm: apply the final norm; False leaves it out at every layer, as the study's code does.
        seed: draws 32 of the other words where there are more.
        stack: examples that run together, at most.
        budget_gb: memory for logits, and for the attention of one layer.
        progress: called as `progress(stage, done, total)`; True shows a bar.

    Returns:
        The readout: `.ranks`, `.probabilities`, `.top(...)`, `.understanding(k)`.

    Raises:
        InputError: an unknown role, a word without tokens, or as many words as there are not examples.
        InterventionError: positions outside the input, or none.
    """
    require_at_least("top", top, 1)
    examples = Examples.of(model, x)
    wanted = _Wanted.of(model, examples, words, others, seed)
    places = [resolve_positions(at, spans, what="lens").index for spans in examples.spans]
    labels = sorted({position for one in places for position in one})
    found = _Readings(model, len(examples), labels, wanted, top, norm, budget_gb)
    frame = Frame.of(model, examples, measured=False)

    def work(stack: Stack, _: Progress) -> None:
        found.read(stack.x, stack.rows, places[stack.members[0]])

    stacks = examples.stacks(examples.stack_size(model, stack, budget_gb))
    frame.run(work, stacks, progress, stage="logit lens", whole=True)
    made = frame.stamp(
        method="logit lens",
        at=str(at),
        norm="final norm" if norm else "left out",
        words=wanted.labels,
        others=wanted.other_labels,
        notes=wanted.notes,
        **({} if wanted.forms is None else wanted.forms.provenance()),
        seed=seed,
    )
    return found.labelled(examples.clusters, made)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """The tokens of every word in every example, and those of the null."""

    labels: list[str]
    ids: list[list[Ids]]  # [word][example]
    other_labels: list[str]
    other_ids: list[Ids]
    notes: list[str] = field(default_factory=list)
    forms: Forms | None = None

    @classmethod
    def of(cls, model: Any, examples: Examples, words: Any, others: Any, seed: int) -> _Wanted:
        n, conflicts = len(examples), examples.conflicts
        if isinstance(words, str) or isinstance(others, str):
            raise InputError("words and others are lists of words: write words=['dog'].")
        listed = [*words] if words is not None else []
        labels = [f"word {number}" if isinstance(word, Each) else shown(word) for number, word in enumerate(listed)]
        if words is None and conflicts:
            listed = [Each(tuple(conflict.answers[side] for conflict in conflicts)) for side in (0, 1)]
            labels = ["sound", "picture"]
        if len(set(labels)) < len(labels):
            raise InputError(f"words names one word twice: {labels}.")
        pool = [*others] if others is not None else [conflict.answers[0] for conflict in conflicts]
        several: list[str] = []
        asked = [word.answers if isinstance(word, Each) else (word,) * n for word in listed]
        for answers in asked:
            if len(answers) != n:
                raise InputError(f"each(...) gives {len(answers)} words for {n} examples.")
        spoken = asked_words(asked, n)
        spoken = spoken if any(spoken) else asked_words([(one,) for one in pool], n)
        forms = read_forms(model, examples.inputs, spoken)
        form = None if forms is None else forms.chosen

        def first_tokens(answer: Any) -> Ids:
            found = resolve(model.tokenizer, answer, form)
            several.extend(f"{found.text!r}: {spelled(model.tokenizer, ids)}" for ids in found.options if len(ids) > 1)
            return tuple(dict.fromkeys(option[0] for option in found.options))

        ids = [[first_tokens(answer) for answer in answers] for answers in asked]
        null = [(first_tokens(answer), shown(answer)) for answer in pool]
        null, chosen = dict(reversed(null)), list(dict.fromkeys(tokens for tokens, _ in null))  # the first of equals
        if len(chosen) > MOST_OTHERS:
            kept = np.random.default_rng(seed).choice(len(chosen), MOST_OTHERS, replace=False)
            chosen = [chosen[i] for i in sorted(kept.tolist())]
        notes = [f"read by their first token: {'; '.join(sorted(set(several)))}"] if several else []
        return cls(labels, ids, [null[one] for one in chosen], chosen, notes, forms)


class _Readings:
    """Arrays that are filled as each layer's stream passes; no stream and no logits are kept."""

    def __init__(
        self, model: Any, n: int, labels: list[int], wanted: _Wanted, top: int, norm: bool, budget_gb: float | int
    ) -> None:
        self.model, self.labels, self.wanted, self.norm, self.budget_gb = model, labels, wanted, norm, budget_gb
        n_layers, n_places = model.spec.n_layers, len(labels)
        self.ranks = np.full((n, len(wanted.ids), n_layers, n_places), np.nan)
        self.probabilities = self.ranks.copy()
        self.top_ids = np.full((n, n_layers, n_places, top), -1)
        self.top_probabilities = np.full(self.top_ids.shape, np.nan)
        self.best_others = np.full((n, n_layers, len(wanted.other_ids)), np.nan)
        self.said = np.full(n, np.nan)

    def labelled(self, clusters: tuple[int, ...], made: dict[str, Any]) -> LensReadout:
        """Name the axes."""
        words, layers = np.array(self.wanted.labels, dtype=str), np.arange(self.model.spec.n_layers)
        axes = {"word": words, "layer": layers, "pos": self.labels}
        sign = "what the stream after each layer would say; no edit, so the effects are the values"
        said: dict[str, Any] = {"clusters": clusters, "provenance": made, "direction": sign}
        ranks, probabilities = (
            readings(xr.DataArray(values, dims=("example", *axes), coords=axes), unit, **said)
            for values, unit in ((self.ranks, "rank"), (self.probabilities, "probability"))
        )
        likeliest = self.top_ids, self.top_probabilities
        texts = {t: str(self.model.tokenizer.decode([t])) for t in np.unique(self.top_ids).tolist() if t >= 0}
        return LensReadout(ranks, probabilities, *likeliest, texts, self.best_others, self.said)

    @torch.no_grad()
    def read(self, x: AVInputs, rows: np.ndarray, positions: tuple[int, ...]) -> None:
        """Run one stack once."""
        columns = np.searchsorted(self.labels, positions)

        def read_layer(layer: int, stream: Tensor) -> None:
            each = 16.0 * stream.shape[0] * self.model.spec.d_vocab  # logits, their comparison and sums, float32
            step = max(1, int(self.budget_gb * 1e9 / each))
            unembed = partial(unembedded, self.model) if self.norm else self.model.bridge.unembed.original_component
            for start in range(0, len(positions), step):
                logits = unembed(stream[:, list(positions[start : start + step])]).float()
                self._read(layer, logits, rows, columns[start : start + step])

        last = read_layers(self.model, x, {"resid_post": read_layer}, [x.spans.generation_position])[:, 0]
        for i, row in enumerate(rows.tolist()):
            if self.wanted.ids:
                self.said[row] = float(int(last[i].argmax()) in self.wanted.ids[0][row])
            own = {token for word in self.wanted.ids for token in word[row]}
            self.best_others[row][:, [bool(own & set(ids)) for ids in self.wanted.other_ids]] = np.nan

    def _read(self, layer: int, logits: Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
        """The likeliest tokens, the words of each example, and the best of each word of the null."""
        whole, found = logits.logsumexp(-1, keepdim=True), logits.topk(self.top_ids.shape[-1], dim=-1)
        at = np.ix_(rows, np.array([layer]), columns)
        self.top_ids[at] = found.indices.cpu().numpy()[:, None]
        self.top_probabilities[at] = (found.values - whole).exp().cpu().numpy()[:, None]
        for (number, by_example), (i, row) in product(enumerate(self.wanted.ids), enumerate(rows.tolist())):
            ids = list(by_example[row])
            chances = (logits[i][:, ids] - whole[i]).exp().sum(-1)
            self.ranks[row, number, layer, columns] = ranks_of(logits[i], ids).cpu().numpy()
            self.probabilities[row, number, layer, columns] = chances.cpu().numpy()
        for number, ids in enumerate(self.wanted.other_ids):
            best = ranks_of(logits, list(ids)).amin(-1).cpu().numpy()
            self.best_others[rows, layer, number] = np.fmin(self.best_others[rows, layer, number], best)


def ranks_of(logits: Float[Tensor, "*lead d_vocab"], ids: Sequence[int]) -> Float[Tensor, "*lead"]:
    """Count the tokens that are likelier than a word, of whose tokens (synonyms) the best counts: 0 for the top."""
    ranks = [(logits > logits[..., token, None]).sum(-1) for token in ids]
    return torch.stack(ranks).amin(0).float()
