"""Generation from a recorded run: the prompt's keys and values are there already, so only new tokens are computed.

What equals `model.generate`, and how sampling draws: `docs/replay.md`. HuggingFace's own treatment of logits, ends and
length is used, and rotary tables at the positions that it goes on to count; inputs whose mask or rotary tables are not
the plainly continued ones run hooked, as plans do that cannot be restarted.

Source: HuggingFace's generation loop (`GenerationMixin._sample`), cascade attention (Ye et al., FlashInfer, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from av_lens.core.budget import GIGABYTE
from av_lens.core.calls import unembedded
from av_lens.core.decoding import Decoding, as_asked, generate_with_hooks, settings_of
from av_lens.errors import InputError
from av_lens.interventions import CompiledPlan, Plan
from av_lens.replay.branches import goes_on, position_ids, rotary
from av_lens.replay.recording import Record, Window, place_of
from av_lens.replay.rerun import Taps, run_layers
from av_lens.replay.stacks import restarted, scheduled


@torch.no_grad()
def continued(record: Record, plans: Sequence[Plan], how: Decoding, *, budget_gb: float | int = 1.0) -> tuple[Any, ...]:
    """Generate from a recorded run under each of several plans."""
    if record.routing == "frozen":
        raise InputError(
            "routing='frozen' holds the experts of recorded positions, and a decoded token has none: use "
            "trace.routed('free').generate(...)."
        )
    choice = Choice.of(record, how)
    found: dict[int, Any] = {}
    schedule = scheduled(record, plans, n_asked=1, budget_gb=budget_gb)
    plain = record.mask is None and goes_on(record, how.max_new_tokens)
    for stack in schedule.stacks:
        if stack.hooked or not plain:
            for number in stack.numbers:
                own = replace(how, seed=None if how.seed is None else _derived(how.seed, number))
                found[number] = generate_with_hooks(record.model, record.x, own, plan=plans[number], fwd_hooks=())
            continue
        size = _together(record, len(record.spans) - stack.start + how.max_new_tokens, budget_gb)
        for first in range(0, len(stack.numbers), size):
            numbers = stack.numbers[first : first + size]
            decoded = _Stack(record, [schedule.plans[number] for number in numbers], stack.start)
            found |= _decode(decoded, numbers, choice)
    return tuple(found[number] for number in range(len(plans)))


@dataclass(frozen=True, eq=False)
class Choice:
    """How a token is chosen from logits, and when a sequence ends: HuggingFace's own rules."""

    how: Decoding  # what the caller asked for
    processors: Any  # HuggingFace's logits processors
    criteria: Any  # HuggingFace's stopping criteria
    pad: int | None  # the token after an end; None where sequences end by their length alone

    @classmethod
    def of(cls, record: Record, how: Decoding) -> Choice:
        """Read the rules from the model's settings and the caller's options."""
        from transformers.generation.configuration_utils import GenerationMode
        from transformers.generation.logits_process import LogitsProcessorList
        from transformers.generation.stopping_criteria import StoppingCriteriaList

        model, n = record.model, len(record.spans)
        hf_model, ids = model.hf_model, model.tensors_of(record.x)["input_ids"]
        settings, unknown = hf_model._prepare_generation_config(
            None, max_new_tokens=how.max_new_tokens, do_sample=how.do_sample, **settings_of(model, how)
        )
        mode = settings.get_generation_mode()
        plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if unknown or not plain or settings.num_return_sequences not in (None, 1):
            asked = ", ".join(how.options) or str(mode)
            raise InputError(
                f"trace.generate decodes one sequence for each plan, greedily or by sampling; the options {asked} ask "
                "for something else. Use model.generate(x, plan=plan, ...)."
            )
        hf_model._prepare_special_tokens(settings, True, device=ids.device, batch_size=ids.shape[0])
        settings.max_length = n + how.max_new_tokens
        if settings.min_new_tokens is not None:
            settings.min_length = n + settings.min_new_tokens
        processors = hf_model._get_logits_processor(
            settings, n, ids, None, LogitsProcessorList(), device=ids.device, model_kwargs={}
        )
        criteria = hf_model._get_stopping_criteria(settings, StoppingCriteriaList(), tokenizer=model.tokenizer)
        ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        return cls(how, processors, criteria, int(settings._pad_token_tensor) if ends else None)

    def __call__(
        self, tokens: Int64[Tensor, "plan batch pos"], logits: Float[Tensor, "plan batch d_vocab"], draws: Sequence[Any]
    ) -> Int64[Tensor, "plan batch"]:
        """Choose the next token of every sequence."""
        scores = self.processors(tokens.flatten(0, 1), logits.flatten(0, 1).clone()).view_as(logits)
        if not self.how.do_sample:
            return scores.argmax(-1)
        chances = scores.softmax(-1).cpu()
        drawn = [torch.multinomial(one, 1, generator=draw)[:, 0] for one, draw in zip(chances, draws, strict=True)]
        return torch.stack(drawn).to(tokens.device)


