"""What is asked of a metric, the arithmetic of scores, and in which form this model says its answers: " dog" or "Dog"?

Answers come as token ids `[example or 1, option, token]`, padded with -1. An option without tokens does not exist for
that example: it scores minus infinity (its rank: infinity), so that pooling passes over it.

The form of a word is chosen by protocol section 1: after the header of its turn one model answers "dog" and another
" dog", and a metric that reads the other one measures nothing. A form of several tokens is at most as likely as its
first: it is run to its end only where that could change the choice or a refusal; else the bound stands in its place
(`Forms.at_most`). What a model says in the other forms is part of no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from av_lens.core.budget import input_stacks, listed, that_fit
from av_lens.core.execution import logits_of
from av_lens.core.readings import Recorded
from av_lens.errors import InputError, unknown
from av_lens.inputs.answers import FORMS, Answer, AnswerLike, forms_of, in_form, resolve, spelled, words_of
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair


def padded(answers: Sequence[Answer]) -> Int64[Tensor, "example option token"]:
    """Bring answers to one tensor."""
    options = max(len(answer.options) for answer in answers)
    tokens = max(answer.n_tokens for answer in answers)
    ids = torch.full((len(answers), options, tokens), -1, dtype=torch.long)
    for row, answer in zip(ids, answers, strict=True):
        for place, option in zip(row, answer.options, strict=False):
            place[: len(option)] = torch.tensor(option)
    return ids


def filled(tokens: Int64[Tensor, "example token"]) -> Int64[Tensor, "example token"]:
    """Replace padding by the token before it, so that it can be run; what follows an answer does not change it."""
    found = tokens.clone()
    for i in range(found.shape[1]):
        missing = found[:, i] < 0
        found[missing, i] = found[missing, i - 1] if i else 0
    return found


def per_option(
    ids: Int64[Tensor, "example option token"], logits: Float[Tensor, "batch d_vocab"], kind: str
) -> Float[Tensor, "batch option"]:
    """Score one-token options at the generation position."""
    tokens = ids[..., 0].to(logits.device).expand(logits.shape[0], -1)
    if kind in ("log_prob", "prob"):
        logits = logits.log_softmax(-1)
    values = logits.gather(-1, tokens.clamp(min=0))
    if kind == "rank":
        ranks = (logits[:, None] > values[..., None]).sum(-1).to(logits.dtype)
        return ranks.masked_fill(tokens < 0, torch.inf)
    return values.masked_fill(tokens < 0, -torch.inf)


def summed_log_prob(
    tokens: Int64[Tensor, "batch token"], logits: Float[Tensor, "batch token d_vocab"]
) -> tuple[Float[Tensor, " batch"], Int64[Tensor, " batch"]]:
    """Score one option of several tokens by teacher forcing."""
    there = tokens >= 0
    each = logits.log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    total = each.masked_fill(~there, 0.0).sum(-1)
    return total.masked_fill(~there.any(-1), -torch.inf), there.sum(-1)


def worst_rank(
    tokens: Int64[Tensor, "batch token"], logits: Float[Tensor, "batch token d_vocab"]
) -> Float[Tensor, " batch"]:
    """Rank one option of several tokens: the worst rank along it."""
    there = tokens >= 0
    values = logits.gather(-1, tokens.clamp(min=0)[..., None])
    ranks = (logits > values).sum(-1).masked_fill(~there, -1).amax(-1).to(logits.dtype)
    return ranks.masked_fill(~there.any(-1), torch.inf)


def unequal_lengths(answers: Sequence[Int64[Tensor, "_ _ _"]]) -> Bool[Tensor, " _"]:
    """Say for which examples the answers' options have unequal numbers of tokens."""
    examples = max(ids.shape[0] for ids in answers)
    lengths = torch.cat([(ids >= 0).sum(-1).expand(examples, -1) for ids in answers], dim=1)
    longest, shortest = lengths.amax(1), lengths.masked_fill(lengths == 0, 2**31).amin(1)
    return longest != shortest


def combined(kind: str, sides: Sequence[Sequence[Float[Tensor, " batch"]]]) -> Float[Tensor, " batch"]:
    """Pool each answer's options, and take the difference of two answers."""
    if kind == "rank":
        return torch.stack(list(sides[0]), dim=-1).amin(-1)
    pooled = [torch.stack(list(side), dim=-1).logsumexp(-1) if len(side) > 1 else side[0] for side in sides]
    if kind == "logit_diff":
        return pooled[0] - pooled[1]
    return pooled[0].exp() if kind == "prob" else pooled[0]


SHOWN = 8


@dataclass(frozen=True)
class Each:
    """One answer for each example, in order. Build it with `each`."""

    answers: tuple[AnswerLike | Answer, ...]


