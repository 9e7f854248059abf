"""One command for each method of the toolbox, its flags read from the function's signature and docstring.

What a method is handed is said by its *feed*: conflicts, one cell of each (`--cell`), or two cells as an aligned pair
(`--clean`, `--corrupt`). A flag that is left out is not passed on, so defaults are the functions' own.
"""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from av_lens.cli import console, faults
from av_lens.cli.faults import definition
from av_lens.errors import InputError
from av_lens.whole_files import make_folder, write_whole

ROWS = 20
_HANDLED = frozenset(("metric", "progress", "base"))
_KINDS = {"str": str, "int": int, "float": float, "bool": bool}


class Method(NamedTuple):
    """One method as a command."""

    command: str  # its name on the command line
    module: str  # where the function lives, below `av_lens`
    function: str  # the function
    feed: str  # "pair", "cell", "conflicts", or "none" for a method that reads the model alone


METHODS = (
    Method("patch", "methods.activation_patching", "patch", "pair"),
    Method("path-patch", "methods.path_patching.patching", "path_patch", "pair"),
    Method("direct-attribution", "methods.attribution", "direct_attribution", "cell"),
    Method("logit-lens", "methods.lens", "logit_lens", "conflicts"),
    Method("attention-flow", "methods.attention", "attention_flow", "cell"),
    Method("find-sinks", "methods.sinks", "find_sinks", "cell"),
    Method("knockout", "methods.knockouts", "knockout", "conflicts"),
    Method("attribution-patch", "methods.gradients", "attribution_patch", "pair"),
    Method("edge-attribution", "methods.edges", "edge_attribution", "pair"),
    Method("find-circuit", "methods.circuits.finding", "find_circuit", "conflicts"),
    Method("causal-trace", "methods.tracing", "causal_trace", "conflicts"),
    Method("probe", "methods.probes", "probe", "conflicts"),
    Method("caption", "methods.captions.captioning", "caption", "conflicts"),
    Method("weight-change", "methods.base_model.grafting", "weight_change", "none"),
    Method("graft", "methods.base_model.grafting", "graft", "conflicts"),
    Method("base-shift", "methods.base_model.inheritance", "base_shift", "cell"),
    Method("steer", "methods.steering", "steer", "cell"),
)


_NEEDED: Any = inspect.Parameter.empty
_ARGUMENTS: dict[str, tuple[Any, Any, str]] = {
    "model": (str, _NEEDED, "A short name, a hub name or a local folder."),
    "pairs": (Path, _NEEDED, "The manifest: one conflict a line, as jsonl."),
    "limit": (int | None, None, "Only the first so many conflicts."),
    "layout": (str, "in_video", "in_video (sound woven into the video) or separate."),
    "out": (Path | None, None, "A folder for the numbers and the figure."),
    "device": (str | None, None, "cpu or cuda."),
    "dtype": (str | None, None, "float32, bfloat16 or float16."),
    "cell": (str, "va", "Which cell: picture first, sound second."),
    "clean": (str, "blank_a", "The cell of the clean run."),
    "corrupt": (str, "va", "The cell of the corrupt run."),
    "base": (str, _NEEDED, "The base model: a short name, hub name or folder."),
}
"""What commands of methods share: its type, its default, and what help says of it."""
_ALWAYS, _LISTED = ("out", "device", "dtype"), ("pairs", "limit", "layout", "out", "device", "dtype")
_FED = {"none": _ALWAYS, "conflicts": _LISTED, "cell": (*_LISTED, "cell"), "pair": (*_LISTED, "clean", "corrupt")}


def flags_of(method: Method) -> list[inspect.Parameter]:
    """Read a function's options from its source, each as a flag with what the docstring says of it."""
    node = definition(method.module, method.function)
    said = _said(ast.get_docstring(node) or "")
    found: list[inspect.Parameter] = []
    for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if arg.arg in _HANDLED or arg.annotation is None:
            continue
        written = ast.unparse(arg.annotation)
        several = re.search(r"Sequence\[(str|int|float)\b", written)
        plain = re.search(r"(?<![\[\w])(bool|float|int|str)\b", re.sub(r"Sequence\[[^\]]*\]", "", written))
        named = plain or several
        if named is None and isinstance(default, ast.Constant) and isinstance(default.value, str):
            named = re.search("(str)", "str")  # takes more than text, but text too
        if named is None:
            continue
        kind = _KINDS["float" if re.search(r"\bfloat\b", named.string) and named[1] == "int" else named[1]]
        found.append(_parameter(arg.arg, kind, said.get(arg.arg, ""), default, several=bool(several and not plain)))
    return found


def _said(docstring: str) -> dict[str, str]:
    """What the docstring's Args say of each argument."""
    listed = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", listed, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def command_of(method: Method) -> Callable[..., None]:
    """Make the command of a method."""
    flags, shared = flags_of(method), _shared(method)
    own = {flag.name for flag in flags}

    def command(**given: Any) -> None:
        options = {name: value for name, value in given.items() if name in own and value is not None and value != []}
        _run(method, options, **{name: given[name] for name in shared})

    node = definition(method.module, method.function)
    command.__doc__ = (ast.get_docstring(node) or "").splitlines()[0]
    parameters = [*shared.values(), *(flag for flag in flags if flag.name not in shared)]
    parameters.sort(key=lambda parameter: parameter.default is not _NEEDED)
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def _parameter(name: str, kind: Any, said: str, default: ast.expr | None, *, several: bool) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    if several:
        kind, said = list[kind], said + " May be given several times."
    elif kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    written = "None" if default is None else ast.unparse(default).strip("'")
    option = typer.Option(flag, help=said, show_default=False if written in ("None", "()") else written)
    needed, taken = (_NEEDED, kind) if default is None else (None, kind | None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=needed, annotation=Annotated[taken, option])


