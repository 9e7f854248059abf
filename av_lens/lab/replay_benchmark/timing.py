"""Timing on a machine that others use too: rounds in which they took a core's time are not counted.

Beside the wall clock the kernel's own accounts are read (`/proc/stat`): time that all processes, and a hypervisor's
other guests, spent on the cores, less this process's. A round is *quiet* where that is below a tenth of a core. What is
timed is repeated until enough rounds were quiet, within a patience; the median of the quiet rounds is the figure. Where
too few were quiet the least of all rounds stands in for it, and the figure is counted as disturbed.

Short works are repeated within a round until it lasts a fifth of a second, so that the accounts (ticks of 10 ms) can
tell. Where there is no such file every round counts as quiet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

_ACCOUNTS = Path("/proc/stat")
BUSY = 0.1  # cores that others may use in a quiet round
LONG = 4.0  # seconds: what takes longer is done once, and once again if it was disturbed
LOOK = 0.25  # seconds over which the machine is watched while waiting


@dataclass
class Stopwatch:
    """Times works in quiet rounds.

    Attributes:
        rounds: quiet rounds that are wanted of each work.
        patience: seconds that may be spent on waiting for quiet, in all.
        shortest: seconds that a round lasts at least; short works are repeated within it.
        waited: seconds spent so.
        figures: how many figures were taken.
        disturbed: how many of them without enough quiet rounds.
    """

    rounds: int = 5
    patience: float = 60.0
    shortest: float = 0.2
    waited: float = 0.0
    figures: int = 0
    disturbed: int = 0
    _known: dict[Any, float] = field(default_factory=dict)
    _brief: Stopwatch | None = None

    def time(self, work: Callable[[], Any]) -> float:
        """Time one work, already warm, in seconds."""
        return self.in_turns({"work": work})["work"]

    def in_turns(self, ways: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Time several works, one after another in each round; each is done before it is timed, unless it is long."""
        first = {name: _round(work, 1) for name, work in ways.items()}
        every = {name: [found] if found[0] > LONG else [] for name, found in first.items()}
        wanted = {name: 1 if found[0] > LONG else self.rounds for name, found in first.items()}
        times: dict[str, int] = {}
        for name, work in ways.items():  # the second time is warm, and says how often to repeat
            seconds = first[name][0] if every[name] or first[name][0] > self.shortest else _round(work, 1)[0]
            times[name] = max(1, round(self.shortest / max(seconds, 1e-6) + 0.5))
        for _ in range(2 * self.rounds):
            for name, work in ways.items():
                tired = self.waited >= self.patience or wanted[name] == 1
                most = wanted[name] + (1 if tired else self.rounds)
                if _quiet(every[name], wanted[name]) or len(every[name]) >= most:
                    continue
                every[name].append(_round(work, times[name]))
                self._rest(every[name][-1])
        return {name: self._figure(every[name], wanted[name]) for name in ways}

    def each(self, works: Sequence[Callable[[], Any]]) -> float:
        """Time works that are alike, each once, after the first was done once to warm up: seconds of one."""
        works[0]()
        found: list[tuple[float, float]] = []
        for work in works:
            found.append(_round(work, 1))
            self._rest(found[-1])
        return self._figure(found, len(works))

    def _figure(self, found: list[tuple[float, float]], wanted: int) -> float:
        self.figures += 1
        if _quiet(found, (wanted + 1) // 2):
            return median(seconds for seconds, others in found if others < BUSY)
        self.disturbed += 1
        return min(seconds for seconds, _ in found)

    def brief(self) -> Stopwatch:
        """A stopwatch for many small works, which waits for nobody; its figures count here."""
        if self._brief is None:
            self._brief = Stopwatch(min(self.rounds, 3), 0.0, min(self.shortest, 0.05))
        return self._brief

    def account(self) -> dict[str, int]:
        """Say how many figures were taken, and how many without enough quiet rounds ("disturbed")."""
        brief = self.brief()
        return {"figures": self.figures + brief.figures, "disturbed": self.disturbed + brief.disturbed}

    def known(self, key: Any, make: Callable[[], Callable[[], Any]]) -> float:
        """Time a work once for each key; it is made where its time is not known."""
        if key not in self._known:
            self._known[key] = self.time(make())
        return self._known[key]

    def _rest(self, found: tuple[float, float]) -> None:
        """After a round that others disturbed, wait for them to rest, while there is patience."""
        while found[1] >= BUSY and self.waited < self.patience:
            begun = time.perf_counter()
            _, others = _round(lambda: time.sleep(LOOK), 1)
            self.waited += time.perf_counter() - begun
            if others < BUSY:
                return


def _quiet(found: list[tuple[float, float]], wanted: int) -> bool:
    return sum(others < BUSY for _, others in found) >= wanted


def _round(work: Callable[[], Any], times: int) -> tuple[float, float]:
    """Seconds of one work, and how many cores others used meanwhile."""
    others, begun = _others(), time.perf_counter()
    for _ in range(times):
        work()
    seconds = time.perf_counter() - begun
    return seconds / times, (_others() - others) / seconds


def _others() -> float:
    """Seconds of core time that others than this process have used since the machine started."""
    if not _ACCOUNTS.exists():
        return 0.0
    # user nice system idle iowait irq softirq steal; guests are counted in user.
    ticks = [int(word) for word in _ACCOUNTS.read_text().split("\n", 1)[0].split()[1:9]]
    used = os.times()
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - used.user - used.system