def each(answers: Sequence[AnswerLike | Answer]) -> Each:
    """Give every example of a stack its own answer, in order: what `logit_diff`, `log_prob` and the like then take."""
    return Each(tuple(answers))


Asked = str | int | Answer | Sequence[str | int] | Each


def shown(asked: Asked) -> str:
    """Write what was asked in a few words."""
    if isinstance(asked, Each):
        return f"{len(asked.answers)} answers"
    return asked.text if isinstance(asked, Answer) else str(asked)


def spread(side: tuple[AnswerLike | Answer, ...], n: int) -> tuple[AnswerLike | Answer, ...]:
    """Repeat a shared answer for every example."""
    return side * n if len(side) == 1 else side


def asked_words(sides: Sequence[Sequence[AnswerLike | Answer]], n: int) -> list[list[str]]:
    """List the words that are asked of each example."""
    spread_out = [spread(tuple(side), n) for side in sides]
    return [[word for side in spread_out for word in words_of(side[i])] for i in range(n)]


def notes_on(answers: list[list[Answer]], tokenizer: Any = None) -> tuple[str, ...]:
    """Say what a reader of the numbers must know about the answers."""
    flat = [answer for side in answers for answer in side]
    if all(answer.single for answer in flat):
        return ()
    notes = ["an answer has several tokens: scores are teacher-forced log-probabilities"]
    for row in zip(*answers, strict=True) if len(answers) == 2 else ():
        lengths = {len(option) for answer in row for option in answer.options}
        if len(lengths) > 1:
            texts = " and ".join(repr(answer.text) for answer in row)
            notes.append(f"{texts} have unequal numbers of tokens: scored by the mean log-probability per token")
            break
    broken = {option: answer.text for answer in flat for option in answer.options if len(option) > 1 and tokenizer}
    notes += [f"{text!r} is {len(ids)} tokens: {spelled(tokenizer, ids)}" for ids, text in list(broken.items())[:SHOWN]]
    notes += [f"... and {len(broken) - SHOWN} more such answers"] if len(broken) > SHOWN else []
    return tuple(notes)


RARER = 100.0  # A word is refused where another form of it is more than so many times likelier than the chosen one
STACK, BUDGET_GB, HELD_BYTES = 16, 1.0, 1 << 28
Given = AVInputs | Recorded | Callable[[], AVInputs]


@dataclass(frozen=True)
class Forms:
    """The form in which the words of a call are read."""

    chosen: str  # one of `FORMS`
    median: Mapping[str, float]  # the median probability of each form over the words and inputs of the call
    at_most: tuple[str, ...] = ()  # forms whose figure is a bound, made with the probability of a first token

    def provenance(self) -> dict[str, Any]:
        """Say what was chosen."""
        return {
            "answer_form": self.chosen,
            "form_probabilities": dict(self.median),
            "form_probabilities_at_most": list(self.at_most),
        }

    def __str__(self) -> str:
        figures = (f"{form!r} {'<= ' * (form in self.at_most)}{p:.2g}" for form, p in self.median.items())
        return f"words are read as {self.chosen!r}; median probability here: {', '.join(figures)}"


@dataclass(frozen=True)
class Doubt:
    """A word whose chosen form is hardly said, and the form that is said instead; `probability` is of both."""

    word: str
    chosen: str
    said: str
    probability: tuple[float, float]

    def sentence(self, tokenizer: Any) -> str:
        """Say what is wrong, and what to do."""
        here, there = (in_form(self.word, form) for form in (self.chosen, self.said))
        ids = {form: spelled(tokenizer, ids) for form, ids in forms_of(tokenizer, self.word).items()}
        return (
            f"the word {self.word!r} is read as {here!r}, the form that the model says for the answers taken together, "
            f"but it says {there!r} at {self.probability[1]:.2g} against {self.probability[0]:.2g}: its figures would "
            f"be those of a token that is hardly ever said. Give the token ids of the form that you mean "
            f"({'; '.join(ids.values())}), or a prefix after which the answers are said alike."
        )


