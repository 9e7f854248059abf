"""Which events does a text name? A stated lexicon: every event with its words, found as whole words.

Matching ignores case, takes a word's plain plural ("siren" finds "sirens") and nothing else; of overlapping matches the
longest counts ("guitar" is not found in "bass guitar"). An event both heard and seen counts in both shares; the share
hallucinated is of the events named, NaN where none is. Not done: negations ("no dog").

    >>> lexicon = Lexicon.of({"dog": ["puppy", "barking"], "siren": []})
    >>> [match.event for match in lexicon.found("A PUPPY, then sirens.")]
    ['dog', 'siren']
    >>> Lexicon.of_sounds().event("dog_barking")
    'dog'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from av_lens.errors import InputError, unknown

FIGURES = ("heard", "seen", "hallucinated")


@dataclass(frozen=True)
class Match:
    """One event in a text."""

    event: str  # the event
    start: int  # the first character
    stop: int  # the character after the last


@dataclass(frozen=True)
class Lexicon:
    """Events and their words. Build it with `Lexicon.of`."""

    words: tuple[tuple[str, tuple[str, ...]], ...]  # (event, its words in lower case), in order
    classes: tuple[tuple[str, str], ...] = ()  # (what a data set calls an event, the event)

    def __post_init__(self) -> None:
        owner: dict[str, str] = {}
        for event, listed in self.words:
            for word in listed:
                if not word:
                    raise InputError(f"the event {event!r} has an empty word; leave it out.")
                if owner.setdefault(word, event) != event:
                    raise InputError(
                        f"the word {word!r} belongs to both {owner[word]!r} and {event!r}, so a text that has it names "
                        "either; give it to one of them."
                    )
        if not self.words:
            raise InputError("a lexicon needs at least one event, such as {'dog': ['puppy', 'barking']}.")

    @classmethod
    def of(cls, events: Mapping[str, Iterable[str]] | Iterable[str]) -> Lexicon:
        """Build a lexicon."""
        pairs = events.items() if isinstance(events, Mapping) else [(event, ()) for event in events]
        return cls(tuple((event, tuple(dict.fromkeys(_plain(w) for w in (event, *words)))) for event, words in pairs))

    @staticmethod
    @cache
    def of_sounds() -> Lexicon:
        """The lexicon of sounds that ships: words for them, and the classes of ESC-50, VGGSound and AudioSet's top."""
        lines = (Path(__file__).with_name("sounds.txt")).read_text(encoding="utf-8").splitlines()
        words, classes = zip(*(line.split(" | ") for line in lines if not line.startswith("#")), strict=True)
        made = Lexicon.of({listed.split(", ")[0]: listed.split(", ") for listed in words})
        named = ((name, made.events[i]) for i, listed in enumerate(classes) for name in listed.split("; "))
        return replace(made, classes=tuple(named))

    @property
    def events(self) -> tuple[str, ...]:
        """The events, in order."""
        return tuple(event for event, _ in self.words)

    @cached_property
    def _owner(self) -> dict[str, str]:
        return {word: event for event, listed in self.words for word in listed}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        words = sorted(self._owner, key=lambda word: (-len(word), word))
        spaced = (re.sub(r"(\\?\s)+", r"\\s+", re.escape(word)) for word in words)
        return re.compile(r"(?<!\w)(" + "|".join(spaced) + r")(?:(?<=[sxz])es|(?<=[cs]h)es|s)?(?!\w)", re.IGNORECASE)

    @cached_property
    def _class(self) -> dict[str, str]:
        return {_letters(name): event for name, event in self.classes}

    def event(self, word: str) -> str:
        """Find the event of a word, or of what a data set calls it."""
        found = self._class.get(_letters(word)) or self._owner.get(_plain(word)) or self._owner.get(_letters(word))
        if found is None:
            raise InputError(unknown("event", word, self._owner))
        return found

    def own_word(self, label: str) -> str:
        """Give a label back in plain letters if it is a word for its event itself, and no data set's class; else ""."""
        return _plain(label) if _letters(label) not in self._class and _plain(label) in self._owner else ""

    def found(self, text: str) -> list[Match]:
        """Find the events that a text names."""
        return [Match(self._owner[_plain(m[1])], *m.span()) for m in self._pattern.finditer(text)]

    def score(self, text: str, *, heard: Sequence[str], seen: Sequence[str]) -> dict[str, float]:
        """Score what a text names against what is there."""
        named = {match.event for match in self.found(text)}
        truth = [{self.event(word) for word in side} for side in (heard, seen)]
        shares = [len(named & side) / len(side) if side else float("nan") for side in truth]
        extra = named - truth[0] - truth[1]
        return dict(zip(FIGURES, (*shares, len(extra) / len(named) if named else float("nan")), strict=True))


def _letters(name: str) -> str:
    """A class's name without what data sets write differently: case, underscores, commas, brackets."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def _plain(word: str) -> str:
    return " ".join(word.casefold().split())
