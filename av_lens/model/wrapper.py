"""A model in hand: a TransformerBridge with every hook real, that takes audio-visual inputs wherever it takes ids.

It satisfies TransformerLens's protocols `TransformerLensModel` and `TransformerLensModelWithWeights`; for its own tools
`bound(x)` gives a real bridge.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from av_lens.checks import require_choice, require_keywords
from av_lens.core.budget import ModelSpec, bounded, require_budget, selected
from av_lens.core.calls import (
    TEXT,
    Kept,
    TokenHelpers,
    in_turn,
    parted,
    require_inputs,
    require_kept,
    require_run_keywords,
    turn_of,
)
from av_lens.core.decoding import Decoding, Generated, generate_with_hooks
from av_lens.core.execution import HookPair, counted, gates_of_filter, gates_of_hooks, only_open, open_gates
from av_lens.core.modes import TorchModes
from av_lens.errors import InputError, InterventionError
from av_lens.families.adapter import experts_units
from av_lens.families.blocks import BUDGET_GB, device_of
from av_lens.families.decoder import COMPONENTS, hook_name, sizes_of
from av_lens.families.registry import Family, family_of
from av_lens.inputs.answers import words_of
from av_lens.inputs.encoder import Asking, Encoder
from av_lens.inputs.model_inputs import AVInputs
from av_lens.metrics.forms import said_answer
from av_lens.model.binding import Bound, bind
from av_lens.model.forwarding import ForwardedAttributes
from av_lens.replay.traces import Trace, record

Filter = str | Sequence[str] | Callable[[str], bool] | None


class HookedAVLLM(ForwardedAttributes, TokenHelpers, TorchModes):
    """An audio-visual language model with every fusion-layer activation readable, writable and differentiable.

    Attributes:
        bridge: the TransformerBridge that does the work.
        processor: the checkpoint's own processor.
        tokenizer: its tokenizer.
        name: what was loaded.
        family: the model family's facts.
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
        self.bridge: Any = bridge
        self.bridge.processor = processor  # TransformerLens's own multimodal tools look for it there
        self.family: Family = family_of(type(bridge.original_model))
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.tokenizer.padding_side = "left"  # as Qwen's processor pads: position -1 is every prompt's last
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
    def device(self) -> torch.device:
        """Where inputs go: where the text embedding computes, and with it all else but of a model that is split."""
        return device_of(self.embed)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the stream: that of the text embedding, which is never quantised."""
        return next(self.embed.original_component.parameters()).dtype

    @cached_property
    def spec(self) -> ModelSpec:
        """The sizes of the fusion stack."""
        cfg: Any = self.cfg
        own = tuple(sizes_of(block, cfg.n_heads) for block in self.blocks)
        return ModelSpec(
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_mlp=self.config.get_text_config().intermediate_size,
            d_vocab=self.hf_model.lm_head.out_features,
            d_experts=experts_units(self.config),
            experts=frozenset(n for n, one in enumerate(self.blocks) if hasattr(one.mlp.original_component, "experts")),
            lacking=frozenset(
                (name, layer)
                for name, one in COMPONENTS.items()
                for layer in range(cfg.n_layers)
                if one.layered and hook_name(name, layer) not in self.bridge.hook_dict
            ),
            own=own if len(set(own)) > 1 else (),
        )

    @cached_property
    def placeholders(self) -> tuple[int, ...]:
        """Ids that stand for media in a prompt."""
        return tuple(self.family.media.placeholders(self.config).values())

    # Inputs

    @cached_property
    def encoder(self) -> Encoder:
        """What makes inputs of clips and questions, by the checkpoint's own processor and template."""
        media = self.family.media
        return Encoder(self.processor, self.config, self.position_ids, grammar=self.grammar, media=media)

    def encode(self, clip: Any, question: Any = "", **options: Unpack[Asking]) -> AVInputs:
        """Make the input of a clip and a question.

        Args:
            clip: a `Clip`, a list of them, or None for text alone; a model that was brought takes a `Given` too.
            question: what is asked, or a list; of a `Given` nothing more.
            **options: as `av_lens.inputs.Encoder.encode`: `sound`, `picture`, `fps`, `system`, `prefix`, `answer`.

        Returns:
            `AVInputs` on the model's device.

        Raises:
            InputError: an unknown keyword, or what `Encoder.encode` refuses.
        """
        require_keywords("encode", options, self.encoder.encode, own=("clip", "question"))
        answer = options.pop("answer", None)
        if words_of(answer or ()):  # which tokens they are depends on what the model says there
            answer, _ = said_answer(self, [self.encoder.encode(clip, question, **options)], answer or ())
        options["answer"] = answer
        return self.encoder.encode(clip, question, **options).to(self.device)

    def position_ids(self, tensors: Mapping[str, Any]) -> torch.Tensor:
        """The model's own position ids of an input.

        Args:
            tensors: keyword arguments of the HuggingFace forward.

        Returns:
            int64 `[stream, batch, pos]`: time, row, column.
        """
        return self.family.position_ids(self.hf_model, tensors)

    # Runs

    @overload
    def __call__(self, x: Any, *, return_type: Literal["logits", "loss"] = "logits", **options: Any) -> Tensor: ...
    @overload
    def __call__(self, x: Any, *, return_type: Literal["both"], **options: Any) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(self, x: Any, *, return_type: None, **options: Any) -> None: ...
    @in_turn
    def __call__(
        self, x: Any, *, return_type: str | None = "logits", budget_gb: float | int = BUDGET_GB, **options: Any
    ) -> Any:
        """Run the model; attention scores that would pass the budget are computed in blocks of queries."""
        ids, options = self._asked("model(x)", x, {"return_type": return_type, **options})
        with bounded(self, ids, budget_gb, options):
            return self.bridge(ids, **options)

    forward = __call__

    def _asked(self, verb: str, x: Any, options: dict[str, Any], *takers: Any) -> tuple[Tensor, dict[str, Any]]:
        """The ids, and every other keyword argument of the bridge's forward, checked."""
        require_run_keywords(self, verb, options, *takers)
        text, options = parted(options, TEXT)
        tensors = self.tensors_of(x, **text)
        return tensors.pop("input_ids"), {**tensors, **options}

    @overload
    def run_with_cache(
        self, x: Any, names_filter: Filter = None, *, return_cache_object: Literal[False], **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]: ...
    @overload
    def run_with_cache(
        self, x: Any, names_filter: Filter = None, *, return_cache_object: Literal[True] = True, **options: Any
    ) -> tuple[Tensor, ActivationCache]: ...
    @in_turn
    def run_with_cache(
        self, x: Any, names_filter: Filter = None, *, budget_gb: float | int = BUDGET_GB, **options: Any
    ) -> tuple[Any, Any]:
        """Run the model and keep activations.

        Args:
            x: `AVInputs`, ids or text.
            names_filter: a hook name, several, a function of a name, or None for every hook that is not gated.
            budget_gb: refuse, before running, a cache that with a layer's scores would take more (GB, 1e9 bytes).
            **options: as for `model(x)`, and those of the bridge's `run_with_cache`, such as `device`.

        Returns:
            Logits and a TransformerLens `ActivationCache` (a dictionary with `return_cache_object=False`).

        Raises:
            BudgetError: the cache would be too big; the message names a filter that fits.
            InputError: an unknown keyword, or one without effect here.
            InterventionError: a name is no hook of the model, the filter selects none, or the run did not pass there.
        """
        own, theirs = self.run_with_cache, self.bridge.run_with_cache
        ids, options = self._asked("run_with_cache", x, options, own, theirs, self.bridge.get_caching_hooks)
        gates = gates_of_filter(names_filter, self._names)
        with open_gates(self.bridge, gates):
            accept = (lambda name: True) if names_filter is None else names_filter
            accept = only_open(self.bridge, accept) if callable(accept) else accept
            names = selected(accept, self._names)
            size = {"batch": ids.shape[0], "n_pos": ids.shape[1], "itemsize": self.dtype.itemsize}
            require_budget(names, self.spec, **size, budget_gb=budget_gb)
            accept = list(accept) if isinstance(accept, Sequence) and not isinstance(accept, str) else accept
            with bounded(self, ids, budget_gb, options):
                logits, cache = self.bridge.run_with_cache(ids, names_filter=accept, **options)
        if names_filter is not None:
            require_kept(names, cache, every=not callable(names_filter))
        as_cache = isinstance(cache, ActivationCache)
        return logits, Kept(cache.cache_dict, self, cache.has_batch_dim) if as_cache else cache

    def run_with_hooks(
        self,
        x: Any,
        fwd_hooks: Sequence[HookPair] = (),
        bwd_hooks: Sequence[HookPair] = (),
        *,
        budget_gb: float | int = BUDGET_GB,
        **options: Any,
    ) -> Tensor:
        """Run the model with hooks attached for this run; every forward hook must fire.

        Args:
            x: `AVInputs`, ids or text.
            fwd_hooks: `(name or function of a name, function(activation, hook) -> new activation or None)` pairs.
            bwd_hooks: likewise, for gradients; they need `reset_hooks_end=False`, as the backward pass comes later.
            budget_gb: the most that a layer's attention scores, and the logits, may take (GB, 1e9 bytes).
            **options: as for `model(x)`, and those of the bridge's `run_with_hooks`.

        Returns:
            Logits `[batch, pos, d_vocab]`, unless `return_type` says otherwise.

        Raises:
            BudgetError: a hook asks for whole scores that would be too big, or the logits would.
            InputError: an unknown keyword, or one without effect here.
            InterventionError: a name is no hook of the model, a function selects none, or a hook did not fire.
        """
        ids, options = self._asked("run_with_hooks", x, options, self.run_with_hooks, self.bridge.run_with_hooks)
        attaching, options = parted(options, ("reset_hooks_end", "clear_contexts"))
        if bwd_hooks and attaching.get("reset_hooks_end", True):
            raise InterventionError(
                "run_with_hooks takes its hooks off again before a backward pass can reach bwd_hooks. Use "
                "`with model.hooks(bwd_hooks=...):` around the run and loss.backward(), or reset_hooks_end=False."
            )
        fwd_hooks = list(fwd_hooks)
        gates_of_hooks([*fwd_hooks, *bwd_hooks], self._names)  # refused by the caller's own names
        counting, require_fired = counted(fwd_hooks, batch_dim=not options.pop("remove_batch_dim", False))
        with (
            self.hooks(fwd_hooks=counting, bwd_hooks=bwd_hooks, **attaching),  # which holds the model's turn
            bounded(self, ids, budget_gb, options),
        ):
            made = self.bridge(ids, **options)
        require_fired()
        return made

    @contextmanager
    def hooks(
        self, fwd_hooks: Sequence[HookPair] = (), bwd_hooks: Sequence[HookPair] = (), **options: Any
    ) -> Generator[HookedAVLLM, None, None]:
        """Attach hooks for a while; gated ones are switched on and off with them; other threads wait (`core.calls`).

        Args:
            fwd_hooks: as in `run_with_hooks`.
            bwd_hooks: as in `run_with_hooks`.
            **options: further options of the bridge's `hooks`.

        Yields:
            This model.

        Raises:
            InputError: an unknown keyword.
            InterventionError: a name is no hook of the model, or a function selects none.
        """
        require_keywords("hooks", options, self.bridge.hooks)
        gates = gates_of_hooks([*fwd_hooks, *bwd_hooks], self._names)
        if not options.get("reset_hooks_end", True) and (shut := [g for g in gates if not getattr(self.cfg, g)]):
            raise InterventionError(
                f"reset_hooks_end=False leaves these hooks on, but they fire only while {shut[0]} is on: call "
                f"model.set_{shut[0]}(True) first."
            )
        with turn_of(self.bridge), open_gates(self.bridge, gates):
            both = [
                [(only_open(self.bridge, name) if callable(name) else name, fn) for name, fn in hooks]
                for hooks in (fwd_hooks, bwd_hooks)
            ]
            with self.bridge.hooks(fwd_hooks=both[0], bwd_hooks=both[1], **options):
                yield self

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(self.bridge.hook_dict)

    @overload
    def generate(self, x: Any, *, return_type: Literal["tokens"] = "tokens", **options: Any) -> Tensor: ...
    @overload
    def generate(self, x: Any, *, return_type: Literal["text"], **options: Any) -> str | list[str]: ...
    @overload
    def generate(self, x: Any, *, return_type: Literal["result"], **options: Any) -> Generated: ...
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
        budget_gb: float | int = BUDGET_GB,
        **options: Any,
    ) -> Any:
        """Let the model answer, under hooks and a plan if asked; without them greedy tokens are HuggingFace's.

        Args:
            x: `AVInputs`, ids or text; prompts of unequal length are padded on the left.
            max_new_tokens: at most so many.
            do_sample: draw instead of taking the likeliest token.
            plan: a `Plan`; its edits act on the prompt and, where they say so, at every decoding step.
            fwd_hooks: `(name, function)` pairs; while decoding an activation holds one position.
            return_type: "tokens" (prompt included), "text" (the new text) or "result" (`.tokens .text .logits .fired`).
            seed: what sampling draws from; needed with `do_sample`.
            budget_gb: GB (1e9 bytes) beyond which attention is computed in blocks, and the prompt's last logits alone.
            **options: further options of HuggingFace's `generate`; `attention_mask`, `prepend_bos` as in `tensors_of`.

        Returns:
            As `return_type` says.

        Raises:
            BudgetError: a hook asks for whole scores that would be too big.
            InputError: an unknown return type, sampling without a seed, or an option that is unknown or without effect.
            InterventionError: an unknown hook, one that never fired, or an edit that did not fire as it should have.
        """
        reading, options = parted(options, TEXT)
        settings = Decoding(max_new_tokens, do_sample, return_type, seed, options)
        gates_of_hooks(fwd_hooks, self._names)
        return generate_with_hooks(
            self, x, settings, plan=plan, fwd_hooks=fwd_hooks, reading=reading, budget_gb=budget_gb
        )

    def trace(self, x: Any, **options: Any) -> Trace:
        """Record a base run once, to restart it anywhere.

        Args:
            x: `AVInputs`.
            **options: as `av_lens.replay.traces.record`.

        Returns:
            A `Trace`.

        Raises:
            InputError: an unknown keyword, or no `AVInputs`.
        """
        require_keywords("trace", options, record, own=("model", "x"))
        require_inputs("trace", x)
        return record(self, x, **options)

    # TransformerLens's side

    def bound(self, x: Any) -> TransformerBridge:
        """A real TransformerBridge that adds the media of an input, for TransformerLens's own tools.

        Args:
            x: `AVInputs`, or a `Pair` of them.

        Returns:
            A bridge with these modules and hooks. Pass it `bound.ids` (one input), or `bound.clean_ids` and
            `bound.corrupt_ids` (a pair); other ids are refused.
        """
        if hasattr(x, "clean") and hasattr(x, "corrupt"):
            return bind(self.bridge, [Bound.of("clean", self, x.clean), Bound.of("corrupt", self, x.corrupt)])
        return bind(self.bridge, [Bound.of("ids", self, x)])

    @in_turn
    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook_fn: Callable[..., Any],
        dir: str = "fwd",
        is_permanent: bool = False,
    ) -> None:
        """Attach a hook until `reset_hooks`; traces that are recorded meanwhile run under it.

        Args:
            name: a hook's name, or a function of a name.
            hook_fn: function(activation, hook) -> new activation or None.
            dir: "fwd", or "bwd" for gradients.
            is_permanent: whether it survives `reset_hooks`.

        Raises:
            InputError: another direction.
            InterventionError: no hook of the model, a function that accepts none, or a gated hook that is switched off.
        """
        require_choice("dir", dir, ("fwd", "bwd"))
        shut = [gate for gate in gates_of_hooks([(name, hook_fn)], self._names) if not getattr(self.cfg, gate)]
        if shut:
            raise InterventionError(
                f"this hook fires only while {shut[0]} is on: call model.set_{shut[0]}(True) first, or use "
                "model.hooks or run_with_hooks, which switch it on for their run."
            )
        accept = only_open(self.bridge, name) if callable(name) else name
        self.bridge.add_hook(accept, hook_fn, dir=dir, is_permanent=is_permanent)

    def tokens_to_residual_directions(self, tokens: Any) -> torch.Tensor:
        """Unembedding directions of tokens, for products with the normed stream.

        Args:
            tokens: a string, an id, or a tensor of ids.

        Returns:
            `[..., d_model]`.

        Raises:
            InputError: the final norm's weight is not folded into the unembedding, so the products would be wrong.
        """
        if not self.compatibility_mode:
            raise InputError(
                "unembedding directions need the final norm's weight folded into them, or every attribution made with "
                "them is wrong: use model.compatible(), or avl.direct_attribution, which folds it itself."
            )
        return self.bridge.tokens_to_residual_directions(tokens)
