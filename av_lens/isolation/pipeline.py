"""`isolate`: which heads keep this model from saying what it hears?

In order: deal the conflicts to two halves; write `protocol.json`; read behaviour and stop where there is nothing to
explain; every head's exact effects on discovery; roles; the set; confirmation, controls and specificity on
the other half; a verdict in words.

Sign: a positive release means that editing the head lets the model hear more. Not done here: where the audio is known
(lens, probes), edge cuts, pair synergies, robustness; several-token answers.

Example:
    ```python
    found = isolate(model, conflicts("pairs.jsonl"), out="run")
    print(found.verdict)
    found.heads
    ```
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from av_lens.errors import ProtocolError, unknown
from av_lens.inputs.sources import clip_key
from av_lens.isolation import confirmation, evidence, protocol, verdicts
from av_lens.isolation.behaviour import Survey, gap_verdict, refusals, rows_of, survey
from av_lens.isolation.bench import Bench
from av_lens.isolation.effects import Progress
from av_lens.isolation.engine import SITES, Engine, ModelEngine
from av_lens.isolation.evidence import Half
from av_lens.isolation.role_tests import family_size
from av_lens.isolation.scoring import Candidates
from av_lens.results.halves import CONFIRMATION, DISCOVERY, Halves, Member, deal, standing, third_sources
from av_lens.results.provenance import stamp
from av_lens.results.record import Isolation
from av_lens.results.statistics import Bootstrap
from av_lens.results.tables import table

GATES = ("stop", "report")
NOT_INTERPRETABLE, EXPLORATORY = "not interpretable", "exploratory"


@dataclass(eq=False)
class Run:
    """Everything a run knows while it goes on."""

    bench: Bench
    members: list[Member]
    halves: Halves
    protocol: dict[str, Any]
    seed: int
    s: float
    sites: tuple[str, ...]
    progress: Progress | None
    survey: Survey | None = None
    stamps: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def half(self, name: str, examples: Sequence[int]) -> Half:
        """Collect some conflicts of a half.

        Args:
            name: the half.
            examples: its conflicts.

        Returns:
            The half, with its bootstrap weights.
        """
        assert self.survey is not None
        found = np.array(examples, dtype=np.int64)
        components = [self.halves.component[i] for i in found]
        sound = [self.members[i].sound_clip for i in found]
        picture = [self.members[i].picture_clip for i in found]
        boot = Bootstrap.draw(components, sound, picture, seed=self.seed + (name == CONFIRMATION))
        return Half(name, found, components, boot, self.survey.G[found], self.survey.C[found])


def isolate(
    model: Any,
    conflicts: Sequence[Any],
    *,
    sites: Sequence[str] = ("suffix",),
    s: float | None = None,
    gate: str = "stop",
    seed: int = 0,
    layout: str = "in_video",
    progress: Progress | None = None,
    out: str | Path | None = None,
    engine: Engine | None = None,
) -> Isolation:
    """Isolate the heads that keep a model from saying what it hears.

    Args:
        model: a `HookedAVLLM`.
        conflicts: `Conflict`s; at least 20 competent ones in each half (below 60 the finding is exploratory).
        sites: site sets to search: "suffix", "generation", "audio".
        s: a head is named above this share of G; default .10 for organisms; for other models .03, or more where the
            same edits do more under the control question.
        gate: "stop" ends where the protocol would (nothing to explain), "report" goes on and stamps every page.
        seed: of the deal, the draws and the flips.
        layout: "in_video" or "separate".
        progress: called as `progress(stage, done, total)`.
        out: a folder for `protocol.json` (before the first effect) and the finding.
        engine: what runs the model, instead of `ModelEngine(model)`.

    Returns:
        The finding.

    Raises:
        ProtocolError: too few conflicts; under gate="stop" also a model that would say neither answer or does not hear.
    """
    if gate not in GATES:
        raise ProtocolError(unknown("gate", gate, GATES))
    for site in sites:
        if site not in SITES:
            raise ProtocolError(unknown("site", site, SITES))
    started = time.monotonic()
    run = _prepared(model, conflicts, tuple(sites), s, gate, seed, layout, progress, engine)
    protocol.write_protocol(run.protocol, out)
    halves = _behave(run, gate, out)
    kind, sentence = gap_verdict(_survey(run), halves[0].examples, halves[0].boot)
    stop = kind in ("no suppression", "not established")
    if stop and gate == "stop":
        run.reasons.append(sentence)
        found = _record(run, halves, kind, sentence, None, None, started)
    else:
        if stop:
            _stamp(run, NOT_INTERPRETABLE, f"the search went on past the gate: {sentence}")
        floor = run.s if run.protocol["s_rule"] == protocol.MEASURED else None
        searched = evidence.search(
            run.bench, halves, s=run.s, floor=floor, sites=run.sites, seed=seed, progress=progress
        )
        run.s = searched.s
        held = confirmation.confirm_all(run.bench, halves, searched, s=run.s, seed=seed, progress=progress)
        kind, sentence = verdicts.verdict(kind, sentence, searched, held, halves, s=run.s, family=_family(run))
        found = _record(run, halves, kind, sentence, searched, held, started)
    if EXPLORATORY in run.stamps:
        found = dataclasses.replace(found, verdict=f"Exploratory, no verdict. {found.verdict}")
    if out is not None:
        found.save(out)
    return found


def _family(run: Run) -> int:
    engine = run.bench.engine
    return family_size(engine.n_layers * engine.n_heads, len(run.sites))


def _survey(run: Run) -> Survey:
    assert run.survey is not None
    return run.survey


def _stamp(run: Run, stamp: str, reason: str) -> None:
    if stamp not in run.stamps:
        run.stamps.append(stamp)
    run.reasons.append(reason)


def _prepared(
    model: Any,
    conflicts: Sequence[Any],
    sites: tuple[str, ...],
    s: float | None,
    gate: str,
    seed: int,
    layout: str,
    progress: Progress | None,
    engine: Engine | None,
) -> Run:
    """Deal the halves, draw the third clips, resolve the answers, write the protocol down."""
    named = [c if c.id is not None else dataclasses.replace(c, id=f"c{i}") for i, c in enumerate(conflicts)]
    organism = getattr(model, "grammar", None) is not None
    rule = "given" if s is not None else ("organism" if organism else protocol.MEASURED)
    s = s if s is not None else (protocol.S_ORGANISM if organism else protocol.S_OTHER)
    if len(named) < 2 * protocol.FEWEST:
        raise ProtocolError(
            f"{len(named)} conflicts were given; isolation needs at least {protocol.FEWEST} competent ones in each "
            f"half ({2 * protocol.FEWEST} in all, 120 for a verdict). Add conflicts."
        )
    engine = ModelEngine(model, layout=layout) if engine is None else engine
    candidates = Candidates.of(named, engine.tokenizer)
    members = [
        Member(c.id, clip_key(c.sound), clip_key(c.picture), candidates.names[candidates.sound[i]])
        for i, c in enumerate(named)
    ]
    halves = deal(members, seed=seed)
    bench = Bench(engine, _with_thirds(named, candidates, halves, seed), candidates, site=sites[0])
    family = family_size(engine.n_layers * engine.n_heads, len(sites))
    written = protocol.protocol_of(
        s=s, s_rule=rule, sites=sites, seed=seed, gate=gate, layout=layout, halves=halves, ids=[m.id for m in members],
        n_layers=engine.n_layers, n_heads=engine.n_heads, family=family,
    )  # fmt: skip
    return Run(bench, members, halves, written, seed, s, sites, progress)


def _behave(run: Run, gate: str, out: str | Path | None) -> tuple[Half, Half]:
    """Read every cell, refuse what must be refused, choose the competent, give them their third clips."""
    bench = run.bench
    everyone = list(range(len(bench.conflicts)))
    chunks = bench.chunks(everyone)
    run.survey = survey(chunks, len(everyone), progress=run.progress)
    dealt = {name: run.halves.members(name) for name in (DISCOVERY, CONFIRMATION)}
    whole = run.half(DISCOVERY, dealt[DISCOVERY])
    for kind, sentence in refusals(run.survey, whole.examples, whole.boot):
        if gate == "stop":
            both = (whole, run.half(CONFIRMATION, dealt[CONFIRMATION]))
            if out is not None:
                _record(run, both, kind, sentence, None, None, time.monotonic()).save(out)
            raise ProtocolError(f"refused: {sentence}" + (f" Its behaviour is saved in {out}." if out else ""))
        _stamp(run, NOT_INTERPRETABLE, sentence)
    competent = {name: [i for i in rows if run.survey.competent[i]] for name, rows in dealt.items()}
    size = standing(
        [len(rows) for rows in competent.values()], [_n_components(run, rows) for rows in competent.values()]
    )
    if size == "refused":
        sentence = (
            f"{len(competent[DISCOVERY])} of {len(dealt[DISCOVERY])} conflicts in discovery and "
            f"{len(competent[CONFIRMATION])} of {len(dealt[CONFIRMATION])} in confirmation are competent (the sound is "
            "heard with nothing to see, the picture is seen with nothing to hear); isolation needs at least "
            f"{protocol.FEWEST} in each half."
        )
        if gate == "stop":
            raise ProtocolError(f"refused: {sentence} Add conflicts, or clips that the model knows.")
        _stamp(run, NOT_INTERPRETABLE, f"{sentence} All conflicts are used, competent or not.")
        competent = dealt
    elif size == "exploratory":
        counts = [len(rows) for rows in competent.values()]
        _stamp(
            run,
            EXPLORATORY,
            f"exploratory: {counts[0]} and {counts[1]} competent conflicts in the halves; a verdict needs "
            f"{protocol.FIRM_CONFLICTS} conflicts and {protocol.FIRM_COMPONENTS} components in each.",
        )
    return run.half(DISCOVERY, competent[DISCOVERY]), run.half(CONFIRMATION, competent[CONFIRMATION])


def _n_components(run: Run, rows: Sequence[int]) -> int:
    return len({run.halves.component[i] for i in rows})


def _with_thirds(named: Sequence[Any], candidates: Candidates, halves: Halves, seed: int) -> list[Any]:
    """Draw w for the conflicts that bring none of their own: another conflict's sound source of the same half."""
    out = list(named)
    for half in (DISCOVERY, CONFIRMATION):
        rows = halves.members(half)
        sound = [candidates.names[candidates.sound[i]] for i in rows]
        picture = [candidates.names[candidates.picture[i]] for i in rows]
        drawn = third_sources(sound, picture, ids=[named[i].id for i in rows], seed=seed)
        for i, j in zip(rows, drawn, strict=True):
            if j >= 0 and named[i].third is None:
                out[i] = dataclasses.replace(named[i], third=named[rows[int(j)]].sound)
    return out


