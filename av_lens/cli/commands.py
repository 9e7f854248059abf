"""The commands, each a thin door to one function: arguments in, progress bars while it works, a table at the end."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

from av_lens.cli import console, faults
from av_lens.cli.faults import signature
from av_lens.whole_files import make_folder, read_object, write_whole

_DEMO = signature("lab.demonstration", "run_demo")
_ISOLATE = signature("isolation.running.pipeline", "isolate")
_ISOLATE_INTO = signature("lab.demonstration", "isolate_into")
_COMPARE = signature("isolation.running.comparing", "compare")
_ENCODE = signature("inputs.encoder", "Encoder.encode")
_LOAD_CLIP = signature("media.source", "load_clip")
_DESIGN = signature("inputs.designs", "design_conflicts")
_PLANT = signature("lab.planting.planting", "plant")
_GENERATE = signature("model.wrapper", "HookedAVLLM.generate")
_CHECK = signature("lab.guarantees", "check")

Model = Annotated[str, Argument(help="A short name (`av-lens models` lists them), a hub name or a local folder.")]
Device = Annotated[str | None, Option(help="cpu or cuda; left out: cuda if the model fits, else cpu.")]
Dtype = Annotated[str | None, Option(help="float32, bfloat16 or float16; left out: what suits the model.")]
Seed = Annotated[int, Option(help="Draws the clips, deals the halves, draws the bootstrap and the random sets.")]
DemoOut = Annotated[Path, Option(help="The folder to write; finished parts of an earlier run are kept.")]
HowMany = Annotated[int, Option(help="How many conflicts; below 120 the report is stamped exploratory.")]
DemoQuick = Annotated[bool, Option("--quick/--whole", help="Leave out robustness and pairs, or nothing.")]
Out = Annotated[Path, Option(help="The folder for the report, the figures and the numbers.")]
_GATE = Option(help="stop: end where there is nothing to explain; report: go on, stamp every page.")
_SITES = Option(help="Where heads are edited: suffix, generation, audio, video, sinks; several by commas.")
Limit = Annotated[int | None, Option(help="Use only the first so many conflicts of the manifest.")]
Budget = Annotated[float | None, Option(help="Stop after so many minutes; the same command goes on from there.")]
Quick = Annotated[bool, Option("--quick", help="Leave out robustness, and pairs where half of the gap is explained.")]
Captions = Annotated[bool, Option("--captions", help="Also write captions with the heads edited.")]
Workers = Annotated[int, Option(help="How many processes of this machine share the work.")]
Join = Annotated[bool, Option("--join", help="Share the work of a run that goes on in the folder, or begin it.")]
Share = Annotated[float | None, Option(help="Name heads above this share of G; left out: the protocol's.")]
Media = Annotated[Path, Argument(help="Any video, sound or image.")]
Question = Annotated[str, Option(help="What the model is asked.")]
Sound = Annotated[str, Option(help="auto, in_video, separate or none.")]
Picture = Annotated[str, Option(help="auto, video, image or none.")]
Rate = Annotated[float, Option(help="Frames per second that the model is shown.")]
Start = Annotated[float, Option(help="Where in the file to begin, in seconds.")]
End = Annotated[float | None, Option(help="Where in the file to stop, in seconds.")]
PlantBase = Annotated[str, Option(help="The balanced model to plant in: a short name or a folder from `train`.")]


PlanFile = Annotated[Path | None, Option(help="A saved plan of edits to answer under (`plan.save` writes one).")]
Sample = Annotated[bool, Option("--sample", help="Draw tokens instead of taking the likeliest.")]


def demo(
    out: DemoOut = Path(_DEMO["out"]),
    conflicts: HowMany = _DEMO["conflicts"],
    seed: Seed = _DEMO["seed"],
    quick: DemoQuick = _DEMO["quick"],
) -> None:
    """Isolate the heads of av-tiny that suppress the sound, calibrate on planted heads, and write a report.

    The verdict is shown and the report begun as soon as the behaviour is known; both grow. Exit code 1 if the
    calibration fails: then the findings are not to be trusted.
    """
    from av_lens.lab.demonstration import run_demo

    console.quiet_loading()
    with console.bars() as bars:
        shown = run_demo(out, conflicts=conflicts, seed=seed, quick=quick, progress=bars, told=console.say)
    console.OUT.print(f"\n[bold]calibration[/bold]  {console.cell(shown.calibration.sentence)}", soft_wrap=True)
    _say_found(shown.found)
    console.say_path(shown.report)
    if not shown.calibration.passed:
        console.ERR.print("[bold red]calibration failed[/bold red]: planted heads did not come out on top.")
        raise Exit(1)


def isolate(
    model: Model,
    pairs: Annotated[Path, Argument(help="The manifest: one conflict a line, as jsonl.")],
    out: Out,
    limit: Limit = _ISOLATE_INTO["limit"],
    budget: Budget = _ISOLATE["budget"],
    quick: Quick = _ISOLATE["quick"],
    sites: Annotated[str, _SITES] = ",".join(_ISOLATE["sites"]),
    captions: Captions = _ISOLATE["captions"],
    gate: Annotated[str, _GATE] = _ISOLATE["gate"],
    layout: Annotated[str, Option(help="in_video (sound woven into the video) or separate.")] = _ISOLATE["layout"],
    s: Share = _ISOLATE["s"],
    seed: Seed = _ISOLATE["seed"],
    protocol: Annotated[str, Option(help="Edition: 2, or 1 for the first one's figures.")] = _ISOLATE["protocol"],
    suppressed: Annotated[str, Option(help="sound, or picture for the mirrored question.")] = _ISOLATE["suppressed"],
    workers: Workers = _ISOLATE["workers"],
    join: Join = _ISOLATE["join"],
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Find the heads of MODEL that keep the sound of the conflicts in PAIRS from being said.

    What is finished is kept in the folder: a command that was killed, interrupted or stopped at its budget (exit code
    3) goes on from there when it is given again. With --join any number of workers, on any machines that see the
    folder, share one run; `av-lens status` says who does what.
    """
    named = tuple(one.strip() for one in sites.split(",") if one.strip())
    lines, *_ = faults.all_told(
        lambda: faults.manifest(pairs, limit),
        lambda: faults.model(model),
        lambda: faults.words(
            dtype=dtype, gate=[gate], layout=[layout], site=named, protocol=[protocol], suppressed=[suppressed]
        ),
    )
    from av_lens.inputs.conflict import conflicts_of
    from av_lens.lab.demonstration import isolate_into

    listed = conflicts_of(lines)
    loaded = _load(model, device=device, dtype=dtype)
    options: dict[str, Any] = {"gate": gate, "layout": layout, "s": s, "seed": seed, "sites": named, "quick": quick}
    options |= {"captions": captions, "protocol": protocol, "suppressed": suppressed}
    options |= {"workers": workers, "join": join}
    with console.bars() as bars:
        found, report = isolate_into(
            out, loaded, listed, name=model, limit=limit, budget=budget, progress=bars, told=console.say, **options
        )
    _say_found(found)
    console.say_path(report)