def _shared(method: Method) -> dict[str, inspect.Parameter]:
    """The arguments that every method's command has."""
    own = {arg.arg for arg in definition(method.module, method.function).args.kwonlyargs}
    named = (*_FED[method.feed], *(["base"] if "base" in own else []))
    made: dict[str, inspect.Parameter] = {}
    for name in ("model", *named):
        kind, default, text = _ARGUMENTS[name]
        door: Any = typer.Argument if name in ("model", "pairs") else typer.Option
        annotation = Annotated[kind, door(help=text)]
        made[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    return made


def _run(method: Method, options: dict[str, Any], **shared: Any) -> None:
    """Check what is cheap, load, feed, run, show and save."""
    lines, *_ = faults.all_told(
        lambda: faults.manifest(shared["pairs"], shared["limit"]) if "pairs" in shared else [],
        *(lambda name=shared[name]: faults.model(name) for name in ("model", "base") if name in shared),
        lambda: faults.words(
            dtype=shared["dtype"],
            layout=[shared["layout"]] if "layout" in shared else [],
            cell=[shared[name] for name in ("cell", "clean", "corrupt") if name in shared],
        ),
    )
    from importlib import import_module

    from av_lens.inputs.conflict import conflicts_of
    from av_lens.model import load

    listed = conflicts_of(lines)
    console.quiet_loading()
    opened = {"device": shared["device"], "dtype": shared["dtype"]}
    with console.OUT.status(f"loading {shared['model']}"):
        model = load(shared["model"], **opened)
    function = getattr(import_module(f"av_lens.{method.module}"), method.function)
    known = inspect.signature(function).parameters
    if "metric" in known and (method.feed != "conflicts" or known["metric"].default is inspect.Parameter.empty):
        options = options | {"metric": _metric(listed, model)}
    if "base" in shared:
        options = options | {"base": load(shared["base"], **opened)}
    fed = _feed(method.feed, model, listed, shared)
    with console.bars() as bars:
        if "progress" in known:
            options = options | {"progress": bars}
        found = function(model, *fed, **options)
    _show(found)
    if shared["out"] is not None:
        _save(found, shared["out"], method.command)


def _metric(listed: list[Any], model: Any) -> Any:
    """The sound's answer against the picture's; words that it does not know are told of all conflicts at once."""
    from av_lens.inputs.answers import words_of
    from av_lens.metrics import each, logit_diff
    from av_lens.metrics.forms import known_forms

    wrong: list[str] = []
    for conflict in listed:
        try:
            for word in [word for answer in conflict.answers for word in words_of(answer)]:
                known_forms(model, word)
        except InputError as fault:
            wrong.append(f"{conflict.id}: {fault}")
    if wrong:
        told = "\n  ".join(wrong)
        raise InputError(f"the answers of {len(wrong)} of {len(listed)} conflicts cannot be scored:\n  {told}")
    heard, seen = (each([conflict.answers[side] for conflict in listed]) for side in (0, 1))
    return logit_diff(heard, seen)


def _feed(feed: str, model: Any, listed: list[Any], shared: dict[str, Any]) -> tuple[Any, ...]:
    from av_lens.inputs import Pair

    if feed in ("none", "conflicts"):
        return (listed,) if feed == "conflicts" else ()
    cells = [conflict.cells(model, layout=shared["layout"]) for conflict in listed]
    if feed == "cell":
        return ([one[shared["cell"]] for one in cells],)
    return ([Pair(clean=one[shared["clean"]], corrupt=one[shared["corrupt"]]) for one in cells],)


def _show(found: Any) -> None:
    """Print the largest effects, or what the result says of itself."""
    console.OUT.print(repr(found), markup=False, soft_wrap=True)
    frame = summary(found)
    if frame is not None:
        console.OUT.print(console.table(list(frame.columns), frame.head(ROWS).itertuples(index=False)))
        if len(frame) > ROWS:
            console.OUT.print(f"... and {len(frame) - ROWS} more; --out keeps them all")


def summary(found: Any) -> Any:
    """Bring a result to a table, the largest mean effects first."""
    from av_lens.results import Grid

    if not isinstance(found, Grid):
        made = getattr(found, "top", None) or getattr(found, "to_frame", None)
        return None if made is None else made().rename(columns=str)
    frame = found.mean().to_series().rename("mean").reset_index()
    bounds = found.interval()
    frame["low"], frame["high"] = (bounds.sel(bound=side).values.reshape(-1) for side in ("low", "high"))
    frame = frame.sort_values("mean", key=abs, ascending=False, na_position="last")
    return frame.reset_index(drop=True)


def _save(found: Any, out: Path, name: str) -> None:
    """Save the result, its table, and its figure where it has one."""
    make_folder(out)
    if hasattr(found, "save"):
        console.OUT.print(f"wrote {found.save(out / name)}", markup=False, soft_wrap=True)
    frame = summary(found)
    if frame is not None:
        write_whole(out / f"{name}.csv", frame.to_csv(index=False))
    if hasattr(found, "plot"):
        write_whole(out / f"{name}.html", found.plot().to_html(include_plotlyjs=True))
