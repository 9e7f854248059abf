"""What does a run say: the sound's answer, the picture's, or neither? Scores and M as in protocol section 1."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from av_lens.core.calls import unembedded
from av_lens.inputs.answers import Answer, answer_pair
from av_lens.metrics.forms import each
from av_lens.metrics.metric import Metric, log_prob

Said = Float[Tensor, "batch 3"]
"""Log-probability of the sound's answer and of the picture's, to their ends; and what makes a logit one (log Z)."""
SIDES = ("sound", "picture")
NEITHER, UNREAD = -1, -2
"""What stands in `top` for an answer that is no candidate's, and for a run without numbers."""


@dataclass(frozen=True, eq=False)
class Edited:
    """An edited run's logits and stream (as it enters the final norm) at the asked position; `later`: at answers."""

    logits: Float[Tensor, "batch d_vocab"]
    final: Float[Tensor, "batch d_model"]
    later: Float[Tensor, "batch row d_model"] | None = None


@dataclass(frozen=True, eq=False)
class CellReading:
    """What a run says, per example; `top` is -1 where no candidate is likeliest, -2 where the run has no number."""

    scores: Float[np.ndarray, "example candidate"]
    top: Int[np.ndarray, " example"]
    mass: Float[np.ndarray, " example"]

    @classmethod
    def joined(cls, parts: Sequence[CellReading], order: Int[np.ndarray, " example"]) -> CellReading:
        """Put the readings of several stacks one after the other, and these in order."""
        names = ("scores", "top", "mass")
        return cls(*(np.concatenate([getattr(one, name) for one in parts])[order] for name in names))


