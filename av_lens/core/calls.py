"""What goes into a call of a model and comes out: text or ids, keywords, turns; activations, logits and the cache.

*Turns.* Whoever attaches hooks or runs the model holds its turn; other threads wait, the same may enter again.
*Keywords.* HuggingFace drops keywords that it does not know, in silence: what is accepted is read off the signatures of
the functions that take it. Text, pads and masks: `docs/hooks.md`.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name

from av_lens.checks import require_choice, require_keywords
from av_lens.errors import InputError, InterventionError, ModelError, NotKeptError, unknown
from av_lens.families.blocks import device_of
from av_lens.families.decoder import COMPONENTS, gates_named, readable
from av_lens.interventions.edits import resolve_positions
from av_lens.spans import Span, SpanMap


def heads_first(activation: Tensor, component: str) -> Tensor:
    """Bring per-head activations to `[batch, head, pos, d_head]`."""
    turned = activation if COMPONENTS[component].head_axis == 1 else activation.transpose(1, 2)
    return turned.contiguous()


def watching(see: Callable[[Tensor], Any]) -> Callable[..., None]:
    """A hook that looks on: `see` is shown the activation, and nothing is changed."""
    return functools.partial(_shown, see)


def _shown(see: Callable[[Tensor], Any], activation: Tensor, hook: Any = None) -> None:
    see(activation)


def rows_of(rows: slice | Tensor) -> Callable[..., Tensor]:
    """A hook that lets some positions pass alone."""
    return lambda activation, hook=None: activation[:, rows]


def asked_positions(spans: SpanMap, logits_at: str | Span) -> Tensor:
    """Resolve the positions at which logits are asked for."""
    asked = None if logits_at == "all" else logits_at
    return torch.tensor(resolve_positions(asked, spans, what="logits_at").index)


def unembedded(
    model: Any, stream: Tensor, tokens: Tensor | None = None, *, under: Callable[[Any], Any] = lambda norm: norm
) -> Float[Tensor, "... d_vocab"]:
    """Read logits from the stream that left the last layer, where the model's inputs go; `under` changes the norm."""
    norm, head = model.bridge.ln_final.original_component, model.bridge.unembed.original_component
    normed = under(norm)(stream.to(device_of(norm))).to(device_of(head))
    tokens = None if tokens is None else tokens.to(normed.device)
    if normed.dtype != torch.float32:  # as the hooked run does it: all tokens, and never of one row alone
        rows = normed.flatten(0, -2)
        logits = head(rows if len(rows) > 1 else rows.expand(2, -1))[: len(rows)].unflatten(0, normed.shape[:-1])
        logits = logits if tokens is None else logits[..., tokens]
    elif tokens is None or not readable(head.weight):
        logits = head(normed) if tokens is None else head(normed)[..., tokens]
    else:
        logits = functional.linear(normed, head.weight[tokens], None if head.bias is None else head.bias[tokens])
    cap = model.bridge.cfg.output_logits_soft_cap
    return (torch.tanh(logits / cap) * cap if cap > 0 else logits).to(model.device)


def is_split(hf_model: Any) -> bool:
    """Whether a model lies in several places, or partly where nothing computes."""
    hooked = any("_hf_hook" in module.__dict__ for module in hf_model.modules())
    return hooked or len({one.device for one in hf_model.parameters()}) > 1


def is_packed(hf_model: Any) -> bool:
    """Whether any weight is quantised."""
    return any(one.dtype.itemsize < 2 for one in hf_model.parameters())


def require_known_layers(model: Any, what: str) -> None:
    """Refuse what reads the weights of layers whose layout is not known here; the ModelError says what they do."""
    reason = model.family.replay_traits(model.config).layers
    if reason:
        raise ModelError(
            f"{what} reads the weights of layers, and would be wrong here: {reason}. What runs the model under hooks "
            "(patching, knockouts, gradients, steering, probes, lenses) is right."
        )


