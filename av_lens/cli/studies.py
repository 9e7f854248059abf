"""The commands of the studies: measurements of the program itself, which fill pages of the documentation."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from av_lens.cli import console
from av_lens.cli.commands import Media, Out, Quick, Seed
from av_lens.cli.faults import signature
from av_lens.whole_files import write_whole

_TRAIN = signature("lab.training.courses", "train")
_BENCH = signature("lab.replay_benchmark.benchmark", "run_benchmark")
_PLANTS = signature("lab.plantbench.bench", "run_plantbench")
_SHAPES = signature("lab.true_shapes", "run_at_true_shapes")
_SEEDS = signature("lab.seeds", "run_seeds")
_TYPE_ONE = signature("lab.type_one", "run_type_one")

Organism = Annotated[str, Argument(help="Which organism: `av-lens models` lists them.")]
TrainSeed = Annotated[int, Option(help="Draws the initial weights and the data.")]
TrainOut = Annotated[Path | None, Option(help="The checkpoint's folder; left out: in the user's cache.")]

Shapes = Annotated[list[str] | None, Option("--shape", help="Measure this one only; may be given several times.")]
Threads = Annotated[int, Option(help="Threads of PyTorch.")]
Patience = Annotated[float, Option(help="Seconds to wait, for each shape, until nobody else uses the machine.")]
Fewest = Annotated[int, Option(help="How many conflicts are cut from the recording; 40 at least.")]
_PLANTED = Argument(help="Folders or short names; left out: all that are shipped, and the balanced one.")
PlantsOut = Annotated[Path, Option(help="The folder to write; models that are scored in it are kept.")]
PlantsNumber = Annotated[int, Option(help="How many conflicts every model is tested on; at least 40.")]
PlantsMinutes = Annotated[
    float | None, Option(help="Begin no model that would end later than that; the same command goes on.")
]
PlantsFresh = Annotated[Path | None, Option(help="Also plant and score the models listed in this file, a line each.")]
PlantsBases = Annotated[list[str], Option("--base", help="A balanced model, 0 in the list; again for 1, 2, ...")]
SeedsOut = Annotated[Path, Option(help="The folder to write; what it holds is not measured again.")]
SeedsNumber = Annotated[int, Option(help="How many conflicts in each of the two sets; 120 for a verdict.")]


def train(name: Organism, seed: TrainSeed = _TRAIN["seed"], out: TrainOut = _TRAIN["out"]) -> None:
    """Train an organism from a seed; interrupted, the same command goes on where it stopped."""
    from av_lens.lab.training.courses import train as train_organism

    with console.bars() as bars:
        written = train_organism(name, seed=seed, out=out, progress=bars)
    console.say_path(written)


def status(folder: Annotated[Path, Argument(help="The folder of a run of `isolate`.")]) -> None:
    """Say how far a run is, and who works on it."""
    from av_lens.isolation.running.durable import standing

    console.say(standing(folder))


def bench(
    shape: Shapes = None,
    recording: Annotated[Path | None, Option(help="A video with sound, for the shape that needs one.")] = None,
    threads: Threads = _BENCH["threads"],
    samples: Annotated[int, Option(help="Patches of a slow loop that are timed.")] = _BENCH["samples"],
    rounds: Annotated[int, Option(help="Quiet rounds of which the median is taken.")] = _BENCH["rounds"],
    patience: Patience = _BENCH["patience"],
    memory: Annotated[bool, Option(help="Measure peak memory too, each in a fresh process.")] = _BENCH["memory"],
    out: Annotated[Path | None, Option(help="Also write the record to this file, as json.")] = None,
    docs: Annotated[Path | None, Option(help="Fill benchmarks.md and benchmarks.json in this folder.")] = None,
) -> None:
    """Measure replay beside TransformerLens, nnsight and attribution patching: same model, prompt and patches."""
    import json

    from av_lens.lab.replay_benchmark import tables as replay_tables
    from av_lens.lab.replay_benchmark.benchmark import run_benchmark

    _can_be_filled(docs, replay_tables)
    console.quiet_loading()
    options: dict[str, Any] = {"threads": threads, "samples": samples, "rounds": rounds, "memory": memory}
    with console.bars() as bars:
        record = run_benchmark(shape, recording=recording, patience=patience, progress=bars, **options)
    for name, found in record.items():
        console.OUT.print(f"\n[bold]{name}[/bold]")
        if "skipped" in found:
            console.OUT.print(f"skipped: {found['skipped']}", markup=False, soft_wrap=True)
            continue
        console.OUT.print(replay_tables.header_line(found), markup=False, soft_wrap=True)
        for headings, rows in replay_tables.tables(found):
            console.show(headings, rows)
    if out is not None:
        write_whole(out, json.dumps(record, indent=1) + "\n")
        console.say_path(out)
    if docs is not None:
        console.say_path(replay_tables.store(record, docs))


def plantbench(
    models: Annotated[list[str] | None, _PLANTED] = None,
    out: PlantsOut = Path(_PLANTS["out"]),
    fresh: PlantsFresh = _PLANTS["fresh"],
    bases: PlantsBases = list(_PLANTS["bases"]),  # noqa: B006
    conflicts: PlantsNumber = _PLANTS["conflicts"],
    seed: Seed = _PLANTS["seed"],
    minutes: PlantsMinutes = _PLANTS["minutes"],
    docs: Annotated[Path | None, Option(help="Fill plantbench.md, .json and .svg in this folder.")] = None,
) -> None:
    """Let every method look for heads that were planted, and for heads where nothing is to be found."""
    from av_lens.lab.plantbench import pages as plantbench_pages
    from av_lens.lab.plantbench.bench import run_plantbench

    _can_be_filled(docs, plantbench_pages)
    console.quiet_loading()
    options: dict[str, Any] = {"fresh": fresh, "bases": bases, "conflicts": conflicts, "seed": seed}
    with console.bars() as bars:
        bench = run_plantbench(models or None, out=out, minutes=minutes, progress=bars, **options)
    record = plantbench_pages.record_of(bench)
    for title, (headings, rows) in plantbench_pages.tables(record):
        console.show(headings, rows, title=title)
    if bench.missing:
        console.OUT.print(f"\nleft for later: {', '.join(bench.missing)}; the same command goes on.", markup=False)
    if docs is not None:
        console.say_path(plantbench_pages.store(record, docs))
    console.say_path(bench.folder)


def true_shapes(
    recording: Media,
    out: Out,
    size: Annotated[str, Option(help="3B or 7B.")] = _SHAPES["size"],
    conflicts: Fewest = _SHAPES["n"],
    quick: Quick = _SHAPES["quick"],
    docs: Annotated[Path | None, Option(help="Write true_shapes.md and true_shapes.json in this folder.")] = None,
) -> None:
    """Search a model of a checkpoint's true shapes, with random weights, on windows of a recording: seconds, memory."""
    from av_lens.lab import true_shape_costs
    from av_lens.lab.true_shapes import run_at_true_shapes

    with console.bars() as bars:
        record = run_at_true_shapes(recording, out, size=size, n=conflicts, quick=quick, progress=bars)
    console.OUT.print(true_shape_costs.page(record), markup=False)
    if docs is not None:
        console.say_path(true_shape_costs.store(record, docs))


