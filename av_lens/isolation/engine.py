"""What does the model say when some heads' outputs at the site are replaced?

This is the one seam between the isolation and the model. Everything else here works on `Recording`s (an unedited run of
a stack of one-layout inputs: its logits at the asked position, every head's z at the site) and `Swap`s (which heads,
what z instead), and asks an `Engine` for the edited logits.

`ModelEngine` runs on a `HookedAVLLM` in two ways that must agree (a test holds them together): `how="trace"` restarts
the recorded run at the first edited layer and position; `how="hooks"` runs the whole model again for every swap, with
plain hooks, as the slow reference.

A swap replaces z at the *site*'s positions only. `freeze=True` also holds every later layer's z, from the site's first
position on, at the recording's own: what is left is the head's own write, through MLPs and norms that are recomputed
(the *direct* effect).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.bridge.hook_names import hook_name
from av_lens.errors import ProtocolError, unknown
from av_lens.interventions import Plan, Site, replace

Head = tuple[int, int]
SITES = ("suffix", "generation", "audio")


@dataclass(frozen=True, eq=False)
class Swap:
    """Heads `(layer, head)` and what their z becomes at the site: one `[batch or 1, pos, d_head]` each."""

    heads: tuple[Head, ...]
    values: tuple[Float[Tensor, "one_or_batch site d_head"], ...]
    freeze: bool = False


@dataclass(frozen=True, eq=False)
class Recording:
    """An unedited run of a stack of inputs.

    `window` are the positions from the site's first on, `site` the site's own; `z` covers the window. `final` is the
    residual stream that enters the final norm at the asked position.
    """

    inputs: Any
    site: Int[np.ndarray, " site"]
    window: Int[np.ndarray, " window"]
    logits: Float[Tensor, "batch d_vocab"]
    z: Float[Tensor, "layer batch window head d_head"]
    final: Float[Tensor, "batch d_model"]
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def site_z(self) -> Float[Tensor, "layer batch site head d_head"]:
        """Every head's z at the site."""
        inside = torch.from_numpy(np.searchsorted(self.window, self.site))
        return self.z[:, :, inside]


@runtime_checkable
class Engine(Protocol):
    """What the isolation asks of a model."""

    @property
    def n_layers(self) -> int:
        """Fusion layers."""
        ...

    @property
    def n_heads(self) -> int:
        """Query heads of a layer."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Resolves answers to token ids."""
        ...

    def cells(self, conflict: Any, question: str | None) -> Any:
        """The conflict's cells, asked its own question (None) or another."""
        ...

    def text_only(self, question: str) -> Any:
        """The bare question, without any media."""
        ...

    def stack(self, inputs: Sequence[Any]) -> Any:
        """Join inputs of one layout along the batch."""
        ...

    def together(self, inputs: Any) -> int:
        """How many inputs of this length one stack may hold."""
        ...

    def record(self, inputs: Any, site: str) -> Recording:
        """Run a stack unedited."""
        ...

    def edited(self, recording: Recording, swaps: Sequence[Swap]) -> Iterator[Float[Tensor, "batch d_vocab"]]:
        """The logits at the asked position under each swap, in order."""
        ...

    def writes(self, recording: Recording, ids: Int[Tensor, " token"]) -> Float[Tensor, "layer head batch token"]:
        """What each head writes directly to the tokens' logits at the asked position, at the run's own norm scale."""
        ...

    def write_norms(self, recording: Recording) -> Float[np.ndarray, "layer head"]:
        """The mean over examples and site positions of the norm of z W_O."""
        ...


def site_positions(spans: Any, site: str) -> Int[np.ndarray, " site"]:
    """Find a site's positions in a prompt.

    Args:
        spans: the prompt's `SpanMap`.
        site: "suffix" (question, header and generation position), "generation" or "audio".

    Returns:
        The positions, increasing.

    Raises:
        ProtocolError: an unknown site, or one that this prompt does not have.
    """
    if site not in SITES:
        raise ProtocolError(unknown("site", site, SITES))
    found = np.asarray(spans[site].positions, dtype=np.int64)
    if not len(found):
        raise ProtocolError(f"the site {site!r} names no position of this prompt; it has {spans!r}.")
    return found


