"""What does a model say when some heads' outputs at the site are replaced? The engine of a `HookedAVLLM`.

It runs in two ways that must agree (a test holds them together): `how="trace"` restarts the recorded run at the first
edited layer and position; `how="hooks"` runs the whole model again for every swap, with plain hooks, as the slow
reference. What the isolation asks of it is `seam.Engine`.

A frozen swap needs the asked position alone: every later head's output there is the recording's own, whatever happened
at other positions. The restart therefore begins at it; the slow reference edits and freezes the whole site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as replaced
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from av_lens.core.attention_mass import incoming_mass
from av_lens.core.execution import logits_of
from av_lens.core.unembedding import unembedded
from av_lens.errors import ProtocolError, unknown
from av_lens.families.hook_names import hook_name
from av_lens.inputs.shared_tensors import shared
from av_lens.interventions import Edit, Plan, Site, replace
from av_lens.isolation.measuring.edited_runs import record_edited
from av_lens.isolation.measuring.seam import SITES, Edited, Engine, Head, Recording, Swap, site_positions
from av_lens.replay.stacks import run_streams, scheduled

__all__ = ["SITES", "Edited", "Engine", "Head", "ModelEngine", "Recording", "Swap", "site_positions"]


class ModelEngine:
    """The engine of a `HookedAVLLM`.

    Args:
        model: the wrapped model.
        how: "trace" (restart recorded runs) or "hooks" (the whole model again, the slow reference).
        layout: how sound and picture are laid out in the prompt.
        cells: further options of `Conflict.cells`, such as another kind of blank.
        logit_bytes: memory for the logits of plans that run together.
        trace_bytes: memory for the trace of one stack.
    """

    def __init__(
        self,
        model: Any,
        *,
        how: str = "trace",
        layout: str = "in_video",
        cells: Mapping[str, Any] | None = None,
        logit_bytes: float = 2.5e8,
        trace_bytes: float = 4e9,
    ) -> None:
        if how not in ("trace", "hooks"):
            raise ProtocolError(unknown("engine", how, ("trace", "hooks")))
        self.model = model
        self.how = how
        self.layout = layout
        self.cell_options = dict(cells or {})
        self.logit_bytes = logit_bytes
        self.trace_bytes = trace_bytes
        self._w_o: Tensor = torch.empty(0)

    @property
    def n_layers(self) -> int:
        """Fusion layers."""
        return int(self.model.spec.n_layers)

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        return int(self.model.spec.n_heads)

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads of a layer."""
        return int(self.model.spec.n_kv_heads)

    @property
    def parts(self) -> tuple[str, ...]:
        """The outputs beside z that a swap may replace; keys before rotary position."""
        return ("mlp_out", "k", "v")

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.tokenizer

    def cells(self, conflict: Any, question: str | None) -> Any:
        """Find a conflict's cells.

        Args:
            conflict: the conflict.
            question: another question than its own, or None.

        Returns:
            A lazy mapping from cell to inputs; beside the conflict's own cells `audio_only_v`, the picture's sound.
        """
        options = {"question": question, "layout": self.layout, "keep_clips": False, **self.cell_options}
        return _Cells(self.model, conflict, options)

    def text_only(self, question: str) -> Any:
        """Encode a question without media.

        Args:
            question: the question.

        Returns:
            The inputs.
        """
        return self.model.encode(None, question)

    def stack(self, inputs: Sequence[Any]) -> Any:
        """Join inputs of one layout.

        Args:
            inputs: the inputs.

        Returns:
            The stack.
        """
        return shared(type(inputs[0]).stack(list(inputs)))

    def together(self, inputs: Any) -> int:
        """Say how many examples fit into one stack: their trace must stay within `trace_bytes`.

        Args:
            inputs: one example.

        Returns:
            At least 1, at most 16: larger stacks gain 3% (on av-tiny), and a killed run loses the one it was at.
        """
        spec = self.model.spec
        per_position = spec.n_layers * (spec.d_model + 2 * spec.n_kv_heads * spec.d_head) * self.model.dtype.itemsize
        return int(max(1, min(16, self.trace_bytes // (per_position * len(inputs.spans)))))

    def record(self, inputs: Any, positions: Int[np.ndarray, " site"]) -> Recording:
        """Run a stack unedited, keeping every head's z from the site on.

        Args:
            inputs: the stack.
            positions: the site's, increasing.

        Returns:
            The recording.
        """
        asked = int(inputs.spans.generation_position)
        window = np.arange(positions[0], asked + 1)
        layers = range(self.n_layers)
        z, final = _Kept(slice(window[0], asked + 1)), _Kept(asked)
        hooks = [(hook_name("z", layer), z.at(layer)) for layer in layers]
        hooks.append((hook_name("resid_post", self.n_layers - 1), final.at(0)))
        with torch.no_grad():
            logits = logits_of(self.model, inputs, hooks, torch.tensor([asked]))[:, 0].detach().float().clone()
        return Recording(inputs, positions, window, logits, torch.stack([z[layer] for layer in layers]), final[0])

    def capture(
        self, inputs: Any, positions: Int[np.ndarray, " site"], components: Sequence[str]
    ) -> Mapping[str, Float[Tensor, "layer batch site ..."]]:
        """Run a stack unedited and keep other outputs at the site.

        Args:
            inputs: the stack.
            positions: the site's.
            components: such as "mlp_out", "k" (before rotary position), "v".

        Returns:
            Each component's activations, layers first.
        """
        layers = range(self.n_layers)
        kept = {component: _Kept(torch.from_numpy(positions)) for component in components}
        hooks = [(hook_name(name, layer), kept[name].at(layer)) for name in components for layer in layers]
        with torch.no_grad():
            logits_of(self.model, inputs, hooks, torch.tensor([len(inputs.spans) - 1]))
        return {name: torch.stack([kept[name][layer] for layer in layers]) for name in components}

    def incoming(self, inputs: Any) -> Float[np.ndarray, "batch pos"]:
        """Sum the value-weighted attention that each position gets from the suffix.

        Args:
            inputs: the stack.

        Returns:
            The sums over all layers and heads.
        """
        return incoming_mass(self.model, inputs).double().numpy()

    def plan(self, recording: Recording, swap: Swap, *, whole: bool = True) -> Plan:
        """Write a swap as a plan.

        Args:
            recording: the run that is edited.
            swap: the heads and their new z.
            whole: write a frozen swap over the whole site; else at the asked position, which says the same there.

        Returns:
            The plan.
        """
        site, own, keep = recording.site.tolist(), recording.window.tolist(), slice(None)
        if swap.freeze and not whole:
            own, keep = own[-1:], slice(-1, None)
            if site[-1] != own[-1]:
                return Plan([])  # no head's own write at another position reaches the asked one
            site = site[-1:]
        edits: list[Edit] = [
            replace(Site("z", layer, head=head, positions=site), value[:, keep] if value.shape[1] > 1 else value)
            for (layer, head), value in zip(swap.heads, swap.values, strict=True)
        ]
        edits += [
            replace(Site(part.component, part.layer, head=part.head, positions=site), part.value) for part in swap.parts
        ]
        if swap.freeze:
            if swap.parts:
                raise ProtocolError("a frozen swap edits heads' z alone; leave its parts out.")
            first = min(layer for layer, _ in swap.heads)
            edits += [
                replace(Site("z", layer, positions=own), recording.z[layer][:, keep])
                for layer in range(first + 1, self.n_layers)
            ]
        return Plan(edits)

    def edited(self, recording: Recording, swaps: Sequence[Swap]) -> Iterator[Float[Tensor, "batch d_vocab"]]:
        """Run a recording's inputs again under each swap.

        Args:
            recording: the unedited run.
            swaps: the edits, each its own run.

        Yields:
            The logits at the asked position, in the order of the swaps.
        """
        for one in self.changed(recording, swaps):
            yield one.logits

    def changed(self, recording: Recording, swaps: Sequence[Swap]) -> Iterator[Edited]:
        """Run a recording's inputs again under each swap.

        Args:
            recording: the unedited run.
            swaps: the edits, each its own run.

        Yields:
            The edited runs at the asked position, in the order of the swaps.
        """
        trace = None
        if self.how == "trace":
            trace = recording.kept.get("trace")
            if trace is None:
                trace = recording.kept["trace"] = self.model.trace(recording.inputs)
        if trace is None or trace.hooked_because:
            for swap in swaps:
                yield self._hooked(recording, swap)
            return
        asked = torch.tensor([int(recording.inputs.spans.generation_position)])
        # A stack's activations keep to their own budget; what is bounded here are the streams that are handed back.
        together = int(max(1, min(512, self.logit_bytes // recording.final.nbytes)))
        for start in range(0, len(swaps), together):
            plans = [self.plan(recording, swap, whole=False) for swap in swaps[start : start + together]]
            finals = recording.final.new_empty(len(plans), *recording.final.shape)
            with torch.no_grad():
                schedule = scheduled(trace, plans, n_asked=1, budget_gb=1.0)
                for numbers, stream in run_streams(trace, schedule, asked):
                    finals[list(numbers)] = stream[:, :, 0]
                for final in finals:
                    yield Edited(unembedded(self.model, final).float(), final)

    def record_edited(self, recording: Recording, swap: Swap) -> Recording:
        """Run a recording's inputs under a swap, so that further edits can be made on top (`edited_runs.further`).

        Args:
            recording: the run that is edited, an edited one or not.
            swap: the heads and their new z; not frozen.

        Returns:
            The edited run, every head's z from the site on.
        """
        return record_edited(self, recording, swap)

    def _hooked(self, recording: Recording, swap: Swap) -> Edited:
        asked = int(recording.inputs.spans.generation_position)
        compiled = self.plan(recording, swap).compile(self.model.spec, recording.inputs.spans)
        final = _Kept(asked)
        last = (hook_name("resid_post", self.n_layers - 1), final.at(0))
        with torch.no_grad():
            hooks = [*compiled.fwd_hooks, last]
            logits = logits_of(self.model, recording.inputs, hooks, torch.tensor([asked]))[:, 0]
        compiled.verify()
        return Edited(logits.float().clone(), final[0])

    def linear_logits(
        self, recording: Recording, final: Float[Tensor, "*more batch d_model"], ids: Int[Tensor, " token"]
    ) -> Float[Tensor, "*more batch token"]:
        """Read tokens' logits from a stream, the final norm dividing by what it divided by in the recording.

        Args:
            recording: the unedited run.
            final: a stream that enters the final norm at the asked position, or several.
            ids: token ids.

        Returns:
            Their logits; linear in `final`.
        """
        norm, head = self.model.ln_final.original_component, self.model.bridge.unembed.original_component
        with torch.no_grad():
            ratio = self._divisor(final) / self._divisor(recording.final)
            bias = None if head.bias is None else head.bias[ids].float()
            return functional.linear(norm(final).float() * ratio, head.weight[ids].float(), bias)

    def _divisor(self, stream: Tensor) -> Float[Tensor, "*more batch 1"]:
        norm = self.model.ln_final.original_component
        return (stream.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    def _output_weights(self) -> Tensor:
        if not self._w_o.numel():
            self._w_o = self.model.W_O.detach()
        return self._w_o

    def writes(self, recording: Recording, ids: Int[Tensor, " token"]) -> Float[Tensor, "layer head batch token"]:
        """Attribute the tokens' logits to the heads' direct writes at the asked position.

        Args:
            recording: the run.
            ids: token ids.

        Returns:
            Each head's z W_O, through the final norm at the run's own scale, on the unembedding's columns.
        """
        at_end = recording.z[:, :, -1].float()
        written = torch.einsum("lbhd,lhdm->lhbm", at_end, self._output_weights().float())
        norm = self.model.ln_final.original_component
        unembedding = self.model.W_U.detach()
        columns = unembedding[:, ids.to(unembedding.device)].float()
        return (written / self._divisor(recording.final) * norm.weight.detach().float()) @ columns

    def write_norms(self, recording: Recording) -> Float[np.ndarray, "layer head"]:
        """Measure how much each head writes at the site.

        Args:
            recording: the run.

        Returns:
            The mean norm of z W_O over examples and site positions.
        """
        out = np.zeros((self.n_layers, self.n_heads))
        for layer in range(self.n_layers):
            written = torch.einsum(
                "bshd,hdm->bshm", recording.site_z[layer].float(), self._output_weights()[layer].float()
            )
            out[layer] = written.norm(dim=-1).mean((0, 1)).cpu().numpy()
        return out


class _Kept(dict[int, Tensor]):
    """What hooks have kept, by layer: the activations at some positions (a number keeps no axis for them)."""

    def __init__(self, positions: int | slice | Tensor) -> None:
        super().__init__()
        self.positions = positions

    def at(self, layer: int) -> Any:
        """A hook that keeps the layer's activation."""

        def fn(activation: Tensor, hook: Any = None) -> None:
            del hook
            self[layer] = activation[:, self.positions].detach().clone()

        return fn


class _Cells(Mapping[str, Any]):
    """A conflict's cells and `audio_only_v`, which is `audio_only` with sound and picture exchanged."""

    def __init__(self, model: Any, conflict: Any, options: dict[str, Any]) -> None:
        self._model, self._conflict, self._options = model, conflict, options
        self._own = conflict.cells(model, **options)
        self._mirror: Any = None

    def __getitem__(self, name: str) -> Any:
        if name != "audio_only_v":
            return self._own[name]
        if self._mirror is None:
            one = self._conflict
            turned = replaced(one, sound=one.picture, picture=one.sound, answers=one.answers[::-1])
            self._mirror = turned.cells(self._model, **self._options)
        return self._mirror["audio_only"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