def seeds(
    models: Annotated[list[str] | None, Argument(help="Short names or folders; left out: av-tiny.")] = None,
    out: SeedsOut = Path(_SEEDS["out"]),
    conflicts: SeedsNumber = _SEEDS["conflicts"],
    seed: Seed = _SEEDS["seed"],
    docs: Annotated[Path | None, Option(help="Fill isolation.md and write seeds.json in this folder.")] = None,
) -> None:
    """Is the same found again? Isolate models of other training seeds, each on two sets of conflicts."""
    from av_lens.lab import seeds as study

    _can_be_filled(docs, study)
    console.quiet_loading()
    with console.bars() as bars:
        record = study.run_seeds(models or ["av-tiny"], out=out, conflicts=conflicts, seed=seed, progress=bars)
    _show(study, record, docs, out)


def type_one(
    out: Annotated[Path, Option(help="The folder to write; rows that it holds are not drawn again.")] = Path(
        _TYPE_ONE["out"]
    ),
    draws: Annotated[int, Option(help="Draws a row.")] = _TYPE_ONE["draws"],
    seed: Seed = _TYPE_ONE["seed"],
    docs: Annotated[Path | None, Option(help="Fill type_one.md and write type_one.json in this folder.")] = None,
) -> None:
    """How often do the tests of `isolate` find what is not there? By simulation, over designs that share sources."""
    from av_lens.lab import type_one as study

    _can_be_filled(docs, study)
    with console.bars() as bars:
        record = study.run_type_one(out=out, draws=draws, seed=seed, progress=bars)
    _show(study, record, docs, out)


def _show(study: Any, record: Any, docs: Path | None, out: Path) -> None:
    for headings, rows in study.tables(record):
        console.show(headings, rows)
    if docs is not None:
        console.say_path(study.store(record, docs))
    console.say_path(out)


def _can_be_filled(docs: Path | None, study: Any) -> None:
    """Refuse a folder whose page cannot be filled before the long work, not after it."""
    if docs is not None:
        study.PAGE.around(docs)
