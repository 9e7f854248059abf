"""What a run is before the model is asked anything: who is dealt where, what is asked, and what was fixed.

The conflicts are dealt to two halves, third clips drawn, answers resolved. Criteria, donors, sites, the family of
tests, the threshold s, seeds and who was dealt where are written down, with their hash, before any head is edited; a
finding that does not carry this hash was not made by this protocol. Whatever can be refused without running the model
is refused here.

A run is the same run as another if criteria, seeds, model (weights and configuration), conflicts (files, windows,
words), number of threads and program are the same; `Run.key` is the hash of all that, and measurements on disk are
known by it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import get_num_threads

from av_lens import __version__
from av_lens.core.readings import SINK_TIMES
from av_lens.errors import ProtocolError, unknown
from av_lens.inputs.conflict import ROLES, ClipKeys
from av_lens.isolation.measuring.behaviour import LEAST_GAP, LEAST_MASS, Survey, answered
from av_lens.isolation.measuring.bench import Bench, Half, Progress, wording
from av_lens.isolation.measuring.engine import PRIMARY_DONORS, SITES, ModelEngine
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.measuring.store import SCHEMA, measuring_hash
from av_lens.isolation.naming.evidence import PERCENTILE
from av_lens.isolation.naming.roles import DAMAGE_CUT, DIRECT_CUT, LEVEL, family_size
from av_lens.isolation.sets.confirmation import FEWEST_SETS, NEAREST, NORM_FACTOR, RANDOM_SETS
from av_lens.isolation.sets.search import ALL_HEADS, MOST_MEMBERS, PATIENCE, SCREENED, SYNERGIES
from av_lens.isolation.sets.sets import MARGIN
from av_lens.model.binding import remembered_towers
from av_lens.replay.trace_files import weight_hashes
from av_lens.results import statistics
from av_lens.results.provenance import plain, versions
from av_lens.results.statistics import CONFIRMATION, DISCOVERY, Bootstrap, Halves, Member

S_ORGANISM, S_OTHER = 0.10, 0.03
ALSO_COUNTED_AT = (0.10, 0.03, 0.01)
"""Shares of G at which the verdict counts heads, whatever s is."""
MEASURED = (
    "other model: at least this, or the 99th percentile over heads of the largest release under the control question"
)

CHOICES = tuple((Path(__file__).parent / "choices.txt").read_text("utf-8").splitlines())
"""Where the protocol is silent: a sentence a line."""


def protocol_of(
    *,
    options: Mapping[str, Any],
    halves: Halves,
    ids: Sequence[str],
    model: Mapping[str, Any],
    conflicts: Mapping[str, Mapping[str, str]],
    family: int,
) -> dict[str, Any]:
    """Write the protocol of a run down."""
    components = len({halves.component[i] for i in halves.members(DISCOVERY)})
    size = statistics.smallest_effect(components, family=family)
    fewest = {"fewest_clips": statistics.FEWEST_CLIPS, "fewest_components": statistics.FEWEST_COMPONENTS}
    out: dict[str, Any] = {
        "av_lens": __version__,
        "primary": "release: effect on C = (M(va) - M(av)) / 2",
        "donors": list(PRIMARY_DONORS),
        **plain(options),
        "left_out": ["robustness", "pairs"] if options["quick"] else [],
        "also_counted_at": list(ALSO_COUNTED_AT),
        "level": LEVEL,
        "direct_share_cut": DIRECT_CUT,
        "family": family,
        "power": {
            "discovery_components": components,
            # The smallest release above s x G that is found in 4 of 5 runs, in standard deviations between components.
            "smallest_effect_in_sd": size if math.isfinite(size) else None,
        },
        "model": dict(model),
        "conflicts": {name: dict(parts) for name, parts in conflicts.items()},
        "least_mass_on_the_answers": LEAST_MASS,
        "least_gap_share": LEAST_GAP,
        "halves": {
            "largest_component": statistics.LARGEST_SHARE,
            "fewest_conflicts": statistics.FEWEST,
            "firm_conflicts": statistics.FIRM_CONFLICTS,
            "firm_components": statistics.FIRM_COMPONENTS,
            "dealt": dict(zip(ids, halves.half, strict=True)),
            "lost": halves.n_lost,
        },
        "bootstrap": {"draws": statistics.DRAWS, "level": 0.95} | fewest,
        "sign_flips": {"most_exact_components": statistics.MOST_EXACT, "least_sampled": "10 x family / .05"},
        "random_sets": RANDOM_SETS,
        "damage": {"fall_of_G_over_release": DAMAGE_CUT, "heard_answer_over_delta": -1},
        "null_percentile_under_control": PERCENTILE,
        "sinks_times_the_mean": SINK_TIMES,
        "sets": {
            "all_heads_up_to": ALL_HEADS,
            "screened": SCREENED,
            "synergies": SYNERGIES,
            "most_members": MOST_MEMBERS,
            "small_gains_in_a_row": PATIENCE,
            "random_norm_factor": NORM_FACTOR,
            "random_nearest": NEAREST,
            "random_fewest": FEWEST_SETS,
        },
        "non_inferiority": {"margin": MARGIN, "fewest_items": statistics.FEWEST_ITEMS},
        "choices": list(CHOICES),
    }
    return out | {"hash": hash_of(out)}


def hash_of(protocol: Mapping[str, Any]) -> str:
    """Hash what a protocol says."""
    said = {name: value for name, value in protocol.items() if name != "hash"}
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def power_sentence(protocol: Mapping[str, Any]) -> str:
    """Say before a run how small an effect it will be able to find."""
    power, tests = protocol["power"], f"{protocol['family']} tests"
    if power["smallest_effect_in_sd"] is None:
        return (
            f"Power: {power['discovery_components']} components on discovery are too few for {tests}: no effect, "
            "however large, could pass them."
        )
    return (
        f"Power: {power['discovery_components']} components on discovery and {tests} find, four times in five, a "
        f"release that exceeds {protocol['s']:g} of G by {power['smallest_effect_in_sd']:.2f} standard deviations "
        "between components."
    )


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
    captions: bool = False

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
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def clips(self) -> dict[tuple[str, str], str]:
        """The conflicts' files, by conflict and role."""
        places = product(self.bench.conflicts, ROLES)
        found = {(c.id, role): getattr(getattr(c, role, None), "path", None) for c, role in places}
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
        components, members = [self.halves.component[i] for i in found], [self.members[i] for i in found]
        clips = [one.sound_clip for one in members], [one.picture_clip for one in members]
        boot = Bootstrap.draw(components, *clips, seed=self.options.seed + (name == CONFIRMATION))
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
    s, rule = (S_ORGANISM, "organism") if organism else (S_OTHER, MEASURED)
    if options.s is not None:
        s, rule = options.s, "given"
    engine = ModelEngine(model, layout=options.layout) if engine is None else engine
    with remembered_towers(engine.model):
        read = answered(engine, named)
    named = list(read.conflicts)
    _require_enough(named, f"{len(named)} conflicts can be used. {read.sentence()} Beside them")
    candidates = Candidates.of(named, engine.model.tokenizer)
    keys = ClipKeys()
    members = [
        Member(c.id, keys.of(c, "sound"), keys.of(c, "picture"), candidates.names[candidates.sound[i]])
        for i, c in enumerate(named)
    ]
    halves = statistics.deal(members, seed=options.seed)
    _refuse_strays(named, members, halves, keys)
    named = _with_thirds(named, candidates, halves, options.seed)
    family = family_size(len(engine.heads), len(options.sites))
    written = protocol_of(
        options=dataclasses.asdict(options) | {"s": s, "s_rule": rule},
        halves=halves,
        ids=[m.id for m in members],
        model=_model_identity(engine),
        conflicts=_contents(named, keys),
        family=family,
    )
    bench = Bench(engine, named, candidates, site=options.sites[0], keys=keys)
    bench.progress = progress or bench.progress
    reasons = [read.sentence()] if read.left_out else []
    return Run(bench, members, halves, written, options, s, answers=read.provenance(), reasons=reasons)


