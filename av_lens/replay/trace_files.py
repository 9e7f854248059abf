"""Traces on disk: a recorded run that outlives its session, and refuses a model or an input that is not its own.

The model's hashes are kept, and made again when a weight's tensor, version counter or sampled numbers changed; a change
of single numbers through `.data` may go unnoticed.
"""

import hashlib
import json
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from av_lens.checks import foreign_file, near_file, parse_json, whole_object
from av_lens.core.calls import turn_of
from av_lens.core.execution import places, standing_hooks
from av_lens.errors import InputError, InterventionError, ModelError
from av_lens.replay.recording import Record
from av_lens.results.provenance import stamp
from av_lens.whole_files import whole_file

SCHEMA = "av_lens.Trace"
SCHEMA_VERSION = 1
_AGAIN = "Copy it again, or record again with model.trace(x)."
SAMPLED = 16  # numbers of each weight that are looked at before kept hashes are trusted
SPAN_COLUMNS = ("start_s", "end_s", "source_start_s", "source_end_s", "row", "col")
# What a configuration says about files and libraries, and not about the computation.
BESIDE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_attn_implementation")


def write_trace(record: Record, path: str | Path) -> Path:
    """Save a recorded run."""
    if record.standing:
        raise InterventionError(
            f"this trace was recorded with hooks at {places(record.model, record.standing)}, and functions cannot be "
            "saved: a session that opened it would not know what they did. Record without them, and write what they "
            "do as a Plan."
        )
    target = Path(path) if Path(path).suffix else Path(path).with_suffix(".safetensors")
    if not target.parent.is_dir():
        raise InputError(f"cannot save a trace to {target}: there is no folder {target.parent}. Make it first.")
    about = stamp(
        model=record.model.name,
        dtype=str(record.resid[0].dtype),
        hooked_because=record.hooked_because,
        flash=record.flash,
        routing=record.routing,
        n_layers=record.n_layers,
        weights=weight_hashes(record.model),
        input=input_hashes(record.x),
    )
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in _named(record)}
    metadata = {"schema": SCHEMA, "schema_version": str(SCHEMA_VERSION), "about": json.dumps(about)}
    metadata["sha256"] = _content_hash(stored)
    with whole_file(target) as beside:
        save_file(stored, beside, metadata=metadata)
    return target


def read_trace(path: str | Path, model: Any, x: Any, *, device: torch.device | str | None = None) -> dict[str, Any]:
    """Open a saved run, if it is this model's on this input."""
    with turn_of(model.bridge):
        standing = standing_hooks(model)
    if standing:
        raise InterventionError(
            f"the trace in {path} was recorded without hooks, and the model has hooks at {places(model, standing)}. "
            "Take them off, or record under them with model.trace(x)."
        )
    about, tensors = _opened(Path(path))
    precision = str(model.dtype)
    if about["dtype"] != precision:
        raise ModelError(
            f"the trace in {path} was recorded in {about['dtype']}, this model computes in {precision}. "
            f"Load the model with dtype={about['dtype']}, or record again with model.trace(x)."
        )
    parts = _differing(about["weights"], weight_hashes(model))
    if parts:
        raise ModelError(
            f"the trace in {path} was recorded by another model ({about['model']!r}; this one is {model.name!r}): "
            f"they differ in {', '.join(parts)}. Open the model that recorded it, or record again with model.trace(x)."
        )
    parts = _differing(about["input"], input_hashes(x))
    if parts:
        raise InputError(
            f"the trace in {path} was recorded on another input: it differs in {', '.join(parts)}. "
            "Encode the same clip and question in the same way, or record again with model.trace(x)."
        )
    _check_shapes(Path(path), model, x, int(about["n_layers"]), tensors)
    place = model.device if device is None else torch.device(device)
    moved = {name: tensor.to(place) for name, tensor in tensors.items()}
    layers = range(int(about["n_layers"]))
    return {
        "model": model,
        "x": x,
        "resid": tuple(moved[f"resid.{i}"] for i in (*layers, len(layers))),
        "keys": tuple(moved[f"keys.{i}"] for i in layers),
        "values": tuple(moved[f"values.{i}"] for i in layers),
        "tables": (moved["cos"], moved["sin"]),
        "mask": moved.get("mask"),
        **{
            kind: {int(name.split(".")[1]): part for name, part in moved.items() if name.startswith(f"{kind}.")}
            for kind in ("added", "experts")
        },
        "hooked_because": about["hooked_because"],
        "flash": bool(about.get("flash", about["dtype"] == "torch.float32")),
        "routing": "frozen" if about.get("routing") == "frozen" else "free",
    }


