"""Logit lens: what would the model say here, if it stopped after this layer?

    logits(l, p) = unembed(final_norm(stream after layer l at position p))

with the final norm's scale computed anew for each stream; at the last layer these are the model's own logits. Read at
any span, by default at the sound's positions: the likeliest tokens in words, and ranks (0 is the top) and probabilities
of chosen words, in the form that the model says (`runs.forms`). Of conflicts, the words are the sound's and the
picture's answers, and the words of the other conflicts' sounds, in the same form, are the null.

*Latent audio understanding* (`readout.understanding(k)`) is the fraction of clips in which the sound's word is in the
top k at some audio position and layer, beside the null of protocol section 8: the same maximum over positions and
layers for other sounds' words on the same clip. The excess is what is to be reported. Of an answer of several tokens
the first is read; of synonyms the best rank, and the sum of probabilities.

`norm=False` leaves the final norm out at every layer, as the study's code does (arXiv 2604.02605), which reads what
each decoder layer hands on. Ranks then depend on what the norm's weights would have turned down, and the last layer's
are not the model's own; it is there to reproduce, not to be used. The study's own rule for its 61.4% was not found.

Source: nostalgebraist (2020). Not done: tuned lenses (a translator fitted to each layer).

    >>> read = logit_lens(model, conflicts)                                                    # doctest: +SKIP
    >>> read.understanding(k=5).mean("values"), read.top(layer=4)                             # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from av_lens.checks import require_at_least
from av_lens.core.execution import logits_of
from av_lens.core.progress import Progress
from av_lens.core.unembedding import unembedded
from av_lens.errors import InputError
from av_lens.families.hook_names import hook_name
from av_lens.inputs import AVInputs
from av_lens.inputs.answers import spelled
from av_lens.interventions.sites import resolve_positions
from av_lens.methods.shared.examples import Examples, Stack
from av_lens.methods.shared.frame import Frame
from av_lens.metrics.asked import Each, asked_words, resolved, shown
from av_lens.metrics.forms import Forms, read_forms
from av_lens.results.lens_readout import LensReadout, readings
from av_lens.spans import Span

MOST_OTHERS = 32
Ids = tuple[int, ...]


def logit_lens(
    model: Any,
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
    found = _Readings.empty(len(examples), model.spec.n_layers, labels, wanted, top)
    frame = Frame.of(model, examples, measured=False)

    def work(stack: Stack, show: Progress) -> None:
        del show
        positions = places[stack.members[0]]
        columns = np.searchsorted(labels, positions)
        _Lens(model, stack.rows, positions, columns, found, wanted, norm, budget_gb).read(stack.x)

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
    return found.labelled(model, labels, wanted, examples.clusters, made)


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
            found = resolved(model.tokenizer, answer, form)
            several.extend(f"{found.text!r}: {spelled(model.tokenizer, ids)}" for ids in found.options if len(ids) > 1)
            return tuple(dict.fromkeys(option[0] for option in found.options))

        ids = [[first_tokens(answer) for answer in answers] for answers in asked]
        null = dict[Ids, str]()
        for answer in pool:
            null.setdefault(first_tokens(answer), shown(answer))
        chosen = list(null)
        if len(chosen) > MOST_OTHERS:
            kept = np.random.default_rng(seed).choice(len(chosen), MOST_OTHERS, replace=False)
            chosen = [chosen[i] for i in sorted(kept.tolist())]
        notes = [f"read by their first token: {'; '.join(sorted(set(several)))}"] if several else []
        return cls(labels, ids, [null[one] for one in chosen], chosen, notes, forms)

    def own(self, example: int) -> set[int]:
        """All tokens of an example's own words."""
        return {token for word in self.ids for token in word[example]}


@dataclass(frozen=True, eq=False)
class _Readings:
    """Arrays that are filled stack by stack."""

    ranks: np.ndarray
    probabilities: np.ndarray
    top_ids: np.ndarray
    top_probabilities: np.ndarray
    best_others: np.ndarray
    said: np.ndarray

    @classmethod
    def empty(cls, n: int, n_layers: int, labels: list[int], wanted: _Wanted, top: int) -> _Readings:
        words = (n, len(wanted.ids), n_layers, len(labels))
        likeliest = (n, n_layers, len(labels), top)
        others = (n, n_layers, len(wanted.other_ids))
        blank = [np.full(shape, np.nan) for shape in (words, words, likeliest, others, (n,))]
        return cls(blank[0], blank[1], np.full(likeliest, -1), blank[2], blank[3], blank[4])

    def labelled(
        self, model: Any, labels: list[int], wanted: _Wanted, clusters: tuple[int, ...], made: dict[str, Any]
    ) -> LensReadout:
        axes = {"word": np.array(wanted.labels, dtype=str), "layer": np.arange(model.spec.n_layers), "pos": labels}
        dims = ("example", *axes)
        sign = "what the stream after each layer would say; no edit, so the effects are the values"
        options: dict[str, Any] = {"clusters": clusters, "provenance": made, "direction": sign}
        texts = {
            int(token): str(model.tokenizer.decode([int(token)])) for token in np.unique(self.top_ids) if token >= 0
        }
        return LensReadout(
            readings(xr.DataArray(self.ranks, dims=dims, coords=axes), "rank", **options),
            readings(xr.DataArray(self.probabilities, dims=dims, coords=axes), "probability", **options),
            self.top_ids,
            self.top_probabilities,
            texts,
            self.best_others,
            self.said,
        )