@dataclass(eq=False)
class Reading:
    """How likely each form of each asked word is. Build it with `Reading.of`."""

    model: Any  # a `HookedAVLLM`
    # the inputs, each one example, a stack, a recorded run, or what makes an input when it is needed
    blocks: list[Given]
    places: list[tuple[int, int]]  # the block and the row of each example
    rows: list[tuple[int, str]]  # an example and a word that is asked there, each once
    ids: dict[str, dict[str, tuple[int, ...]]]  # the tokens of each word's forms
    _known: dict[tuple[int, tuple[int, ...]], np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, given: Sequence[Given], asked: Sequence[Iterable[str]]) -> Reading:
        """Run the inputs, and look up the first token of every form."""
        rows = [(example, word) for example, words in enumerate(asked) for word in dict.fromkeys(words)]
        ids = {word: known_forms(model, word) for word in dict.fromkeys(word for _, word in rows)}
        blocks, places = _blocks(model, given)
        found = cls(model, blocks, places, rows, ids)
        made = [number for number, block in enumerate(blocks) if callable(block)]
        for number in set(range(len(blocks))) - {*made}:
            found._begin([number], found._input(number))
        for some, inputs in _held(made, found._input):
            size = that_fit(model, max(len(x.spans) for x in inputs), STACK, BUDGET_GB)
            for members in input_stacks(inputs, size):
                found._begin([some[i] for i in members], AVInputs.stack([inputs[i] for i in members]))
        return found

    def forms(self) -> Forms:
        """Choose the form of the largest median probability."""
        medians, best, exact = self._likeliest(range(len(self.rows)), lambda medians, best: True)
        at_most = tuple(form for i, form in enumerate(FORMS) if not exact[:, i].all())
        return Forms(FORMS[best], dict(zip(FORMS, medians.tolist(), strict=True)), at_most)

    def doubt(self, rows: Sequence[int], forms: Forms) -> Doubt | None:
        """Say whether a word is said in another form than the chosen one."""
        own = FORMS.index(forms.chosen)

        def rare(medians: np.ndarray, other: int) -> bool:
            return bool(medians[other] > RARER * medians[own])

        medians, other, _ = self._likeliest(rows, rare)
        if not rare(medians, other):
            return None
        word, both = self.rows[rows[0]][1], (float(medians[own]), float(medians[other]))
        return Doubt(word, FORMS[own], FORMS[other], both)

    def _likeliest(
        self, rows: Sequence[int], matters: Callable[[np.ndarray, int], bool]
    ) -> tuple[np.ndarray, int, np.ndarray]:
        """The forms' medians, the largest of them (run to its end where that matters), and what is no bound."""
        while True:
            values, exact = self._values(rows)
            medians = np.median(values, axis=0)
            best = int(medians.argmax())
            if exact[:, best].all() or not matters(medians, best):
                return medians, best, exact
            self._run([n for n, whole in zip(rows, exact[:, best], strict=True) if not whole], FORMS[best])

    def _input(self, number: int) -> Any:
        block = self.blocks[number]
        return block.x if isinstance(block, Recorded) else block if isinstance(block, AVInputs) else block()

    @torch.no_grad()
    def _begin(self, numbers: Sequence[int], x: Any) -> None:
        """Look up the first tokens of what is asked in a block, or in several of one example each that ran together."""
        words = {word for example, word in self.rows if self.places[example][0] in numbers}
        tokens = sorted({ids[0] for word in words for ids in self.ids[word].values()})
        if not tokens:
            return
        block, asked = self.blocks[numbers[0]], torch.tensor([x.spans.generation_position])
        logits = (block.logits_at(asked) if isinstance(block, Recorded) else logits_of(self.model, x, [], asked))[:, 0]
        likely = logits.double().softmax(-1)[:, tokens].cpu().numpy()
        for row, number in enumerate(numbers):
            own = likely if len(numbers) == 1 else likely[row : row + 1]
            self._known |= {(number, (token,)): own[:, i] for i, token in enumerate(tokens)}

    @torch.no_grad()
    def _run(self, rows: Iterable[int], form: str) -> None:
        wanted = {(self.places[self.rows[n][0]][0], self.ids[self.rows[n][1]][form]) for n in rows}
        for number, ids in sorted(wanted - self._known.keys()):
            x = self._input(number)
            tokens = torch.tensor([ids]).expand(len(x), -1)
            first = x.spans.generation_position
            logits = logits_of(self.model, followed(x, tokens), [], torch.arange(first, first + len(ids)))
            summed = summed_log_prob(tokens.to(logits.device), logits.double())[0]
            self._known[number, ids] = summed.exp().cpu().numpy()

    def _values(self, rows: Sequence[int]) -> tuple[Float[np.ndarray, "row form"], Bool[np.ndarray, "row form"]]:
        """The probability of every form (0 of one that does not exist), and whether it is that and no bound."""
        values, exact = np.zeros((len(rows), len(FORMS))), np.ones((len(rows), len(FORMS)), dtype=bool)
        for i, n in enumerate(rows):
            example, word = self.rows[n]
            number, row = self.places[example]
            for form, ids in self.ids[word].items():
                at = (i, FORMS.index(form))
                exact[at] = (number, ids) in self._known
                values[at] = self._known[number, ids if exact[at] else ids[:1]][row]
        return values, exact