def _named(record: Record) -> Iterable[tuple[str, Tensor]]:
    yield from ((f"resid.{i}", record.stream(i, 0)) for i in range(record.n_layers + 1))
    for i in range(record.n_layers):
        yield from zip((f"keys.{i}", f"values.{i}"), record.past(i, len(record.spans)), strict=True)
    yield from zip(("cos", "sin"), record.tables, strict=True)
    if record.mask is not None:
        yield "mask", record.mask
    for kind, parts in (("added", record.added), ("experts", record.experts)):
        yield from ((f"{kind}.{layer}", part) for layer, part in parts.items())


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read metadata and tensors, the tensors in memory of their own."""
    if not path.is_file():
        raise InputError(f"no such file: {path}. {near_file(path)} trace.save(path) says which file it wrote.")
    with foreign_file(path, "a whole trace: cut short, damaged or made by something else", mend=_AGAIN):
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            _check_schema(path, metadata)
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        about = whole_object(parse_json(metadata["about"]), "about")
        for name, kind in (("weights", dict), ("input", dict), ("n_layers", int), ("hooked_because", str)):
            if type(about[name]) is not kind:
                raise ValueError(f"{name} is {about[name]!r}"[:80])
        n, _ = about["n_layers"], (about["dtype"], about["model"])
        if n > len(tensors):
            raise ValueError(f"it says that it has {n} layers")
    wanted = {f"resid.{i}" for i in range(n + 1)} | {f"{kind}.{i}" for kind in ("keys", "values") for i in range(n)}
    missing = sorted((wanted | {"cos", "sin"}) - set(tensors))
    if missing:
        lacking = ", ".join(missing)
        raise InputError(f"{path} is no whole trace: {lacking} are missing. Record again with model.trace(x).")
    if metadata.get("sha256", "") not in ("", _content_hash(tensors)):
        raise InputError(f"{path} is no whole trace: its numbers are not those that were saved. {_AGAIN}")
    return about, tensors


def _check_shapes(path: Path, model: Any, x: Any, n_layers: int, tensors: Mapping[str, Tensor]) -> None:
    spec, batch, pos = model.spec, len(x), len(x.spans)
    stream, heads = (batch, pos, spec.d_model), (batch, spec.n_kv_heads, pos, spec.d_head)
    wanted = {f"resid.{i}": stream for i in range(n_layers + 1)}
    wanted |= {f"{kind}.{i}": heads for kind in ("keys", "values") for i in range(n_layers)}
    strange = [name for name, shape in wanted.items() if tensors[name].shape != shape]
    tables = {name: tensors[name].shape[-2:] for name in ("cos", "sin")}
    strange += [name for name, shape in tables.items() if shape[0] != pos or shape[1] > spec.d_head]
    strange += [name for name in ("mask",) if name in tensors and tensors[name].shape[-3:] != (1, pos, pos)]
    added = {name: part.shape for name, part in tensors.items() if name.startswith("added.")}
    strange += [name for name, shape in added.items() if shape[::2] != (batch, spec.d_model) or shape[1] > pos]
    experts = {name: part for name, part in tensors.items() if name.startswith("experts.")}
    strange += sorted(experts.keys() ^ {f"experts.{layer}" for layer in spec.experts})
    strange += [name for name, part in experts.items() if part.ndim != 3 or part.shape[:2] != (batch, pos)]
    kinds = {name: torch.int64 if name in experts else tensors["resid.0"].dtype for name in tensors}
    strange += [name for name, tensor in tensors.items() if tensor.dtype != kinds[name]]
    if strange or n_layers != spec.n_layers:
        raise InputError(
            f"{path} is no whole trace of this model and input: {', '.join(strange[:3]) or 'its layers'} have other "
            f"shapes or types. {_AGAIN}"
        )


def _content_hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _feed(digest, name, tensors[name])
    return digest.hexdigest()


def _check_schema(path: Path, metadata: Mapping[str, str]) -> None:
    kind, version = metadata.get("schema"), metadata.get("schema_version", "0")
    if kind != SCHEMA or version != str(SCHEMA_VERSION):
        found = f"{kind}, version {version}" if kind else "safetensors of something else, such as a model's weights"
        raise InputError(
            f"{path} holds {found}; this av_lens reads {SCHEMA}, version {SCHEMA_VERSION}. "
            "Record again with model.trace(x), or open it with the av_lens that wrote it."
        )


def _differing(recorded: Mapping[str, object], found: Mapping[str, str]) -> list[str]:
    names = dict.fromkeys((*recorded, *found))
    return [name for name in names if recorded.get(name) != found.get(name)]


# Hashes


@dataclass(eq=False)
class _Kept:
    """A model's hashes, and what its weights looked like when they were made."""

    tensors: tuple[weakref.ref[Tensor], ...]
    versions: tuple[tuple[int, int], ...]
    sample: str
    hashes: dict[str, str]