@dataclass(frozen=True, eq=False)
class _Lens:
    """The reading of one stack: hooks that read each layer's stream as it passes, and keep no stream and no logits."""

    model: Any
    rows: np.ndarray
    positions: tuple[int, ...]
    columns: np.ndarray  # the place of each position on the axis
    into: _Readings
    wanted: _Wanted
    norm: bool
    budget_gb: float | int

    @torch.no_grad()
    def read(self, x: AVInputs) -> None:
        """Run the stack once."""
        n_layers = self.model.spec.n_layers
        hooks = [(hook_name("resid_post", layer), self._hook(layer)) for layer in range(n_layers)]
        last = logits_of(self.model, x, hooks, torch.tensor([x.spans.generation_position]))[:, 0]
        if self.wanted.ids:
            for i, row in enumerate(self.rows.tolist()):
                self.into.said[row] = float(int(last[i].argmax()) in self.wanted.ids[0][row])
        for row in self.rows.tolist():
            own = self.wanted.own(row)
            shared = [bool(own & set(ids)) for ids in self.wanted.other_ids]
            self.into.best_others[row][:, shared] = np.nan

    def _hook(self, layer: int) -> Callable[..., None]:
        def hook(stream: Tensor, hook: Any = None) -> None:
            del hook
            each = 16.0 * stream.shape[0] * self.model.spec.d_vocab  # logits, their comparison and sums, float32
            step = max(1, int(self.budget_gb * 1e9 / each))
            for start in range(0, len(self.positions), step):
                part = slice(start, start + step)
                logits = self._logits(stream[:, list(self.positions[part])]).float()
                self._likeliest(layer, logits, self.columns[part])
                self._words(layer, logits, self.columns[part])
                self._others(layer, logits)

        return hook

    def _logits(self, stream: Tensor) -> Tensor:
        return unembedded(self.model, stream) if self.norm else self.model.bridge.unembed.original_component(stream)

    def _likeliest(self, layer: int, logits: Tensor, columns: np.ndarray) -> None:
        found = logits.topk(self.into.top_ids.shape[-1], dim=-1)
        chances = (found.values - logits.logsumexp(-1, keepdim=True)).exp()
        at = np.ix_(self.rows, np.array([layer]), columns)
        self.into.top_ids[at] = found.indices.cpu().numpy()[:, None]
        self.into.top_probabilities[at] = chances.cpu().numpy()[:, None]

    def _words(self, layer: int, logits: Tensor, columns: np.ndarray) -> None:
        whole = logits.logsumexp(-1, keepdim=True)
        for number, by_example in enumerate(self.wanted.ids):
            for i, row in enumerate(self.rows.tolist()):
                ids = list(by_example[row])
                chances = (logits[i][:, ids] - whole[i]).exp().sum(-1)
                self.into.ranks[row, number, layer, columns] = ranks_of(logits[i], ids).cpu().numpy()
                self.into.probabilities[row, number, layer, columns] = chances.cpu().numpy()

    def _others(self, layer: int, logits: Tensor) -> None:
        for number, ids in enumerate(self.wanted.other_ids):
            best = ranks_of(logits, list(ids)).amin(-1).cpu().numpy()
            kept = self.into.best_others[self.rows, layer, number]
            self.into.best_others[self.rows, layer, number] = np.fmin(kept, best)


def ranks_of(logits: Float[Tensor, "*lead d_vocab"], ids: Sequence[int]) -> Float[Tensor, "*lead"]:
    """Count the tokens that are likelier than a word.

    Args:
        logits: of the whole vocabulary.
        ids: the word's tokens: synonyms, of which the best counts.

    Returns:
        The rank, 0 for the top.
    """
    ranks = [(logits > logits[..., token, None]).sum(-1) for token in ids]
    return torch.stack(ranks).amin(0).float()