class Kept(ActivationCache):
    """An `ActivationCache` of a run; `cache["z", 5]` and `cache["blocks.5.attn.hook_z"]` are one tensor."""

    def __getitem__(self, key: Any) -> Tensor:
        try:
            return super().__getitem__(key)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise NotKeptError(self._missing(key)) from error

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's, where the stream is a sum of what layers write."""
        require_known_layers(self.model, "decompose_resid")
        return super().decompose_resid(*args, **kwargs)

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's, where heads write to the stream as they are."""
        require_known_layers(self.model, "stack_head_results")
        return super().stack_head_results(*args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerLens's, likewise."""
        require_known_layers(self.model, "get_full_resid_decomposition")
        return super().get_full_resid_decomposition(*args, **kwargs)

    def _missing(self, key: Any) -> str:
        """Why an activation is not there, and what would bring it."""
        model: Any = self.model
        known = tuple(model.hook_dict)
        parts = list(key) if isinstance(key, tuple) else [key]
        if len(parts) > 1 and isinstance(parts[1], int) and parts[1] < 0:
            parts[1] += int(model.cfg.n_layers)
        try:
            name = str(get_act_name(*parts))
        except (AssertionError, TypeError, AttributeError):
            name = str(key)
        if name not in known:
            return unknown("activation", name, self.cache_dict)
        gated = ": it fires only in a run that names it" if gates_named([name], known) else ""
        return f"{name} was not kept{gated}. Run again with model.run_with_cache(x, names_filter=[{name!r}, ...])."

    def __repr__(self) -> str:
        names = list(self.cache_dict)
        shown = ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "")
        return f"ActivationCache with keys [{shown}]"


def require_kept(names: Sequence[str], cache: Any, *, every: bool) -> None:
    """Refuse a cache in which something is missing that was asked for."""
    kept = set(cache.keys())
    missing = [name for name in names if name not in kept]
    if missing and (every or len(missing) == len(names)):
        raise InterventionError(
            f"the run never passed through {missing[0]}, so nothing was kept of it (a layer behind stop_at_layer=, or "
            "an encoder of media that the input does not have)."
        )


WAIT_S = 600.0
P = ParamSpec("P")
Given = TypeVar("Given")


class Turn:
    """A model's turn, held by one thread; a copied model has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        """Wait for the turn."""
        if not self._lock.acquire(timeout=WAIT_S):
            raise ModelError(
                f"another thread has been running this model, or holding hooks on it, for {WAIT_S:g} s. Runs of one "
                "model take turns: leave `with model.hooks(...)` before you wait for threads that use the model, or "
                "load a model for each thread."
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give the turn back."""
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        """A copy is a turn of its own."""
        return Turn, ()


def turn_of(bridge: Any) -> Turn:
    """The turn of a bridge and of all that is bound to it."""
    return bridge.__dict__.setdefault("av_lens_turn", Turn())


def waiting(turn: Turn, function: Callable[P, Given]) -> Callable[P, Given]:
    """Let a function hold a turn while it runs."""

    @functools.wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> Given:
        with turn:
            return function(*args, **kwargs)

    return held


def in_turn(method: Callable[Concatenate[Any, P], Given]) -> Callable[Concatenate[Any, P], Given]:
    """Let a model's method hold its turn while it runs."""

    @functools.wraps(method)
    def waiting(self: Any, *args: P.args, **kwargs: P.kwargs) -> Given:
        with turn_of(self.bridge):
            return method(self, *args, **kwargs)

    return waiting


class Forwarded:
    """An attribute that lives on the bridge; a method that changes what runs read waits for other threads' runs."""

    def __init__(self, doc: str, *, in_turn: bool = False) -> None:
        self.__doc__ = doc
        self._in_turn = in_turn

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        found = getattr(instance.bridge, self._name)
        return waiting(turn_of(instance.bridge), found) if self._in_turn else found


RETURN_TYPES = ("logits", "loss", "both", None)
TEXT = ("attention_mask", "prepend_bos", "padding_side")  # keywords that say how text or ids are read

_DECODING = "keys and values are kept from step to step by model.generate and trace.generate"
_MEDIA = "media go in by model.encode(clip, question)"
_KEPT = "run_with_cache keeps activations"
REFUSED = {
    "start_at_layer": "a stream that enters in the middle needs its mask and positions; model.bound(x) knows them",
    "past_key_values": _DECODING,
    "past_kv_cache": _DECODING,
    "use_past_kv_cache": _DECODING,
    "use_cache": _DECODING,
    "inputs_embeds": "write to the stream with a hook at hook_embed",
    "output_attentions": _KEPT,
    "output_hidden_states": _KEPT,
    "return_dict": "return_type= says what comes back",
    "input_values": _MEDIA,
    "pixel_values": _MEDIA,
}
"""Keywords of TransformerLens's or HuggingFace's forward that are not taken, with the reason and the mend."""


