"""Sections 5 and 7 of the protocol, who is named and who holds, written a second time from the text.

It begins where `plain_protocol` ends: with every node's effect on every conflict of a half. Intervals and p are dyadic.

Read out of the text where it leaves a choice: that the *release* passes (breaks and undetermined need it) is judged by
a second q over the same family, each role's p replaced by its release part; a node whose release passes and for which
no cut holds is undetermined, and confirmed by its release alone if it does not break; a named MLP is one whose release
passes and is no mere damage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from plain_forward import MLP, Node
from plain_protocol import RELEASES
from plain_statistics import Dyadic, Units, benjamini_hochberg, dyadic, holm, mean

LEVEL = 0.05
SUPPRESSORS = ("picture writer", "sound opponent", "gate")
RELEASING = (*SUPPRESSORS, "undetermined")
FEEDER = "feeder"
CARRIERS = {"silenced carrier": "silenced/blank_a - blank_muted", "sound carrier": "carries/blank_muted"}
Test = tuple[Node, str, str]
"""Node, role, donor ("" of carriers)."""


@dataclass(eq=False)
class PlainHalf:
    """A half's effects.

    Attributes:
        figures: "estimand/donor" -> node -> one value per conflict.
        G: hearing with nothing to see, per conflict.
        units: each conflict's sources; `with_third` those of effects that use the third clip, `words` its answers'.
        s: delta over G.
    """

    figures: Mapping[str, Mapping[Node, Sequence[float]]]
    G: Sequence[float]
    units: Units
    with_third: Units
    words: Units
    s: float
    held: Mapping[str, Mapping[Node, Sequence[float]]] = field(default_factory=dict)

    @property
    def delta(self) -> float:
        """The smallest effect that counts."""
        return self.s * mean(self.G)

    @property
    def nodes(self) -> list[Node]:
        """All that were measured."""
        return list(self.figures["release/zero"])

    def of(self, name: str, node: Node) -> list[float]:
        """An estimand's values; the first token's release is the release where answers have one token."""
        if name.startswith("release at the first token") and name not in self.figures:
            name = name.replace(" at the first token", "")
        return list(self.figures[name][node])

    def donor(self, node: Node) -> str:
        """The donor of the largest mean release."""
        return max(RELEASES, key=lambda donor: mean(self.of(f"release/{donor}", node)))

    def alone(self, node: Node) -> bool:
        """Whether one donor alone releases."""
        second, largest = sorted(mean(self.of(f"release/{donor}", node)) for donor in RELEASES)[1:]
        return second < 0.5 * largest

    # Section 7: the parts of a role's p.

    def over(self, values: Sequence[float]) -> list[float]:
        """values - s G."""
        return [x - self.s * g for x, g in zip(values, self.G, strict=True)]

    def parts(self, node: Node, role: str, donor: str) -> dict[str, Dyadic]:
        """What must hold for a role, each as a mean to be above 0."""
        if role in CARRIERS:
            return {role: dyadic(self.over(self.of(CARRIERS[role], node)), self.units)}
        first, direct = self.of(f"release at the first token/{donor}", node), self.of(f"direct/{donor}", node)
        found = {"release": dyadic(self.over(self.of(f"release/{donor}", node)), self.units)}
        if role == FEEDER:
            held, write = self.held[donor][node], self.of(f"write/{donor}", node)
            lost = [0.5 * r - h for r, h in zip(first, held, strict=True)]
            found["held"] = dyadic(lost, self.units)
            found["write"] = dyadic([0.25 * r - w for r, w in zip(first, write, strict=True)], self.units)
            return found
        own = [d - 0.5 * r for d, r in zip(direct, first, strict=True)]
        found["direct"] = dyadic([-one for one in own] if role == "gate" else own, self.units)
        if role != "gate":
            reads = self.reads(node)
            found["reads"] = dyadic([-one for one in reads] if role == "sound opponent" else reads, self.with_third)
        return found

    def reads(self, node: Node) -> list[float]:
        """Reads picture - reads sound."""
        both = zip(self.of("reads picture/wa", node), self.of("reads sound/vw", node), strict=True)
        return [picture - sound for picture, sound in both]

    def p(self, test: Test) -> float:
        """A role's p: the largest of its parts'."""
        node, role, donor = test
        if role == FEEDER and node not in self.held.get(donor, {}):
            return 1.0
        return max(part.p for part in self.parts(node, role, donor).values())

    def release_p(self, test: Test) -> float:
        """The same with the role replaced by its release."""
        node, role, donor = test
        return self.p(test) if role in CARRIERS else self.parts(node, "gate", donor)["release"].p

    # Section 5: the cuts.

    def share(self, above: Sequence[float], node: Node, donor: str) -> tuple[float, float]:
        """The interval of a share of the release."""
        return dyadic(above, self.units, self.of(f"release at the first token/{donor}", node)).interval

    def breaks(self, node: Node, donor: str) -> bool:
        """Whether the edit is mere damage."""
        falls, release = self.of(f"fall of G/{donor}", node), self.of(f"release/{donor}", node)
        damage = dyadic([fall - 0.5 * r for fall, r in zip(falls, release, strict=True)], self.units)
        rise = dyadic(self.of(f"rise over others/{donor}", node), self.units)
        return damage.interval[1] >= 0 or rise.interval[0] <= -self.delta

    def acts_through(self, node: Node, donor: str) -> bool:
        """Whether at least half of the release is lost with the named later MLPs held."""
        if node not in self.held.get(donor, {}):
            return False
        first = self.of(f"release at the first token/{donor}", node)
        lost = [r - h for r, h in zip(first, self.held[donor][node], strict=True)]
        return self.share(lost, node, donor)[0] >= 0.5

    def role(self, node: Node, donor: str, passes: Mapping[str, bool]) -> str:
        """The first that holds, of a node whose release passes."""
        if self.breaks(node, donor):
            return "breaks"
        small = self.share(self.of(f"write/{donor}", node), node, donor)[1] < 0.25 if self.held else False
        if self.acts_through(node, donor) and small and passes[FEEDER]:
            return FEEDER
        direct = self.share(self.of(f"direct/{donor}", node), node, donor)
        low, high = dyadic(self.reads(node), self.with_third).interval
        picture, sound = (
            dyadic(self.of(name, node), self.with_third).interval[0] > 0
            for name in ("reads picture/wa", "reads sound/vw")
        )
        if direct[0] >= 0.5 and low > 0 and picture and passes["picture writer"]:
            return "picture writer"
        if direct[0] >= 0.5 and high < 0 and sound and passes["sound opponent"]:
            return "sound opponent"
        return "gate" if direct[1] < 0.5 and passes["gate"] else "undetermined"


@dataclass
class PlainNamed:
    """Who is named on discovery: (node, role, donor) -> its p and q."""

    rows: dict[Test, tuple[float, float]]

    def suppresses(self, node: Node) -> bool:
        """Whether a node is named for its release."""
        return any(at == node and role in RELEASING for at, role, _ in self.rows)


def family(nodes: Sequence[Node]) -> list[Test]:
    """All tests: heads with four roles by three donors and two carriers, MLPs with three roles by three donors."""
    found: list[Test] = []
    for node in nodes:
        roles = SUPPRESSORS if node[1] == MLP else (*SUPPRESSORS, FEEDER)
        found += [(node, role, donor) for role in roles for donor in RELEASES]
        found += [] if node[1] == MLP else [(node, role, "") for role in CARRIERS]
    return found


def named(half: PlainHalf, tests: Sequence[Test]) -> PlainNamed:
    """Name nodes on discovery, with q over a family of tests."""
    p, release_p = ({test: of(test) for test in tests} for of in (half.p, half.release_p))
    q, release_q = (
        dict(zip(tests, benjamini_hochberg([one[test] for test in tests], len(tests)), strict=True))
        for one in (p, release_p)
    )
    rows: dict[Test, tuple[float, float]] = {}
    for node in dict.fromkeys(node for node, _, _ in tests):
        donor = half.donor(node)
        mine = {role: q[node, role, donor] < LEVEL for role in (*SUPPRESSORS, FEEDER) if (node, role, donor) in q}
        gate = node, "gate", donor
        passed = mean(half.of(f"release/{donor}", node)) > half.delta and release_q[gate] < LEVEL
        if passed:
            test = node, half.role(node, donor, mine), donor
            rows[test] = (p[test], q[test]) if test in p else (release_p[gate], release_q[gate])
        for role, estimand in CARRIERS.items():
            test = node, role, ""
            joins = role == "sound carrier" or not passed
            if test in q and joins and mean(half.of(estimand, node)) > half.delta and q[test] < LEVEL:
                rows[test] = p[test], q[test]
    return PlainNamed(rows)


def named_with_feeders(half: PlainHalf, held: Mapping[str, Mapping[Node, Sequence[float]]]) -> PlainNamed:
    """MLPs first, feeder rows at p = 1; then feeder rows get their p, and heads are named once more.

    Args:
        half: discovery, nothing held.
        held: donor -> head -> its release with the MLPs held that the first step names.
    """
    tests = family(half.nodes)
    first = named(half, tests)
    half.held = held
    second = named(half, tests)
    half.held = {}
    mlps = {test: found for test, found in first.rows.items() if test[0][1] == MLP}
    return PlainNamed(mlps | {test: found for test, found in second.rows.items() if test[0][1] != MLP})


def confirmed(half: PlainHalf, rows: Sequence[Test], adjusted: Mapping[Test, float]) -> dict[Test, bool]:
    """Which rows hold on confirmation: Holm's p over those named, the same role by the same cuts, mean above delta."""
    found: dict[Test, bool] = {}
    for test in rows:
        node, role, donor = test
        estimand = CARRIERS.get(role, f"release/{donor}")
        held = adjusted[test] < LEVEL and mean(half.of(estimand, node)) > half.delta
        if role not in CARRIERS:
            again = half.role(node, donor, dict.fromkeys((*SUPPRESSORS, FEEDER), True))
            held = held and (again == role or (role == "undetermined" and again != "breaks"))
        found[test] = held
    return found


def holm_over(half: PlainHalf, rows: Sequence[Test]) -> dict[Test, float]:
    """Holm's p of the rows that got a name (breaks is none)."""
    p = [half.release_p((n, "gate", d)) if role == "undetermined" else half.p((n, role, d)) for n, role, d in rows]
    return dict(zip(rows, holm(p), strict=True))


def over_words(half: PlainHalf, test: Test) -> str:
    """What is to be said of a suppressor that holds: "", "on these words" or "untested over words"."""
    node, role, donor = test
    if role not in (*RELEASING, FEEDER):
        return ""
    if len(set().union(*half.words)) < 8:
        return "untested over words"
    found = dyadic(half.over(half.of(f"release/{donor}", node)), half.words)
    return "" if found.interval[0] > 0 else "on these words"
