"""The commands, each a thin door to one function: arguments in, progress bars while it works, a table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from av_lens.cli import console
from av_lens.cli.defaults import default
from av_lens.errors import InputError

_DEMO = ("studies.demonstration", "run_demo")
_MODEL = Annotated[
    str, typer.Argument(help="A short name (`av-lens models` lists them), a hub name or a local folder.")
]
_DEVICE = Annotated[str | None, typer.Option(help="cpu or cuda; left out: cuda if the model fits, else cpu.")]
_DTYPE = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; left out: float32 below 1 B parameters on a CPU.")
]


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write; a finished part of an earlier run is kept.")] = Path(
        default(*_DEMO, "out")
    ),
    conflicts: Annotated[
        int, typer.Option(help="How many conflicts of sound and picture; below 120 the report is exploratory.")
    ] = default(*_DEMO, "conflicts"),
    seed: Annotated[int, typer.Option(help="Draws the clips, the halves, the bootstrap.")] = default(*_DEMO, "seed"),
) -> None:
    """Calibrate on planted heads, then isolate the heads of av-tiny that suppress the sound, and write a report."""
    from av_lens.studies.demonstration import run_demo

    with console.Bars() as bars:
        shown = run_demo(out, conflicts=conflicts, seed=seed, progress=bars)
    console.OUT.print()
    console.OUT.print(f"[bold]calibration[/bold]  {shown.calibration.sentence}")
    _say_found(shown.found)
    _say_path(shown.report)


def isolate(
    model: _MODEL,
    pairs: Annotated[Path, typer.Argument(help="The manifest: one conflict a line, as jsonl.")],
    out: Annotated[Path, typer.Option(help="The folder for the report, the figures and the numbers.")],
    gate: Annotated[
        str, typer.Option(help="stop: end where there is no gap to explain; report: go on and stamp every page.")
    ] = default("isolation.search", "isolate", "gate"),
    seed: Annotated[int, typer.Option(help="Deals the halves, draws the bootstrap and the random sets.")] = default(
        "isolation.search", "isolate", "seed"
    ),
    device: _DEVICE = None,
    dtype: _DTYPE = None,
) -> None:
    """Find the heads of MODEL that keep the sound of the conflicts in PAIRS from being said."""
    from av_lens.inputs import conflicts
    from av_lens.studies.isolations import isolate_into

    listed = conflicts(pairs)
    loaded = _load(model, device=device, dtype=dtype)
    with console.Bars() as bars:
        found, report = isolate_into(out, loaded, listed, name=model, gate=gate, seed=seed, progress=bars)
    _say_found(found)
    _say_path(report)


def inspect(
    model: _MODEL,
    clip: Annotated[Path, typer.Argument(help="Any video, sound or image.")],
    question: Annotated[str, typer.Option(help="What the model is asked.")],
    sound: Annotated[str, typer.Option(help="auto, in_video (interleaved), separate, or none.")] = default(
        "inputs.encoding", "Encoder.encode", "sound"
    ),
    picture: Annotated[str, typer.Option(help="auto, video, image, or none.")] = default(
        "inputs.encoding", "Encoder.encode", "picture"
    ),
    fps: Annotated[float, typer.Option(help="Frames per second that the model is shown.")] = default(
        "inputs.encoding", "Encoder.encode", "fps"
    ),
    start: Annotated[float, typer.Option(help="Where in the file to begin, in seconds.")] = default(
        "media.reading", "load_clip", "start"
    ),
    end: Annotated[float | None, typer.Option(help="Where in the file to stop, in seconds.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="One row per position instead of one per run of equal roles.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the table of all positions to this file.")] = None,
) -> None:
    """Show what each position of the input is: its role, its token, its seconds and its patch."""
    from av_lens.cli.positions import by_position, by_run
    from av_lens.media import load_clip

    read = load_clip(str(clip), start=start, end=end)
    loaded = _load(model, device="cpu", dtype=None)
    x = loaded.encode(read, question, sound=_absent(sound), picture=_absent(picture), fps=fps)
    console.OUT.print(x.describe(), markup=False)
    frame = x.table()
    console.OUT.print()
    console.OUT.print(by_position(frame) if every else by_run(frame))
    if csv is not None:
        frame.to_csv(csv, index=False)
        _say_path(csv)


def models() -> None:
    """List what can be loaded, and how."""
    from av_lens.cli.catalogue import families, short_names

    console.OUT.print(
        console.table(
            ["name", "what it is"], short_names(), title="In the package: av-lens inspect NAME ..., avl.load(NAME)"
        )
    )
    console.OUT.print()
    console.OUT.print(
        console.table(["weights", "by hub name or local folder"], families(), title="Checkpoints with an adapter")
    )


def train(
    name: Annotated[str, typer.Argument(help="Which organism: `av-lens models` lists them.")],
    seed: Annotated[int, typer.Option(help="Draws the initial weights and the data.")] = default(
        "organism.training", "train", "seed"
    ),
    out: Annotated[Path | None, typer.Option(help="The folder to write; left out: NAME-seedN here.")] = None,
) -> None:
    """Train an organism from a seed; interrupted, the same command goes on where it stopped."""
    from av_lens.organism import train as train_organism

    folder = out or Path(f"{name}-seed{seed}")
    with console.Bars() as bars:
        train_organism(name, seed=seed, out=folder, progress=bars)
    _say_path(folder)


def _absent(choice: str) -> str | None:
    return None if choice == "none" else choice


def _load(model: str, *, device: str | None, dtype: str | None) -> Any:
    with console.waiting(f"loading {model} ..."):
        import torch

        from av_lens.runs import load

        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype is not None and dtype not in kinds:
            from av_lens.errors import unknown

            raise InputError(unknown("dtype", dtype, kinds))
        return load(model, device=device, dtype=kinds[dtype] if dtype else None)


def _say_path(path: Path) -> None:
    console.OUT.print(f"\nwritten: {Path(path).resolve()}", soft_wrap=True, markup=False)


def _say_found(found: Any) -> None:
    from av_lens.cli.findings import behaviour_table, head_table

    console.OUT.print()
    console.OUT.print(f"[bold]verdict[/bold]      {console.cell(found.verdict)}", soft_wrap=True)
    console.OUT.print()
    console.OUT.print(behaviour_table(found))
    console.OUT.print()
    console.OUT.print(head_table(found))
