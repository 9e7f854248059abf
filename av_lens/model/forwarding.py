"""The bridge's attributes that the wrapper hands on: a written list, each tested; `model.bridge` has the others."""

from typing import Any

import torch

from av_lens.core.calls import Forwarded, is_packed, is_split
from av_lens.errors import ModelError
from av_lens.families.weights import LOAD_PLAIN


class Weights(Forwarded):
    """Weights, as TransformerLens puts those of all layers together: they must lie in one place, as plain numbers."""

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        wrong = None
        try:
            found = super().__get__(instance, owner)
            if not isinstance(found, torch.Tensor) or found.device.type != "meta":
                return found
        except RuntimeError as error:
            if not (is_packed(instance.hf_model) or is_split(instance.hf_model)):
                raise
            wrong = error
        raise ModelError(
            f"model.{self._name} puts weights together that are packed, lie on several devices or wait on disk. "
            "Hooks, caches, patching and replays need none of them, and avl.direct_attribution, path_patch and their "
            f"like read plain weights layer by layer wherever they lie. {LOAD_PLAIN}"
        ) from wrong


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
    W_E: Any = Weights("Text embedding `[d_vocab, d_model]`.")
    W_U: Any = Weights("Unembedding `[d_model, d_vocab]`.")
    b_U: Any = Weights("Bias of the unembedding `[d_vocab]`.")
    W_Q: Any = Weights("Query weights `[layer, head, d_model, d_head]`.")
    W_K: Any = Weights("Key weights, key-value heads repeated for the query heads that share them.")
    W_V: Any = Weights("Value weights, repeated likewise.")
    W_O: Any = Weights("Output weights `[layer, head, d_head, d_model]`.")
    b_Q: Any = Weights("Query biases.")
    b_K: Any = Weights("Key biases.")
    b_V: Any = Weights("Value biases.")
    W_gate: Any = Weights("The MLPs' gate weights.")
    W_in: Any = Weights("The MLPs' input weights.")
    W_out: Any = Weights("The MLPs' output weights.")
    QK: Any = Weights("Each head's query-key circuit, factored.")
    OV: Any = Weights("Each head's output-value circuit, factored.")
    accumulated_bias: Any = Weights("The sum of the biases written to the stream up to a layer.")
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
