"""Which keywords a run takes, and where each goes: to the text, to the hooks, or to the bridge's forward.

HuggingFace's forward drops keywords that it does not know, and TransformerLens hands all it does not know to it: a
misspelt one would ask for nothing, in silence. What is accepted is read off the signatures of the functions that take
it; some of theirs are refused in words, because they would be wrong or without effect here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from av_lens.checks import require_choice, require_keywords
from av_lens.errors import InputError

RETURN_TYPES = ("logits", "loss", "both", None)
TEXT = ("attention_mask", "prepend_bos", "padding_side")
"""Keywords that say how text or ids are read."""

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
    forward, text = model.hf_model.forward, model.hf_model.get_decoder().forward
    media = _names(forward) - _names(text) - _names(model.bridge.forward)
    refused = {name: _MEDIA for name in media} | REFUSED
    bridge: Callable[..., Any] = model.bridge.forward
    own = ("x", "input", "input_ids", "cache")
    require_keywords(verb, options, bridge, forward, *takers, own=own, refused=refused)
    require_choice("return_type", options.get("return_type", "logits"), RETURN_TYPES)
    _require_stop(model, options)


def _require_stop(model: Any, options: dict[str, Any]) -> None:
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


def _names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def parted(options: dict[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part keywords in two."""
    chosen = {name: options[name] for name in names if name in options}
    return chosen, {name: value for name, value in options.items() if name not in chosen}
