"""What does a model say when some heads' outputs at the site are replaced? Recordings and edited runs of one model.

Edits are `Plan`s (`Recording.plan` writes them for heads) and run in two ways that must agree (a test holds them
together): `how="trace"` restarts the recorded run at the first edited layer and position; `how="hooks"` runs the whole
model again for every plan, with plain hooks, as the slow reference.

*Norm frozen*: logits read from a run's stream with the final norm dividing by what it divided by in the unedited run of
that cell. Reading out is then linear, so that what a change of the stream does to the logits is the same whatever the
norm would have made of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from av_lens.core.attention_mass import incoming_mass
from av_lens.core.execution import logits_of, run
from av_lens.core.unembedding import unembedded
from av_lens.errors import ProtocolError, unknown
from av_lens.families.hook_names import hook_name
from av_lens.inputs import AVInputs
from av_lens.inputs.shared_tensors import shared
from av_lens.interventions import Plan, Site
from av_lens.isolation.measuring.edited_runs import edited_run
from av_lens.isolation.measuring.recordings import Edited, Head, Recording, Values, edits_at
from av_lens.replay.stacks import run_streams, scheduled
from av_lens.replay.traces import Trace

STREAM_BYTES, TRACE_BYTES = 2.5e8, 4e9
"""Memory for the streams of plans that run together; for the trace of one stack."""


class ModelEngine:
    """Recordings and edited runs of a `HookedAVLLM`.

    Args:
        model: the wrapped model.
        how: "trace" (restart recorded runs) or "hooks" (the whole model again, the slow reference).
        layout: how sound and picture are laid out in the prompt.
        cells: further options of `Conflict.cells`, such as another kind of blank.
    """

    def __init__(
        self, model: Any, *, how: str = "trace", layout: str = "in_video", cells: Mapping[str, Any] | None = None
    ) -> None:
        if how not in ("trace", "hooks"):
            raise ProtocolError(unknown("engine", how, ("trace", "hooks")))
        self.model, self.how, self.layout = model, how, layout
        self.cell_options = dict(cells or {})
        self.n_layers, self.n_heads = int(model.spec.n_layers), int(model.spec.n_heads)

    @cached_property
    def heads(self) -> list[Head]:
        """All heads, layer by layer."""
        return [(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]

    def cells(self, conflict: Any, question: str | None) -> Mapping[str, AVInputs]:
        """Give a conflict's cells, asked its own question (None) or another; `audio_only_v` mirrors `audio_only`."""
        options = {"question": question, "layout": self.layout, "keep_clips": False, **self.cell_options}
        return _Cells(self.model, conflict, options)

    def together(self, inputs: AVInputs) -> int:
        """Say how many examples fit into one stack: their trace must stay within `TRACE_BYTES`."""
        spec = self.model.spec
        per_position = spec.n_layers * (spec.d_model + 2 * spec.n_kv_heads * spec.d_head) * self.model.dtype.itemsize
        return int(max(1, min(16, TRACE_BYTES // (per_position * len(inputs.spans)))))

    def record(self, inputs: AVInputs, positions: Int[np.ndarray, " site"], under: Values | None = None) -> Recording:
        """Run a stack, under edits of heads or none, keeping every head's z from the site on."""
        window, last = np.arange(positions[0], inputs.spans.generation_position + 1), self.n_layers - 1
        sites = [Site("z", layer, positions=window.tolist()) for layer in range(self.n_layers)]
        sites.append(Site("resid_post", last, positions=window[-1:].tolist()))
        with torch.no_grad():  # what is kept was never bounded: it is the trace that `together` counts
            plan = Plan(edits_at(positions, under or {}))
            made = run(self.model, inputs, plan=plan, capture=sites, budget_gb=math.inf)
        z = torch.stack([made.cache["z", layer] for layer in range(self.n_layers)])
        logits, final = made.logits[:, 0].float().clone(), made.cache["resid_post", last][:, 0].clone()
        return Recording(inputs, positions, window, logits, z, final, under or {})

    def record_edited(self, recording: Recording, values: Values) -> Recording:
        """Run a recording's inputs with heads edited, so that further edits can be made on top.

        The search for sets asks the same question about many sets that share members. An edited run is therefore made
        once, and every further edit restarts there, at its own layer, instead of at the first layer of the whole set.
        """
        whole, trace = dict(recording.under) | dict(values), self._restartable(recording)
        if trace is None:
            again = self.record(recording.inputs, recording.site, whole)
            return dataclasses.replace(again, trace=recording.trace)
        edited, z, start = edited_run(trace, recording.plan(values))
        final = edited.stream(edited.n_layers, int(recording.window[-1]))[:, 0]
        with torch.no_grad():
            logits = unembedded(self.model, final).float()
        inside = torch.from_numpy(recording.window - start).to(final.device)
        below = [recording.z[layer] for layer in range(edited.n_layers - len(z))]
        stacked = torch.stack([*below, *(z[layer][:, inside] for layer in sorted(z))])
        changed = {"logits": logits, "z": stacked, "final": final, "under": whole, "trace": edited}
        return dataclasses.replace(recording, **changed)

    def trace(self, recording: Recording) -> Trace:
        """Give the recorded run that restarts begin from, made when first needed and kept with the recording."""
        trace: Trace = self.model.trace(recording.inputs) if recording.trace is None else recording.trace
        recording.trace = trace
        return trace

    def _restartable(self, recording: Recording) -> Trace | None:
        trace = self.trace(recording) if self.how == "trace" else None
        return None if trace is None or trace.hooked_because else trace

    def capture(
        self, inputs: AVInputs, positions: Int[np.ndarray, " site"], components: Sequence[str]
    ) -> Mapping[str, Float[Tensor, "layer batch site ..."]]:
        """Run a stack unedited and keep other outputs at the site."""
        layers, at = range(self.n_layers), positions.tolist()
        sites = [Site(name, layer, positions=at) for name in components for layer in layers]
        with torch.no_grad():
            cache = run(self.model, inputs, capture=sites, budget_gb=math.inf).cache
        return {name: torch.stack([cache[name, layer] for layer in layers]) for name in components}

    def incoming(self, inputs: AVInputs) -> Float[np.ndarray, "batch pos"]:
        """Sum the value-weighted attention that each position gets from the suffix, all layers and heads together."""
        return incoming_mass(self.model, inputs).double().numpy()

    def changed(self, recording: Recording, plans: Sequence[Plan]) -> Iterator[Edited]:
        """Run a recording's inputs again under each plan, in order."""
        trace = self._restartable(recording)
        if trace is None:
            yield from (self._hooked(recording, plan) for plan in plans)
            return
        asked = torch.tensor([int(recording.window[-1])])
        # A stack's activations keep to their own budget; what is bounded here are the streams that are handed back.
        together = int(max(1, min(512, STREAM_BYTES // recording.final.nbytes)))
        for start in range(0, len(plans), together):
            some = plans[start : start + together]
            finals = recording.final.new_empty(len(some), *recording.final.shape)
            with torch.no_grad():
                schedule = scheduled(trace, some, n_asked=1, budget_gb=1.0)
                for numbers, stream in run_streams(trace, schedule, asked):
                    finals[list(numbers)] = stream[:, :, 0]
                for final in finals:
                    yield Edited(unembedded(self.model, final).float(), final)

    def _hooked(self, recording: Recording, plan: Plan) -> Edited:
        if not len(plan):  # the run as it was recorded, with the edits that it was made under
            return Edited(recording.logits, recording.final)
        compiled = plan.compile(self.model.spec, recording.inputs.spans, batch=len(recording.inputs))
        asked, final = int(recording.window[-1]), list[Tensor]()
        last = (hook_name("resid_post", self.n_layers - 1), partial(_keep, final, asked))
        with torch.no_grad():
            logits = logits_of(self.model, recording.inputs, [*compiled.fwd_hooks, last], torch.tensor([asked]))[:, 0]
        compiled.verify()
        return Edited(logits.float().clone(), final[0])

    def linear_logits(
        self, recording: Recording, final: Float[Tensor, "*more batch d_model"], ids: Int[Tensor, " token"]
    ) -> Float[Tensor, "*more batch token"]:
        """Read tokens' logits from a stream, the final norm dividing by what it divided by in the recording."""
        norm, head = self.model.ln_final.original_component, self.model.bridge.unembed.original_component
        with torch.no_grad():
            ratio = self._divisor(final) / self._divisor(recording.final)
            bias = None if head.bias is None else head.bias[ids].float()
            return functional.linear(norm(final).float() * ratio, head.weight[ids].float(), bias)

    def _divisor(self, stream: Tensor) -> Float[Tensor, "*more batch 1"]:
        norm = self.model.ln_final.original_component
        return (stream.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    @cached_property
    def _output_weights(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self.model.W_O.detach()

    def writes(self, recording: Recording, ids: Int[Tensor, " token"]) -> Float[Tensor, "layer head batch token"]:
        """Attribute the tokens' logits to the heads' direct writes at the asked position, at the run's own norm scale.

        This is `direct_attribution(by="head")` for many tokens, from what the recording keeps: nothing is run again.
        """
        at_end = recording.z[:, :, -1].float()
        written = torch.einsum("lbhd,lhdm->lhbm", at_end, self._output_weights.float())
        norm = self.model.ln_final.original_component
        unembedding = self.model.W_U.detach()
        columns = unembedding[:, ids.to(unembedding.device)].float()
        return (written / self._divisor(recording.final) * norm.weight.detach().float()) @ columns

    def write_norms(self, recording: Recording) -> Float[np.ndarray, "layer head"]:
        """Measure how much each head writes at the site: the mean over examples and positions of |z W_O|."""
        out = np.zeros((self.n_layers, self.n_heads))
        for layer in range(self.n_layers):
            z, output = recording.site_z[layer].float(), self._output_weights[layer].float()
            out[layer] = torch.einsum("bshd,hdm->bshm", z, output).norm(dim=-1).mean((0, 1)).cpu().numpy()
        return out


def _keep(kept: list[Tensor], position: int, activation: Tensor, hook: Any = None) -> None:
    """A hook that keeps one position."""
    del hook
    kept.append(activation[:, position].detach().clone())


def stacked(inputs: Sequence[AVInputs]) -> AVInputs:
    """Join inputs of one layout."""
    return shared(AVInputs.stack(list(inputs)))


class _Cells(Mapping[str, AVInputs]):
    """A conflict's cells and `audio_only_v`, which is `audio_only` with sound and picture exchanged."""

    def __init__(self, model: Any, conflict: Any, options: dict[str, Any]) -> None:
        self._conflict, self._of = conflict, lambda one: one.cells(model, **options)
        self._own = self._of(conflict)

    @cached_property
    def _mirror(self) -> Mapping[str, AVInputs]:
        one = self._conflict
        return self._of(dataclasses.replace(one, sound=one.picture, picture=one.sound, answers=one.answers[::-1]))

    def __getitem__(self, name: str) -> AVInputs:
        return self._mirror["audio_only"] if name == "audio_only_v" else self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