@dataclass(frozen=True, eq=False)
class Candidates:
    """All answers by their synonyms' first tokens; with long ones scores end with the two's at the first token."""

    names: tuple[str, ...]
    ids: Int[np.ndarray, "candidate option"]
    sound: Int[np.ndarray, " example"]
    picture: Int[np.ndarray, " example"]
    long: Bool[np.ndarray, " example"]

    @classmethod
    def of(cls, conflicts: Sequence[Any], tokenizer: Any) -> Candidates:
        """Resolve every conflict's two answers."""
        pairs = [answer_pair(tokenizer, *conflict.answers) for conflict in conflicts]
        names: dict[frozenset[tuple[int, ...]], str] = {}
        for answer in chain.from_iterable(pairs):
            names.setdefault(frozenset(answer.options), answer.text)
        firsts = [sorted({option[0] for option in options}) for options in names]
        ids = np.full((len(names), max(map(len, firsts))), -1, dtype=np.int64)
        for row, tokens in zip(ids, firsts, strict=True):
            row[: len(tokens)] = tokens
        order = {options: number for number, options in enumerate(names)}
        sound, picture = np.array(
            [[order[frozenset(answer.options)] for answer in pair] for pair in pairs], dtype=np.int64
        ).T
        long = np.array([not all(answer.single for answer in pair) for pair in pairs], dtype=bool)
        return cls(tuple(names.values()), ids, sound, picture, long)

    @property
    def several(self) -> bool:
        """Whether any conflict has an answer of several tokens."""
        return bool(self.long.any())

    @property
    def width(self) -> int:
        """Columns of scores."""
        return len(self.names) + (2 if self.several else 0)

    def scores(
        self, logits: Float[Tensor, "batch d_vocab"], examples: Int[np.ndarray, " batch"], said: Said | None = None
    ) -> Float[np.ndarray, "batch column"]:
        """Score every candidate."""
        return self.completed(self.pooled(logits[:, self.tokens.to(logits.device)]), examples, said)

    def completed(
        self,
        pooled: Float[np.ndarray, "*more batch candidate"],
        examples: Int[np.ndarray, " batch"],
        said: Float[Tensor, "*more batch 3"] | None = None,
    ) -> Float[np.ndarray, "*more batch column"]:
        """Put the two answers' sums in their places, their first tokens behind: all become log-probabilities then."""
        if not self.several:
            return pooled
        places = [(..., np.arange(len(examples)), getattr(self, side)[examples]) for side in SIDES]
        whole = None if said is None else said.double().cpu().numpy()
        out = pooled if whole is None else pooled - whole[..., 2:]
        first = np.stack([out[place] for place in places], axis=-1)
        if whole is not None:
            for number, place in enumerate(places):
                out[place] = whole[..., number]
        return np.concatenate([out, first], axis=-1)

    @property
    def tokens(self) -> Int[Tensor, " token"]:
        """The tokens that are scored, candidate by candidate; a place without a synonym holds token 0."""
        return torch.from_numpy(self.ids).clamp(min=0).flatten()

    def pooled(self, logits: Float[Tensor, "*more batch token"]) -> Float[np.ndarray, "*more batch candidate"]:
        """Score every candidate from the logits of its own tokens."""
        absent = torch.from_numpy(self.ids < 0).to(logits.device)
        picked = logits.double().unflatten(-1, tuple(self.ids.shape)).masked_fill(absent, -torch.inf)
        return picked.logsumexp(-1).cpu().numpy()

    def weighed(
        self, parts: Float[Tensor, "*more batch token"], logits: Float[Tensor, "batch d_vocab"]
    ) -> Float[np.ndarray, "*more batch candidate"]:
        """Add up what is written to `tokens`; synonyms count by their share of the answer's own probability."""
        shape = tuple(self.ids.shape)
        own = logits.double()[:, self.tokens].unflatten(-1, shape)
        weight = own.masked_fill(torch.from_numpy(self.ids < 0).to(own.device), -torch.inf).softmax(-1)
        return (parts.double().unflatten(-1, shape) * weight).sum(-1).cpu().numpy()

    def read(
        self, logits: Float[Tensor, "batch d_vocab"], examples: Int[np.ndarray, " batch"], said: Said | None = None
    ) -> CellReading:
        """Read a run of some of the conflicts."""
        scores = self.scores(logits, examples, said)
        log_total = logits.double().logsumexp(-1).cpu().numpy() if said is None else np.zeros(len(scores))
        probability = np.exp(scores - log_total[:, None])
        mass = self._own(probability, examples, "sound") + self._own(probability, examples, "picture")
        return CellReading(scores, self.tops(logits, examples), mass)

    def tops(
        self, logits: Float[Tensor, "batch d_vocab"], examples: Int[np.ndarray, " batch"]
    ) -> Int[np.ndarray, " batch"]:
        """Find the candidate that the most likely token begins, of several the example's own (see `CellReading`)."""
        best = logits.argmax(-1).cpu().numpy()
        owner = {int(token): index for index, row in enumerate(self.ids) for token in row if token >= 0}
        top = np.array([owner.get(int(token), NEITHER) for token in best], dtype=np.int64)
        for side in SIDES:
            mine: np.ndarray = getattr(self, side)[examples]
            top = np.where((self.ids[mine] == best[:, None]).any(1), mine, top)
        top[logits[:, self.tokens.to(logits.device)].isnan().any(1).cpu().numpy()] = UNREAD
        return top

    def _own(self, scores: np.ndarray, examples: np.ndarray, of: str) -> np.ndarray:
        return scores[..., np.arange(len(examples)), getattr(self, of)[examples]]

    def margin(
        self,
        scores: Float[np.ndarray, "*more batch column"],
        examples: Int[np.ndarray, " batch"],
        *,
        first: bool = False,
    ) -> Float[np.ndarray, "*more batch"]:
        """Compute M: score of the sound's answer minus score of the picture's; or the same at the first token."""
        if first and self.several:
            return scores[..., -2] - scores[..., -1]
        return self._own(scores, examples, "sound") - self._own(scores, examples, "picture")

    def moved_at_first(
        self,
        before: Float[np.ndarray, "scale 1 1 batch column"],
        after: Float[np.ndarray, "scale request node batch column"],
        examples: Int[np.ndarray, " batch"],
    ) -> Float[np.ndarray, "scale request node batch column"]:
        """Let the two answers' scores move as their first tokens do: where heads are held, at the answer too."""
        out = after.copy()
        for column, side in zip((-2, -1), SIDES if self.several else (), strict=False):
            place = (..., np.arange(len(examples)), getattr(self, side)[examples])
            out[place] = before[place] + after[..., column] - before[..., column]
        return out

    def above_others(
        self, scores: Float[np.ndarray, "*more batch column"], examples: Int[np.ndarray, " batch"], *, of: str
    ) -> Float[np.ndarray, "*more batch"]:
        """Compare an answer's score at the first token with the mean of the candidates that are neither of the two."""
        n_others = len(self.names) - 2
        if n_others < 1:
            return np.full(scores.shape[:-1], np.nan)
        pair = self._own(scores, examples, "sound") + self._own(scores, examples, "picture")
        own = scores[..., SIDES.index(of) - 2] if self.several else self._own(scores, examples, of)
        return own - (scores[..., : len(self.names)].sum(-1) - pair) / n_others

    def centred(
        self, scores: Float[np.ndarray, "*more batch column"], examples: Int[np.ndarray, " batch"], *, of: str
    ) -> Float[np.ndarray, "*more batch"]:
        """Compare one answer's score with the mean of all distinct answers of the set."""
        return self._own(scores, examples, of) - scores[..., : len(self.names)].mean(-1)


