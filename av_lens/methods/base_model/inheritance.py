"""Base shift: does an audio-visual model say what the vision-language model that it was made from would have said?

The model's own greedy answer (or a given one) is run through the base, token by token. With p the model's and q the
base's next-token distribution after the same tokens, and t the token that the model chose,

    unshifted, marginal, shifted    t is the base's top 1; else among its top 3; else neither
    kl(model||base)                 sum p log(p / q), in nats: what the base misses of the model
    kl(base||model)                 sum q log(q / p)
    js                              ½ KL(p || m) + ½ KL(q || m), m = ½ (p + q); at most log 2
    same answer                     1 where every token is unshifted, the end too: the base would have answered alike

each by word class ("heard", "seen", "other", and "all" but end tokens), means over an example's tokens, NaN without
one. `prompt="another's"` is the control: the same answers before the next example's prompt with the same question and
another picture; NaN where there is none.

Source: Lin et al. (2023), arXiv 2312.01552, for the three kinds of tokens. Not done: answers sampled; bases of other
vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from av_lens.core import Progress, run
from av_lens.errors import InputError
from av_lens.inputs import Answer, AVInputs
from av_lens.inputs.answers import AnswerLike, words_of
from av_lens.methods.base_model.grafting import deaf_plan, opened, prompt_for
from av_lens.methods.shared.frame import Examples, Frame, Stack, answer_lengths, for_each
from av_lens.metrics.forms import padded, said_answer
from av_lens.model import HookedAVLLM
from av_lens.results import Tabled
from av_lens.results.events import Lexicon

FIGURES = ("unshifted", "marginal", "shifted", "kl(model||base)", "kl(base||model)", "js", "same answer")
CLASSES = ("all", "heard", "seen", "other")
PROMPTS = ("own", "another's")
END = "end"
SIGN = "the model's answer through its base; shares of tokens, divergences in nats; baseline 0, so effects are values"


def base_shift(
    model: HookedAVLLM,
    x: Any,
    *,
    base: Any,
    audio: str = "out",
    answer: AnswerLike | Answer | None = None,
    heard: Sequence[str] | Sequence[Sequence[str]] = (),
    seen: Sequence[str] | Sequence[Sequence[str]] = (),
    max_new_tokens: int = 64,
    stack: int = 16,
    progress: Progress | bool | None = None,
) -> Tabled:
    """Compare a model's answer, token by token, with what the model that it was made from would have said.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs` (one example or a stack), a `Conflict` (its cell va), or several of either.
        base: the model that it was made from, or its name or folder.
        audio: what becomes of the sound in the base's prompt: "out" (taken out), "masked" (read by nothing) or "kept".
        answer: a text to run through both instead of the model's own greedy answer, in the form that the model says.
        heard: words for what is heard, for all examples alike or a list for each; a conflict's are its sound's answers.
        seen: words for what is seen, likewise; a conflict's are its picture's answers.
        max_new_tokens: the model's own answer has at most so many tokens.
        stack: examples that run together.
        progress: called as `progress(stage, done, total)`; True shows a bar with the time left.

    Returns:
        A grid over `[example, prompt, word class, figure]`, and a row for every token.

    Raises:
        InputError: nothing given, words for another number of examples, or a word that is both heard and seen.
        AlignmentError: the base's prompt differs in more than the sound.
        ModelError: the base has another vocabulary.
    """
    examples, related = Examples.of(model, x), opened(base, model)
    words = _words(examples, heard, seen)
    given, forms = (None, None) if answer is None else said_answer(model, examples.inputs, answer)
    stacks = examples.stacks(stack)
    prompts = [prompt_for(related, model, one.x, audio) for one in stacks]  # all compared before anything runs
    frame = Frame.of(model, examples, measured=False)
    frame.shape(len(PROMPTS), len(CLASSES), len(FIGURES))
    rows: list[dict[str, Any]] = []

    @torch.no_grad()
    def work(stack: Stack, show: Progress) -> None:
        x, prompt = stack.x, prompts[stacks.index(stack)]
        said = Said.own(model, x, max_new_tokens) if given is None else Said.given(model, x, given)
        compared = {"own": Compared.of(said, _teacher_forced(related, prompt, said.tokens, audio))}
        others = _others(prompt)
        if (others >= 0).any():
            turned = AVInputs.stack([prompt[int(j) if j >= 0 else i] for i, j in enumerate(others)])
            compared["another's"] = Compared.of(said, _teacher_forced(related, turned, said.tokens, audio))
        for i, example in enumerate(stack.rows.tolist()):
            classes = said.classes(model.tokenizer, i, words[example])
            for p, name in enumerate(PROMPTS):
                if name in compared and (name == "own" or others[i] >= 0):
                    frame.values[example, p] = compared[name].summary(i, classes)
            rows.extend(compared["own"].rows(model.tokenizer, example, i, classes))
        show("base shift", 1, 1)

    frame.run(work, stacks, progress)
    if frame.partial:
        done = len({row["example"] for row in rows})
        frame.partial = f"interrupted: {done} of {len(examples)} examples compared, the others are NaN"
    grid = frame.grid(
        {"prompt": list(PROMPTS), "word_class": list(CLASSES), "figure": list(FIGURES)},
        named=("base shift", "share of tokens, or nat"),
        direction=SIGN,
        method="base shift",
        base=related.name,
        audio=audio,
        answer=None if given is None else given.text,
        **({} if forms is None else forms.provenance()),
        words=[{side: list(listed) for side, listed in each.items()} for each in words],
        max_new_tokens=max_new_tokens,
    )
    return Tabled(grid, pd.DataFrame(rows).sort_values(["example", "number"], ignore_index=True))


@dataclass(frozen=True, eq=False)
class Said:
    """The model's answers to a stack of prompts."""

    tokens: Int64[Tensor, "batch token"]  # the answers, padded to one length
    lengths: tuple[int, ...]  # tokens of each answer, its end token included
    ended: tuple[bool, ...]  # whether the last of them is an end token
    logits: Float[Tensor, "batch token d_vocab"]  # the model's, before each token

    @classmethod
    def own(cls, model: Any, x: AVInputs, max_new_tokens: int) -> Said:
        """Let the model answer greedily."""
        out = model.generate(x, max_new_tokens=max_new_tokens, return_type="result")
        tokens = out.tokens[:, len(x.spans) :]
        lengths, ended = zip(*answer_lengths(model, tokens), strict=True)
        return cls(tokens, lengths, ended, out.logits)

    @classmethod
    def given(cls, model: Any, x: AVInputs, answer: Answer) -> Said:
        """Run a given answer through the model."""
        if len(answer.options) > 1:
            raise InputError(
                f"answer= runs one answer, and {answer.text!r} lists {len(answer.options)} synonyms; choose one."
            )
        tokens = padded([answer])[0].to(model.device).expand(len(x), -1)
        logits = _teacher_forced(model, x, tokens, "kept")
        return cls(tokens, (int(tokens.shape[1]),) * len(x), (False,) * len(x), logits)

    def classes(self, tokenizer: Any, i: int, words: dict[str, tuple[str, ...]]) -> list[str]:
        """Say which class each token of an answer belongs to."""
        n = self.lengths[i] - self.ended[i]
        ids, found = self.tokens[i, :n].tolist(), ["other"] * n
        bounds = [0, *(len(tokenizer.decode(ids[: k + 1])) for k in range(n))]
        for side, listed in words.items():
            for match in Lexicon.of(listed).found(tokenizer.decode(ids)) if listed else ():
                inside = (begin < match.stop and match.start < end for begin, end in pairwise(bounds))
                found = [side if hit else name for hit, name in zip(inside, found, strict=True)]
        return found + [END] * int(self.ended[i])


