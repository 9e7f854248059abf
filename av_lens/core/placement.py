"""Where a model's weights lie and in what form, and what of that can be opened, moved or rewritten."""

from collections.abc import Mapping
from typing import Any

from av_lens.core.calls import is_packed, is_split
from av_lens.errors import ModelError
from av_lens.families.blocks import device_of
from av_lens.families.weights import LOAD_PLAIN


def require_movable(hf_model: Any) -> None:
    """Refuse to rewrite or move weights that are split over devices or packed."""
    packed = is_packed(hf_model)
    if packed or is_split(hf_model):
        what = "quantised" if packed else "split over several places"
        raise ModelError(
            f"this model is {what}, and its weights stay as and where they were loaded. Load it again: "
            'avl.load(name, dtype=..., device_map="auto"), without quantisation where its numbers are to change.'
        )


def require_whole_layers(layers: Any) -> None:
    """Refuse a model in which one layer's modules compute on several devices."""
    for number, layer in enumerate(layers):
        places = sorted({str(device_of(part)) for part in layer.modules() if part._parameters})
        if len(places) > 1:
            raise ModelError(
                f"layer {number} is spread over {' and '.join(places)}, and a restart computes each layer in one "
                'place. Name whole layers in device_map=, or leave the choice to device_map="auto".'
            )


def require_weights(hf_model: Any) -> None:
    """Refuse weights that are nowhere, a layer in two places, adapters in place, and an unknown quantisation."""
    require_whole_layers(hf_model.get_decoder().layers)
    bare = [(name, one) for name, one in hf_model.named_modules() if not hasattr(one, "_hf_hook")]
    nowhere = [name for name, one in bare if any(p is not None and p.is_meta for p in one._parameters.values())]
    if nowhere:
        raise ModelError(
            f"this model has no weights at {', '.join(nowhere[:3])} ({len(nowhere)} places): they are mere shapes "
            "(meta). Load it with device_map= or from_pretrained, which bring the numbers."
        )
    beside = [name for name, one in hf_model.named_modules() if hasattr(one, "base_layer")]
    if beside:
        raise ModelError(
            f"adapters (peft) stand in this model at {', '.join(beside[:2])} ({len(beside)} places): what reads "
            "weights would read the base's alone. Merge them first (peft's merge_and_unload), or give avl.load their "
            "folder."
        )
    quantizer = getattr(hf_model, "hf_quantizer", None)
    way = getattr(quantizer, "quantization_config", quantizer)
    require_known_packing(way or getattr(getattr(hf_model, "config", None), "quantization_config", None))
    if way is None:
        require_known_packing(next((str(p.dtype) for p in hf_model.parameters() if p.dtype.itemsize < 2), None))


def require_known_packing(way: Any) -> None:
    """Refuse quantised weights, but those of bitsandbytes; None where they are not quantised."""
    if way is None:
        return
    method = way.get("quant_method", way) if isinstance(way, Mapping) else getattr(way, "quant_method", way)
    method = str(getattr(method, "value", method))
    if not method.startswith("bitsandbytes"):
        raise ModelError(
            f"these weights are quantised ({method}), and av_lens opens none of that kind but bitsandbytes'. "
            f"{LOAD_PLAIN}"
        )
