"""`isolate`: which heads keep this model from saying what it hears? The protocol from deal to verdict, in order."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from av_lens.core.execution import places, standing_hooks
from av_lens.errors import ProtocolError
from av_lens.isolation.explaining.captions import caption_tables
from av_lens.isolation.explaining.knowledge import Known, knowledge_rows
from av_lens.isolation.explaining.mechanisms import cards
from av_lens.isolation.explaining.robustness import robustness_rows
from av_lens.isolation.explaining.routes import cut_rows, route_rows
from av_lens.isolation.explaining.units import repair, unit_rows
from av_lens.isolation.measuring.behaviour import gap_verdict, refusals, survey
from av_lens.isolation.measuring.bench import Progress
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.naming import evidence
from av_lens.isolation.running import cost, preparing
from av_lens.isolation.running.durable import Ledger, watched_run
from av_lens.isolation.running.finding import Further, finding
from av_lens.isolation.running.preparing import EXPLORATORY, Options, Run, prepared
from av_lens.isolation.running.verdicts import planned, verdict
from av_lens.isolation.running.workers import sharing
from av_lens.isolation.sets import confirmation
from av_lens.model.binding import remembered_towers
from av_lens.results import dealing
from av_lens.results.dealing import CONFIRMATION, DISCOVERY
from av_lens.results.record import Isolation

NAMED_ONLY = "Left out, as asked (named_only): all that explains the named heads and tests the finding's robustness."
QUICK = "Left out, as asked (quick): robustness, and pairs of heads in the search for sets."
QUICK_PAIRS = (
    "Left out, as asked (quick): robustness. Pairs of heads were searched after all, because no set found without them "
    "releases half of the gap."
)
MIRRORED_ONLY = (
    'What explains the named heads is not mirrored: with suppressed="picture" the run ends once they are named.'
)
Grown = Callable[[Isolation], None]
EXPLAINED: dict[str, Callable[[Known], list[dict[str, Any]]]] = {
    "cards": cards,
    "cuts": cut_rows,
    "routes": route_rows,
    "knowledge": knowledge_rows,
}


def isolate(
    model: Any,
    conflicts: Sequence[Any],
    *,
    sites: Sequence[str] = ("suffix",),
    s: float | str | None = None,
    gate: str = "stop",
    seed: int = 0,
    layout: str = "in_video",
    quick: bool = False,
    named_only: bool = False,
    captions: bool = False,
    protocol: str = "2",
    suppressed: str = "sound",
    budget: float | int | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
    grown: Grown | None = None,
    out: str | Path | None = None,
    engine: ModelEngine | None = None,
    workers: int = 1,
    join: bool = False,
) -> Isolation:
    """Isolate the heads that keep a model from saying what it hears.

    Args:
        model: a `HookedAVLLM`.
        conflicts: `Conflict`s; at least 20 competent ones in each half (below 60 the finding is exploratory).
        sites: site sets to search: "suffix", "generation", "audio" or "video" (while either is encoded), "sinks".
        s: a head is named above this share of G; default .10 for organisms; for other models, and by s="control", .03,
            or more where the same edits do more under the control question.
        gate: "stop" ends where the protocol would (nothing to explain), "report" goes on and stamps every page.
        seed: of the deal, the draws and the flips.
        layout: "in_video" or "separate".
        quick: leave out robustness, and pairs of heads unless half of the gap stays unexplained without them; say so.
        named_only: end once heads and sets are named and confirmed, without what explains them, and say so.
        captions: also let the model describe the clips, as it is and with the set edited (`found.captions`).
        protocol: the edition: "2", or "1" for the first one's figures (halves share no clips; components alone).
        suppressed: "sound", or "picture" for the mirrored question: asked `see`, which heads keep the model from saying
            what it sees? Ends once they are named and confirmed.
        budget: stop after so many minutes, with everything kept in `out`; the same call goes on from there.
        progress: called as `progress(stage, done, total)`.
        told: called with lines worth reading: power, what the run will cost, each conflict that is finished.
        grown: called with the finding as far as it goes: after the behaviour, and once heads and sets are confirmed.
        out: a folder for `protocol.json` (before the first effect), every measurement, and the finding in `numbers`.
        engine: what runs the model, instead of `ModelEngine(model)`.
        workers: how many processes of this machine share the work, each with a share of the threads: the same numbers
            as one worker gives with as many threads as each has. Each holds the model.
        join: share the work of a run that goes on in `out` (or begin it); any number of workers may, from any machine
            that sees the folder. Whoever came first writes the record, and is followed by another if it dies.

    Returns:
        The finding.

    Raises:
        ProtocolError: too few conflicts; under gate="stop" also where too few are independent for any effect to be
            found, and a model that would say neither answer or does not hear; a folder that holds another protocol, or
            is to be written while hooks stand on the model.
        FileError: `out` is no folder that can be written, or holds what cannot be read.
        UnfinishedError: the budget is spent, the disk is full, or a clip is gone.
    """
    options = Options(tuple(sites), s, gate, seed, layout, quick, named_only, captions, protocol, suppressed)
    if out is not None or workers != 1:
        _refuse_hooks(model)
    if join and out is None:
        raise ProtocolError("to join a run, name its folder (out=DIR).")
    shared = (
        nullcontext(None if out is None else Path(out))
        if workers == 1
        else sharing(workers, model, conflicts, options, out=out, told=told, engine=engine)
    )
    with shared as folder:
        run = prepared(model, conflicts, options, engine=engine, progress=progress)
        watched = watched_run(run, folder, budget=budget, told=told, join=join)
        with watched as ledger, remembered_towers(run.bench.engine.model):
            if told is not None:
                told(preparing.power_sentence(run.protocol))
            found = _carried_out(run, ledger, folder, grown)
            if folder is not None:
                ledger.keep(found.save, folder)
    return found


def _refuse_hooks(model: Any) -> None:
    """Refuse to keep what is measured under hooks: a later session would go on without them and mix the two."""
    standing = standing_hooks(model) if hasattr(model, "bridge") else ()
    if standing:
        raise ProtocolError(
            f"`out` keeps measurements from which a later session goes on, and hooks stand on the model at "
            f"{places(model, standing)}: functions cannot be kept with them. Take the hooks off, or leave `out` out."
        )


def _carried_out(run: Run, ledger: Ledger, folder: Path | None, grown: Grown | None) -> Isolation:
    started = time.monotonic()

    def so_far(kind: str, sentence: str, **more: Any) -> Isolation:
        said = f"Exploratory, no verdict. {sentence}" if EXPLORATORY in run.stamps and not run.refused else sentence
        return finding(run, run.words(kind), run.words(said), seconds=time.monotonic() - started, **more)

    _behave(run, ledger, folder)
    kind, sentence = gap_verdict(run.read, run.both[0])
    if kind in ("no suppression", "not established"):
        sentence = f"{sentence} {run.read.competence()}"
        if run.options.gate == "stop":
            run.reasons.append(run.words(sentence))
            return so_far(kind, sentence)
        run.go_past(kind, sentence, before="the search went on past the gate: ")
    if grown is not None:
        grown(so_far(kind, sentence))
    known = _searched(run, ledger)
    kind, sentence = verdict(run, kind, sentence, known)
    if EXPLORATORY in run.stamps and run.options.protocol != "1" and (plan := planned(known, run.family)):
        run.reasons.append(plan)
    if grown is not None:
        grown(so_far(kind, sentence, known=known))
    return so_far(kind, sentence, known=known, more=further(run, known))


def further(run: Run, known: Known) -> Further:
    """Measure what follows the search and its confirmation; what is left out, as asked, is said in the reasons."""
    if run.options.quick:
        run.reasons.append(QUICK_PAIRS if known.held.searched.pairs else QUICK)
    rows, arrays = caption_tables(known) if run.options.captions else ({}, {})
    if run.options.named_only or run.options.suppressed == "picture":
        run.reasons.append(NAMED_ONLY if run.options.named_only else MIRRORED_ONLY)
        return rows, arrays
    sites = known.searched.sites.items()
    rows |= {"units": [row for name, site in sites for row in unit_rows(site.chunks, known.discovery, site=name)]}
    rows |= {name: rows_of(known) for name, rows_of in EXPLAINED.items()}
    rows["repair"], repaired = repair(known)
    if not run.options.quick:
        rows["robustness"] = robustness_rows(known)
    return rows, arrays | repaired


def _searched(run: Run, ledger: Ledger) -> Known:
    seed = run.options.seed
    floor = run.s if run.protocol["s_rule"] == preparing.MEASURED else None
    searched = evidence.search(
        run.bench, run.both[0], s=run.s, floor=floor, sites=run.options.sites, seed=seed, family=run.family
    )
    ledger.close()
    run.s = searched.s
    run.reasons += searched.notes
    held = confirmation.confirm_all(run.bench, run.both, searched, s=run.s, seed=seed, quick=run.options.quick)
    ledger.close()
    return Known(run.bench, *run.both, searched, held, seed)


def _behave(run: Run, ledger: Ledger, folder: Path | None) -> None:
    """Read every cell, refuse what must be refused, choose the competent."""
    bench, gate = run.bench, run.options.gate
    everyone = list(range(len(bench.conflicts)))
    chunks = bench.chunks(everyone, "suffix")  # readings do not depend on the site; sinks are found later
    if ledger.leads and (ledger.told is not None or folder is not None):
        ledger.expect(cost.estimated(chunks, _size(run), folder=folder, key=run.key))
    run.survey = survey(chunks, len(everyone))
    ledger.figures = {
        member.id: {"C": round(float(run.read.C[i]), 4), "G": round(float(run.read.G[i]), 4)}
        for i, member in enumerate(run.members)
    }
    dealt = {name: run.halves.members(name) for name in (DISCOVERY, CONFIRMATION)}
    run.both = run.half(DISCOVERY, dealt[DISCOVERY]), run.half(CONFIRMATION, dealt[CONFIRMATION])
    for kind, refusal in refusals(run.read, run.both[0]):
        sentence = f"{refusal} {run.read.competence()}"
        if gate == "stop":
            said = run.words(sentence)
            if folder is not None:
                ledger.keep(finding(run, run.words(kind), said, seconds=0.0).save, folder)
            raise ProtocolError(f"refused: {said}" + (f" Its behaviour is saved in {folder}." if folder else ""))
        run.go_past(kind, sentence)
    competent = _competent(run, dealt)
    run.both = run.half(DISCOVERY, competent[DISCOVERY]), run.half(CONFIRMATION, competent[CONFIRMATION])


def _size(run: Run) -> cost.Size:
    engine, options = run.bench.engine, run.options
    halves = (len(run.halves.members(name)) for name in (DISCOVERY, CONFIRMATION))
    model = {"heads": len(run.bench.nodes), "layers": engine.n_layers, "sites": len(options.sites)}
    return cost.Size(len(run.members), *halves, **model, quick=options.quick, named_only=options.named_only)


def _competent(run: Run, dealt: dict[str, list[int]]) -> dict[str, list[int]]:
    """Choose the conflicts whose sound is heard and whose picture is seen; refuse where they are too few."""
    competent = {name: [i for i in rows if run.read.competent[i]] for name, rows in dealt.items()}
    counts = [len(rows) for rows in competent.values()]
    size = run.dealt.standing(list(competent.values()))
    if size == "refused":
        sentence = (
            f"{counts[0]} of {len(dealt[DISCOVERY])} conflicts in discovery and "
            f"{counts[1]} of {len(dealt[CONFIRMATION])} in confirmation are competent (the sound is "
            "heard with nothing to see, the picture is seen with nothing to hear); isolation needs at least "
            f"{dealing.FEWEST} in each half. {run.read.competence()}"
        )
        if run.options.gate == "stop":
            raise ProtocolError(f"refused: {run.words(sentence)} Add conflicts, or clips that the model knows.")
        run.go_past("too few competent", f"{sentence} All conflicts are used, competent or not.")
        run.stamp(EXPLORATORY, f"exploratory: fewer than {dealing.FIRM_CONFLICTS} competent conflicts in a half.")
        return dealt
    if size == "exploratory":
        units = f"{dealing.FIRM_SOURCES} sources" if run.dealt.dyadic else f"{dealing.FIRM_COMPONENTS} components"
        run.stamp(
            EXPLORATORY,
            f"exploratory: {counts[0]} and {counts[1]} competent conflicts in the halves; a verdict needs "
            f"{dealing.FIRM_CONFLICTS} conflicts and {units} in each.",
        )
    return competent