def _behaviour_rows(run: Run, halves: tuple[Half, Half]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for half in halves:
        rows += rows_of(_survey(run), half.examples, half.boot, half.name, "competent")
        whole = run.half(half.name, run.halves.members(half.name))
        rows += rows_of(_survey(run), whole.examples, whole.boot, half.name, "all")
    return rows


def _conflict_rows(run: Run, halves: tuple[Half, Half]) -> list[dict[str, Any]]:
    found, candidates = _survey(run), run.bench.candidates
    used = {int(i) for half in halves for i in half.examples}
    tops = found.readings[("va", "ask")].top
    names = {-1: "neither", -2: ""}
    margins = {cell: found.margin(cell) for cell in ("va", "av", "blank_a", "blank_v")}
    return [
        {
            "id": run.members[i].id,
            "half": run.halves.half[i],
            "component": run.halves.component[i],
            "competent": i in used,
            "sound_answer": candidates.names[candidates.sound[i]],
            "picture_answer": candidates.names[candidates.picture[i]],
            "says": names.get(int(tops[i])) or candidates.names[int(tops[i])],
            **{f"M_{cell}": float(values[i]) for cell, values in margins.items()},
            "C": float(found.C[i]),
            "G": float(found.G[i]),
        }
        for i in range(len(run.members))
    ]


def _record(
    run: Run,
    halves: tuple[Half, Half],
    kind: str,
    sentence: str,
    searched: evidence.Searched | None,
    held: confirmation.Held | None,
    started: float,
) -> Isolation:
    engine = run.bench.engine
    arrays = {f"{half.name}/{name}": getattr(half, name) for half in halves for name in ("G", "C")}
    summary = verdicts.summary(_survey(run), halves, searched, held, s=run.s, family=_family(run))
    tables: dict[str, Any] = {}
    if searched is not None and held is not None:
        arrays |= {f"{half}/{key}": v for half, found in (("discovery", searched), ("confirmation", held))
                   for key, v in found.arrays().items()}  # fmt: skip
        tables = {
            "heads": table("heads", confirmation.head_rows(searched, held)),
            "evidence": table("evidence", [*searched.rows(DISCOVERY), *held.rows(CONFIRMATION)]),
            "sets": table("sets", held.set_rows),
            "ablation": table("ablation", held.ablation_rows),
            "specificity": table("specificity", held.specificity_rows),
        }
    return Isolation(
        verdict=sentence,
        verdict_kind=kind,
        n_layers=engine.n_layers,
        n_heads=engine.n_heads,
        stamps=tuple(run.stamps),
        reasons=tuple(run.reasons),
        summary=summary,
        behaviour=table("behaviour", _behaviour_rows(run, halves)),
        conflicts=table("conflicts", _conflict_rows(run, halves)),
        arrays=arrays,
        protocol=run.protocol,
        provenance=stamp(
            av_lens=protocol.__version__,
            model=str(getattr(getattr(engine, "model", None), "name", type(engine).__name__)),
            weights=getattr(getattr(engine, "model", None), "provenance", {}),
            question=" / ".join(dict.fromkeys(str(c.question) for c in run.bench.conflicts)),
            protocol_hash=run.protocol["hash"],
            choices=list(protocol.CHOICES),
            seconds=round(time.monotonic() - started, 1),
            bootstrap_units=[half.boot.unit for half in halves],
        ),
        **tables,
    )
