"""What a run is, before the model is asked anything: who is dealt where, what is asked, and which protocol this is.

Deal the conflicts to two halves, draw the third clips, resolve the answers, write the protocol down. Whatever can be
refused without running the model is refused here.

A run is the same run as another if criteria, seeds, model (weights and configuration), conflicts (files, windows,
words), number of threads and program are the same; `Run.key` is the hash of all that, and measurements on disk are
known by it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import get_num_threads

from av_lens.errors import ProtocolError, unknown
from av_lens.inputs.sources import ROLES, ClipKeys
from av_lens.isolation.measuring.answer_forms import answered
from av_lens.isolation.measuring.behaviour import Survey
from av_lens.isolation.measuring.bench import Bench, Progress
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.recordings import SITES
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.measuring.store import SCHEMA, measuring_hash
from av_lens.isolation.naming.role_tests import family_size
from av_lens.isolation.running import protocol
from av_lens.model.remembered_towers import remembered_towers
from av_lens.replay.trace_files import weight_hashes
from av_lens.results.halves import CONFIRMATION, DISCOVERY, LOST, Halves, Member, deal, third_sources
from av_lens.results.provenance import plain, versions
from av_lens.results.statistics import Bootstrap

GATES = ("stop", "report")


@dataclass(frozen=True)
class Options:
    """What a caller of `isolate` chose; see there."""

    sites: tuple[str, ...]
    s: float | None
    gate: str
    seed: int
    layout: str
    quick: bool
    named_only: bool = False

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ProtocolError(unknown("gate", self.gate, GATES))
        if not self.sites:
            raise ProtocolError(f"no site was given to search; give at least one of: {', '.join(SITES)}.")
        for site in self.sites:
            if site not in SITES:
                raise ProtocolError(unknown("site", site, SITES))


@dataclass(eq=False)
class Run:
    """Everything a run knows while it goes on; `s` may be raised when it is measured.

    `answers` says how words are read, and which conflicts are left out for theirs.
    """

    bench: Bench
    members: list[Member]
    halves: Halves
    protocol: dict[str, Any]
    options: Options
    s: float
    survey: Survey | None = None
    both: tuple[Half, Half] = field(init=False)
    answers: dict[str, Any] = field(default_factory=dict)
    stamps: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The hash of all that the run's measurements depend on: protocol, weights, conflicts, program, versions."""
        parts = [SCHEMA, self.protocol["hash"], measuring_hash(), versions()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def clips(self) -> dict[tuple[str, str], str]:
        """The conflicts' files, by conflict and role."""
        found = {
            (c.id, role): getattr(getattr(c, role, None), "path", None) for c in self.bench.conflicts for role in ROLES
        }
        return {place: str(path) for place, path in found.items() if path is not None}

    @property
    def family(self) -> int:
        """How many tests q corrects for."""
        return int(self.protocol["family"])

    @property
    def read(self) -> Survey:
        """What the unedited model says in every cell."""
        assert self.survey is not None
        return self.survey

    def half(self, name: str, examples: Sequence[int]) -> Half:
        """Collect some conflicts of a half."""
        found = np.array(examples, dtype=np.int64)
        components = [self.halves.component[i] for i in found]
        sound = [self.members[i].sound_clip for i in found]
        picture = [self.members[i].picture_clip for i in found]
        boot = Bootstrap.draw(components, sound, picture, seed=self.options.seed + (name == CONFIRMATION))
        return Half(name, found, components, boot, self.read.G[found], self.read.C[found])

    def stamp(self, stamp: str, reason: str) -> None:
        """Mark every page, and say why."""
        if stamp not in self.stamps:
            self.stamps.append(stamp)
        self.reasons.append(reason)


def prepared(
    model: Any, conflicts: Sequence[Any], options: Options, *, engine: ModelEngine | None, progress: Progress | None
) -> Run:
    """Deal the halves, draw the third clips, resolve the answers, write the protocol down."""
    named = [c if c.id is not None else dataclasses.replace(c, id=f"c{i}") for i, c in enumerate(conflicts)]
    _require_enough(named, f"{len(named)} conflicts were given")
    organism = getattr(model, "grammar", None) is not None
    rule = "given" if options.s is not None else ("organism" if organism else protocol.MEASURED)
    s = options.s if options.s is not None else (protocol.S_ORGANISM if organism else protocol.S_OTHER)
    engine = ModelEngine(model, layout=options.layout) if engine is None else engine
    tokenizer = engine.model.tokenizer
    with remembered_towers(engine.model):
        read = answered(engine, named)
    named = list(read.conflicts)
    _require_enough(named, f"{len(named)} conflicts can be used. {read.sentence()} Beside them")
    candidates = Candidates.of(named, tokenizer)
    keys = ClipKeys()
    members = [
        Member(c.id, keys.of(c, "sound"), keys.of(c, "picture"), candidates.names[candidates.sound[i]])
        for i, c in enumerate(named)
    ]
    halves = deal(members, seed=options.seed)
    _refuse_strays(named, members, halves, keys)
    named = _with_thirds(named, candidates, halves, options.seed)
    family = family_size(len(engine.heads), len(options.sites))
    written = protocol.protocol_of(
        options=dataclasses.asdict(options) | {"s": s, "s_rule": rule},
        halves=halves,
        ids=[m.id for m in members],
        model=_model_identity(engine),
        conflicts=_contents(named, keys),
        family=family,
    )
    bench = Bench(engine, named, candidates, site=options.sites[0], keys=keys)
    bench.progress = progress or bench.progress
    run = Run(bench, members, halves, written, options, s, answers=read.provenance())
    run.reasons += [read.sentence()] if read.left_out else []
    return run


def _require_enough(named: Sequence[Any], found: str) -> None:
    if len(named) < 2 * protocol.FEWEST:
        raise ProtocolError(
            f"{found}; isolation needs at least {protocol.FEWEST} competent ones in each half "
            f"({2 * protocol.FEWEST} in all, 120 for a verdict). Add conflicts."
        )


def _model_identity(engine: ModelEngine) -> dict[str, Any]:
    """Name the model by its sizes, its weights and how it computes."""
    text = json.dumps(weight_hashes(engine.model), sort_keys=True)
    return {
        "n_layers": engine.n_layers,
        "n_heads": engine.n_heads,
        "threads": get_num_threads(),
        "engine": engine.how,
        "weights": hashlib.sha256(text.encode()).hexdigest(),
        "dtype": str(engine.model.dtype),
        "device": str(engine.model.device.type),
    }


def _contents(named: Sequence[Any], keys: ClipKeys) -> dict[str, dict[str, str]]:
    """Hash what the conflicts are made of, by id: their clips by content and window, and their words."""
    found: dict[str, dict[str, str]] = {}
    for one in named:
        parts: dict[str, Any] = {role: keys.of(one, role) for role in ROLES if getattr(one, role, None) is not None}
        words = [str(getattr(one, name, "")) for name in ("question", "see", "control", "prefix")]
        parts["words"] = [plain(one.answers), *words]
        found[one.id] = {
            name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()
        }
    return found


def _refuse_strays(named: Sequence[Any], members: Sequence[Member], halves: Halves, keys: ClipKeys) -> None:
    """Refuse a given third clip on which the other half's conflicts are built: the halves share no clip."""
    built_on = {
        clip: half
        for member, half in zip(members, halves.half, strict=True)
        for clip in (member.sound_clip, member.picture_clip)
    }
    for conflict, half in zip(named, halves.half, strict=True):
        other = half if conflict.third is None else built_on.get(keys.of(conflict, "third"), half)
        if LOST not in (half, other) and half != other:
            raise ProtocolError(
                f"conflict {conflict.id!r} was dealt to {half}, and its third clip is a source clip of {other}: the "
                "halves must share no clip. Give a third clip that no conflict is made of, or leave third= out (one is "
                "drawn)."
            )


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
