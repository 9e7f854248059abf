"""What a run says, as one number for each example: `logit_diff`, `log_prob`, `prob`, `rank`, `kl`.

A metric reads the logits `[batch, asked_pos, d_vocab]`, whose last position is the generation position, and returns
`[batch]`. Answers are strings, token ids, lists of either (synonyms) or resolved `Answer`s; `each([...])` gives every
example its own. Scores and the form of a word are those of protocol section 1; where two answers have unequal numbers
of tokens, both are scored by the *mean* log-probability per token, and the metric's `notes` say so. `measure`, `patch`
and their like look forms up on their unedited inputs; elsewhere use `metric.bind(model, x)`. Token ids, and
`Answer(text, ((id, id),))` for several, are taken literally. Any callable of logits to `[batch]` may stand where a
metric is taken.

    >>> import torch
    >>> logit_diff(2, 0)(torch.tensor([[[1.0, 0.0, 4.0]]]))
    tensor([3.])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from av_lens.brief import Brief
from av_lens.core.execution import logits_of
from av_lens.errors import InputError
from av_lens.inputs.answers import answer_pair, resolve
from av_lens.interventions import Plan
from av_lens.metrics.forms import (
    Asked,
    Each,
    Forms,
    combined,
    filled,
    followed,
    n_examples,
    notes_on,
    padded,
    per_option,
    read_sides,
    shown,
    spread,
    summed_log_prob,
    unedited,
    unequal_lengths,
    worst_rank,
)


def require_numbers(found: Float[Tensor, " batch"], name: str, *, run: str = "the run without edits") -> None:
    """Refuse a metric that gives no number."""
    bad = (~found.isfinite()).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:6])) + (", ..." if len(bad) > 6 else "")
        raise InputError(
            f"the metric {name} is NaN or infinite on {run} for {len(bad)} of {len(found)} examples ({shown}), so no "
            "effect can be measured. Mend the metric: a log of 0, a division by 0, or an answer that an example lacks."
        )


Kind = Literal["logit_diff", "logit", "log_prob", "prob", "rank", "kl", "custom"]
_UNITS = {"logit_diff": "logit", "logit": "logit", "prob": "probability", "rank": "tokens", "custom": ""}  # else nats


@dataclass(frozen=True, eq=False, repr=False)
class Metric(Brief):
    """A number for each example, read from logits. Build it with `logit_diff`, `log_prob`, ..."""

    kind: Kind  # which of the module's metrics
    asked: tuple[Asked, ...] = ()  # the answers as they were given; two for `logit_diff`
    reference: Float[Tensor, "..."] | None = None  # the logits that `kl` compares with
    function: Callable[[Tensor], Tensor] | None = None  # a callable of the user's own
    # once bound, the tokens of each answer, `[example or 1, option, token]`, -1 where there is none
    ids: tuple[Int64[Tensor, "_ _ _"], ...] | None = None
    texts: tuple[str, ...] = field(default=())  # once bound, the answers as text
    notes: tuple[str, ...] = field(default=())  # what a reader of the numbers must know
    # once bound, in which form words are read, and how likely each form is; None where no word is asked
    forms: Forms | None = None
    # score answers of unequal lengths by their sums, not per token: for mirrored figures, in which the words change
    # places and their lengths cancel
    summed: bool = False

    @property
    def name(self) -> str:
        """The metric as one would write it."""
        if self.kind == "custom":
            return getattr(self.function, "__name__", type(self.function).__name__)
        words = self.texts or tuple(shown(asked) for asked in self.asked)
        return f"{self.kind}({', '.join(words) if self.kind != 'kl' else 'reference'})"

    @property
    def unit(self) -> str:
        """The metric's unit."""
        return _UNITS.get(self.kind, "nat")

    def provenance(self) -> dict[str, Any]:
        """Say what was measured, with the token ids that were chosen."""
        ids = [tokens.tolist() for tokens in self.ids or ()]
        forms = {} if self.forms is None else self.forms.provenance()
        return {"metric": self.name, "unit": self.unit, "answer_ids": ids, **forms, "notes": list(self.notes)}

    def bind(self, model: Any = None, x: Any = ()) -> Metric:
        """Find the answers' tokens, in the form that the model says on unedited inputs (of a pair the clean one)."""
        if self.kind in ("kl", "custom"):
            return self
        sides = [asked.answers if isinstance(asked, Each) else (asked,) for asked in self.asked]
        n = max(len(side) for side in sides)
        if any(len(side) not in (1, n) for side in sides):
            raise InputError(f"each(...) was given {' and '.join(str(len(s)) for s in sides)} answers: they differ.")
        given, named = unedited(x), n if self.ids is None else self.n_answers
        if given and named not in (1, examples := sum(map(n_examples, given))):
            raise InputError(f"{self.name} names {named} answers for {examples} examples.")
        if self.ids is not None:
            return self
        tokenizer, forms = getattr(model, "tokenizer", None), read_sides(model, given, sides)
        form = None if forms is None else forms.chosen
        if self.kind == "logit_diff":
            rivals = zip(*(spread(side, n) for side in sides), strict=True)
            answers = list(map(list, zip(*(answer_pair(tokenizer, a, b, form) for a, b in rivals), strict=True)))
        else:
            answers = [[resolve(tokenizer, answer, form) for answer in sides[0]]]
        texts = tuple(side[0].text if len(side) == 1 else f"{side[0].text}, ... ({len(side)})" for side in answers)
        ids, notes = tuple(padded(side) for side in answers), notes_on(answers, tokenizer)
        return replace(self, ids=ids, texts=texts, notes=notes, forms=forms)

    def reading(self) -> str:
        """Say which tokens the answers are, and in which form words are read."""
        one = self.bind()
        said = "; ".join(f"{text!r}: ids {ids[0].tolist()}" for text, ids in zip(one.texts, one.ids or (), strict=True))
        return "; ".join(filter(None, (said, *self.notes, "" if self.forms is None else str(self.forms))))

    @property
    def n_answers(self) -> int:
        """For how many examples answers were given: 1 where all share theirs."""
        return max((int(ids.shape[0]) for ids in self._bound()), default=1)

    def chosen(self, examples: Sequence[int]) -> Metric:
        """Keep the answers (or reference logits) of some examples."""
        rows = list(examples)
        ids = tuple(tokens if tokens.shape[0] == 1 else tokens[rows] for tokens in self._bound())
        reference = self.reference
        if reference is not None and reference.shape[0] != 1:
            reference = reference[rows]
        return replace(self, ids=ids or None, reference=reference)

    @property
    def teacher_forced(self) -> bool:
        """Whether an answer has several tokens, so that the answer must be run after the prompt."""
        return any(int(ids.shape[-1]) > 1 for ids in self._bound())

    def __call__(self, logits: Float[Tensor, "batch asked_pos d_vocab"]) -> Float[Tensor, " batch"]:
        """Read the metric from logits."""
        if self.kind == "custom":
            return _own_result(self, logits)
        if self.reference is not None:
            return divergence(self.reference, logits)
        if self.teacher_forced:
            raise InputError(
                f"{self.name}: an answer has several tokens, which one set of logits cannot score. Use "
                "measure(model, x, metric) or patch(...), which run the answer after the prompt, or one-token answers."
            )
        last = logits[:, -1].float()
        sides = [per_option(ids, last, self.kind) for ids in self._fitting(len(last))]
        return combined(self.kind, [side.unbind(1) for side in sides])

    def of_plans(self, logits: Float[Tensor, "plan batch asked_pos d_vocab"]) -> Float[Tensor, "plan batch"]:
        """Read the metric of several runs of one stack: one number for each run and example."""
        n = len(logits)
        if self.kind == "custom" or n == 1:
            return torch.stack([self(one) for one in logits])
        ids = tuple(one if len(one) == 1 else one.repeat(n, 1, 1) for one in self._fitting(logits.shape[1]))
        reference = self.reference
        if reference is not None and len(reference) == logits.shape[1]:
            reference = reference.repeat(n, *[1] * (reference.ndim - 1))
        return replace(self, ids=ids or self.ids, reference=reference)(logits.flatten(0, 1)).view(n, -1)

    def on(self, device: torch.device) -> Metric:
        """Bring tokens and reference to a device, once for many runs."""
        ids = None if self.ids is None else tuple(one.to(device) for one in self.ids)
        return replace(self, ids=ids, reference=None if self.reference is None else self.reference.to(device))

    def few_tokens(self) -> tuple[Metric, Int64[Tensor, " token"] | None]:
        """A metric that reads some tokens' logits alone, and these tokens; this metric and None if it reads all."""
        if self.kind not in ("logit_diff", "logit") or self.teacher_forced:
            return self, None
        tokens = torch.unique(torch.cat([ids.flatten() for ids in self._bound()]).clamp(min=0))
        places = tuple(torch.searchsorted(tokens, ids).masked_fill(ids < 0, -1) for ids in self._bound())
        return replace(self, ids=places), tokens

    def continuations(self, batch: int) -> list[Int64[Tensor, "batch token"]]:
        """List the token sequences to be run after the prompt, one an option, padded; none for one-token answers."""
        if not self.teacher_forced:
            return []
        return [filled(ids[:, i]).expand(batch, -1) for ids in self._fitting(batch) for i in range(ids.shape[1])]

    def reduce(self, number: int, logits: Float[Tensor, "batch token d_vocab"]) -> Float[Tensor, " batch"]:
        """Score this continuation by the logits before its tokens; no such option: minus infinity (rank: infinity)."""
        options = [ids[:, i] for ids in self._bound() for i in range(ids.shape[1])]
        tokens = options[number].to(logits.device).expand(logits.shape[0], -1)
        if self.kind == "rank":
            return worst_rank(tokens, logits.float())
        total, lengths = summed_log_prob(tokens, logits.float())
        if self.kind != "logit_diff" or self.summed:
            return total
        return torch.where(unequal_lengths(self._bound()).to(total.device), total / lengths.clamp(min=1), total)

    def combine(self, reduced: Sequence[Float[Tensor, " batch"]]) -> Float[Tensor, " batch"]:
        """Put the scores of all continuations (`reduce` of each, in order) together: one number for each example."""
        rest = iter(reduced)
        return combined(self.kind, [list(islice(rest, ids.shape[1])) for ids in self._bound()])

    def _bound(self) -> tuple[Tensor, ...]:
        return self.bind().ids or () if self.ids is None else self.ids

    def _fitting(self, batch: int) -> tuple[Tensor, ...]:
        for ids in self._bound():
            if ids.shape[0] not in (1, batch):
                raise InputError(
                    f"{self.name}: each(...) gives {ids.shape[0]} answers, but the run has {batch} examples."
                )
        return self._bound()


