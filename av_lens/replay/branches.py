"""Answers of several tokens after one recorded prompt, side by side: the prompt is run once for all of them.

Each row is a token of an answer: it reads the recorded prefix, the plan's own positions and the tokens before it of its
own answer. Logits equal those of teacher forcing to 1e-5. Not done, so that answers run one by one: a run that a
restart does not know, prompts whose last position does not read everything, rotary tables that are not continued.

Source: tree attention over a shared prefix (Miao et al., SpecInfer, 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from av_lens.families.decoder import as_forward
from av_lens.interventions import CompiledPlan
from av_lens.replay.recording import Record, Window, place_of
from av_lens.replay.rerun import Heads, Taps, no_edits, run_layers


def position_ids(record: Record) -> Shaped[Tensor, "stream batch pos"]:
    """The model's own position ids of the prompt."""
    model = record.model
    return model.position_ids(model.tensors_of(record.x)).to(model.device)


def rotary(model: Any, stream: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables `[batch, pos, d_head]` from the model's own embedding of positions."""
    return model.hf_model.get_decoder().rotary_emb(stream, as_forward(ids))


def goes_on(record: Record, n_new: int) -> bool:
    """Whether what comes after the prompt is plain: it reads all before it, and rotary tables can be made again."""
    traits, n = record.traits, len(record.spans) + n_new
    if record.hooked_because or traits.obstacle(n) or traits.forgets(n):
        return False
    if record.mask is not None and bool((record.mask[:, :, -1] != 0).any()):
        return False
    last, ids = record.stream(0, len(record.spans) - 1), position_ids(record)[..., -1:]
    # Beside the last new position: some tables are others for all positions once a sequence is long.
    again = rotary(record.model, last, torch.cat((ids, ids + n_new - 1), dim=-1))
    return all(torch.allclose(new[:, :1], old[:, -1:].to(new)) for new, old in zip(again, record.tables, strict=True))


@dataclass(frozen=True, eq=False)
class Branches:
    """Answers after one recorded prompt. Build it with `Branches.of`."""

    record: Record  # the recorded run
    window: Window  # rotary tables of the answers' rows, and which row reads which
    # what entered each layer at these rows in the recorded run, and what left the last
    streams: tuple[Float[Tensor, "batch _ d_model"], ...]
    sizes: tuple[int, ...]  # how many rows each answer has

    @classmethod
    @torch.no_grad()
    def of(cls, record: Record, answers: Sequence[Int64[Tensor, "batch _"]]) -> Branches | None:
        """Run answers after the recorded prompt; None where they have to be run one by one."""
        sizes = tuple(int(one.shape[1]) - 1 for one in answers)
        homes = {place_of(record.model, layer) for layer in range(record.n_layers)}
        if not sum(sizes) or len(homes) > 1 or not goes_on(record, max(sizes)):
            return None
        model, n = record.model, len(record.spans)
        embedded = model.bridge.embed.original_component(
            torch.cat([one[:, :-1] for one in answers], 1).to(model.device)
        )
        place = torch.cat([torch.arange(size) for size in sizes]).to(model.device)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(model.device)
        cos, sin = rotary(model, embedded, position_ids(record)[..., -1:] + 1 + place)
        hidden = (owner[:, None] != owner) | (place[:, None] < place)
        mask = embedded.new_zeros(1, 1, *hidden.shape).masked_fill(hidden, torch.finfo(embedded.dtype).min)
        window = Window(n, cos[:, :, None], sin[:, :, None], None, mask, causal=False)
        taps, streams = no_edits(n, start=n), [embedded]
        layers = run_layers(
            model, window, taps, lambda at, left: taps.enter(at, left, embedded), lambda at: record.past(at, n)
        )
        streams += [made.stream[0] for _, made in layers]
        return cls(record, window, tuple(streams), sizes)

    def after(
        self, plans: Sequence[CompiledPlan], start: int, own: Sequence[Heads]
    ) -> Float[Tensor, "plan batch _ d_model"]:
        """Run the answers after restarted prompts, whose keys and values from `start` on are `own`: the last stream."""
        record, rows = self.record, self.window.own_mask
        taps = Taps([replace(plan, steps=()) for plan in plans], len(record.spans))
        prompt = rows.new_zeros(1, 1, rows.shape[2], len(record.spans) - start)
        window = replace(self.window, start=start, own_mask=torch.cat((prompt, rows), dim=-1))
        last = self.streams[-1][None]
        for _, made in run_layers(
            record.model,
            window,
            taps,
            lambda at, left: taps.enter(at, left, self.streams[at]),
            lambda at: record.past(at, start),
            earlier=own,
        ):
            last = made.stream
        return last

    def parts(self, found: Float[Tensor, "batch row _"]) -> list[Float[Tensor, "batch _ _"]]:
        """Part what was read at the asked position and at all rows after it: each answer's own positions."""
        first, *rows = found.split([1, *self.sizes], dim=1)
        return [torch.cat((first, own), dim=1) for own in rows]
