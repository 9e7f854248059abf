"""The house rules: one-way imports, small files and functions, no shadowed verbs, honest docstrings, a light import."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import av_lens

ROOT = Path(av_lens.__file__).parent
REPOSITORY = ROOT.parent
FILES = sorted(ROOT.rglob("*.py"))

# Lowest first: a room may import from itself and from every room before it.
ORDER = [
    {"errors", "brief", "checks", "checkpoints", "colours", "memory", "spans", "upstairs", "whole_files"},
    {"media", "results"},
    {"families"},
    {"inputs"},
    {"interventions"},
    {"core"},
    {"metrics"},
    {"replay"},
    {"model"},
    {"bring"},
    {"methods"},
    {"isolation"},
    {"organism"},
    {"lab"},
    {"cli"},
]
BESIDE = {"plots": {*ORDER[0], "results", "media"} - {"checkpoints"}}
BESIDE["reports"] = BESIDE["plots"] | {"plots"}
ALSO = {"isolation": {"reports"}, "lab": {"plots", "reports"}, "cli": {"plots", "reports"}}
# The floors of a room, lowest first: its folders may import from their own and those before.
FLOORS = {"isolation": ["measuring", "naming", "sets", "explaining", "running"]}
# Where modules are looked up by a name that is data: a family's own file, a command's function.
BY_NAME = {"upstairs.py", "families/registry.py", "cli/toolbox.py"}


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def allowed(name: str) -> set[str]:
    if name == "__init__":
        return {r for level in ORDER for r in level} | {"plots", "reports"}
    if name in BESIDE:
        return BESIDE[name] | {name}
    found: set[str] = {name}
    for level in ORDER:
        if name in level:
            return found | level if name in ORDER[0] else found | ALSO.get(name, set())
        found |= level
    raise AssertionError(f"av_lens/{name} is not a room of the house: add it to ORDER or move the file")


def imported(path: Path) -> set[str]:
    """Every dotted name of the package that a file imports, or looks up by `import_module` or `upstairs`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: write the whole path, not a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            known = isinstance(node.args[0], ast.Constant)
            assert known or str(path.relative_to(ROOT)) in BY_NAME, f"{path}: say which module is imported"
            names = [str(ast.literal_eval(node.args[0]))] if known else []
        found |= {name for name in names if name.split(".")[0] == "av_lens" and "." in name}
    return found


def told(offences: list[str]) -> str:
    return f"{len(offences)} offences:\n" + "\n".join(offences)


def up(own: tuple[str, ...], name: str) -> str:
    """What is wrong with a file's importing a name; "" where nothing is."""
    parts = name.split(".")[1:]
    if not (ROOT / parts[0]).exists() and not (ROOT / f"{parts[0]}.py").exists():
        return ""
    if parts[0] not in allowed(own[0]):
        return "it comes after its room"
    private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
    if parts[0] != own[0] and private:
        return "another room's own business"
    floors = FLOORS.get(own[0], [])
    if parts[0] == own[0] and len(own) > 2 and parts[1] in floors and floors.index(parts[1]) > floors.index(own[1]):
        return "a floor up"
    return ""


def test_imports_point_one_way():
    offences = []
    for path in FILES:
        own = path.relative_to(ROOT).with_suffix("").parts
        wrong = {name: up(own, name) for name in sorted(imported(path))}
        offences += [f"{path.relative_to(ROOT)} imports {name}: {why}" for name, why in wrong.items() if why]
    assert not offences, told(offences)


def test_siblings_never_import_each_other():
    offences = []
    for path in [path for package in ("methods", "plots") for path in (ROOT / package).rglob("*.py")]:
        package, *own = path.relative_to(ROOT).with_suffix("").parts
        if own[0] == "__init__" or own[0].startswith("_"):
            continue
        for name in sorted(imported(path)):
            parts = name.split(".")[1:]
            if parts[0] == package and len(parts) > 1:
                shared = parts[1] == own[0] or parts[1] == "shared" or parts[1].startswith("_")
                offences += [] if shared else [f"{path.relative_to(ROOT)} imports its sibling {name}"]
    assert not offences, told(offences)