def compare(
    a: Annotated[str, Argument(help="The first: a model, or the folder of a run of `isolate`.")],
    b: Annotated[str, Argument(help="The second, likewise.")],
    pairs: Annotated[
        Path | None, Argument(help="The manifest; of two runs, only if something must be measured.")
    ] = None,
    out: Annotated[Path, Option(help="The folder for the page, the record and the runs of models.")] = Path(
        "av-compare"
    ),
    limit: Limit = _ISOLATE_INTO["limit"],
    sites: Annotated[str, _SITES] = ",".join(_COMPARE["sites"]),
    captions: Annotated[bool, Option("--captions", help="Also compare what the models write.")] = _COMPARE["captions"],
    layout: Annotated[str, Option(help="in_video (sound woven into the video) or separate.")] = _COMPARE["layout"],
    s: Share = _COMPARE["s"],
    seed: Seed = _COMPARE["seed"],
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare two checkpoints on one manifest: did training repair it, and in the same heads?

    Models are isolated first, in the folders `a` and `b` of OUT; the same command goes on from there. Of two runs the
    records are read; what they do not hold is measured if PAIRS is given (the models are loaded by their names).
    """
    named = tuple(one.strip() for one in sites.split(",") if one.strip())
    lines, *_ = faults.all_told(
        lambda: None if pairs is None else faults.manifest(pairs, limit),
        *(partial(faults.model, one) for one in (a, b) if not faults.is_run(one)),
        lambda: faults.words(dtype=dtype, layout=[layout], site=named),
    )
    from av_lens.inputs.conflict import conflicts_of
    from av_lens.isolation import compare as compare_them

    listed = None if lines is None else conflicts_of(lines)
    load = partial(_load, device=device, dtype=dtype)
    sides = [one if faults.is_run(one) else load(one) for one in (a, b)]
    own = [load(faults.model_of_run(one)) if faults.is_run(one) and listed else None for one in (a, b)]
    options: dict[str, Any] = {"sites": named, "s": s, "seed": seed, "layout": layout, "captions": captions}
    with console.bars() as bars:
        options |= {"out": out, "progress": bars, "told": console.say}
        found = compare_them(sides[0], sides[1], listed, models=(own[0], own[1]), **options)
    _say_found(found, console.change_table(found), console.node_table(found))
    found.save(make_folder(out) / "comparison.nc")
    console.say_path(found.report(out / "comparison.html"))


def pairs(
    clips: Annotated[Path, Argument(help="A folder (a folder a kind of sound), a csv or jsonl, or a saved data set.")],
    out: Annotated[Path, Option(help="The manifest to write: one conflict a line, as jsonl.")],
    design: Annotated[str, Option(help="disjoint, permutation or assignment (least alike captions).")] = _DESIGN[
        "design"
    ],
    seed: Annotated[int, Option(help="Draws which sound goes with which picture.")] = _DESIGN["seed"],
    question: Annotated[str, Option(help="What is asked of the sound.")] = _DESIGN["question"],
    prefix: Annotated[str, Option(help="The assistant's text before the answer.")] = _DESIGN["prefix"],
    shortest: Annotated[float, Option(help="Leave out clips of fewer seconds.")] = _DESIGN["shortest"],
) -> None:
    """Make conflicts of labelled clips: a manifest for `isolate` and the methods.

    A label is a word for what sounds, or a class of ESC-50 or VGGSound; clips without one need a caption that names one
    sound. What is left out is counted, with the reason.
    """
    faults.words(design=[design])
    from av_lens.inputs.designs import design_conflicts

    with console.bars() as bars:
        made = design_conflicts(
            clips, design=design, seed=seed, question=question, prefix=prefix, shortest=shortest, progress=bars
        )
    console.OUT.print(str(made), markup=False, soft_wrap=True)
    console.say_path(made.save(out))


def inspect(
    model: Model,
    clip: Media,
    question: Question,
    sound: Sound = _ENCODE["sound"],
    picture: Picture = _ENCODE["picture"],
    fps: Rate = _ENCODE["fps"],
    start: Start = _LOAD_CLIP["start"],
    end: End = _LOAD_CLIP["end"],
    every: Annotated[bool, Option("--all", help="One row per position instead of one per run of equal roles.")] = False,
    csv: Annotated[Path | None, Option(help="Also write the table of all positions to this file.")] = None,
) -> None:
    """Show what each position of the input is: its role, its token, its seconds and its patch."""
    faults.all_told(lambda: faults.clip(clip, start, end), lambda: faults.model(model))
    from av_lens.media import load_clip

    read = load_clip(clip, start=start, end=end)
    loaded = _load(model, device="cpu", dtype=None)
    x = loaded.encode(read, question, sound=_absent(sound), picture=_absent(picture), fps=fps)
    frame = x.table()
    console.OUT.print(f"{model}: {len(frame)} positions, layout {x.layout}", markup=False)
    console.OUT.print(f"{read!r}\n{question!r}\n", markup=False, soft_wrap=True)
    console.OUT.print(console.by_position(frame) if every else console.by_run(frame))
    console.OUT.print("\nmodel (s): the time that the model is told; source (s): the time in the file", markup=False)
    if csv is not None:
        write_whole(csv, frame.to_csv(index=False))
        console.say_path(csv)


def generate(
    model: Model,
    clip: Media,
    question: Question,
    plan: PlanFile = _GENERATE["plan"],
    max_new_tokens: Annotated[int, Option(help="Answer with at most so many tokens.")] = _GENERATE["max_new_tokens"],
    sample: Sample = _GENERATE["do_sample"],
    seed: Annotated[int, Option(help="What sampling draws from.")] = 0,
    prefix: Annotated[str, Option(help="Text of the assistant that the answer goes on from.")] = _ENCODE["prefix"],
    sound: Sound = _ENCODE["sound"],
    picture: Picture = _ENCODE["picture"],
    fps: Rate = _ENCODE["fps"],
    start: Start = _LOAD_CLIP["start"],
    end: End = _LOAD_CLIP["end"],
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Let MODEL answer a question about CLIP; with --plan, once as it is and once under the plan's edits."""
    faults.all_told(
        lambda: faults.clip(clip, start, end),
        lambda: faults.file(plan, "plan"),
        lambda: faults.model(model),
        lambda: faults.words(dtype=dtype),
    )
    from av_lens.interventions import Plan
    from av_lens.media import load_clip

    loaded = _load(model, device=device, dtype=dtype)
    edits = None if plan is None else Plan.load(plan, model=loaded)
    read = load_clip(clip, start=start, end=end)
    x = loaded.encode(read, question, sound=_absent(sound), picture=_absent(picture), fps=fps, prefix=prefix)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample, "seed": seed if sample else None}
    said = {"as it is": loaded.generate(x, return_type="text", **options)}
    if edits is not None:
        said["under the plan"] = loaded.generate(x, plan=edits, return_type="text", **options)
    console.OUT.print(f"{model}: {x.questions[0]!r}", markup=False, soft_wrap=True)
    for name, text in said.items():
        console.OUT.print(f"{name + ':':15} {prefix}{text}".rstrip(), markup=False, soft_wrap=True)