_KEPT: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()


def weight_hashes(model: Any) -> dict[str, str]:
    """Hash all that a model computes with: weights, buffers and configuration."""
    weights = sorted([*model.hf_model.named_parameters(), *model.hf_model.named_buffers()])
    tensors = [tensor for _, tensor in weights]
    if any(tensor.device.type == "meta" for tensor in tensors):
        raise ModelError(
            "a saved trace knows its model by a hash of all weights, and some of this model's wait in memory or on "
            "disk until they are called. Keep the trace in memory, or load the model where all of it fits."
        )
    countable = not any(tensor.is_inference() for tensor in tensors)
    versions = tuple((tensor._version, tensor.data_ptr()) for tensor in tensors) if countable else ()
    sample, kept = _sampled(tensors), _KEPT.get(model.hf_model)
    known = kept is not None and countable and kept.versions == versions and kept.sample == sample
    if kept is not None and known and all(ref() is t for ref, t in zip(kept.tensors, tensors, strict=True)):
        return {**kept.hashes, "configuration": _configuration(model)}
    digests: dict[str, Any] = {}
    for name, tensor in weights:
        _feed(digests.setdefault(_part(name), hashlib.sha256()), name, tensor)
    hashes = {part: digest.hexdigest() for part, digest in digests.items()}
    _KEPT[model.hf_model] = _Kept(tuple(map(weakref.ref, tensors)), versions, sample, hashes)
    return {**hashes, "configuration": _configuration(model)}


def _part(name: str) -> str:
    """The part of the model that a weight belongs to: `layers 3`, `visual`, `lm_head`, ..."""
    words = [word for word in name.split(".") if word not in ("model", "language_model", "_original_component")]
    return " ".join(words[:2]) if words[0] == "layers" else words[0]


def _sampled(tensors: Iterable[Tensor]) -> str:
    """Hash a few numbers of every tensor."""
    flat = (tensor.detach().reshape(-1) for tensor in tensors)
    parts = [one[:: max(1, len(one) // SAMPLED)][:SAMPLED].float() for one in flat]
    joined = torch.cat([part.to(parts[0].device) for part in parts]) if parts else torch.zeros(0)
    return hashlib.sha256(joined.cpu().numpy().tobytes()).hexdigest()


def _configuration(model: Any) -> str:
    def plain(level: Any) -> Any:
        if isinstance(level, Mapping):
            return {str(name): plain(value) for name, value in level.items() if name not in BESIDE}
        return level

    text = json.dumps(plain(model.config.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def input_hashes(x: Any) -> dict[str, str]:
    """Hash an input: every tensor that the model is given, and its spans."""
    found: dict[str, str] = {}
    for name, value in sorted({**x.tensors, "position_ids": x.position_ids}.items()):
        if isinstance(value, Tensor):
            found[name] = _content_hash({name: value})
        else:
            found[name] = hashlib.sha256(repr(value).encode()).hexdigest()
    digest = hashlib.sha256(json.dumps([x.spans.roles, x.spans.tokens]).encode())
    for name in SPAN_COLUMNS:
        digest.update(getattr(x.spans, name).tobytes())
    found["spans"] = digest.hexdigest()
    return found


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(flat.numpy())
