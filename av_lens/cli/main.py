"""The command line: `av-lens demo | pairs | isolate | status | compare | inspect | generate | check | train | plant`.

What av_lens or the system refuses is one message, with exit code 2 and no traceback (`--debug` shows it). Work that
stopped at its budget, at a full disk or at a clip that is gone exits with 3, by a signal with 128 and its number (130
for Ctrl-C); the same command goes on. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import errno
import signal
import threading
from contextlib import ExitStack, suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from av_lens import __version__
from av_lens.cli import commands, console, studies, toolbox
from av_lens.errors import AvLensError, UnfinishedError

KEEPING = ("demo", "isolate", "compare", "train", "plant", "plantbench", "seeds", "type-one")
"""Commands that go on from what an interrupted one had finished."""


class _Stops(ExitStack):
    """Makes SIGTERM and a closed terminal what Ctrl-C is, while a command runs; a signal that is ignored stays so."""

    code = 0

    def __enter__(self) -> _Stops:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self.callback(signal.signal, number, signal.signal(number, self._stop))
        return self

    def _stop(self, number: int, frame: object) -> None:
        del frame
        self.code = 128 + number
        raise KeyboardInterrupt


class _Group(TyperGroup):
    """The group of commands, which turns what av_lens or the system refuses into one message."""

    def invoke(self, ctx: Any) -> Any:
        stops = _Stops()
        try:
            with stops:
                found = super().invoke(ctx)
        except UnfinishedError as stopped:
            _end(ctx, str(stopped), 3)
        except (AvLensError, OSError) as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:  # click ends these quietly
                raise
            with suppress(OSError):
                console.fail(error)
            ctx.exit(2)
        except KeyboardInterrupt:
            kept = "what was finished is kept, the same command goes on from there."
            if ctx.invoked_subcommand not in KEEPING:
                kept = "nothing of it is kept, the same command begins anew."
            _end(ctx, f"stopped; {kept}", stops.code or 130)
        else:
            if stops.code:  # a method that was stopped shows what it had done
                _end(ctx, "stopped; what is shown holds what was done until then.", stops.code)
            return found


def _end(ctx: Any, said: str, code: int) -> None:
    with suppress(OSError):  # the terminal may be gone
        console.ERR.print(said, markup=False, soft_wrap=True)
    ctx.exit(code)


app = typer.Typer(
    cls=_Group,
    name="av-lens",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find the attention heads that keep an audio-visual language model from saying what it hears.",
)


def _say_version(asked: bool) -> bool:
    if asked:
        console.OUT.print(f"av-lens {__version__}")
        raise typer.Exit
    return asked


_VERSION = typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version.")


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, _VERSION] = False,
) -> None:
    """Find the attention heads that keep an audio-visual language model from saying what it hears."""


_WORK = (
    commands.demo,
    commands.pairs,
    commands.isolate,
    studies.status,
    commands.compare,
    commands.inspect,
    commands.generate,
    commands.check,
)
_STUDIES = (studies.bench, studies.plantbench, studies.seeds, studies.true_shapes, studies.type_one)
for command in (*_WORK, commands.models, studies.train, commands.plant, *_STUDIES):
    app.command()(command)
for method in toolbox.METHODS:
    app.command(method.command, rich_help_panel="Methods")(toolbox.command_of(method))


def run() -> None:
    """Run the command line: the entry point `av-lens`."""
    app()
