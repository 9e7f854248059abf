"""What a run is before the model is asked anything: who is dealt where, what is asked, and what was fixed.

`Run.key` hashes criteria, seeds, model, conflicts (files, windows, words), number of threads and program.
"""

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
from av_lens.isolation.measuring.bench import Bench, Progress, layout_of, wording
from av_lens.isolation.measuring.cells import SUPPRESSED, mirrored_conflict
from av_lens.isolation.measuring.engine import ENCODING_SITES, PRIMARY_DONORS, SITES, ModelEngine
from av_lens.isolation.measuring.halves import Half
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.measuring.store import SCHEMA, measuring_hash
from av_lens.isolation.naming.evidence import PERCENTILE
from av_lens.isolation.naming.roles import (
    ALL_NODES,
    DAMAGE_CUT,
    DIRECT_CUT,
    ENCODES_CUT,
    HELD_CUT,
    LEVEL,
    WRITE_CUT,
    family_size,
)
from av_lens.isolation.naming.screen import BY_ATP, BY_CARRYING, LOOK_TAIL, LOOKS
from av_lens.isolation.running.dealt import EDITIONS, Dealt, dealt_conflicts, hopeless
from av_lens.isolation.sets.matching import FEWEST_SETS, NEAREST, NORM_FACTOR, RANDOM_SETS, WIDENINGS
from av_lens.isolation.sets.search import MOST_MEMBERS, PATIENCE, SCREENED, SYNERGIES
from av_lens.isolation.sets.sets import MARGIN
from av_lens.model.binding import remembered_towers
from av_lens.replay.trace_files import weight_hashes
from av_lens.results import dealing, statistics
from av_lens.results.dealing import CONFIRMATION, DISCOVERY, Halves, Member
from av_lens.results.exchanged import exchanged
from av_lens.results.provenance import plain, versions

S_ORGANISM, S_OTHER = 0.10, 0.03
ALSO_COUNTED_AT = (0.10, 0.03, 0.01)
"""Shares of G at which the verdict counts heads, whatever s is."""
LEFT_OUT_PAIRS = "pairs, unless half of an established gap stays unexplained"
CONTROL = "control"  # asks for the rule of other models
MEASURED = (
    "other model: at least this, or the 99th percentile over nodes of the largest release under the control question "
    "(above 64 nodes over 64 drawn ones, its upper bound)"
)

CHOICES = tuple((Path(__file__).parent / "choices.txt").read_text("utf-8").splitlines())
"""Where the protocol is silent: a sentence a line."""


def protocol_of(
    *,
    options: Mapping[str, Any],
    dealt: Dealt,
    model: Mapping[str, Any],
    conflicts: Mapping[str, Mapping[str, str]],
    family: int,
) -> dict[str, Any]:
    """Write the protocol of a run down."""
    halves = dealt.halves
    rows = halves.members(DISCOVERY)
    size = dealt.rules(rows, seed=0)[0].smallest_effect(family=family)
    fewest = {"fewest_clips": statistics.FEWEST_CLIPS, "fewest_components": statistics.FEWEST_COMPONENTS}
    out: dict[str, Any] = {
        "av_lens": __version__,
        "primary": "release: effect on C = (M(va) - M(av)) / 2",
        "donors": list(PRIMARY_DONORS),
        **plain(options),
        "left_out": ["robustness", LEFT_OUT_PAIRS] if options["quick"] else [],
        "also_counted_at": list(ALSO_COUNTED_AT),
        "level": LEVEL,
        "direct_share_cut": DIRECT_CUT,
        "feeder": {"lost_with_mlps_held": HELD_CUT, "write_share_below": WRITE_CUT},
        "encoder": {"lost_under_see_over_release": ENCODES_CUT},
        "screen": {"by_atp_star": BY_ATP, "by_carrying": BY_CARRYING, "looks": list(LOOKS), "tail": LOOK_TAIL},
        "family": family,
        "power": {
            "discovery_components": len({halves.component[i] for i in rows}),
            "discovery_conflicts": len(rows),
            "discovery_sources": dealt.n_sources(rows),
            # The smallest release above s x G that is found in 4 of 5 runs, in standard deviations between components.
            "smallest_effect_in_sd": size if math.isfinite(size) else None,
        },
        "model": dict(model),
        "conflicts": {name: dict(parts) for name, parts in conflicts.items()},
        "least_mass_on_the_answers": LEAST_MASS,
        "least_gap_share": LEAST_GAP,
        "halves": _halves(dealt),
        "bootstrap": {"draws": statistics.DRAWS, "level": 0.95} | fewest,
        "sign_flips": {"most_exact_components": statistics.MOST_EXACT, "least_sampled": "10 x family / .05"},
        "random_sets": RANDOM_SETS,
        "damage": {"fall_of_G_over_release": DAMAGE_CUT, "heard_answer_over_delta": -1},
        "null_percentile_under_control": PERCENTILE,
        "sinks_times_the_mean": SINK_TIMES,
        "sets": {
            "all_nodes_up_to": ALL_NODES,
            "screened": SCREENED,
            "synergies": SYNERGIES,
            "most_members": MOST_MEMBERS,
            "small_gains_in_a_row": PATIENCE,
            "random_norm_factor": NORM_FACTOR,
            "random_nearest": NEAREST,
            "random_fewest": FEWEST_SETS,
            "random_widenings": [where for where, *_ in WIDENINGS[1:]],
        },
        "non_inferiority": {"margin": MARGIN, "fewest_items": statistics.FEWEST_ITEMS},
        "choices": list(CHOICES),
    }
    return out | {"hash": hash_of(out)}