def require_run_keywords(model: Any, verb: str, options: dict[str, Any], *takers: Callable[..., Any]) -> None:
    """Refuse keywords that a run would not heed."""
    if not options:
        return
    forward, text, bridge = model.hf_model.forward, type(model.hf_model.get_decoder()), model.bridge.forward
    of_forward, of_bridge = (set(inspect.signature(one).parameters) for one in (forward, bridge))
    own_forwards = [
        vars(one)["forward"] for one in text.__mro__ if "forward" in vars(one)
    ]  # what is mixed in names none
    of_text = {name for one in own_forwards for name in inspect.signature(one).parameters}
    media = {name for name in of_forward if name.startswith(("audio_", "image_"))}  # some decoders take them themselves
    refused = dict.fromkeys((of_forward - of_text - of_bridge) | media, _MEDIA) | REFUSED
    own = ("x", "input", "input_ids", "cache")
    require_keywords(verb, options, bridge, forward, *takers, own=own, refused=refused)
    require_choice("return_type", options.get("return_type", "logits"), RETURN_TYPES)
    stop, n = options.get("stop_at_layer"), int(model.spec.n_layers)
    if stop is None:
        return
    if not -n <= stop < n:
        raise InputError(
            f"stop_at_layer={stop}: the layers are 0 to {n - 1}, and the run ends with the stream that enters one. The "
            f"stream that leaves the last is hook_resid_post of layer {n - 1}."
        )
    if options.get("return_type", "logits") != "logits":
        raise InputError(f"stop_at_layer= gives the stream, so return_type={options['return_type']!r} is not there.")