class _Stack:
    """Plans that decode together, first layers ascending: their own keys and values from `start` on, grown by token."""

    def __init__(self, record: Record, plans: Sequence[CompiledPlan], start: int) -> None:
        self.record, self.plans, self.start = record, list(plans), start
        model, n = record.model, len(record.spans)
        if start < n:
            stream, self.own = restarted(record, plans, start, [n - 1 - start], keep=True)
        else:  # nothing in the prompt changes
            stream = record.stream(record.n_layers, n - 1).expand(len(plans), -1, -1, -1)
            shape = (len(plans), record.batch, 0, int(model.spec.n_kv_heads), int(model.spec.d_head))
            homes = [place_of(model, layer) for layer in range(record.n_layers)]
            self.own = [(stream.new_empty(shape, device=home), stream.new_empty(shape, device=home)) for home in homes]
        self.logits = unembedded(model, stream)[:, :, 0].float()
        self.past = [record.past(layer, start) for layer in range(record.n_layers)]
        self.next_ids = position_ids(record)[..., -1:] + 1
        self.steps = 0

    def step(self, tokens: Int64[Tensor, "plan batch"]) -> None:
        """Run the tokens that were chosen last, and read the logits behind the next ones."""
        model, offset = self.record.model, len(self.record.spans) + self.steps
        stream = model.bridge.embed.original_component(tokens)[:, :, None]
        taps = Taps(self.plans, offset, decoding=True)
        cos, sin = rotary(model, stream[0], self.next_ids + self.steps)
        everything = stream.new_zeros(1, 1, 1, offset - self.start + 1)
        window = Window(self.start, cos[:, :, None], sin[:, :, None], None, everything, causal=False)
        last = stream
        for number, made in run_layers(
            model,
            window,
            taps,
            lambda _, left: stream if left is None else left,
            self.past.__getitem__,
            earlier=self.own,
        ):
            last, self.own[number] = made.stream, (made.keys, made.values)
        self.logits = unembedded(model, last)[:, :, 0].float()
        self.steps += 1

    def keep(self, places: list[int]) -> None:
        """Go on with some of the plans only."""
        self.plans = [self.plans[place] for place in places]
        self.own = [(keys[places], values[places]) for keys, values in self.own]


def _decode(stack: _Stack, numbers: Sequence[int], choice: Choice) -> dict[int, Any]:
    """Decode until every plan has ended, as HuggingFace would have ended each by itself."""
    model, how = stack.record.model, choice.how
    prompt = model.tensors_of(stack.record.x)["input_ids"]
    tokens = prompt.expand(len(numbers), -1, -1)
    going = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    draws = [torch.Generator().manual_seed(_derived(how.seed or 0, number)) for number in numbers]
    left = list(numbers)
    logits: dict[int, list[Tensor]] = {number: [] for number in numbers}
    found: dict[int, Any] = {}
    while True:
        chosen = choice(tokens, stack.logits, draws)
        if choice.pad is not None:
            chosen = torch.where(going, chosen, choice.pad)
        if how.return_type == "result":
            for number, one in zip(left, stack.logits, strict=True):
                logits[number].append(one)
        tokens = torch.cat((tokens, chosen[..., None]), dim=-1)
        going = going & ~choice.criteria(tokens.flatten(0, 1), None).view_as(going)
        still = going.any(-1).tolist()
        for place, number in enumerate(left):
            if not still[place]:
                plan = stack.plans[place]
                plan.verify(decode_steps=stack.steps)
                found[number] = as_asked(model, how, tokens[place], prompt.shape[1], logits[number], plan.fired)
        if not any(still):
            return found
        if not all(still):
            places = [place for place, goes in enumerate(still) if goes]
            stack.keep(places)
            tokens, going, chosen = tokens[places], going[places], chosen[places]
            left, draws = [left[place] for place in places], [draws[place] for place in places]
        stack.step(chosen)


def _together(record: Record, n_own: int, budget_gb: float | int) -> int:
    """How many plans' own keys and values fit; one layer's are there twice while they grow."""
    spec = record.model.spec
    each = 2 * record.batch * n_own * int(spec.n_kv_heads) * int(spec.d_head) * record.resid[0].element_size()
    return max(1, int(budget_gb * GIGABYTE / (each * (record.n_layers + 1))))


def _derived(seed: int, number: int) -> int:
    """A plan's own seed."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
