"""A folder of LoRA weights (peft), opened as the model that it makes of its base: W' = W + scale * B A.

peft merges the adapter (`merge_and_unload`), and what is wrapped is a plain model. Every weight of the adapter must
find its place, or it is refused.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); the library peft.
"""

import importlib.util
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from av_lens.checkpoints import ADAPTER
from av_lens.checks import foreign_file, parse_json
from av_lens.errors import ModelError

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """A folder of LoRA weights."""

    folder: Path  # where it lies
    base: str  # its base's folder or hub name
    revision: str | None  # of a base on the hub

    def merged_into(self, hf_model: Any) -> Any:
        """Put the adapter into its base, for good."""
        from safetensors import safe_open

        peft: Any = import_module("peft")  # an extra

        path = self.folder / WEIGHTS
        with foreign_file(path, "an adapter's weights", error=ModelError), safe_open(path, framework="pt") as file:
            stored = set(file.keys())
        held = {name for name in stored if not name.endswith(".base_layer.weight")}  # the base's, kept beside it
        if hf_model.get_output_embeddings().weight is hf_model.get_input_embeddings().weight and any(
            "embed_tokens" in name or "lm_head" in name for name in held
        ):
            raise ModelError(
                f"the adapter in {str(self.folder)!r} changes embed_tokens or lm_head, which are one weight in "
                f"{self.base!r}: merged, it would change both. Merge it by the code that trained it, save the whole "
                "with tie_word_embeddings=False, and load that folder."
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what it calls, and of weights that are told of below
                made = peft.PeftModel.from_pretrained(hf_model, str(self.folder), use_safetensors=True)
                wanted = set(peft.get_peft_model_state_dict(made, save_embedding_layers=False))
        except (RuntimeError, ValueError, TypeError) as error:
            first = " ".join(str(error).split())[:300]
            raise ModelError(f"the adapter in {str(self.folder)!r} does not fit {self.base!r}: {first}") from error
        astray = sorted(held ^ wanted)
        if astray:
            raise ModelError(
                f"the adapter in {str(self.folder)!r} and its base {self.base!r} do not belong together: of "
                f"{len(held | wanted)} weights {len(astray)} are in one of them alone ({', '.join(astray[:2])}, ...). "
                "An adapter that was trained on a larger model than the fusion model has longer names: merge it there "
                "(peft's merge_and_unload), save that, and load the folder."
            )
        return made.merge_and_unload(safe_merge=True)


def read_adapter(folder: Path) -> Adapter | None:
    """Read what a folder of LoRA weights says of itself; None where it is none."""
    if not (folder / ADAPTER).is_file() or any(folder.glob("model*.safetensors*")):
        return None
    shown = repr(str(folder))
    with foreign_file(folder / ADAPTER, "an adapter's configuration", error=ModelError):
        about: dict[str, Any] = dict(parse_json((folder / ADAPTER).read_bytes(), finite=False))
    if about.get("peft_type") != "LORA":
        raise ModelError(f"{shown} is an adapter of the kind {about.get('peft_type')!r}; av_lens merges LORA alone.")
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
        held = f"{pickled[0]} is there, and pickled weights are never opened here" if pickled else "it was not copied"
        raise ModelError(f"{shown} has no {WEIGHTS}: {held}. Ask for the adapter as safetensors.")
    base = about.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{shown} names no base: write its folder or hub name into {ADAPTER} (base_model_name_or_path)."
        )
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{shown} is a LoRA adapter, and peft is not installed: pip install 'av_lens[lora]'.")
    revision = about.get("revision")
    return Adapter(folder, base, str(revision) if revision else None)
