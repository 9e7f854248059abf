"""From what a run knows to the record that is saved: tables, arrays, summary, provenance."""

from __future__ import annotations

from typing import Any

from av_lens.isolation.measuring.behaviour import rows_of
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import NEITHER, UNREAD
from av_lens.isolation.naming import evidence
from av_lens.isolation.running import protocol, verdicts
from av_lens.isolation.running.head_table import head_rows
from av_lens.isolation.running.preparing import Run
from av_lens.isolation.running.stages import Further
from av_lens.isolation.sets import confirmation
from av_lens.results.halves import CONFIRMATION, DISCOVERY
from av_lens.results.provenance import stamp
from av_lens.results.record import Isolation
from av_lens.results.tables import table


def finding(
    run: Run,
    halves: tuple[Half, Half],
    kind: str,
    sentence: str,
    *,
    searched: evidence.Searched | None = None,
    held: confirmation.Held | None = None,
    more: Further | None = None,
    seconds: float,
) -> Isolation:
    """Write down what a run found, as far as it went.

    Args:
        run: the run.
        halves: discovery and confirmation.
        kind: the verdict's kind.
        sentence: the verdict.
        searched: what discovery found, if the search was made.
        held: what confirmation found, likewise.
        more: the rows of further tables, and further arrays.
        seconds: how long the run took.

    Returns:
        The record.
    """
    engine = run.bench.engine
    arrays = {f"{half.name}/{name}": getattr(half, name) for half in halves for name in ("G", "C")}
    summary = verdicts.summary(run.read, halves, searched, held, s=run.s, family=run.family)
    more = more or Further()
    arrays |= more.arrays
    tables: dict[str, Any] = {name: table(name, found) for name, found in more.rows.items()}
    if searched is not None and held is not None:
        arrays |= {f"{half}/{key}": v for half, found in (("discovery", searched), ("confirmation", held))
                   for key, v in found.arrays().items()}  # fmt: skip
        tables |= {
            "heads": table("heads", head_rows(searched, held)),
            "evidence": table("evidence", [*searched.rows(DISCOVERY), *held.rows(CONFIRMATION)]),
            "sets": table("sets", held.set_rows),
            "members": table("members", held.member_rows),
            "steps": table("steps", held.searched.steps),
            "synergies": table("synergies", held.searched.synergies),
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
        behaviour=table("behaviour", behaviour_rows(run, halves)),
        conflicts=table("conflicts", conflict_rows(run, halves)),
        arrays=arrays,
        protocol=run.protocol,
        provenance=stamp(
            av_lens=protocol.__version__,
            model=str(getattr(getattr(engine, "model", None), "name", type(engine).__name__)),
            weights=getattr(getattr(engine, "model", None), "provenance", {}),
            question=" / ".join(dict.fromkeys(str(c.question) for c in run.bench.conflicts)),
            protocol_hash=run.protocol["hash"],
            answers=run.answers,
            choices=list(protocol.CHOICES),
            seconds=round(seconds, 1),
            bootstrap_units=[half.boot.unit for half in halves],
        ),
        **tables,
    )


def behaviour_rows(run: Run, halves: tuple[Half, Half]) -> list[dict[str, Any]]:
    """Write the behaviour table: both halves, with and without the choice by competence.

    Args:
        run: the run, its cells read.
        halves: the conflicts that are analysed.

    Returns:
        The rows.
    """
    rows: list[dict[str, Any]] = []
    for half in halves:
        dealt = run.halves.members(half.name)
        # Not the half's own conflicts: after a refusal, and past one, all of them are analysed.
        for chosen, rows_there in (("competent", [i for i in dealt if run.read.competent[i]]), ("all", dealt)):
            if rows_there:
                part = run.half(half.name, rows_there)
                rows += rows_of(run.read, part.examples, part.boot, half.name, chosen)
    return rows


def conflict_rows(run: Run, halves: tuple[Half, Half]) -> list[dict[str, Any]]:
    """Write the table of conflicts: where each was dealt, what the model says, C and G.

    Args:
        run: the run, its cells read.
        halves: the conflicts that are analysed.

    Returns:
        One row for each conflict, in the order in which they were given.
    """
    found, candidates = run.read, run.bench.candidates
    used = {int(i) for half in halves for i in half.examples}
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