def _halves(dealt: Dealt) -> dict[str, Any]:
    halves, ids = dealt.halves, [one.id for one in dealt.members]
    return {
        "rule": halves.rule,
        "largest_component": dealing.LARGEST_SHARE if dealt.edition == "1" else dealing.LARGEST_OF_A_HALF,
        "fewest_conflicts": dealing.FEWEST,
        "firm_conflicts": dealing.FIRM_CONFLICTS,
        "firm_components": dealing.FIRM_COMPONENTS,
        "firm_sources": dealing.FIRM_SOURCES,
        "dealt": dict(zip(ids, halves.half, strict=True)),
        "lost": halves.n_lost,
        "doubled": list(dealt.twice),
    }


def hash_of(protocol: Mapping[str, Any]) -> str:
    """Hash what a protocol says."""
    said = {name: value for name, value in protocol.items() if name != "hash"}
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


_PAIRLESS = ": of heads that stand in for each other a quick search says nothing, unless a gap stays unexplained"


def power_sentence(protocol: Mapping[str, Any]) -> str:
    """Say before a run how small an effect it will be able to find."""
    power, tests = protocol["power"], f"{protocol['family']} tests"
    if power["smallest_effect_in_sd"] is None:
        return (
            f"Power: {power['discovery_components']} components on discovery are too few for {tests}: no effect, "
            "however large, could pass them."
        )
    many = f"{power['discovery_components']} components"
    if power["discovery_sources"] is not None:
        many = f"{power['discovery_conflicts']} conflicts of {power['discovery_sources']} sources"
    return (
        f"Power: {many} on discovery and {tests} find, four times in five, a "
        f"release that exceeds {protocol['s']:g} of G by {power['smallest_effect_in_sd']:.2f} standard deviations "
        f"between components. That is of single heads{_PAIRLESS if protocol['quick'] else ''}."
    )


GATES = ("stop", "report")
NOT_INTERPRETABLE, EXPLORATORY = "not interpretable", "exploratory"


@dataclass(frozen=True)
class Options:
    """What a caller of `isolate` chose; see there."""

    sites: tuple[str, ...]
    s: float | str | None
    gate: str
    seed: int
    layout: str
    quick: bool
    named_only: bool = False
    captions: bool = False
    protocol: str = "2"
    suppressed: str = "sound"

    def __post_init__(self) -> None:
        if self.suppressed not in SUPPRESSED:
            raise ProtocolError(unknown("suppressed", self.suppressed, SUPPRESSED))
        if self.suppressed == "picture" and self.captions:
            raise ProtocolError('captions tell what is heard: leave captions out with suppressed="picture".')
        if self.protocol not in EDITIONS:
            raise ProtocolError(unknown("edition of the protocol", self.protocol, EDITIONS))
        if isinstance(self.s, str) and self.s != CONTROL:
            raise ProtocolError(f"s={self.s!r}: give a share of G, {CONTROL!r} for the rule of other models, or None.")
        if self.gate not in GATES:
            raise ProtocolError(unknown("gate", self.gate, GATES))
        if not self.sites:
            raise ProtocolError(f"no site was given to search; give at least one of: {', '.join(SITES)}.")
        for site in self.sites:
            if site == "generated":
                raise ProtocolError(
                    "the site 'generated' is what decoding adds, and answers are asked for at the last position of the "
                    f"prompt: it is edited in captions alone (captions=True). Search {', '.join(SITES)}."
                )
            if site not in SITES:
                raise ProtocolError(unknown("site", site, SITES))


