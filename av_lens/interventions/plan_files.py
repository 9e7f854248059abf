"""Plans as files: which edits, at which sites, for a model of which sizes.

    {"schema": "av_lens.Plan", "version": 1,
     "model": {"name": "av-tiny", "n_layers": 7, "n_heads": 8, "n_kv_heads": 4, "d_model": 128, "d_head": 16},
     "edits": [{"kind": "scale", "component": "z", "layer": 4, "head": [2, 3], "positions": "suffix", "amount": 0.0}]}

Tensors lie beside it as safetensors, bound by their hash; nothing is pickled. An unknown kind, key or version, other
tensors, and a model of other sizes are refused. Positions are role names or all: a file is applied to any clip.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from av_lens.checks import foreign_file, near_file, parse_json
from av_lens.errors import AvLensError, InterventionError, unknown
from av_lens.interventions.edges import Cut
from av_lens.interventions.edits import Edit, Site
from av_lens.spans import GROUPS, ROLES
from av_lens.whole_files import write_whole

SCHEMA = "av_lens.Plan"
VERSION = 1
SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head")
KINDS = ("replace", "zero", "resample", "noise", "scale", "add", "cut")
_EDIT = ("kind", "component", "layer", "head", "positions", "amount", "seed", "value")
_CUT = ("kind", "query", "key", "layers", "heads", "renormalize", "include_generation")
_FILE = ("schema", "version", "model", "edits", "tensors", "note")
_NEEDED = dict.fromkeys(("scale", "noise"), "amount") | dict.fromkeys(("replace", "resample", "add"), "value")


def write_plan(edits: tuple[Any, ...], path: str | Path, *, model: Any, note: str = "") -> Path:
    """Write a plan file, and its tensors beside it."""
    target = Path(path) if Path(path).suffix else Path(path).with_suffix(".json")
    if target.suffix != ".json":
        raise InterventionError(f"a plan is saved as json, with its tensors beside it; {target.name} ends otherwise.")
    if not target.parent.is_dir():
        raise InterventionError(f"the folder {str(target.parent)!r} does not exist; make it first.")
    tensors: dict[str, Tensor] = {}
    sizes = {name: int(getattr(model.spec, name)) for name in SIZES}
    text: dict[str, Any] = {"schema": SCHEMA, "version": VERSION, "model": {"name": str(model.name)} | sizes}
    text |= {"note": note} if note else {}
    text["edits"] = [_written(number, edit, tensors) for number, edit in enumerate(edits)]
    if tensors:
        from safetensors.torch import save

        data = save(tensors, metadata={"schema": SCHEMA, "version": str(VERSION)})
        beside = target.with_suffix(".safetensors")
        write_whole(beside, data, error=InterventionError)
        text["tensors"] = {"file": beside.name, "sha256": hashlib.sha256(data).hexdigest()}
    write_whole(target, json.dumps(text, indent=1) + "\n", error=InterventionError)
    return target


def read_plan(path: str | Path, *, model: Any = None) -> tuple[Any, ...]:
    """Read a plan file."""
    source = Path(path)
    found = _opened(source)
    sizes = found["model"]
    if model is not None:
        for name in SIZES:
            if sizes[name] != int(getattr(model.spec, name)):
                raise InterventionError(
                    f"{source.name} was made for {sizes.get('name', 'a model')} with {name} = {sizes[name]}; "
                    f"{model.name} has {int(getattr(model.spec, name))}. Make the plan for this model."
                )
    with foreign_file(source, "a plan", error=InterventionError):
        tensors = _tensors(source, found.get("tensors"))
        return tuple(_read(number, edit, tensors, source.name) for number, edit in enumerate(found["edits"]))


def _opened(source: Path) -> dict[str, Any]:
    try:
        found: Any = parse_json(source.read_bytes(), finite=False)
    except FileNotFoundError as error:
        raise InterventionError(f"cannot read the plan {source}: no such file. {near_file(source)}") from error
    except OSError as error:
        raise InterventionError(f"cannot read the plan {source}: {error.strerror or error}") from error
    except ValueError as error:
        raise InterventionError(f"{source} is not a plan: it is no json ({error}).") from error
    whole: dict[str, Any] = found if isinstance(found, dict) else {}
    if whole.get("schema") != SCHEMA:
        raise InterventionError(f"{source} is not a plan: its schema is {whole.get('schema')!r}, not {SCHEMA!r}.")
    version = whole.get("version")
    if version != VERSION:
        raise InterventionError(f"{source} is a plan of version {version}; this av_lens reads version {VERSION}.")
    _check_keys(whole, _FILE, ("model", "edits"), source.name)
    sizes = whole["model"]
    if not isinstance(sizes, dict) or any(type(sizes.get(name)) is not int for name in SIZES):
        raise InterventionError(f"{source.name}: model must name {', '.join(SIZES)} as whole numbers.")
    if not isinstance(whole["edits"], list):
        raise InterventionError(f"{source.name}: edits must be a list.")
    return whole


def _check_keys(row: Mapping[str, Any], known: tuple[str, ...], needed: tuple[str, ...], where: str) -> None:
    for key in (*row, *needed):
        if key not in known:
            raise InterventionError(f"{where}: {unknown('key', key, known)}")
        if key not in row:
            raise InterventionError(f"{where}: {key!r} is missing.")


def _tensors(source: Path, said: Any) -> dict[str, Tensor]:
    if said is None:
        return {}
    _check_keys(said, ("file", "sha256"), ("file", "sha256"), f"{source.name}: tensors")
    name = str(said["file"])
    if Path(name).name != name:
        raise InterventionError(f"{source.name}: its tensors lie beside it, so {name!r} must be a file's bare name.")
    beside = source.with_name(name)
    try:
        data = beside.read_bytes()
    except OSError as error:
        raise InterventionError(
            f"{source.name} needs its tensors in {name}, which cannot be read ({error.strerror or error}). Keep both "
            "files together."
        ) from error
    if hashlib.sha256(data).hexdigest() != said["sha256"]:
        raise InterventionError(f"{name} does not hold the tensors of {source.name}: its hash is another one.")
    from safetensors.torch import load

    return load(data)


def _written(number: int, edit: Edit | Cut, tensors: dict[str, Tensor]) -> dict[str, Any]:
    where = f"edit {number}"
    if isinstance(edit, Cut):
        row = {name: getattr(edit, name) for name in _CUT[1:]}
        return {"kind": "cut"} | row | {name: _roles(row[name], where) for name in ("query", "key")}
    site = edit.site
    row: dict[str, Any] = {"kind": edit.kind, "component": site.component}
    row |= {} if site.layer is None else {"layer": int(site.layer)}
    row |= {} if site.heads is None else {"head": site.head if isinstance(site.head, int) else list(site.heads)}
    row["positions"] = _roles(site.positions, where)
    if edit.kind in ("scale", "noise"):
        row["amount"] = float(edit.amount) if not isinstance(edit.amount, Tensor) else _kept(edit.amount, tensors)
    if edit.value is not None:
        row["value"] = _kept(edit.value, tensors)
    return row | ({"seed": edit.seed} if edit.kind in ("noise", "resample") else {})


def _kept(value: Tensor, tensors: dict[str, Tensor]) -> str:
    name = f"tensor{len(tensors)}"
    tensors[name] = value.detach().cpu().contiguous().clone()
    return name


def _roles(positions: Any, where: str) -> str | None:
    if positions is None or isinstance(positions, str):
        return positions
    raise InterventionError(
        f"{where} names positions by number, which mean something in one layout only; a plan file is applied to any "
        "clip. Name roles, such as 'suffix', 'generation' or 'video|audio'."
    )


def _read(number: int, row: Any, tensors: Mapping[str, Tensor], name: str) -> Edit | Cut:
    where = f"{name}: edit {number}"
    if not isinstance(row, dict):
        raise InterventionError(f"{where} must be an object with a kind.")
    kind = row.get("kind")
    if kind not in KINDS:
        raise InterventionError(f"{where}: {unknown('kind of edit', kind, KINDS)}")
    try:
        return _read_cut(row, where) if kind == "cut" else _read_edit(row, tensors, where)
    except AvLensError as error:
        raise InterventionError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def _read_edit(row: dict[str, Any], tensors: Mapping[str, Tensor], where: str) -> Edit:
    kind = row["kind"]
    _check_keys(row, _EDIT, ("component", "positions", *filter(None, [_NEEDED.get(kind)])), where)
    layer, head = _typed(row, "layer", int), row.get("head")
    head = head if head is None or type(head) is int else tuple(_whole(head, where))
    site = Site(str(row["component"]), layer, head, _known_roles(row["positions"], where))
    value = _looked_up(row["value"], tensors, where) if "value" in row else None
    amount = row.get("amount", 0.0)
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    amount = float(amount) if number else _looked_up(amount, tensors, where)
    if isinstance(amount, float) and not math.isfinite(amount):
        raise InterventionError(f"{where}: amount {amount} is not finite.")
    return Edit(kind, site, value, amount, _typed(row, "seed", int) or 0)


def _read_cut(row: dict[str, Any], where: str) -> Cut:
    _check_keys(row, _CUT, ("query", "key"), where)
    listed = (row.get(name) for name in ("layers", "heads"))
    layers, heads = (None if found is None else tuple(_whole(found, where)) for found in listed)
    if layers == ():
        raise InterventionError(f"{where}: no layer is named; leave layers out for all.")
    query, key = (_known_roles(row[name], where) for name in ("query", "key"))
    flags = [_typed(row, name, bool) for name in ("renormalize", "include_generation")]
    return Cut(query, key, layers, heads, *(True if flag is None else flag for flag in flags))


def _typed(row: Mapping[str, Any], name: str, kind: Callable[..., Any]) -> Any:
    found = row.get(name)
    if found is not None and type(found) is not kind:
        raise InterventionError(f"{name} is {found!r}; wanted {'a whole number' if kind is int else 'true or false'}.")
    return found


def _whole(found: Any, where: str) -> list[int]:
    if not isinstance(found, list) or any(type(item) is not int for item in found):
        raise InterventionError(f"{where}: {found!r} should be a list of whole numbers.")
    return found


def _known_roles(found: Any, where: str) -> str | None:
    if found is None:
        return None
    for role in found.split("|") if isinstance(found, str) else [found]:
        if not isinstance(role, str) or role.strip() not in (*ROLES, *GROUPS):
            raise InterventionError(f"{where}: {unknown('role', role, (*ROLES, *GROUPS))}")
    return found


def _looked_up(name: Any, tensors: Mapping[str, Tensor], where: str) -> Tensor:
    if name not in tensors:
        raise InterventionError(f"{where}: {unknown('tensor', name, tensors)}")
    found = tensors[name]
    if not bool(torch.isfinite(found).all()):
        raise InterventionError(f"{where}: {name} holds numbers that are not finite.")
    return found