def _own_result(metric: Metric, logits: Tensor) -> Tensor:
    assert metric.function is not None
    found: Any = metric.function(logits)
    batch = int(logits.shape[0])
    shape = tuple(getattr(found, "shape", ()))
    if not isinstance(found, Tensor) or shape != (batch,):
        what = "one number for the whole batch" if shape == () else f"shape {shape}"
        raise InputError(
            f"the metric {metric.name} returned {what}; wanted one number for each of the {batch} examples, shape "
            f"({batch},). Leave out the mean: `lambda logits: logits[:, -1, a] - logits[:, -1, b]`."
        )
    return found


def as_metric(metric: Metric | Callable[..., Any] | None, model: Any = None, x: Any = ()) -> Metric:
    """Make a bound metric of what a caller handed in."""
    if isinstance(metric, Metric):
        return metric.bind(model, x)
    if not callable(metric):
        raise InputError(
            "metric= says what is measured: avl.logit_diff('siren', 'dog'), avl.metrics.log_prob('siren'), or a "
            f"function of logits [batch, asked_pos, d_vocab] to [batch]; not {metric!r}."
        )
    return Metric("custom", function=metric)


def logit_diff(a: Asked, b: Asked) -> Metric:
    """Measure how far one answer is preferred to another: score(a) - score(b), positive for a.

    Args:
        a: an answer, such as the sound's.
        b: its rival, such as the picture's.

    Returns:
        The metric, in logits (differences of log-probabilities for answers of several tokens).
    """
    return Metric("logit_diff", (a, b))