def parted(options: dict[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part keywords in two."""
    chosen = {name: options[name] for name in names if name in options}
    return chosen, {name: value for name, value in options.items() if name not in chosen}


class TokenHelpers:
    """Tokenizer helpers of a model; they take `AVInputs` too."""

    bridge: Any
    tokenizer: Any
    device: Any
    placeholders: Any

    def to_tokens(self, text: Any, **options: Any) -> torch.Tensor:
        """Token ids of text, or of an input; a list is padded on the tokenizer's side.

        Args:
            text: a string, several, or `AVInputs`.
            **options: as TransformerLens has them (`prepend_bos`, `padding_side`, ...), for text.

        Returns:
            int64 `[batch, pos]`.

        Raises:
            InputError: an option that is unknown, or has nothing to act on.
        """
        self._require_heeded("to_tokens", text, options)
        return text.tensors["input_ids"] if hasattr(text, "tensors") else self.bridge.to_tokens(text, **options)

    def to_str_tokens(self, text: Any, **options: Any) -> Any:
        """The tokens as strings.

        Args:
            text: a string, ids, or `AVInputs`.
            **options: as TransformerLens has them, for text.

        Returns:
            A list of strings.

        Raises:
            InputError: an option that is unknown, or has nothing to act on.
        """
        self._require_heeded("to_str_tokens", text, options)
        return list(text.tokens) if hasattr(text, "tensors") else self.bridge.to_str_tokens(text, **options)

    def _require_heeded(self, verb: str, text: Any, options: Mapping[str, Any]) -> None:
        require_keywords(verb, options, getattr(self.bridge, verb), own=("input",))
        if hasattr(text, "tensors"):
            _refuse_text_options(options, "AVInputs are tokens already")
        if options.get("padding_side") is not None:
            require_choice("padding_side", options["padding_side"], ("left", "right"))
        if options.get("prepend_bos") and self.tokenizer.bos_token is None:  # left out by TransformerLens in silence
            raise InputError("prepend_bos=True: this tokenizer has no token for a text's beginning; leave it out.")

    def to_single_token(self, text: str) -> int:
        """The id of a string that is one token: as it is written, else with a leading space.

        Args:
            text: the string.

        Returns:
            The id.

        Raises:
            InputError: it is several tokens either way; the message shows them.
        """
        for written in (text, f" {text}"):
            ids = self.tokenizer(written, add_special_tokens=False)["input_ids"]
            if len(ids) == 1:
                return int(ids[0])
        shown = " ".join(repr(token) for token in self.bridge.to_str_tokens(text, prepend_bos=False))
        raise InputError(
            f"{text!r} is no single token: {shown}. Where one token is needed choose another word, or use a metric "
            "(avl.metrics.log_prob takes answers of several tokens)."
        )

    def tensors_of(
        self,
        x: Any,
        *,
        attention_mask: Tensor | None = None,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments of the HuggingFace forward, on the model's device.

        Args:
            x: `AVInputs`, or ids `[batch, pos]` or text without media; a list of prompts is padded.
            attention_mask: which ids are read, `[batch, pos]` of 0 and 1; with ids only. None: a run of pad tokens at
                either end of a row is not read.
            prepend_bos: as TransformerLens has it; with text only.
            padding_side: "left" or "right"; with text only. None for `model.tokenizer.padding_side`.

        Returns:
            A fresh dictionary, `input_ids` and `attention_mask` among it.

        Raises:
            InputError: ids that hold placeholders of media which are not there, an empty prompt, a mask that does not
                fit, an option that has nothing to act on, or something else altogether.
        """
        text = {"prepend_bos": prepend_bos, "padding_side": padding_side}
        if hasattr(x, "tensors"):
            _refuse_text_options({**text, "attention_mask": attention_mask}, "AVInputs hold their tokens and mask")
            return {name: v.to(self.device) if isinstance(v, torch.Tensor) else v for name, v in x.tensors.items()}
        if isinstance(x, str) or (isinstance(x, list | tuple) and x and all(isinstance(part, str) for part in x)):
            _refuse_text_options({"attention_mask": attention_mask}, "text gets the mask of its own padding")
            return self._read(self._padded([x] if isinstance(x, str) else list(x), text), None)
        _refuse_text_options(text, "ids are tokens already")
        if not isinstance(x, torch.Tensor) or x.is_floating_point() or x.dtype == torch.bool or x.ndim not in (1, 2):
            shown = f"a tensor {tuple(x.shape)} of {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise InputError(f"a model runs AVInputs (model.encode makes them), ids [batch, pos] or text, not {shown}.")
        return self._read((x if x.ndim == 2 else x[None]).to(self.device), attention_mask)

    def _padded(self, prompts: list[str], options: Mapping[str, Any]) -> Int64[Tensor, "batch pos"]:
        """Ids of prompts; each has at least one, and no more than the model has positions for."""
        ids = self.to_tokens(prompts, truncate=False, **options)
        for number, prompt in enumerate(prompts):
            if not prompt:
                where = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
                raise InputError(f"{where} is empty, so there is no position to run: leave it out.")
        most = self.bridge.cfg.n_ctx
        if ids.shape[1] > most:
            raise InputError(f"this text has {ids.shape[1]} tokens, and the model {most} positions: shorten it.")
        return ids.to(self.device)

    def _read(self, ids: Int64[Tensor, "batch pos"], mask: Any) -> dict[str, Any]:
        """Ids with the mask of those that are read."""
        if any(bool((ids == placeholder).any()) for placeholder in self.placeholders):
            raise InputError(
                "these ids hold placeholders of media, but no media: the model would read bare placeholders. "
                "Pass the AVInputs that they come from, or use model.bound(x) for tools that take ids."
            )
        if mask is None:
            mask = unpadded(ids, self.tokenizer.pad_token_id)
        elif not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or bool(((mask != 0) & (mask != 1)).any()):
            shown = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise InputError(
                f"attention_mask= takes 0 and 1 for each of the ids {tuple(ids.shape)}, and got {shown}. To cut single "
                "edges use avl.cut or a hook at hook_attn_scores."
            )
        mask = mask.to(self.device, torch.long)
        if not bool(mask.any(dim=-1).all()):
            row = int((~mask.any(dim=-1)).nonzero()[0])
            raise InputError(f"row {row} of the ids is padding alone, so there is no position to run: leave it out.")
        return {"input_ids": ids, "attention_mask": mask}


def unpadded(ids: Int64[Tensor, "batch pos"], pad: int | None) -> Int64[Tensor, "batch pos"]:
    """Mark what is not a run of pad tokens at an end of its row."""
    if pad is None:
        return torch.ones_like(ids)
    real = (ids != pad).long()
    return ((real.cumsum(-1) > 0) & (real.flip(-1).cumsum(-1).flip(-1) > 0)).long()


def left_padded(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Bring every row's pads to its left, where generation needs them."""
    mask: Tensor = tensors["attention_mask"]
    if bool(mask[:, -1].all()):
        return dict(tensors)
    order = mask.argsort(dim=-1, stable=True)  # pads first, what is read after them in order
    return {**tensors, **{name: tensors[name].gather(1, order) for name in ("input_ids", "attention_mask")}}


def _refuse_text_options(options: Mapping[str, Any], because: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name}= has nothing to act on here: {because}.")


def require_inputs(verb: str, x: Any) -> None:
    """Refuse what does not say what its positions are."""
    if not (hasattr(x, "tensors") and hasattr(x, "spans")):
        raise InputError(
            f"{verb} takes AVInputs, which know what each position is, not {type(x).__name__}. Make them with "
            "model.encode(clip, question); for text alone model.encode(None, question)."
        )