@dataclass(frozen=True, eq=False)
class Compared:
    """Both models on the same tokens."""

    said: Said  # the answers
    figures: dict[str, np.ndarray]  # rank in the base, log-probabilities, divergences: by name, `[batch, token]`
    top: Int64[np.ndarray, "batch token"]  # the base's likeliest token, `[batch, token]`

    @classmethod
    def of(cls, said: Said, base: Float[Tensor, "batch token d_vocab"]) -> Compared:
        """Compare distributions, in float64."""
        p, q = (logits.double().log_softmax(-1) for logits in (said.logits, base.to(said.logits.device)))
        middle = torch.logaddexp(p, q) - np.log(2.0)
        chosen = said.tokens[..., None].to(p.device)
        own, others = (each.gather(-1, chosen)[..., 0] for each in (p, q))
        figures = {
            "rank": (q > others[..., None]).sum(-1),
            "log_prob_model": own,
            "log_prob_base": others,
            "kl(model||base)": divergence(p, q),
            "kl(base||model)": divergence(q, p),
            "js": 0.5 * (divergence(p, middle) + divergence(q, middle)),
        }
        found = {name: values.double().cpu().numpy() for name, values in figures.items()}
        return cls(said, found, q.argmax(-1).cpu().numpy())

    def summary(self, i: int, classes: list[str]) -> Float[np.ndarray, "word_class figure"]:
        """Average an example's tokens by word class."""
        rank, labels = self.figures["rank"][i, : len(classes)], np.array(classes)
        kinds = [rank == 0, (rank > 0) & (rank < 3), rank >= 3]
        columns = kinds + [self.figures[name][i, : len(classes)] for name in FIGURES[3:6]]
        found = np.full((len(CLASSES), len(FIGURES)), np.nan)
        for number, name in enumerate(CLASSES):
            where = labels != END if name == "all" else labels == name
            if where.any():
                found[number, :6] = [float(column[where].mean()) for column in columns]
        found[0, 6] = float((rank == 0).all())
        return found

    def rows(self, tokenizer: Any, example: int, i: int, classes: list[str]) -> list[dict[str, Any]]:
        """Write an example's tokens out."""
        found: list[dict[str, Any]] = []
        for n, name in enumerate(classes):
            rank, token = int(self.figures["rank"][i, n]), int(self.said.tokens[i, n])
            numbers = {key: float(values[i, n]) for key, values in self.figures.items() if key != "rank"}
            kind = "unshifted" if rank == 0 else "marginal" if rank < 3 else "shifted"
            words = {"token": tokenizer.decode([token]), "base_top": tokenizer.decode([int(self.top[i, n])])}
            row = {"example": example, "number": n, "token_id": token, **words, "word_class": name, "kind": kind}
            found.append(row | {"rank": rank} | numbers)
        return found