@dataclass(eq=False)
class Run:
    """Everything a run knows while it goes on; `s` may be raised when it is measured, `refused` is what it passed."""

    bench: Bench
    dealt: Dealt
    protocol: dict[str, Any]
    options: Options
    s: float
    survey: Survey | None = None
    both: tuple[Half, Half] = field(init=False)
    answers: dict[str, Any] = field(default_factory=dict)
    stamps: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    @property
    def members(self) -> list[Member]:
        """What the deal knew of each conflict."""
        return self.dealt.members

    @property
    def halves(self) -> Halves:
        """Where each conflict went."""
        return self.dealt.halves

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
        components, seed = [self.halves.component[i] for i in found], self.options.seed + (name == CONFIRMATION)
        boot, third, words = self.dealt.rules(found.tolist(), seed=seed)
        return Half(name, found, components, boot, self.read.G[found], self.read.C[found], third, words)

    def words(self, text: str) -> str:
        """Say a sentence of the question that is asked: of the sound, or with sound and picture exchanged."""
        return exchanged(text) if self.options.suppressed == "picture" else text

    def go_past(self, kind: str, sentence: str, *, before: str = "") -> None:
        """Go on past a refusal: the verdict will begin with it (competence told once), and every page is marked."""
        said = "" if self.survey is None else f" {self.read.competence()}"
        sentence = sentence.replace(said, "") if any(said in earlier for _, earlier in self.refused) else sentence
        self.refused.append((kind, sentence))
        self.stamp(NOT_INTERPRETABLE, self.words(f"{before}{sentence}"))

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
    named = list(map(mirrored_conflict, named)) if options.suppressed == "picture" else named
    _require_enough(named, f"{len(named)} conflicts were given")
    organism = getattr(model, "grammar", None) is not None
    s, rule = (S_ORGANISM, "organism") if organism else (S_OTHER, MEASURED)
    if options.s == CONTROL:
        s, rule = S_OTHER, MEASURED
    elif options.s is not None:
        s, rule = float(options.s), "given"
    engine = ModelEngine(model, layout=options.layout) if engine is None else engine
    engine.suppressed = options.suppressed
    with remembered_towers(engine.model):
        read = answered(engine, named)
    named = list(read.conflicts)
    _require_enough(named, f"{len(named)} conflicts can be used. {read.sentence()} Beside them")
    keys = ClipKeys()
    dealt = dealt_conflicts(named, engine.model.tokenizer, keys, seed=options.seed, edition=options.protocol)
    named, candidates = dealt.conflicts, Candidates.of(dealt.conflicts, engine.model.tokenizer)
    mlps = options.protocol != "1"
    n_encoding = sum(site in ENCODING_SITES for site in options.sites)
    n_mlps = engine.n_layers if mlps else 0
    family = family_size(len(engine.heads), len(options.sites), n_mlps, n_encoding=n_encoding)
    written = protocol_of(
        options=dataclasses.asdict(options) | {"s": s, "s_rule": rule},
        dealt=dealt,
        model=_model_identity(engine, named[0]),
        conflicts=_contents(named, keys),
        family=family,
    )
    bench = Bench(engine, named, candidates, site=options.sites[0], keys=keys, mlps=mlps)
    bench.progress = progress or bench.progress
    reasons = [read.sentence()] if read.left_out else []
    run = Run(bench, dealt, written, options, s, answers=read.provenance(), reasons=reasons + dealt.sentences())
    if options.protocol != "1" and (why := hopeless(dealt, written["power"]["smallest_effect_in_sd"], family=family)):
        if options.gate == "stop":
            raise ProtocolError(f"refused: {why}")
        run.go_past("too few sources", why)
    return run


def _require_enough(named: Sequence[Any], found: str) -> None:
    fewest = dealing.FEWEST
    if len(named) < 2 * fewest:
        raise ProtocolError(
            f"{found}; isolation needs at least {fewest} competent ones in each half "
            f"({2 * fewest} in all, 120 for a verdict). Add conflicts."
        )


def _model_identity(engine: ModelEngine, conflict: Any) -> dict[str, Any]:
    """Name the model by its sizes, its words, how it lays out a conflict, its weights and how it computes."""
    text = json.dumps(weight_hashes(engine.model), sort_keys=True)
    vocab = getattr(engine.model.tokenizer, "get_vocab", dict)()
    said = {"tokenizer": sorted(vocab.items()), "prompt": layout_of(engine.cells(conflict, None)["va"])}
    return {
        **{name: sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in said.items()},
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
