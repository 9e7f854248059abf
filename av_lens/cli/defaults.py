"""The defaults of the command line are those of the functions: read from their source, so that help needs no torch.

A default typed twice drifts. Importing the functions to ask them would load torch and take seconds before `--help` says
a word, so the signature is read from the file instead. A test compares every default here with the live signature.
"""

from __future__ import annotations

import ast
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from av_lens.errors import AvLensError

_ROOT = Path(__file__).resolve().parents[1]


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
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
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
