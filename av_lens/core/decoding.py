"""Generation with interventions, by HuggingFace's own `generate` run inside the bridge's hooks.

TransformerLens's own routes lose the media after the first token or crash on three-stream positions.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64

from av_lens.brief import Brief
from av_lens.checks import require_at_least, require_choice, require_keywords
from av_lens.core.budget import GIGABYTE, bounded
from av_lens.core.calls import left_padded, require_inputs
from av_lens.core.execution import HookPair, counted
from av_lens.errors import InputError
from av_lens.families.blocks import BUDGET_GB

RETURN_TYPES = ("tokens", "text", "result")
_RESULT = 'return_type="result" gives tokens, text, logits and the firing record'
REFUSED = {
    "max_length": "max_new_tokens= says how many",
    "return_dict_in_generate": _RESULT,
    "output_logits": _RESULT,
    "output_scores": _RESULT,
    "output_attentions": "fwd_hooks=[(name, function)] see patterns at every step",
    "output_hidden_states": "fwd_hooks=[(name, function)] see the stream at every step",
    "return_cache": "run model.run_with_cache(x.continued(new_tokens))",
    "names_filter": "run model.run_with_cache(x.continued(new_tokens), names_filter)",
    "custom_generate": "no code from a hub is run",
    "stop_at_eos": "eos_token_id=None goes on past the end",
    "freq_penalty": "HuggingFace has repetition_penalty=",
    "use_past_kv_cache": "HuggingFace calls it use_cache=",
    "verbose": "nothing is printed",
}
"""Keywords of HuggingFace's or TransformerLens's generation that are not taken, with the reason or the mend."""


@dataclass(frozen=True, eq=False, repr=False)
class Generated(Brief):
    """What came out.

    Attributes:
        tokens: prompt and new tokens, as HuggingFace returns them.
        text: the new text of each example.
        logits: the raw logits behind each new token.
        fired: how often each edit of the plan fired; empty without a plan.
    """

    tokens: Int64[torch.Tensor, "batch pos"]
    text: tuple[str, ...]
    logits: Float[torch.Tensor, "batch new_pos d_vocab"]
    fired: Mapping[Any, int]


@dataclass(frozen=True)
class Decoding:
    """How to decode."""

    max_new_tokens: int  # at most so many
    do_sample: bool  # draw instead of taking the likeliest
    return_type: str  # "tokens", "text" or "result"
    seed: int | None  # what sampling draws from; needed with `do_sample`
    options: Mapping[str, Any]  # further options of HuggingFace's `generate`

    def __post_init__(self) -> None:
        require_choice("return_type", self.return_type, RETURN_TYPES)
        require_at_least("max_new_tokens", self.max_new_tokens, 1)
        if self.do_sample and self.seed is None:
            raise InputError("sampling draws from the seed you give, never from the global generator: pass seed=0.")
        from transformers import GenerationConfig, GenerationMixin

        known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
        theirs: Any = vars(GenerationMixin)["generate"]
        own = ("self", "inputs", "model", "x", "how", "options", "reading", "transformers_version")
        takers = (theirs, generate_with_hooks, Decoding)
        require_keywords("generate", self.options, *takers, own=own, more=known, refused=REFUSED)
        asked = {name: value for name, value in self.options.items() if name in known}
        try:  # what HuggingFace would leave out with a warning
            config = GenerationConfig(max_new_tokens=self.max_new_tokens, do_sample=self.do_sample, **asked)
            config.validate(strict=True)
        except ValueError as error:
            raise InputError(f"these options of generate do not go together: {error}") from error


def generate_with_hooks(
    model: Any,
    x: Any,
    how: Decoding,
    *,
    plan: Any,
    fwd_hooks: Sequence[HookPair],
    reading: Mapping[str, Any] | None = None,
    budget_gb: float | int = BUDGET_GB,
) -> Any:
    """Generate from an audio-visual prompt under hooks and a plan."""
    tensors = left_padded(model.tensors_of(x, **(reading or {})))
    ids, compiled = tensors["input_ids"], None
    if plan is not None:
        require_inputs("generate(plan=)", x)
        if any((how.options.get(name) or 1) > 1 for name in ("num_beams", "num_return_sequences")):
            raise InputError("a plan edits one sequence of each example: leave out num_beams and num_return_sequences.")
        compiled = plan.compile(model.spec, x.spans, batch=ids.shape[0])
    counting, require_fired = counted(fwd_hooks)
    hooks = [*(compiled.fwd_hooks if compiled else ()), *counting]
    if ids.numel() * model.spec.d_vocab * model.dtype.itemsize > budget_gb * GIGABYTE:
        hooks.append(("unembed.hook_in", partial(_last_of_prompt, n_prompt=ids.shape[1])))
    devices = [model.device] if model.device.type == "cuda" else []
    drawing = torch.random.fork_rng(devices) if how.do_sample else nullcontext()
    with torch.no_grad(), model.hooks(fwd_hooks=hooks), bounded(model, ids, budget_gb), drawing:
        if how.seed is not None and how.do_sample:
            torch.manual_seed(how.seed)
        out = model.hf_model.generate(
            **tensors,
            max_new_tokens=how.max_new_tokens,
            do_sample=how.do_sample,
            return_dict_in_generate=True,
            output_logits=how.return_type == "result",
            **settings_of(model, how),
        )
    require_fired()
    tokens, prompt = out.sequences, ids.shape[1]
    if compiled is not None:
        compiled.verify(decode_steps=tokens.shape[1] - prompt - 1)
    return as_asked(model, how, tokens, prompt, out.logits, {} if compiled is None else compiled.fired)


def _last_of_prompt(stream: torch.Tensor, hook: Any = None, *, n_prompt: int) -> torch.Tensor:
    """Drop a long prompt's positions before the unembedding, but for the one that is decoded from."""
    return stream[:, -1:] if stream.shape[1] == n_prompt else stream


def settings_of(model: Any, how: Decoding) -> dict[str, Any]:
    """Collect options that HuggingFace would warn about or leave out: an end, a pad token, no sampling if greedy."""
    settings = model.hf_model.generation_config
    quiet: dict[str, Any] = {}
    if settings.eos_token_id is None:  # a thinker taken out of a full checkpoint names none, and would never end
        quiet["eos_token_id"] = model.tokenizer.eos_token_id
    if settings.pad_token_id is None:
        quiet["pad_token_id"] = model.tokenizer.pad_token_id
    if not how.do_sample:
        quiet |= {name: None for name in ("temperature", "top_p", "top_k") if getattr(settings, name, None) is not None}
    return {**quiet, **how.options}


def as_asked(
    model: Any,
    how: Decoding,
    tokens: Int64[torch.Tensor, "batch pos"],
    prompt: int,
    logits: Sequence[Float[torch.Tensor, "batch d_vocab"]] | None,
    fired: Mapping[Any, int],
) -> Any:
    """Bring what came out to the form that was asked for."""
    if how.return_type == "tokens":
        return tokens
    text = tuple(model.tokenizer.batch_decode(tokens[:, prompt:], skip_special_tokens=True))
    if how.return_type == "text":
        return text[0] if len(text) == 1 else list(text)
    return Generated(tokens, text, torch.stack(list(logits or ()), dim=1), fired)