def test_no_room_is_crowded():
    folders = [path.parent for path in FILES if path.stem != "__init__"]
    held = {folder: folders.count(folder) for folder in set(folders)}
    offences = [f"{folder.relative_to(ROOT)} holds {n} files: make rooms of it" for folder, n in held.items() if n > 20]
    assert not offences, told(offences)


def test_test_files_have_names_of_their_own():
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert not (twice := {name for name in names if names.count(name) > 1}), f"pytest imports the first alone: {twice}"


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            found -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return found


def test_files_and_functions_stay_small():
    offences = []
    for path in FILES:
        text, named = path.read_text(), path.relative_to(ROOT)
        tree = ast.parse(text)
        lines = code_lines(text, tree)
        if len(lines) > 300:
            offences.append(f"{named} has {len(lines)} lines of code, more than 300")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = len(lines & set(range(node.lineno, (node.end_lineno or 0) + 1)))
                if length > 60:
                    offences.append(f"{named}: {node.name} has {length} lines of code; a function does one thing")
    assert not offences, told(offences)


def test_no_module_carries_a_public_verbs_name():
    verbs = {name for name in av_lens.__all__ if name.islower() and name not in av_lens._ROOMS} - {"__version__"}
    for path in FILES:
        names = {path.stem} | ({path.parent.name} if path.parent != ROOT else set())
        assert not names & verbs, f"{path} shadows the public verb {names & verbs}"


def test_every_submodule_imports_and_every_public_name_is_there():
    assert set(av_lens.__all__) == {"__version__", *av_lens._HOMES, *av_lens._ROOMS}
    imports = [n for n in ast.walk(ast.parse((ROOT / "__init__.py").read_text())) if isinstance(n, ast.ImportFrom)]
    told = {alias.asname for node in imports for alias in node.names}
    assert told - {None} == {*av_lens._HOMES, *av_lens._ROOMS}, "type checkers are told of other names"
    for path in FILES:
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        importlib.import_module(".".join(part for part in parts if part != "__init__"))
    for name, home in av_lens._HOMES.items():
        value = getattr(av_lens, name)
        assert callable(value) or inspect.isclass(value), f"{name} is neither a function nor a class"
        assert getattr(value, "__module__", "").startswith(f"av_lens.{home}"), f"{name} does not live in {home}"
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"
    for room_name in av_lens._ROOMS:
        assert inspect.ismodule(getattr(av_lens, room_name))


def test_public_names_are_few_and_the_others_are_told():
    assert len(av_lens.__all__) <= 50
    with pytest.raises(AttributeError, match=r"write av_lens\.metrics\.kl\."):
        _ = av_lens.kl


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean 'isolate'"):
        _ = av_lens.isolat


def public_functions(path: Path):
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for child in node.body:
                if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                    yield f"{node.name}.{child.name}", child


def documented(doc: str) -> list[str]:
    """The names under a docstring's "Args:"."""
    section = re.split(r"\n(?=\S)", doc.split("Args:", 1)[1])[0]
    indent = min(len(line) - len(line.lstrip()) for line in section.splitlines() if line.strip())
    return re.findall(rf"^ {{{indent}}}\*{{0,2}}(\w+)(?: \([^)]*\))?:", section, flags=re.M)


def test_docstring_args_are_the_signatures():
    offences = []
    for path in FILES:
        for name, node in public_functions(path):
            doc = ast.get_docstring(node)
            if not doc or "Args:" not in doc:
                continue
            a, said = node.args, documented(doc)
            real = [x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs] if x.arg not in ("self", "cls")]
            real += [x.arg for x in (a.vararg, a.kwarg) if x]
            if set(said) != set(real):
                offences.append(f"{path.relative_to(ROOT)}: {name} documents {said}, its signature has {real}")
    assert not offences, told(offences)


def test_the_top_level_is_as_fixed():
    allowed_names = {"av_lens", "notebooks", "tests", "docs", "pyproject.toml", "README.md"}
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= allowed_names


def test_importing_is_silent_and_light():
    heavy = ["plotly", "circuitsvis", "av", "sklearn", "torch", "xarray", "pandas", "transformers"]
    statement = f"import sys, av_lens; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True)
    said = done.stdout + done.stderr
    assert said.strip() == "[]", f"import av_lens printed or loaded: {said}"