def logit(a: Asked) -> Metric:
    """Measure one answer's score: its logit, logsumexp over synonyms.

    Args:
        a: the answer.

    Returns:
        The metric, in logits (a log-probability for an answer of several tokens).
    """
    return Metric("logit", (a,))


def log_prob(a: Asked) -> Metric:
    """Measure an answer's log-probability, in nats.

    Args:
        a: the answer.

    Returns:
        The metric.
    """
    return Metric("log_prob", (a,))


def prob(a: Asked) -> Metric:
    """Measure an answer's probability.

    Args:
        a: the answer.

    Returns:
        The metric, in [0, 1].
    """
    return Metric("prob", (a,))


def rank(a: Asked) -> Metric:
    """Count the tokens that are likelier than the answer.

    Args:
        a: the answer; of synonyms the best counts, of several tokens the worst.

    Returns:
        The metric; 0 where the answer is the likeliest.
    """
    return Metric("rank", (a,))


def kl(reference_logits: Float[Tensor, "..."]) -> Metric:
    """Measure how far a run has moved from a reference: KL(reference || run), in nats.

    Args:
        reference_logits: `[batch, asked_pos, d_vocab]` or `[batch, d_vocab]` of the reference run.

    Returns:
        The metric, averaged over the asked positions (compared from the last backwards).
    """
    return Metric("kl", reference=reference_logits)


