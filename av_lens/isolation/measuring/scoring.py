"""What does a run say: the sound's answer, the picture's, or neither?

The score of an answer at the asked position is its token's logit, or the logsumexp over its synonyms' logits.
M = score(sound's answer) - score(picture's answer), the two answers held fixed in every cell. "Right among the two"
is M > 0 for the sound's answer; right in the whole vocabulary means that the most likely token of all belongs to the
answer.

`Candidates` are all distinct answers of a set of conflicts, whose words have been read (`behaviour`). Answers of
several tokens are refused here: their score is a teacher-forced sum over tokens, which needs one more run per answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.errors import InputError, ProtocolError
from av_lens.inputs.answers import Answer, answer_pair

NEITHER, UNREAD = -1, -2
"""What stands in `top` for an answer that is no candidate's, and for a run without numbers."""


@dataclass(frozen=True, eq=False)
class CellReading:
    """What a run of a stack says, per example.

    `scores` are the candidates' scores; `top` is the candidate that holds the most likely token of the whole
    vocabulary, -1 where none does, -2 where the run has no number; `mass` is P(sound's answer) + P(picture's).
    """

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
    """All distinct answers of a set of conflicts, and which two belong to each conflict.

    `ids` lists each candidate's one-token synonyms, padded with -1; `sound` and `picture` index the candidates.
    """

    names: tuple[str, ...]
    ids: Int[np.ndarray, "candidate option"]
    sound: Int[np.ndarray, " example"]
    picture: Int[np.ndarray, " example"]

    @classmethod
    def of(cls, conflicts: Sequence[Any], tokenizer: Any) -> Candidates:
        """Resolve every conflict's two answers."""
        pairs = [answer_pair(tokenizer, *conflict.answers) for conflict in conflicts]
        names: dict[frozenset[tuple[int, ...]], str] = {}
        for answer in chain.from_iterable(pairs):
            require_one_token(answer, tokenizer)
            names.setdefault(frozenset(answer.options), answer.text)
        _require_apart(names)
        ids = np.full((len(names), max(map(len, names))), -1, dtype=np.int64)
        for row, options in zip(ids, names, strict=True):
            row[: len(options)] = sorted(token for (token,) in options)
        order = {options: number for number, options in enumerate(names)}
        owners = np.array([[order[frozenset(answer.options)] for answer in pair] for pair in pairs], dtype=np.int64)
        return cls(tuple(names.values()), ids, *owners.T)

    def scores(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[np.ndarray, "batch candidate"]:
        """Score every candidate."""
        return self.pooled(logits[:, self.tokens.to(logits.device)])

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

    def read(self, logits: Float[Tensor, "batch d_vocab"], examples: Int[np.ndarray, " batch"]) -> CellReading:
        """Read a run of some of the conflicts."""
        scores = self.scores(logits)
        best = logits.argmax(-1).cpu().numpy()
        owner = {int(token): index for index, row in enumerate(self.ids) for token in row if token >= 0}
        top = np.array([owner.get(int(token), NEITHER) for token in best], dtype=np.int64)
        top[np.isnan(scores).any(1)] = UNREAD
        log_total = logits.double().logsumexp(-1).cpu().numpy()
        probability = np.exp(scores - log_total[:, None])
        mass = self._own(probability, examples, "sound") + self._own(probability, examples, "picture")
        return CellReading(scores, top, mass)

    def _own(self, scores: np.ndarray, examples: np.ndarray, of: str) -> np.ndarray:
        """Each example's own sound's, or picture's, answer."""
        return scores[..., np.arange(len(examples)), getattr(self, of)[examples]]

    def margin(
        self, scores: Float[np.ndarray, "*more batch candidate"], examples: Int[np.ndarray, " batch"]
    ) -> Float[np.ndarray, "*more batch"]:
        """Compute M: score of the sound's answer minus score of the picture's."""
        return self._own(scores, examples, "sound") - self._own(scores, examples, "picture")

    def above_others(
        self, scores: Float[np.ndarray, "*more batch candidate"], examples: Int[np.ndarray, " batch"], *, of: str
    ) -> Float[np.ndarray, "*more batch"]:
        """Compare one answer's score with the mean of the candidates that are neither of the two."""
        n_others = scores.shape[-1] - 2
        if n_others < 1:
            return np.full(scores.shape[:-1], np.nan)
        pair = self._own(scores, examples, "sound") + self._own(scores, examples, "picture")
        return self._own(scores, examples, of) - (scores.sum(-1) - pair) / n_others

    def centred(
        self, scores: Float[np.ndarray, "*more batch candidate"], examples: Int[np.ndarray, " batch"], *, of: str
    ) -> Float[np.ndarray, "*more batch"]:
        """Compare one answer's score with the mean of all distinct answers of the set."""
        return self._own(scores, examples, of) - scores.mean(-1)


def _require_apart(names: Mapping[frozenset[tuple[int, ...]], str]) -> None:
    """Refuse answers that overlap: a word must belong to one answer, whichever conflict it is said in."""
    owner: dict[tuple[int, ...], frozenset[tuple[int, ...]]] = {}
    for options, name in names.items():
        for option in options:
            if (other := owner.setdefault(option, options)) != options:
                raise ProtocolError(
                    f"the answers {names[other]!r} and {name!r} of different conflicts share a word (their "
                    "synonyms overlap): give one list of synonyms for each answer, the same in every conflict."
                )


def require_one_token(answer: Answer, tokenizer: Any) -> None:
    """Refuse an answer of several tokens."""
    if not answer.single:
        pieces = [tokenizer.decode([token]) for token in next(ids for ids in answer.options if len(ids) > 1)]
        raise InputError(
            f"the answer {answer.text!r} is {len(pieces)} tokens for this model ({' '.join(map(repr, pieces))}); "
            "isolation scores answers of one token: choose a shorter word, or put what comes before its last token "
            "into the prefix."
        )
