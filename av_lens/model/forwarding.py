"""The bridge's attributes that the wrapper hands on: a written list, each tested.

TransformerLens's protocols and tools read weights and components off the model. What is not listed here is not part of
the wrapper; `model.bridge` has it.
"""

from __future__ import annotations

from typing import Any

from av_lens.core.calls import Forwarded


class ForwardedAttributes:
    """Attributes that live on `.bridge`."""

    bridge: Any

    blocks: Any = Forwarded("The fusion layers, as bridge components.")
    embed: Any = Forwarded("The text embedding.")
    unembed: Any = Forwarded("The unembedding.")
    ln_final: Any = Forwarded("The norm before the unembedding.")
    hook_dict: Any = Forwarded("Every hook point by every one of its names.")
    mod_dict: Any = Forwarded("Every module and hook point by name.")
    adapter: Any = Forwarded("TransformerLens's architecture adapter.")
    W_E: Any = Forwarded("Text embedding `[d_vocab, d_model]`.")
    W_U: Any = Forwarded("Unembedding `[d_model, d_vocab]`.")
    b_U: Any = Forwarded("Bias of the unembedding `[d_vocab]`.")
    W_Q: Any = Forwarded("Query weights `[layer, head, d_model, d_head]`.")
    W_K: Any = Forwarded("Key weights, key-value heads repeated for the query heads that share them.")
    W_V: Any = Forwarded("Value weights, repeated likewise.")
    W_O: Any = Forwarded("Output weights `[layer, head, d_head, d_model]`.")
    b_Q: Any = Forwarded("Query biases.")
    b_K: Any = Forwarded("Key biases.")
    b_V: Any = Forwarded("Value biases.")
    W_gate: Any = Forwarded("The MLPs' gate weights.")
    W_in: Any = Forwarded("The MLPs' input weights.")
    W_out: Any = Forwarded("The MLPs' output weights.")
    QK: Any = Forwarded("Each head's query-key circuit, factored.")
    OV: Any = Forwarded("Each head's output-value circuit, factored.")
    accumulated_bias: Any = Forwarded("The sum of the biases written to the stream up to a layer.")
    layer_types: Any = Forwarded("What kind each layer is.")
    original_model: Any = Forwarded("The wrapped HuggingFace model, as TransformerLens names it.")
    compatibility_mode: Any = Forwarded("Whether the weights were processed to HookedTransformer's numerics.")
    all_head_labels: Any = Forwarded("L0H0, L0H1, ...")
    to_string: Any = Forwarded("Text of token ids.")
    to_single_str_token: Any = Forwarded("Text of one token id.")
    get_token_position: Any = Forwarded("Where a token stands in ids.")
    parameters: Any = Forwarded("The weights.")
    named_parameters: Any = Forwarded("The weights by name.")
    state_dict: Any = Forwarded("The weights as a dictionary.")
    named_modules: Any = Forwarded("The bridge's modules by name.")
    modules: Any = Forwarded("The bridge's modules.")
    named_children: Any = Forwarded("The bridge's outermost modules by name.")
    children: Any = Forwarded("The bridge's outermost modules.")
    hook_points: Any = Forwarded("Every hook point.")
    zero_grad: Any = Forwarded("Forget the gradients of the weights.")
    reset_hooks: Any = Forwarded("Detach hooks.", in_turn=True)
    set_use_attn_result: Any = Forwarded("Leave `hook_result` switched on.", in_turn=True)
    set_use_split_qkv_input: Any = Forwarded("Leave the forked inputs of q, k and v switched on.", in_turn=True)
    set_use_attn_in: Any = Forwarded("Leave the forked attention input switched on.", in_turn=True)
    set_use_hook_mlp_in: Any = Forwarded("Leave `hook_mlp_in` switched on.", in_turn=True)
    training: Any = Forwarded("Whether the model is in training mode.")


FORWARDED: tuple[str, ...] = tuple(
    name for name, value in vars(ForwardedAttributes).items() if isinstance(value, Forwarded)
)
"""Their names."""