def divergence(
    reference: Float[Tensor, "..."], logits: Float[Tensor, "batch asked_pos d_vocab"]
) -> Float[Tensor, " batch"]:
    """KL(reference || run) in nats, averaged over the asked positions that both have, from the last backwards."""
    reference = reference[:, None] if reference.ndim == 2 else reference
    shared = min(reference.shape[1], logits.shape[1])
    if reference.shape[0] not in (1, logits.shape[0]) or reference.shape[2] != logits.shape[2]:
        raise InputError(
            f"kl: the reference has shape {tuple(reference.shape)}, the run's logits {tuple(logits.shape)}; "
            "batch and vocabulary must be equal."
        )
    target = reference[:, -shared:].to(logits.device).double().log_softmax(-1)
    found = logits[:, -shared:].double().log_softmax(-1)
    return (target.exp() * (target - found)).sum(-1).mean(-1).to(logits.dtype)


def measure(
    model: Any, x: Any, metric: Metric | Callable[..., Any], *, plan: Plan | None = None
) -> Float[Tensor, " batch"]:
    """Measure a metric on every example of an input.

    Args:
        model: a `HookedAVLLM`.
        x: an `AVInputs`, one example or a stack.
        metric: `logit_diff(...)` and its like, or any callable of logits `[batch, asked_pos, d_vocab]` to `[batch]`.
        plan: edits to be made.

    Returns:
        One number for each example.

    Raises:
        InputError: answers that cannot be told apart, or a metric that returns one number for the batch.
        InterventionError: the plan does not fit, or an edit did not fire.
    """
    bound = as_metric(metric, model, x)

    def logits(inputs: Any, rows: list[int]) -> Tensor:
        compiled = (plan or Plan()).compile(model.spec, inputs.spans, batch=len(inputs))
        with torch.no_grad():
            found = logits_of(model, inputs, compiled.fwd_hooks, torch.tensor(rows))
        compiled.verify()
        return found

    asked = x.spans.generation_position
    reduced = [
        bound.reduce(i, logits(followed(x, tokens), list(range(asked, asked + tokens.shape[1]))))
        for i, tokens in enumerate(bound.continuations(len(x)))
    ]
    return bound.combine(reduced) if reduced else bound(logits(x, [asked]))


def sources(x: Any, i: int) -> list[str]:
    """The media an example was made of: examples that share any are one cluster."""
    clip = x.clips[i]
    hashes = [] if clip is None else [clip.picture_hash, clip.sound_hash]
    return [found for found in hashes if found is not None]
