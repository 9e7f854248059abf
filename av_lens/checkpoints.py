"""Where a checkpoint lies, and whether its folder can be one: what can be said of a model before torch is imported.

A short name ("av-tiny") is a folder that ships with the package; anything else is a local folder or a name on the
HuggingFace hub. Headers of weights say how long a file should be, so that a copy that was cut short is told at once.
Symbolic links are followed wherever they lead.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

from av_lens.checks import foreign_file, near_file, parse_json
from av_lens.errors import ModelError, unknown

WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
CONFIG, DIFFERENCE, BROUGHT, ADAPTER = "config.json", "difference.json", "bring.json", "adapter_config.json"
LARGEST, MOST_LAYERS = 10**8, 1000
"""A whole number in `config.json`, or a number of layers, above which it is no size of a model."""
_LAYERS = ("num_hidden_layers", "depth", "encoder_layers")
_BROUGHT = ("model", "family", "prefix", "inner", "tokenizer")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MOST_HEADER = 100_000_000  # bytes: what safetensors itself allows
_AGAIN = "Download or copy the checkpoint again."
_foreign = partial(foreign_file, mend=_AGAIN, error=ModelError)


def shipped() -> Traversable:
    """Say where the checkpoints lie that ship with the package."""
    return resources.files("av_lens") / "organism" / "checkpoints"  # named from the root: organism is not imported


def index() -> Mapping[str, Any]:
    """List the checkpoints that ship with the package."""
    found = shipped() / "index.json"
    return parse_json(found.read_bytes()) if found.is_file() else {}


def known_names() -> str:
    """Say in a sentence which short names there are."""
    names = ", ".join(index())
    return f"Short names: {names}." if names else "No short names are installed."


def located(name: str) -> Path | None:
    """Find the folder of a checkpoint."""
    listed = index()
    if name in listed:
        return Path(str(shipped() / str(listed[name]["folder"])))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.is_file():
        return None
    if "/" not in name and not path.exists():
        raise ModelError(f"{unknown('model', name, listed)} A folder or a hub name (owner/name) will do too.")
    kind = "is a file, not a folder." if path.is_file() else f"does not exist. {near_file(path)}"
    raise ModelError(f"the checkpoint folder {name!r} {kind} {known_names()}")


def check_checkpoint(name: str) -> None:
    """Refuse a name or a folder that cannot be loaded, as far as that can be seen without opening the model."""
    folder = located(name)
    if folder is not None and (folder / BROUGHT).is_file():
        folder, _ = brought(folder)
    if folder is not None and not any((folder / named).is_file() for named in (DIFFERENCE, ADAPTER)):
        check_configurations(folder)
        check_weight_files(folder)


def brought(folder: Path) -> tuple[Path, dict[str, str]]:
    """Read which checkpoint's decoder a folder of saved inputs is for, and how it is loaded."""
    with foreign_file(folder / BROUGHT, "a json object of texts", error=ModelError):
        told = {name: str(value) for name, value in dict(parse_json((folder / BROUGHT).read_bytes())).items()}
        for name in told:
            if name not in _BROUGHT:
                raise ModelError(f"{folder / BROUGHT}: {unknown('key', name, _BROUGHT)}")
        place = folder / told.pop("model")
    if not place.is_dir():
        raise ModelError(f"{folder / BROUGHT} names the checkpoint {str(place)!r}, which is no folder.")
    return place, told


def check_configurations(folder: Path) -> None:
    """Refuse a folder whose configurations cannot be those of a checkpoint."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{str(folder)!r} has no {CONFIG}, so it is no checkpoint. {known_names()}")
    for path in sorted(folder.glob("*config.json")):  # the vocabulary is left to who reads it: it has megabytes
        with _foreign(path, "a configuration"):
            found: dict[str, Any] = dict(parse_json(path.read_bytes(), finite=False))
        if path.name == CONFIG:
            _check_sizes(path, found, "")
    if (folder / ADAPTER).is_file():
        raise ModelError(
            f"{str(folder)!r} holds an adapter ({ADAPTER}) beside a whole model: which of them is meant? Put the "
            "adapter into a folder of its own, which names this one as its base."
        )


def check_weight_files(folder: Path) -> int:
    """Refuse a folder whose weights are missing, cut short or pickled; only headers are read."""
    packed = _is_packed(folder)
    return sum(_numbers_in(path, packed=packed) for path in _weight_files(folder))


def _is_packed(folder: Path) -> bool:
    """Whether a checkpoint says that bitsandbytes quantised its weights."""
    with _foreign(folder / CONFIG, "a configuration"):
        config: Any = parse_json((folder / CONFIG).read_bytes(), finite=False)
    levels = [config, *(one for one in config.values() if isinstance(one, dict))]
    ways = [one.get("quantization_config") for one in levels]
    return any(isinstance(way, dict) and str(way.get("quant_method")).startswith("bitsandbytes") for way in ways)


def _check_sizes(path: Path, level: Mapping[str, Any], where: str) -> None:
    for name, value in level.items():
        if isinstance(value, dict):
            _check_sizes(path, cast(dict[str, Any], value), f"{where}{name}.")
        most = MOST_LAYERS if name in _LAYERS else LARGEST
        if isinstance(value, int) and not -LARGEST <= value <= most:
            said = f"{path} says {where}{name} = {value}"
            raise ModelError(f"{said}, which is no size of a model (at most {most}). {_AGAIN}")


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that hold the weights; transformers prefers one file to shards, and so does this."""
    if (folder / WEIGHTS).is_file():
        yield folder / WEIGHTS
        return
    if not (folder / SHARDS).is_file():
        found = f"the weights are missing. {_AGAIN}"
        if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED):
            found = (
                f"it has {pickled[0]}: pickled weights can run code when they are opened, and are never opened here. "
                "Ask for the checkpoint as safetensors, or convert it where you trust it (save_pretrained writes them)."
            )
        raise ModelError(f"cannot read {WEIGHTS} in {str(folder)!r}: there is no such file, and {found}")
    with _foreign(folder / SHARDS, "the list of a checkpoint's weight files"):
        listed = sorted({str(name) for name in parse_json((folder / SHARDS).read_bytes())["weight_map"].values()})
    for name in listed:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{folder / SHARDS} names the weight file {name!r}, which is not in the folder. {_AGAIN}")
        yield folder / name


def _numbers_in(path: Path, *, packed: bool) -> int:
    """Read the header of a file of weights: it must be whole, and the file as long as it says."""
    size, total, end = path.stat().st_size, 0, 0
    with _foreign(path, "a whole file of weights"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MOST_HEADER):
            raise ValueError(f"cut short: its header should have {length} bytes, the file has {size}")
        header: dict[str, Any] = parse_json(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            kind, last = str(entry["dtype"]), int(entry["data_offsets"][1])
            if not packed and name.endswith((".weight", ".bias")) and not kind.startswith(("F", "BF")):
                raise ValueError(f"{name} is stored as {kind}; weights are floating-point numbers, not quantised ones")
            total, end = total + math.prod(int(n) for n in entry["shape"]), max(end, last)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}: cut short or overwritten")
    return total