def read_forms(model: Any, given: Sequence[Given], asked: Sequence[Iterable[str]]) -> Forms | None:
    """Choose the form in which the words of a call are read."""
    if not any(map(list, asked)):
        return None
    reading = Reading.of(model, given, asked)
    forms = reading.forms()
    for one in reading.ids:
        doubt = reading.doubt([n for n, (_, word) in enumerate(reading.rows) if word == one], forms)
        if doubt is not None:
            raise InputError(doubt.sentence(model.tokenizer))
    return forms


def unedited(x: Any) -> list[Given]:
    """List the inputs by which a metric's words are read."""
    found = [one.clean if isinstance(one, Pair) else one for one in listed(x)]
    for one in found:
        if not isinstance(one, AVInputs | Recorded):
            raise InputError(
                f"words are read by what the model says on AVInputs, a recorded run or a Pair, not on "
                f"{type(one).__name__}: write metric.bind(model, x) with what model.encode or model.trace gave."
            )
    return found


def read_sides(model: Any, given: Sequence[Given], sides: Sequence[Sequence[Any]]) -> Forms | None:
    """Choose the form of a metric's words."""
    if model is None or not given:
        return None
    return read_forms(model, given, asked_words(sides, sum(map(n_examples, given))))


def said_answer(model: Any, given: Sequence[Given], answer: AnswerLike | Answer) -> tuple[Answer, Forms | None]:
    """Find the tokens of one answer, read as the model says it after these inputs."""
    forms = read_forms(model, given, [words_of(answer)] * sum(map(n_examples, given)))
    return resolve(model.tokenizer, answer, None if forms is None else forms.chosen), forms


def known_forms(model: Any, word: str) -> dict[str, tuple[int, ...]]:
    """Find the tokens of each form of a word, and refuse one that an organism's tokenizer was never taught."""
    forms = forms_of(model.tokenizer, word)
    if model.grammar is None:
        return forms
    for part in filter(None, (part.strip(".,;:!?\"'") for part in word.split())):
        found = forms_of(model.tokenizer, part)
        if all(len(ids) > 1 for ids in found.values()):
            taught = [*model.grammar.get("classes", ()), *model.grammar.get("colours", ())]
            raise InputError(
                f"{model.name} was never taught the word {part!r}: its tokenizer breaks it into "
                f"{spelled(model.tokenizer, next(iter(found.values())))}. {unknown('word', part, taught)}"
            )
    return forms


def n_examples(given: Given) -> int:
    """Count examples."""
    return len(given.x) if isinstance(given, Recorded) else len(given) if isinstance(given, AVInputs) else 1


def followed(x: AVInputs, tokens: Tensor) -> AVInputs:
    """Put all but the last token of an answer after a prompt."""
    if tokens.shape[1] == 1:
        return x
    if len(x.spans["generated"]):
        raise InputError(
            f"this input already holds {len(x.spans['generated'])} tokens of an answer, and an answer of several "
            "tokens would come after them: encode it without answer=."
        )
    return x.continued(tokens[:, :-1])


def _held(numbers: Sequence[int], make: Callable[[int], Any]) -> Iterator[tuple[list[int], list[Any]]]:
    """Make inputs, so many at a time as may be held together."""
    some, inputs, taken = list[int](), list[Any](), 0
    for number in numbers:
        some.append(number)
        inputs.append(make(number))
        taken += sum(value.nbytes for value in inputs[-1].tensors.values() if isinstance(value, Tensor))
        if len(some) == STACK or taken > HELD_BYTES or number == numbers[-1]:
            yield some, inputs
            some, inputs, taken = [], [], 0


def _blocks(model: Any, given: Sequence[Given]) -> tuple[list[Given], list[tuple[int, int]]]:
    """Group inputs that can run together; say where each example went."""
    plain = [one for one in given if isinstance(one, AVInputs)]
    if len(plain) < len(given):
        return list(given), [(number, row) for number, one in enumerate(given) for row in range(n_examples(one))]
    blocks, places = list[Given](), dict[tuple[int, int], tuple[int, int]]()
    size = that_fit(model, max((len(x.spans) for x in plain), default=1), STACK, BUDGET_GB)
    for members in input_stacks(plain, size):
        inside = [(n, i) for n in members for i in range(len(plain[n]))]
        whole = AVInputs.stack([plain[n] for n in members])
        for start in range(0, len(inside), size):
            places |= {at: (len(blocks), row) for row, at in enumerate(inside[start : start + size])}
            blocks.append(whole[start : start + size] if len(inside) > size else whole)
    return blocks, [places[n, i] for n, x in enumerate(plain) for i in range(len(x))]
