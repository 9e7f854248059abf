"""From a name or a folder to a model whose every hook is real.

Only the fusion model is loaded: of a full Qwen2.5-Omni checkpoint the thinker. Weights come from safetensors, must fit
the configuration and be finite, and no code from a checkpoint is run, or asked about.

Precision: float32 for organisms and, on a CPU, for anything below a billion parameters; else the checkpoint's own.
"""

import copy
import importlib.util
import logging
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from av_lens.checkpoints import check_configurations, check_weight_files, index, known_names
from av_lens.core.calls import is_packed
from av_lens.core.modes import cast, free_bytes
from av_lens.core.placement import require_known_packing, require_movable, require_weights, require_whole_layers
from av_lens.errors import ModelError
from av_lens.families.registry import HOW_TO_ADD, Family, build_bridge, family_of
from av_lens.families.weights import LOAD_PLAIN
from av_lens.model.selfcheck import check_model, check_parts
from av_lens.model.sources import Source
from av_lens.model.wrapper import HookedAVLLM

BILLION = 1_000_000_000
_LAYER = re.compile(r"\.(layers|blocks)\.\d+\.")
_OPENS_MORE = re.compile(r"auto_map|transformers_weights|use_kernels|_?(attn|experts)_implementation")
ROOM_TO_RUN = 1.3  # a model needs this much of its weights' memory, at least, to run


def short_names() -> dict[str, str]:
    """The models that ship with the package."""
    return {name: str(entry.get("summary", "")) for name, entry in index().items()}


