"""The bridge's attributes that the wrapper hands on: a written list, each tested.

TransformerLens's protocols and tools read weights and components off the model. What is not listed here is not part of
the wrapper; `model.bridge` has it.
"""

from __future__ import annotations

from typing import Any


class Forwarded:
    """An attribute that lives on the bridge."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(instance.bridge, self._name)


class ForwardedAttributes:
    """Attributes that live on `.bridge`."""

    bridge: Any

    blocks = Forwarded("The fusion layers, as bridge components.")
    embed = Forwarded("The text embedding.")
    unembed = Forwarded("The unembedding.")
    ln_final = Forwarded("The norm before the unembedding.")
    hook_dict = Forwarded("Every hook point by every one of its names.")
    mod_dict = Forwarded("Every module and hook point by name.")
    adapter = Forwarded("TransformerLens's architecture adapter.")
    W_E = Forwarded("Text embedding `[d_vocab, d_model]`.")
    W_U = Forwarded("Unembedding `[d_model, d_vocab]`.")
    b_U = Forwarded("Bias of the unembedding `[d_vocab]`.")
    W_Q = Forwarded("Query weights `[layer, head, d_model, d_head]`.")
    W_K = Forwarded("Key weights, key-value heads repeated for the query heads that share them.")
    W_V = Forwarded("Value weights, repeated likewise.")
    W_O = Forwarded("Output weights `[layer, head, d_head, d_model]`.")
    b_Q = Forwarded("Query biases.")
    b_K = Forwarded("Key biases.")
    b_V = Forwarded("Value biases.")
    b_O = Forwarded("Output biases `[layer, d_model]`.")
    W_gate = Forwarded("The MLPs' gate weights.")
    W_in = Forwarded("The MLPs' input weights.")
    W_out = Forwarded("The MLPs' output weights.")
    QK = Forwarded("Each head's query-key circuit, factored.")
    OV = Forwarded("Each head's output-value circuit, factored.")
    accumulated_bias = Forwarded("The sum of the biases written to the stream up to a layer.")
    tokens_to_residual_directions = Forwarded("Unembedding directions of tokens.")
    all_head_labels = Forwarded("L0H0, L0H1, ...")
    to_string = Forwarded("Text of token ids.")
    to_single_str_token = Forwarded("Text of one token id.")
    get_token_position = Forwarded("Where a token stands in ids.")
    parameters = Forwarded("The weights.")
    named_parameters = Forwarded("The weights by name.")
    state_dict = Forwarded("The weights as a dictionary.")
    add_hook = Forwarded("Attach a hook until `reset_hooks`.")
    reset_hooks = Forwarded("Detach hooks.")
    set_use_attn_result = Forwarded("Leave `hook_result` switched on.")
    set_use_split_qkv_input = Forwarded("Leave the forked inputs of q, k and v switched on.")
    set_use_attn_in = Forwarded("Leave the forked attention input switched on.")
    set_use_hook_mlp_in = Forwarded("Leave `hook_mlp_in` switched on.")
    training = Forwarded("Whether the model is in training mode.")


FORWARDED: tuple[str, ...] = tuple(
    name for name, value in vars(ForwardedAttributes).items() if isinstance(value, Forwarded)
)
"""Their names."""