def _require_enough(named: Sequence[Any], found: str) -> None:
    fewest = statistics.FEWEST
    if len(named) < 2 * fewest:
        raise ProtocolError(
            f"{found}; isolation needs at least {fewest} competent ones in each half "
            f"({2 * fewest} in all, 120 for a verdict). Add conflicts."
        )


def _model_identity(engine: ModelEngine) -> dict[str, Any]:
    """Name the model by its sizes, its weights and how it computes."""
    text = json.dumps(weight_hashes(engine.model), sort_keys=True)
    return {
        "n_layers": engine.n_layers,
        "n_heads": engine.n_heads,
        "threads": get_num_threads(),
        "engine": engine.how,
        "weights": sha256(text.encode()).hexdigest(),
        "dtype": str(engine.model.dtype),
        "device": str(engine.model.device.type),
    }


def _contents(named: Sequence[Any], keys: ClipKeys) -> dict[str, dict[str, str]]:
    """Hash what the conflicts are made of, by id: their clips by content and window, and their words."""
    found: dict[str, dict[str, str]] = {}
    for one in named:
        parts: dict[str, Any] = {role: keys.of(one, role) for role in ROLES if getattr(one, role, None) is not None}
        parts["words"] = [plain(one.answers), *wording(one)]
        found[one.id] = {name: sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}
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
        if statistics.LOST not in (half, other) and half != other:
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
        drawn = statistics.third_sources(sound, picture, ids=[named[i].id for i in rows], seed=seed)
        for i, j in zip(rows, drawn, strict=True):
            if j >= 0 and named[i].third is None:
                out[i] = dataclasses.replace(named[i], third=named[rows[int(j)]].sound)
    return out
