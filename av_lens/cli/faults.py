"""What is said without torch: what can be loaded, the functions' defaults, and what is refused at once.

Signatures, and the choices of some words, are read from the source: importing a function to ask it would load torch.
"""

import ast
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from av_lens.checkpoints import check_checkpoint, index
from av_lens.checks import near_file, require_choice
from av_lens.errors import AvLensError, InputError
from av_lens.whole_files import read_object


def short_names() -> list[tuple[str, str]]:
    """List the organisms that ship with the package."""
    return [(name, str(entry.get("summary", ""))) for name, entry in index().items()]


def families() -> list[tuple[str, str]]:
    """List the architectures that can be opened: those with an adapter of ours, and other packages' families."""
    found = {point.name: "any checkpoint of this class" for point in entry_points(group="av_lens.families")}
    for path in sorted((_ROOT / "families").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Family":
                facts = {word.arg: word.value for word in node.keywords}
                found[ast.unparse(facts["model_class"])] = ast.literal_eval(facts["checkpoints"])
    return sorted(found.items())


_ROOT = Path(__file__).resolve().parents[1]


def proofs() -> dict[str, str]:
    """What was proved of each architecture on its tiny checkpoint, in words (`python .ci/models.py` proves it)."""
    record = read_object(_ROOT / "families" / "proved.json")
    return {one["class"]: verdict(one["checks"]) for one in record["families"].values()}


def verdict(checks: Sequence[Sequence[Any]]) -> str:
    """How many guarantees held, which did not, and how replays run; a check is its name, state and finding."""
    states = {name: held for name, held, _ in checks if held is not None}
    failed = [name for name, held in states.items() if not held]
    replays = next((found for name, _, found in checks if name == "replay is the hooked run"), "").partition("; ")[2]
    said = f"{len(states) - len(failed)} of {len(states)} guarantees"
    return "; ".join([said, *(f"not: {name}" for name in failed), *([f"replay {replays}"] if replays else [])])


@cache
def signature(module: str, function: str) -> dict[str, Any]:
    """Read all literal defaults of one of our functions."""
    arguments = definition(module, function).args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    given = [*arguments.defaults, *arguments.kw_defaults]
    found: dict[str, Any] = {}
    for arg, value in zip(every[len(every) - len(given) :], given, strict=True):
        with suppress(ValueError):
            if value is not None:
                found[arg.arg] = ast.literal_eval(value)
    return found


@cache
def constant(module: str, name: str) -> tuple[str, ...]:
    """Read the words of a constant of one of our modules, without importing it."""
    for node in _body(module, name):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if ast.unparse(target) == name:
                return tuple(ast.literal_eval(node.value))
    raise AvLensError(f"av_lens.{module} defines no constant {name}.")


@cache
def definition(module: str, function: str) -> ast.FunctionDef:
    """Read one of our functions without importing it."""
    body = _body(module, function)
    *owners, last = function.split(".")
    for owner in owners:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner), [])
    node = next((node for node in reversed(body) if isinstance(node, ast.FunctionDef) and node.name == last), None)
    if node is None:
        raise AvLensError(f"av_lens.{module} defines no function {function}.")
    return node


def _body(module: str, name: str) -> list[ast.stmt]:
    path = _ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not path.exists():
        raise AvLensError(f"there is no module av_lens.{module} to read the defaults of {name} from.")
    return ast.parse(path.read_text(encoding="utf-8")).body


_CHOICES: dict[str, tuple[str, str]] = {
    "layout": ("inputs.conflict", "LAYOUTS"),
    "cell": ("inputs.conflict", "CELLS"),
    "gate": ("isolation.running.preparing", "GATES"),
    "design": ("inputs.designs", "DESIGNS"),
    "site": ("isolation.measuring.engine", "SITES"),
    "protocol": ("isolation.running.dealt", "EDITIONS"),
    "suppressed": ("isolation.measuring.cells", "SUPPRESSED"),
}


def all_told(*checks: Callable[[], Any]) -> list[Any]:
    """Make every check, and tell all that failed in one error."""
    found: list[Any] = []
    faults: list[AvLensError] = []
    for check in checks:
        try:
            found.append(check())
        except AvLensError as fault:
            faults.append(fault)
    if faults:
        raise faults[0] if len(faults) == 1 else AvLensError("\n".join(map(str, faults)))
    return found


def words(*, dtype: str | None = None, **given: Iterable[str]) -> None:
    """Refuse words that are not among the choices."""
    asked = [(kind, word, constant(*_CHOICES[kind])) for kind, listed in given.items() for word in listed]
    asked += [] if dtype is None else [("dtype", dtype, ("float32", "bfloat16", "float16"))]
    all_told(*(partial(require_choice, *one) for one in asked))


def manifest(path: Path, limit: int | None) -> list[Any]:
    """Read a manifest, with the headers of its files."""
    from av_lens.media.manifest import read_manifest

    found, _ = all_told(lambda: read_manifest(path), lambda: _limit(limit))
    return found[:limit]


def _limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit} leaves no conflict; leave it out for all.")


def is_run(name: str) -> bool:
    """Say whether a name is the folder of a run of `isolate`, and no model's."""
    return any((Path(name) / inside / "isolation.json").is_file() for inside in ("", "numbers"))


def model_of_run(name: str) -> str:
    """Name the model that a run was made of."""
    record = next(place for inside in ("", "numbers") if (place := Path(name) / inside / "isolation.json").is_file())
    return str(dict(read_object(record).get("provenance") or {}).get("model", ""))


def model(name: str) -> None:
    """Refuse a model's name, or a folder, that cannot be loaded."""
    check_checkpoint(name)


def clip(path: Path, start: float, end: float | None) -> None:
    """Refuse a media file whose header cannot be read."""
    from av_lens.media.source import ClipFile

    ClipFile(str(path), start=start, end=end).probe()


def place(path: Path) -> None:
    """Refuse a file to be written whose folder is not there."""
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.absolute().parent}. Make it first.")


def file(path: Path | None, what: str) -> None:
    """Refuse a file that is not there."""
    if path is not None and not path.is_file():
        raise InputError(f"cannot read the {what} {path}: no such file. {near_file(path)}")