def check(
    model: Model,
    clip: Annotated[Path | None, Argument(help="Any video, sound or image; left out: two seconds of noise.")] = None,
    question: Question = _CHECK["question"],
    plans: Annotated[int, Option(help="How many random plans are replayed and run hooked.")] = _CHECK["plans"],
    quick: Annotated[bool, Option("--quick", help="A few hooks of the last layer, not all of all.")] = _CHECK["quick"],
    seed: Annotated[int, Option(help="What plans are drawn from.")] = _CHECK["seed"],
    device: Device = None,
    dtype: Dtype = None,
    out: Annotated[Path, Option(help="The report, as json; the table beside it ends in .md.")] = Path("av-check.json"),
) -> None:
    """Check every guarantee on MODEL and CLIP, beside HuggingFace's own model; a report to send back.

    Exit code 1 if one does not hold. The report holds no path, and nothing of the clip but its size and length.
    """
    faults.all_told(
        lambda: None if clip is None else faults.clip(clip, _LOAD_CLIP["start"], _LOAD_CLIP["end"]),
        lambda: faults.model(model),
        lambda: faults.words(dtype=dtype),
        lambda: faults.place(out),
    )
    from av_lens.lab.guarantees import check as check_all

    console.quiet_loading()
    options: dict[str, Any] = {"plans": plans, "quick": quick, "seed": seed, "device": device, "dtype": dtype}
    with console.bars() as bars:
        report = check_all(model, clip, question=question, progress=bars, **options)
    rows = [(one.name, one.state, one.found) for one in report.checks]
    console.OUT.print(console.table(["guarantee", "", "found"], rows))
    for name, value in report.about.items():
        console.say(f"{name}: {value}")
    console.say(f"\n{report}")
    console.say_path(report.save(out))
    if not report.ok:
        raise Exit(1)