def divergence(p: Float[Tensor, "*shape d_vocab"], q: Float[Tensor, "*shape d_vocab"]) -> Float[Tensor, "*shape"]:
    """KL(p || q) in nats."""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


def _teacher_forced(model: Any, x: AVInputs, tokens: Tensor, audio: str) -> Tensor:
    """Logits before each of the tokens, these given."""
    whole = x if tokens.shape[1] == 1 else x.continued(tokens[:, :-1])
    asked = int(x.spans.generation_position)
    where = whole.spans.span(range(asked, asked + tokens.shape[1]))
    return run(model, whole, plan=deaf_plan(whole, audio), logits_at=where).logits


def _others(x: AVInputs) -> Int64[np.ndarray, " example"]:
    """For each example the next one with the same text and another picture, -1 where there is none."""
    pictures = [None if clip is None else clip.picture_hash for clip in x.clips]
    found = np.empty(len(x), dtype=np.int64)
    for i in range(len(x)):
        around = (*range(i + 1, len(x)), *range(i))
        found[i] = next((j for j in around if pictures[j] != pictures[i] and torch.equal(x.ids[i], x.ids[j])), -1)
    return found


def _words(examples: Examples, heard: Any, seen: Any) -> list[dict[str, tuple[str, ...]]]:
    """The heard and the seen words of every example."""
    sides: dict[str, list[tuple[str, ...]]] = {}
    for side, (name, given) in enumerate((("heard", heard), ("seen", seen))):
        own = [tuple(words_of(conflict.answers[side])) for conflict in examples.conflicts]
        sides[name] = own if own and not len(given) else for_each(given, len(examples), f"{name} words")
    found = [{side: listed[i] for side, listed in sides.items()} for i in range(len(examples))]
    for number, each in enumerate(found):
        both = {w.casefold() for w in each["heard"]} & {w.casefold() for w in each["seen"]}
        if both:
            raise InputError(
                f"example {number}: {min(both)!r} is both heard and seen, so its tokens have no one class."
            )
    return found
