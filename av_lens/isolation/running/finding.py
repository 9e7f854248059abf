"""From what a run knows to the record that is saved: tables, arrays, summary, provenance."""

from __future__ import annotations

from typing import Any

from av_lens.isolation.explaining.known import Known
from av_lens.isolation.measuring.behaviour import rows_of
from av_lens.isolation.measuring.scoring import NEITHER, UNREAD
from av_lens.isolation.running import protocol, verdicts
from av_lens.isolation.running.head_table import head_rows
from av_lens.isolation.running.preparing import Run
from av_lens.isolation.running.stages import Further
from av_lens.results.halves import CONFIRMATION, DISCOVERY
from av_lens.results.provenance import stamp
from av_lens.results.record import Isolation
from av_lens.results.tables import table


def finding(
    run: Run, kind: str, sentence: str, *, seconds: float, known: Known | None = None, more: Further = ({}, {})
) -> Isolation:
    """Write down what a run found, as far as it went."""
    engine, tables = run.bench.engine, dict[str, Any](more[0])
    arrays = {f"{half.name}/{name}": getattr(half, name) for half in run.both for name in ("G", "C")} | more[1]
    if known is not None:
        sides = {DISCOVERY: known.searched, CONFIRMATION: known.held}
        arrays |= {f"{half}/{key}": v for half, found in sides.items() for key, v in found.arrays().items()}
        tables |= known.held.tables | {
            "heads": head_rows(known.searched, known.held),
            "evidence": [row for half, found in sides.items() for row in found.rows(half)],
        }
    tables |= {"behaviour": behaviour_rows(run), "conflicts": conflict_rows(run)}
    return Isolation(
        verdict=sentence,
        verdict_kind=kind,
        n_layers=engine.n_layers,
        n_heads=engine.n_heads,
        stamps=tuple(run.stamps),
        reasons=tuple(run.reasons),
        summary=verdicts.summary(run, known),
        arrays=arrays,
        protocol=run.protocol,
        provenance=stamp(
            av_lens=protocol.__version__,
            model=str(engine.model.name),
            weights=engine.model.provenance,
            question=" / ".join(dict.fromkeys(str(c.question) for c in run.bench.conflicts)),
            protocol_hash=run.protocol["hash"],
            answers=run.answers,
            choices=list(protocol.CHOICES),
            seconds=round(seconds, 1),
            bootstrap_units=[half.boot.unit for half in run.both],
        ),
        **{name: table(name, rows) for name, rows in tables.items()},
    )


def behaviour_rows(run: Run) -> list[dict[str, Any]]:
    """Write the behaviour table: both halves, with and without the choice by competence."""
    rows: list[dict[str, Any]] = []
    for half in run.both:
        dealt = run.halves.members(half.name)
        # Not the half's own conflicts: after a refusal, and past one, all of them are analysed.
        for chosen, rows_there in (("competent", [i for i in dealt if run.read.competent[i]]), ("all", dealt)):
            if rows_there:
                rows += rows_of(run.read, run.half(half.name, rows_there), chosen)
    return rows


def conflict_rows(run: Run) -> list[dict[str, Any]]:
    """Write the table of conflicts: where each was dealt, what the model says, C and G."""
    found, candidates = run.read, run.bench.candidates
    used = {int(i) for half in run.both for i in half.examples}
    tops = found.readings[("va", "ask")].top
    names = {NEITHER: "neither", UNREAD: ""}
    margins = {cell: found.margin(cell) for cell in ("va", "av", "blank_a", "blank_v")}
    return [
        {
            "id": run.members[i].id,
            "half": run.halves.half[i],
            "component": run.halves.component[i],
            "competent": bool(found.competent[i]),
            "analysed": i in used,
            "sound_answer": candidates.names[candidates.sound[i]],
            "picture_answer": candidates.names[candidates.picture[i]],
            "says": names.get(int(tops[i])) or candidates.names[int(tops[i])],
            **{f"M_{cell}": float(values[i]) for cell, values in margins.items()},
            "C": float(found.C[i]),
            "G": float(found.G[i]),
        }
        for i in range(len(run.members))
    ]