def models() -> None:
    """List what can be loaded, and how."""
    console.OUT.print("[bold]in the package, by short name[/bold]")
    console.OUT.print(console.table(["name", "what it is"], faults.short_names()))
    console.OUT.print("\n[bold]checkpoints with an adapter, by hub name or local folder[/bold]")
    proved = faults.proofs()
    rows = [(name, fits, proved.get(name, "not proved here: av-lens check MODEL")) for name, fits in faults.families()]
    console.OUT.print(console.table(["class", "known to fit", "proved on a tiny checkpoint"], rows))
    console.OUT.print('\nIn Python: avl.load("NAME"); here: av-lens inspect NAME CLIP --question "What do you hear?"')


def plant(
    kind: Annotated[str, Argument(help="What to plant, such as writers, mlp or mixture (see the docs).")],
    seed: Annotated[int, Option(help="Draws the heads, and every clip and question.")] = _PLANT["seed"],
    base: PlantBase = _PLANT["base"],
    layer: Annotated[int | None, Option(help="The layer; left out: where the kind was developed.")] = _PLANT["layer"],
    gap: Annotated[float | None, Option(help="Of a mixture or crosstalk: the share of G to be lost.")] = _PLANT["gap"],
    of: Annotated[list[str] | None, Option(help="A plant to be mixed in; give it once for each.")] = None,
    out: Annotated[Path | None, Option(help="The model's folder; left out: in the user's cache.")] = _PLANT["out"],
) -> None:
    """Plant nodes that silence the sound (or decoys) in a balanced model, and measure by brute force what they became.

    Exit code 1 if the best try is not what was asked for: planted.json in the folder says what it is.
    """
    from av_lens.lab.planting import planting

    with console.bars() as bars:
        written = planting.plant(kind, seed=seed, base=base, layer=layer, gap=gap, of=of or (), out=out, progress=bars)
    truth = read_object(written / planting.TRUTH)
    headings = ["layer", "head (MLP: -1)", "kind", "adds", "direct_share", "reads_picture", "reads_sound"]
    rows = [(h["layer"], h["head"], h["kind"], *(f"{h[name]:.2f}" for name in headings[3:])) for h in truth["heads"]]
    rows += [(str(decoy["layer"]), str(decoy["head"]), "decoy", *4 * ("",)) for decoy in truth["decoys"]]
    console.OUT.print(console.table(headings, rows, right=headings[3:]))
    lost, shown, kept = 1 - truth["C"] / truth["G"], truth["shown"], truth["kept"]
    console.OUT.print(f"gap/G: {lost:.3f}; what is new: {shown:.3f}; the rest, at the least: {kept:.3f}", markup=False)
    console.say_path(written)
    if truth["missing"] or not truth["success"]:
        said = "; ".join(truth["missing"]) or "it answers worse than it should (see shown and kept in planted.json)"
        console.ERR.print(f"not what was asked for: {said}", soft_wrap=True, markup=False)
        raise Exit(1)


def _absent(choice: str) -> str | None:
    return None if choice == "none" else choice


def _load(model: str, *, device: str | None, dtype: str | None) -> Any:
    with console.OUT.status(f"loading {model} ..."):
        import torch

        from av_lens.model import load

        return load(model, device=device, dtype=getattr(torch, dtype) if dtype else None)


def _say_found(found: Any, *tables: Any) -> None:
    stamped = f" [yellow]({', '.join(found.stamps)})[/yellow]" if found.stamps else ""
    console.OUT.print()
    console.OUT.print(f"[bold]verdict[/bold]{stamped}  {console.cell(found.verdict)}", soft_wrap=True)
    for reason in (one for one in found.reasons if one not in found.verdict):
        console.OUT.print(f"  {console.cell(reason)}", soft_wrap=True)
    for table in tables or (console.behaviour_table(found), console.head_table(found)):
        console.OUT.print("", table, sep="\n")
