"""Who is dealt where, what is left out, and by which rule are the halves judged? Before the model is asked anything."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from av_lens.errors import ProtocolError
from av_lens.inputs.conflict import ClipKeys
from av_lens.inputs.sources import sources_of
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.results import dealing
from av_lens.results.dealing import CONFIRMATION, DISCOVERY, DYADIC, MORE_SOURCES, Halves, Member
from av_lens.results.dyadic import WORD, Dyadic, Inference, by_components
from av_lens.results.statistics import Bootstrap

EDITIONS = ("1", "2")


@dataclass(frozen=True, eq=False)
class Dealt:
    """The conflicts of a run as they were dealt; `twice` names those left out because an earlier one says the same."""

    conflicts: list[Any]
    members: list[Member]
    halves: Halves
    words: list[tuple[str, str]]
    thirds: list[str]
    twice: tuple[str, ...]
    edition: str

    def rules(self, examples: Sequence[int], *, seed: int) -> tuple[Inference, Inference | None, Dyadic | None]:
        """Choose what some conflicts of a half are judged by: effects, those with the third clip, and over words."""
        parts, members = [self.halves.component[i] for i in examples], [self.members[i] for i in examples]
        clips = [one.sound_clip for one in members], [one.picture_clip for one in members]
        if self.edition == "1":
            return Bootstrap.draw(parts, *clips, seed=seed), None, None
        dyadic = self.halves.rule == DYADIC
        rule = Dyadic.of([one.sources for one in members]) if dyadic else by_components(parts, clips, seed=seed)
        third = Dyadic.of([(*self.members[i].sources, self.thirds[i]) for i in examples])
        return rule, third, Dyadic.of([self.words[i] for i in examples], unit=WORD)

    def n_sources(self, examples: Sequence[int]) -> int | None:
        """Count the sources of some conflicts, where they are what counts."""
        return len({name for i in examples for name in self.members[i].sources}) if self.dyadic else None

    @property
    def dyadic(self) -> bool:
        """Whether sources are shared."""
        return self.halves.rule == DYADIC

    def standing(self, examples: Sequence[Sequence[int]]) -> str:
        """Say what the size of two halves allows."""
        parts = [len({self.halves.component[i] for i in rows}) for rows in examples]
        sources = [len({name for i in rows for name in self.members[i].sources}) for rows in examples]
        return dealing.standing(list(map(len, examples)), parts, n_sources=sources if self.dyadic else None)

    def sentences(self) -> list[str]:
        """Count what was left out of the deal."""
        out: list[str] = []
        if self.twice:
            named = ", ".join(self.twice[:5]) + (", ..." if len(self.twice) > 5 else "")
            out.append(
                f"{len(self.twice)} conflicts are left out because an earlier one has the same two sources and the "
                f"same question: {named}."
            )
        if self.dyadic:
            out.append(
                f"Conflicts share sources: sources were dealt to the halves, {self.halves.n_lost} conflicts across "
                "them are left out, and inference is dyadic."
            )
        return out


def dealt_conflicts(named: Sequence[Any], tokenizer: Any, keys: ClipKeys, *, seed: int, edition: str) -> Dealt:
    """Deal conflicts whose answers are tokens."""
    of, twice = keys.of, set[int]()
    if edition != "1":
        of = sources_of(named, keys).of
        twice = set(dealing.doubled([Member(c.id, of(c, "sound"), of(c, "picture"), "", c.question) for c in named]))
    kept = [one for i, one in enumerate(named) if i not in twice]
    candidates = Candidates.of(kept, tokenizer)
    words = [
        (candidates.names[a], candidates.names[v]) for a, v in zip(candidates.sound, candidates.picture, strict=True)
    ]
    members = [
        Member(c.id, of(c, "sound"), of(c, "picture"), heard, c.question)
        for c, (heard, _) in zip(kept, words, strict=True)
    ]
    halves = dealing.deal(members, seed=seed) if edition == "1" else dealing.deal_sources(members, seed=seed)
    _refuse_strays(kept, members, halves, of)
    drawn = drawn_thirds(words, [c.id for c in kept], halves, seed)
    thirds = [
        of(c, "third") if c.third is not None else "" if j is None else members[j].sound_clip
        for c, j in zip(kept, drawn, strict=True)
    ]
    whole = [
        c if c.third is not None or j is None else dataclasses.replace(c, third=kept[j].sound)
        for c, j in zip(kept, drawn, strict=True)
    ]
    return Dealt(whole, members, halves, words, thirds, tuple(named[i].id for i in sorted(twice)), edition)


def _refuse_strays(
    named: Sequence[Any], members: Sequence[Member], halves: Halves, of: Callable[[Any, str], str]
) -> None:
    """Refuse a given third clip on which the other half's conflicts are built: the halves share no clip."""
    built_on = {clip: half for member, half in zip(members, halves.half, strict=True) for clip in member.sources}
    for conflict, half in zip(named, halves.half, strict=True):
        other = half if conflict.third is None else built_on.get(of(conflict, "third"), half)
        if dealing.LOST not in (half, other) and half != other:
            raise ProtocolError(
                f"conflict {conflict.id!r} was dealt to {half}, and its third clip is a source clip of {other}: the "
                "halves must share no clip. Give a third clip that no conflict is made of, or leave third= out (one is "
                "drawn)."
            )


def drawn_thirds(words: Sequence[tuple[str, str]], ids: Sequence[str], halves: Halves, seed: int) -> list[int | None]:
    """Draw the conflict whose sound's clip is each one's w: another of the same half."""
    out: list[int | None] = [None] * len(ids)
    for half in (DISCOVERY, CONFIRMATION):
        rows = halves.members(half)
        sides = [[words[i][side] for i in rows] for side in (0, 1)]
        drawn = dealing.third_sources(*sides, ids=[ids[i] for i in rows], seed=seed)
        for i, j in zip(rows, drawn, strict=True):
            out[i] = rows[int(j)] if j >= 0 else None
    return out


def hopeless(dealt: Dealt, smallest: float | None, *, family: int) -> str:
    """Say why no effect, however large, could be found in this deal; "" where one could."""
    rows = [dealt.halves.members(name) for name in (DISCOVERY, CONFIRMATION)]
    if min(map(len, rows)) < dealing.FEWEST:
        left = f" ({dealt.halves.n_lost} conflicts lie across the halves)" if dealt.halves.n_lost else ""
        return (
            f"{len(rows[0])} and {len(rows[1])} conflicts could be dealt to halves that share no source{left}; "
            f"isolation needs at least {dealing.FEWEST} in each. {MORE_SOURCES}"
        )
    if smallest is None:
        parts = len({dealt.halves.component[i] for i in rows[0]})
        return (
            f"{parts} components on discovery are too few for {family} tests: no effect, however large, could pass "
            f"them. {MORE_SOURCES}"
        )
    return ""
