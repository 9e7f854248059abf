"""The command line: `av-lens demo | isolate | inspect | generate | models | train | plant`.

Every default is read from the function that does the work; what av_lens refuses is printed as one message, with exit
code 2 and no traceback (`--debug` shows it). Work that stopped at its budget exits with 3, an interrupt with 130; the
same command goes on from what was finished. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from av_lens import __version__
from av_lens.cli import commands, console, studies, toolbox
from av_lens.errors import AvLensError, UnfinishedError


class _Group(TyperGroup):
    """The group of commands, which turns what av_lens refuses into one message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UnfinishedError as stopped:
            console.ERR.print(str(stopped), markup=False, soft_wrap=True)
            ctx.exit(3)
        except AvLensError as error:
            if ctx.params.get("debug"):
                raise
            console.fail(error)
            ctx.exit(2)
        except KeyboardInterrupt:
            console.ERR.print("stopped; what was finished is kept, the same command goes on from there.")
            ctx.exit(130)


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


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find the attention heads that keep an audio-visual language model from saying what it hears."""


app.command()(commands.demo)
app.command()(commands.isolate)
app.command()(commands.inspect)
app.command()(commands.generate)
app.command()(commands.models)
app.command()(commands.train)
app.command()(commands.plant)
for study in (studies.bench, studies.plantbench, studies.seeds, studies.true_shapes):
    app.command()(study)
for method in toolbox.METHODS:
    app.command(method.command, rich_help_panel="Methods")(toolbox.command_of(method))


def run() -> None:
    """Run the command line: the entry point `av-lens`."""
    app()
