"""A model in hand: a TransformerBridge with every hook real, that takes audio-visual inputs wherever it takes ids.

`HookedAVLLM` *holds* a TransformerLens bridge (`.bridge`), forwards a written list of its attributes
(`runs.forwarding.FORWARDED`), and satisfies TransformerLens's `TransformerLensModel` and
`TransformerLensModelWithWeights` protocols. What it adds is media: `encode` makes inputs, and every verb takes them.
For TransformerLens's own tools, `bound(x)` gives a real bridge.

    >>> model = load("av-tiny")                                    # doctest: +SKIP
    >>> x = model.encode(clip, "What do you hear?")                # doctest: +SKIP
    >>> logits, cache = model.run_with_cache(x)                    # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from av_lens.bridge.families import Family, family_of
from av_lens.errors import InputError, ModelError
from av_lens.inputs.answers import words_of
from av_lens.runs.budget import ModelSpec, require_budget, selected
from av_lens.runs.copies import OF_WEIGHTS, copied
from av_lens.runs.decoding import Decoding, generate_with_hooks
from av_lens.runs.forms import said_answer
from av_lens.runs.forwarding import ForwardedAttributes
from av_lens.runs.gates import HookPair, gates_of_filter, gates_of_hooks, only_open, open_gates
from av_lens.runs.interop import TransformerLensSide
from av_lens.runs.tokens import TokenHelpers

Filter = str | Sequence[str] | Callable[[str], bool] | None


class HookedAVLLM(ForwardedAttributes, TokenHelpers, TransformerLensSide):
    """An audio-visual language model with every fusion-layer activation readable, writable and differentiable.

    Attributes:
        bridge: the TransformerBridge that does the work.
        processor: the checkpoint's own processor.
        tokenizer: its tokenizer.
        name: what was loaded.
        grammar: the questions that an organism understands, or None.
        handed_in: whether the caller handed the HuggingFace model in (then its weights are never rewritten).
        provenance: where the weights came from.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        processor: Any,
        *,
        name: str = "external",
        grammar: Mapping[str, Any] | None = None,
        handed_in: bool = True,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.bridge = bridge
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.name = name
        self.grammar = grammar
        self.handed_in = handed_in
        self.provenance: dict[str, Any] = dict(provenance or {})

    def __repr__(self) -> str:
        s = self.spec
        return (
            f"HookedAVLLM({self.name!r}, {s.n_layers} layers, {s.n_heads} heads on {s.n_kv_heads} key-value heads, "
            f"d_model {s.d_model}, {str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    # What it is

    @property
    def cfg(self) -> Any:
        """TransformerLens's configuration."""
        return self.bridge.cfg

    @property
    def hf_model(self) -> Any:
        """The wrapped HuggingFace model; never save it, its parameter names have changed."""
        return self.bridge.original_model

    @property
    def config(self) -> Any:
        """HuggingFace's configuration."""
        return self.hf_model.config

    @property
    def family(self) -> Family:
        """The model family's facts."""
        return family_of(type(self.hf_model).__name__)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.hf_model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.hf_model.parameters()).dtype

    @cached_property
    def spec(self) -> ModelSpec:
        """The sizes of the fusion stack."""
        cfg: Any = self.cfg
        text = self.config.get_text_config()
        return ModelSpec(
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_mlp=text.intermediate_size,
            d_vocab=self.hf_model.lm_head.weight.shape[0],
        )

    @cached_property
    def placeholders(self) -> tuple[int, ...]:
        """Ids that stand for media in a prompt."""
        return (self.config.audio_token_id, self.config.image_token_id, self.config.video_token_id)

    # Inputs

    @cached_property
    def encoder(self) -> Any:
        """What makes inputs of clips and questions, by the checkpoint's own processor and template."""
        from av_lens.inputs.encoder import Encoder

        return Encoder(self.processor, self.config, self.position_ids, grammar=self.grammar)

    def encode(self, clip: Any, question: Any, **options: Any) -> Any:
        """Make the input of a clip and a question.

        Args:
            clip: a `Clip`, a list of them, or None for text alone.
            question: what is asked, or a list.
            **options: as `av_lens.inputs.Encoder.encode`: `sound`, `picture`, `fps`, `system`, `prefix`, `answer`.

        Returns:
            `AVInputs` on the model's device.
        """
        if words_of(options.get("answer") or ()):  # which tokens they are depends on what the model says there
            prompt = self.encoder.encode(clip, question, **{**options, "answer": None})
            options["answer"], _ = said_answer(self, [prompt], options["answer"])
        return self.encoder.encode(clip, question, **options).to(self.device)

    def position_ids(self, tensors: Mapping[str, Any]) -> torch.Tensor:
        """The model's own position ids of an input.

        Args:
            tensors: keyword arguments of the HuggingFace forward.

        Returns:
            int64 `[stream, batch, pos]`: time, row, column.
        """
        return self.family.position_ids(self.hf_model, tensors)

    def tensors_of(self, x: Any) -> dict[str, Any]:
        """The keyword arguments of the HuggingFace forward, on the model's device.

        Args:
            x: `AVInputs`, or ids `[batch, pos]` or text without media.

        Returns:
            A fresh dictionary, `input_ids` and `attention_mask` among it.

        Raises:
            InputError: ids that hold placeholders of media which are not there, or something else altogether.
        """
        if hasattr(x, "tensors"):
            return {name: v.to(self.device) if isinstance(v, torch.Tensor) else v for name, v in x.tensors.items()}
        if isinstance(x, str) or (isinstance(x, list) and x and all(isinstance(part, str) for part in x)):
            x = self.bridge.to_tokens(x)
        if not isinstance(x, torch.Tensor) or x.is_floating_point():
            raise InputError(f"a model runs AVInputs (model.encode makes them), ids or text, not {type(x).__name__}.")
        ids = (x if x.ndim == 2 else x[None]).to(self.device)
        if any(bool((ids == placeholder).any()) for placeholder in self.placeholders):
            raise InputError(
                "these ids hold placeholders of media, but no media: the model would read bare placeholders. "
                "Pass the AVInputs that they come from, or use model.bound(x) for tools that take ids."
            )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    # Runs

    def __call__(self, x: Any, *, return_type: str | None = "logits", **options: Any) -> Any:
        """Run the model.

        Args:
            x: `AVInputs`, ids or text.
            return_type: "logits", "loss", "both" or None, as TransformerLens has it.
            **options: further options of the bridge's forward, such as `stop_at_layer`.

        Returns:
            Logits `[batch, pos, d_vocab]`, equal to HuggingFace's, unless `return_type` says otherwise.
        """
        tensors = self.tensors_of(x)
        return self.bridge(tensors.pop("input_ids"), return_type=return_type, **tensors, **options)

    forward = __call__

    def run_with_cache(
        self, x: Any, names_filter: Filter = None, *, budget_gb: float | int = 8.0, **options: Any
    ) -> tuple[Any, ActivationCache]:
        """Run the model and keep activations.

        Args:
            x: `AVInputs`, ids or text.
            names_filter: a hook name, several, a function of a name, or None for every hook that is not gated.
            budget_gb: refuse, before running, a cache estimated to take more (GB, 1e9 bytes).
            **options: further options of the bridge's `run_with_cache`.

        Returns:
            Logits and a TransformerLens `ActivationCache`.

        Raises:
            BudgetError: the cache would be too big; the message names a filter that fits.
            InterventionError: a name is no hook of the model.
        """
        gates = gates_of_filter(names_filter, self._known)
        tensors = self.tensors_of(x)
        ids = tensors.pop("input_ids")
        with open_gates(self.bridge, gates):
            accept = names_filter
            if names_filter is None or callable(names_filter):
                accept = only_open(self.bridge, names_filter or (lambda name: True))
            names = selected(accept, self._known)
            batch, n_pos = ids.shape
            itemsize = self.dtype.itemsize
            require_budget(names, self.spec, batch=batch, n_pos=n_pos, itemsize=itemsize, budget_gb=budget_gb)
            accept = list(accept) if isinstance(accept, Sequence) and not isinstance(accept, str) else accept
            logits, cache = self.bridge.run_with_cache(ids, names_filter=accept, **tensors, **options)
        if isinstance(cache, ActivationCache):
            cache.model = self  # its helpers ask the model, and ours refuses what would be wrong
        return logits, cache

    def run_with_hooks(
        self, x: Any, fwd_hooks: Sequence[HookPair] = (), bwd_hooks: Sequence[HookPair] = (), **options: Any
    ) -> Any:
        """Run the model with hooks attached for this run.

        Args:
            x: `AVInputs`, ids or text.
            fwd_hooks: `(name or function of a name, function(activation, hook) -> new activation or None)` pairs.
            bwd_hooks: likewise, for gradients.
            **options: further options of the bridge's forward, such as `return_type`.

        Returns:
            Logits `[batch, pos, d_vocab]`, unless `return_type` says otherwise.

        Raises:
            InterventionError: a name is no hook of the model.
        """
        tensors = self.tensors_of(x)
        with self.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
            return self.bridge(tensors.pop("input_ids"), **tensors, **options)

    @contextmanager
    def hooks(
        self, fwd_hooks: Sequence[HookPair] = (), bwd_hooks: Sequence[HookPair] = (), **options: Any
    ) -> Generator[HookedAVLLM, None, None]:
        """Attach hooks for a while; gated ones are switched on and off with them.

        Args:
            fwd_hooks: as in `run_with_hooks`.
            bwd_hooks: as in `run_with_hooks`.
            **options: further options of the bridge's `hooks`.

        Yields:
            This model.

        Raises:
            InterventionError: a name is no hook of the model.
        """
        gates = gates_of_hooks([*fwd_hooks, *bwd_hooks], self._known)
        with open_gates(self.bridge, gates):
            both = [
                [(only_open(self.bridge, name) if callable(name) else name, fn) for name, fn in hooks]
                for hooks in (fwd_hooks, bwd_hooks)
            ]
            with self.bridge.hooks(fwd_hooks=both[0], bwd_hooks=both[1], **options):
                yield self

    @property
    def _known(self) -> tuple[str, ...]:
        if "_names" not in self.__dict__:
            self.__dict__["_names"] = tuple(self.bridge.hook_dict)
        return self.__dict__["_names"]

    def generate(
        self,
        x: Any,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        plan: Any = None,
        fwd_hooks: Sequence[HookPair] = (),
        return_type: str = "tokens",
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Let the model answer, under hooks and a plan if asked; without them greedy tokens are HuggingFace's.

        Args:
            x: `AVInputs`, ids or text.
            max_new_tokens: at most so many.
            do_sample: draw instead of taking the likeliest token.
            plan: a `Plan`; its edits act on the prompt and, where they say so, at every decoding step.
            fwd_hooks: `(name, function)` pairs; while decoding an activation holds one position.
            return_type: "tokens" (prompt included), "text" (the new text) or "result" (`.tokens .text .logits .fired`).
            seed: what sampling draws from; needed with `do_sample`.
            **options: further options of HuggingFace's `generate`.

        Returns:
            As `return_type` says.

        Raises:
            InputError: an unknown return type, or sampling without a seed.
            InterventionError: an unknown hook, or an edit that did not fire as it should have.
        """
        settings = Decoding(max_new_tokens, do_sample, return_type, seed, options)
        return generate_with_hooks(self, x, settings, plan=plan, fwd_hooks=fwd_hooks)

    def trace(self, x: Any, **options: Any) -> Any:
        """Record a base run once, to restart it anywhere.

        Args:
            x: `AVInputs`.
            **options: as `av_lens.runs.traces.record`.

        Returns:
            A `Trace`.
        """
        from av_lens.runs.traces import record

        return record(self, x, **options)

    # HookedTransformer's numerics

    def compatible(self) -> HookedAVLLM:
        """A new model with HookedTransformer's numerics: norms folded, weights centred; log-probs agree to 1e-5.

        Returns:
            A second model; this one stays as it is. It takes as much memory again.
        """
        other = copied(self, "compatible")
        other.handed_in = False
        other.provenance = {**self.provenance, "processing": "HookedTransformer numerics"}
        return other.enable_compatibility_mode()

    def enable_compatibility_mode(self, **options: Any) -> HookedAVLLM:
        """Give *this* model HookedTransformer's numerics, in place; its weights are rewritten.

        Args:
            **options: as TransformerLens has them (`fold_ln`, `center_unembed`, `no_processing`, ...).

        Returns:
            This model.

        Raises:
            ModelError: the caller handed the HuggingFace model in, so its weights are not ours to rewrite.
        """
        if self.handed_in:
            raise ModelError(
                "this model was handed in, and compatibility mode rewrites its weights in place. "
                "Use model.compatible(), which makes a new one."
            )
        self.bridge.enable_compatibility_mode(**{"disable_warnings": True, **options})
        for derived in OF_WEIGHTS:
            self.__dict__.pop(derived, None)
        return self