def overlapping(listed: Sequence[tuple[Answer, Answer]]) -> dict[int, str]:
    """Find the conflicts of which an answer shares a synonym, but not all, with a commoner one of another conflict."""
    counted = Counter(frozenset(answer.options) for answer in chain.from_iterable(listed))
    owner = {option: options for options, _ in reversed(counted.most_common()) for option in options}
    names = {frozenset(answer.options): answer.text for answer in chain.from_iterable(listed)}
    found = dict[int, str]()
    for number, answer in ((number, answer) for number, pair in enumerate(listed) for answer in pair):
        for options in (owner[option] for option in answer.options if owner[option] != frozenset(answer.options)):
            found[number] = (
                f"the answers {names[options]!r} and {answer.text!r} of different conflicts share a word (their "
                "synonyms overlap): give one list of synonyms for each answer, the same in every conflict."
            )
    return found


@dataclass(frozen=True, eq=False)
class Spoken:
    """The two answers of some conflicts, to be said to their end: log P(sound's answer) and log P(picture's)."""

    sides: tuple[Metric, Metric]

    @classmethod
    def of(cls, answers: Sequence[tuple[Any, Any]], model: Any) -> Spoken:
        """Take the two answers of each conflict, their words read."""
        heard, seen = (log_prob(each([pair[side] for pair in answers])).bind(model) for side in (0, 1))
        return cls((heard, seen))

    def continuations(self, batch: int) -> list[Int64[Tensor, "batch _"]]:
        """List the tokens that come after the prompt, an answer's option each; see `Metric.continuations`."""
        return [tokens for side in self.sides for tokens in side.continuations(batch)]

    def said(self, model: Any, one: Edited, own: Edited | None = None) -> Said:
        """Sum up what a run says of both answers; `own` is the unedited run whose final norm is held."""
        assert one.later is not None
        with torch.no_grad():
            if own is None or own.later is None:
                return self.summed(one.logits, unembedded(model, one.later).float())
            return self.summed(_at_scale(model, one.final, own.final), _at_scale(model, one.later, own.later))

    def summed(self, first: Float[Tensor, "batch d_vocab"], later: Float[Tensor, "batch row d_vocab"]) -> Said:
        """Sum up both answers; `later` are the logits at the answers' own rows, one answer's after the other's."""
        found: list[Tensor] = []
        for side in self.sides:
            reduced: list[Tensor] = []
            for number, tokens in enumerate(side.continuations(len(first))):
                own, later = later.tensor_split([tokens.shape[1] - 1], dim=1)
                reduced.append(side.reduce(number, torch.cat((first[:, None], own), dim=1)))
            found.append(side.combine(reduced) if reduced else side(first[:, None]))
        return torch.stack([*found, first.logsumexp(-1)], dim=-1)


def divisor(model: Any, stream: Float[Tensor, "*more d_model"]) -> Float[Tensor, "*more 1"]:
    """What the final norm divides a stream by."""
    return (stream.float().pow(2).mean(-1, keepdim=True) + model.ln_final.original_component.variance_epsilon).sqrt()


def _at_scale(model: Any, stream: Float[Tensor, "*more d_model"], own: Float[Tensor, "*more d_model"]) -> Tensor:
    """All logits of a stream, the final norm dividing by what it divides another one by."""
    scaled = model.ln_final.original_component(stream).float() * divisor(model, stream) / divisor(model, own)
    return model.bridge.unembed.original_component(scaled.to(stream.dtype)).float()