class ModelEngine:
    """The engine of a `HookedAVLLM`.

    Args:
        model: the wrapped model.
        how: "trace" (restart recorded runs) or "hooks" (the whole model again, the slow reference).
        layout: how sound and picture are laid out in the prompt.
        logit_bytes: memory for the logits of plans that run together.
        trace_bytes: memory for the trace of one stack.
    """

    def __init__(
        self,
        model: Any,
        *,
        how: str = "trace",
        layout: str = "in_video",
        logit_bytes: float = 2.5e8,
        trace_bytes: float = 4e9,
    ) -> None:
        if how not in ("trace", "hooks"):
            raise ProtocolError(unknown("engine", how, ("trace", "hooks")))
        self.model = model
        self.how = how
        self.layout = layout
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
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.model.tokenizer

    def cells(self, conflict: Any, question: str | None) -> Any:
        """Find a conflict's cells.

        Args:
            conflict: the conflict.
            question: another question than its own, or None.

        Returns:
            A lazy mapping from cell to inputs.
        """
        return conflict.cells(self.model, question=question, layout=self.layout)

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
        return type(inputs[0]).stack(list(inputs))

    def together(self, inputs: Any) -> int:
        """Say how many examples fit into one stack: their trace must stay within `trace_bytes`.

        Args:
            inputs: one example.

        Returns:
            At least 1, at most 128.
        """
        spec = self.model.spec
        per_position = spec.n_layers * (spec.d_model + 2 * spec.n_kv_heads * spec.d_head) * self.model.dtype.itemsize
        return int(max(1, min(128, self.trace_bytes // (per_position * len(inputs.spans)))))

    def record(self, inputs: Any, site: str) -> Recording:
        """Run a stack unedited, keeping every head's z from the site on.

        Args:
            inputs: the stack.
            site: the site's name.

        Returns:
            The recording.
        """
        positions = site_positions(inputs.spans, site)
        asked = int(inputs.spans.generation_position)
        window = np.arange(positions[0], asked + 1)
        z: dict[int, Tensor] = {}
        final: dict[str, Tensor] = {}

        def keep(layer: int) -> Any:
            def fn(activation: Tensor, hook: Any = None) -> None:
                del hook
                z[layer] = activation[:, window[0] : asked + 1].detach().clone()

            return fn

        def keep_final(activation: Tensor, hook: Any = None) -> None:
            del hook
            final["resid"] = activation[:, asked].detach().clone()

        hooks = [(hook_name("z", layer), keep(layer)) for layer in range(self.n_layers)]
        hooks.append((hook_name("resid_post", self.n_layers - 1), keep_final))
        with torch.no_grad():
            logits = self.model.run_with_hooks(inputs, fwd_hooks=hooks)[:, asked].detach().float().clone()
        stacked = torch.stack([z[layer] for layer in range(self.n_layers)])
        return Recording(inputs, positions, window, logits, stacked, final["resid"])

    def plan(self, recording: Recording, swap: Swap) -> Plan:
        """Write a swap as a plan.

        Args:
            recording: the run that is edited.
            swap: the heads and their new z.

        Returns:
            The plan.
        """
        edits = [
            replace(Site("z", layer, head=head, positions=recording.site.tolist()), value)
            for (layer, head), value in zip(swap.heads, swap.values, strict=True)
        ]
        if swap.freeze:
            first = min(layer for layer, _ in swap.heads)
            own = recording.window.tolist()
            edits += [
                replace(Site("z", layer, positions=own), recording.z[layer])
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
        asked = int(recording.inputs.spans.generation_position)
        if self.how == "hooks":
            for swap in swaps:
                compiled = self.plan(recording, swap).compile(self.model.spec, recording.inputs.spans)
                with torch.no_grad():
                    logits = self.model.run_with_hooks(recording.inputs, fwd_hooks=compiled.fwd_hooks)[:, asked]
                compiled.verify()
                yield logits.float().clone()
            return
        trace = recording.kept.get("trace")
        if trace is None:
            trace = recording.kept["trace"] = self.model.trace(recording.inputs)
        # The trace stacks activations to its own budget; what is bounded here are the logits that it hands back.
        together = int(max(1, min(256, self.logit_bytes // recording.logits.nbytes)))
        for start in range(0, len(swaps), together):
            plans = [self.plan(recording, swap) for swap in swaps[start : start + together]]
            with torch.no_grad():
                logits = trace.replay(plans, logits_at="generation")
            for one in logits:
                yield one[:, -1].float()

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
        resid = recording.final.float()
        norm = self.model.ln_final.original_component
        scale = (resid.pow(2).mean(-1) + norm.variance_epsilon).sqrt()
        columns = self.model.W_U.detach().float()[:, ids.to(self.model.W_U.device)]
        return (written / scale[:, None] * norm.weight.detach().float()) @ columns

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