def load(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | Path | None = None,
    hf_model: Any = None,
    processor: Any = None,
) -> HookedAVLLM:
    """Open an audio-visual language model.

    Args:
        name_or_path: a short name (`av-lens models` lists them), a local folder (of the fusion model or of a full
            checkpoint), or a hub name such as "Qwen/Qwen2.5-Omni-7B".
        device: such as "cuda" or "cpu"; None for cuda where the model fits, else the CPU.
        dtype: such as torch.bfloat16 or "bfloat16"; None for the rule above.
        revision: of a hub name: a branch, tag or commit.
        device_map: "auto", or by module (whole layers) a device, "cpu" or "disk", as HuggingFace takes it.
        max_memory: with `device_map="auto"`: how much each device may hold, such as `{0: "20GiB", "cpu": "60GiB"}`.
        offload_folder: where weights go for "disk" that the checkpoint holds in another form (experts).
        hf_model: a HuggingFace model that is already there. It is wrapped in place: keep no other use for it.
        processor: its processor; needed with `hf_model` unless `name_or_path` has one.

    Returns:
        The model, in evaluation mode, after the cheap part of `check_model`.

    Raises:
        ModelError: nothing there, no adapter for that family (the message says how to add one), weights missing from
            the checkpoint or quantised in a way that is not known, a layer split in two, or a self-check that failed.
    """
    opener = None if name_or_path is None else _opener(Path(name_or_path))
    if opener is not None and hf_model is None:
        if device_map is not None:
            raise ModelError(
                f"{name_or_path} holds saved inputs: its decoder goes to one device; leave device_map= out."
            )
        return opener(Path(str(name_or_path)), device=device, dtype=dtype)
    how: Any = {"device": device, "dtype": dtype, "revision": revision, "hf_model": hf_model, "processor": processor}
    how |= {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    model = opened(name_or_path, **how).wrapped()
    check_model(model, full=False)
    return model


OPENERS: dict[str, Callable[..., HookedAVLLM]] = {}
"""Files that make a folder something else than a checkpoint, and what opens it."""


def _opener(folder: Path) -> Callable[..., HookedAVLLM] | None:
    return next((opens for file, opens in OPENERS.items() if (folder / file).is_file()), None)


@dataclass(frozen=True, eq=False)
class Opened:
    """A HuggingFace model, its processor, and what else is known of it, before the model is wrapped."""

    hf_model: Any  # the model, with HuggingFace's own layers
    processor: Any  # its processor
    name: str  # what was asked for
    more: Mapping[str, Any]  # further arguments of `HookedAVLLM`

    def __post_init__(self) -> None:
        object.__setattr__(self, "processor", family_of(type(self.hf_model)).media.opened(self.processor))
        check_parts(self.hf_model, self.processor, self.name)

    def wrapped(self) -> HookedAVLLM:
        """Wrap the model, in place."""
        bridge = build_bridge(self.hf_model, tokenizer=self.processor.tokenizer, name=self.name)
        return HookedAVLLM(bridge, self.processor, name=self.name, **self.more)


def opened(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    hf_model: Any = None,
    processor: Any = None,
    **split: Any,
) -> Opened:
    """Open a model as `load` does, and leave it unwrapped."""
    how: Any = {"device": device, "dtype": dtype, "revision": revision}
    spread = {name: value for name, value in split.items() if value is not None}
    if spread and ("device_map" not in spread or device is not None or hf_model is not None):
        raise ModelError(
            f"{', '.join(spread)}: device_map= says where each part of a checkpoint goes, max_memory= and "
            "offload_folder= go with it, and neither device= nor hf_model= does. Give device_map= with a name or a "
            "folder alone."
        )
    if hf_model is not None:
        return _given(hf_model, name_or_path, processor, **how)
    if name_or_path is None:
        raise ModelError(f"load needs a name, a folder, or hf_model= with processor=. {known_names()}")
    return _open(str(name_or_path), processor, spread, **how)


def _given(hf_model: Any, name_or_path: str | Path | None, processor: Any, **options: Any) -> Opened:
    family_of(type(hf_model))
    require_weights(hf_model)
    if processor is None:
        if name_or_path is None:
            raise ModelError("hf_model= needs processor= as well (or a name or folder that has one).")
        processor = _processor(Source(str(name_or_path), options["revision"]))
    if options["dtype"] is not None or options["device"] is not None:
        require_movable(hf_model)
    if options["dtype"] is not None:
        cast(hf_model, _dtype(options["dtype"]))
    if options["device"] is not None:
        hf_model = hf_model.to(options["device"])
    name = "external" if name_or_path is None else str(name_or_path)
    return Opened(hf_model, processor, name, {"provenance": {"source": "hf_model"}})


def _open(
    name: str, processor: Any, spread: Mapping[str, Any], *, device: Any, dtype: Any, revision: str | None
) -> Opened:
    source = Source(name, revision)
    if spread and (source.difference is not None or source.adapter is not None):
        kind = "an adapter" if source.adapter is not None else "a difference"
        raise ModelError(
            f"{name!r} is {kind} over {source.asked!r}, whose weights it changes: these must lie in one place. Leave "
            "device_map= out, or save the whole model first and load that."
        )
    if source.folder is not None:
        check_configurations(source.folder)
    config = source.config()
    family = _family(config, name)
    inner = family.inner_config.get(str(config.get("model_type")))
    for level in _levels(config, inner):
        require_known_packing(way := level.get("quantization_config"))
        if way is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise ModelError(
                f"the weights of {name!r} are quantised by bitsandbytes, which is not installed: "
                f"pip install 'av_lens[quantised]'. Or load those that they were made from. {LOAD_PLAIN}"
            )
    with source.translated("config.json"):
        hf_config = family.model_class.config_class.from_dict(_plain(config[inner] if inner else config))
        if config.get("quantization_config") is not None:  # of a larger model it stands outside the fusion model's own
            hf_config.quantization_config = config["quantization_config"]
        count = cache(partial(_count, family, hf_config))
        # A configuration could have memory taken for weights that are nowhere.
        if source.folder is not None and count() > 2 * (held := check_weight_files(source.folder)) + BILLION // 100:
            raise ModelError(
                f"the weight files of {name!r} hold {held} numbers and its config.json wants {count()}: they do not "
                "belong together. Download or copy the checkpoint again."
            )
        organism = source.grammar is not None
        stored = torch.float32 if organism else _stored_dtype(config, inner)
        precision = stored if dtype is None else _dtype(dtype)
        chosen = device is None and not spread and torch.cuda.is_available()
        fitting = _fitting_device(count(), precision) if chosen else "cpu"
        place = torch.device(fitting if device is None else device)
        if dtype is None and not organism and not spread and place.type == "cpu" and count() < BILLION:
            precision = torch.float32
    with quiet(bar=not organism):
        hf_model = _weights(family, source, hf_config, precision, spread)
        if source.difference is not None:
            source.difference.put_into(hf_model)
        if source.adapter is not None:
            require_movable(hf_model)
            hf_model = source.adapter.merged_into(hf_model)
        if spread:
            require_whole_layers(hf_model.get_decoder().layers)
        elif not is_packed(hf_model):
            hf_model = hf_model.to(place)
    if spread:
        place = getattr(hf_model, "hf_device_map", None) or spread["device_map"]
    provenance = {"source": source.place, "revision": revision, "dtype": str(precision), "device": str(place)}
    if source.difference is not None:
        provenance |= {"source": str(source.difference.folder), "base": source.difference.base}
    if source.adapter is not None:
        provenance |= {"source": str(source.adapter.folder), "base": source.adapter.base}
    processor = _processor(source) if processor is None else processor
    return Opened(hf_model, processor, name, {"grammar": source.grammar, "handed_in": False, "provenance": provenance})


def _levels(config: Mapping[str, Any], inner: str | None = None) -> Generator[Mapping[str, Any], None, None]:
    """A configuration and those within it; of a larger one the fusion model's alone."""
    yield config
    for name, value in config.items():
        if isinstance(value, Mapping) and inner in (None, name):
            yield from _levels(value)


def _family(config: Mapping[str, Any], name: str) -> Family:
    """By the class that a checkpoint was saved from, else by its model_type."""
    classes = config.get("architectures")
    names = [str(one) for one in (*(classes if isinstance(classes, list) else ()), config.get("model_type")) if one]
    if not names:
        raise ModelError(f"the config.json of {name!r} names no model_type. {HOW_TO_ADD}")
    return family_of(*names)


def _plain(level: Mapping[Any, Any]) -> dict[Any, Any]:
    """A configuration without what would have other code or files opened (an attention kernel from the hub, ...)."""
    kept = {name: value for name, value in level.items() if not _OPENS_MORE.fullmatch(str(name))}
    return {name: _plain(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _count(family: Family, hf_config: Any) -> int:
    """How many parameters the fusion model has; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in family.model_class(copy.deepcopy(hf_config)).parameters())


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"{dtype!r} is no floating-point dtype; pass torch.float32, torch.bfloat16 or torch.float16.")
    return found


def _stored_dtype(config: Mapping[str, Any], inner: str | None = None) -> torch.dtype:
    for level in (config, config.get(inner or "") or {}, config.get("text_config") or {}):
        stored = level.get("dtype") or level.get("torch_dtype")
        if stored:
            return _dtype(stored)
    return torch.float32


def _fitting_device(n_parameters: int, dtype: torch.dtype) -> torch.device:
    cuda = torch.device("cuda")
    return cuda if n_parameters * dtype.itemsize * ROOM_TO_RUN < free_bytes(cuda) else torch.device("cpu")


def _weights(family: Family, source: Source, hf_config: Any, dtype: torch.dtype, spread: Mapping[str, Any]) -> Any:
    with source.translated("model.safetensors"):
        hf_model, report = family.model_class.from_pretrained(
            source.place,
            config=hf_config,
            revision=source.revision,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **spread,
        )
    for what, names in (
        ("are missing", report["missing_keys"]),
        ("have other sizes than config.json says", [name for name, *_ in report["mismatched_keys"]]),
        ("belong to layers that config.json does not have", filter(_LAYER.search, report["unexpected_keys"])),
    ):
        listed = sorted(names)
        if listed:
            raise ModelError(
                f"{len(listed)} weights of {family.architecture} {what} in {source.asked!r} ({', '.join(listed[:3])}, "
                "...); its answers would be another model's. The checkpoint is incomplete or belongs to another model."
            )
    return hf_model


@contextmanager
def quiet(*, bar: bool) -> Generator[None, None, None]:
    """Keep HuggingFace from listing the talker's and vocoder's weights, and from drawing a bar unless asked."""
    from transformers.utils import logging as hf_logging

    logger = logging.getLogger("transformers.modeling_utils")
    level, had_bar = logger.level, hf_logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    if not bar:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if had_bar:
            hf_logging.enable_progress_bar()


def _processor(source: Source) -> Any:
    from transformers import AutoProcessor

    with source.translated("the processor"):
        processor: Any = AutoProcessor.from_pretrained(source.place, revision=source.revision, trust_remote_code=False)
    # The processor class's common size would override the checkpoint's own in silence. A size above it that is the
    # images' too comes from a file for all pictures alike: it speaks of images, and HuggingFace keeps videos smaller.
    common = dict(getattr(processor, "videos_kwargs", None) or {})
    if "size" not in common:
        return processor
    own, images = dict(processor.video_processor.size), dict(processor.image_processor.size)
    if own != images or own["longest_edge"] <= common["size"]["longest_edge"]:
        processor.videos_kwargs = common | {"size": own}
    return processor
