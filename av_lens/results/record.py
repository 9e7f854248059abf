"""What did an isolation find, in which tables, and can it be opened again years later?

`TABLES` is the whole schema: table -> column -> kind, a kind being "text", "int", "float" or "flag" (true or false).
Positive effects mean that the edit gives hearing back. Figures are logits unless a column says share (of G) or rate.
Not measured is NaN, missing words are empty. Saved are json, csv (tables) and npz (arrays), without pickle.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from av_lens.brief import Brief
from av_lens.checks import called, foreign_file, parse_json, whole_object
from av_lens.errors import InputError, unknown
from av_lens.upstairs import upstairs
from av_lens.whole_files import make_folder, read_arrays, write_whole

SUPPRESSORS = ("picture writer", "sound opponent", "gate")
ENCODING = "suppresses while encoding"
# Nodes whose release passes and is no mere damage; the mechanism of the last is undetermined.
RELEASING = (*SUPPRESSORS, ENCODING, "undetermined")
FEEDER, ENCODER = "feeder", "picture encoder"
ROLE_NAMES = (*SUPPRESSORS, ENCODING, FEEDER, ENCODER, "breaks", "undetermined", "silenced carrier", "sound carrier")
# Of the mirrored question (`isolate(suppressed="picture")`).
MIRRORED_SUPPRESSORS, MIRRORED_CARRIER = ("sound writer", "picture opponent"), "picture carrier"


def _columns(*runs: str) -> dict[str, str]:
    """Column -> kind, of runs such as "int: k; float: low high", in the order of the table."""
    parts = [part.split(": ") for run in runs for part in run.split("; ")]
    return {name: kind for kind, names in parts for name in names.split()}


TABLES: dict[str, dict[str, str]] = {
    # One row per named (head, site, role), largest effect first. `effect low high` are confirmation's. In all tables
    # head -1 is the layer's MLP; here MLPs stand apart, in `mlps`.
    "heads": _columns(
        "int: layer head; text: site role member_of estimand donor",
        "float: effect low high direct_share q p_maxt; flag: confirmed; text: status; flag: would_confirm; text: flags",
        "text: role_alone role_in_set",
        "float: share share_low share_high p_holm discovery_effect discovery_low discovery_high",
        "float: discovery_share discovery_direct_share discovery_p release_blank_muted release_mean_other",
        "float: release_zero release_half_dose question_share reads_picture reads_sound sufficiency silenced carries",
        "float: repair release_on_sound release_on_picture release_norm_frozen dla write_share mlp_share",
    ),
    # Every head's and MLP's every effect, named or not: what heat maps are drawn from.
    "evidence": _columns(
        "text: half site; int: layer head; text: estimand donor",
        "float: mean low high share share_low share_high; int: n",
    ),
    # The same for what is no single node: `unit` is "kv group", "attention" or "layer", `index` the group or -1.
    "units": _columns(
        "text: half site unit; int: layer index; text: estimand donor",
        "float: mean low high share share_low share_high; int: n",
    ),
    # One row per set that was built (one per primary donor; `chosen` marks the one that the verdict speaks of).
    "sets": _columns(
        "text: name site members; int: k; text: donor screen; flag: chosen",
        "float: discovery_release discovery_share release low high share share_low share_high",
        "float: says_sound_before says_sound says_picture_before says_picture",
        "float: see_release; int: random_n; float: random_mean random_high random_max p_random p_floor",
        "flag: confirmed would_confirm; text: flags",
    ),
    # One row per member of a set, in the order in which the search took it in. `single` is its release alone, `gain`
    # what it added when it was taken in, `without` the set's release minus the set's without it, all on discovery;
    # `effect low high` is the last of these on confirmation; role, direct share and reads are measured with the others
    # edited. `context_...` is what the set loses without it on discovery where all members are edited by that donor.
    "members": _columns(
        "text: name site donor; flag: chosen; int: order layer head; text: screen",
        "float: single single_low gain without without_low without_high effect low high",
        "float: context_blank_muted context_mean_other context_zero; text: role role_alone; float: direct_share",
        "float: direct_share_low direct_share_high reads_picture reads_sound; flag: confirmed would_confirm",
    ),
    # The search's path: action is "start", "add", "drop" (gains below delta at the end) or "take out".
    "steps": _columns("text: site donor start; int: step; text: action; int: layer head; float: release gain"),
    # release({h, k}) - max(0, release h) - max(0, release k), the largest pairs by donor.
    "synergies": _columns("text: site donor; int: layer head layer2 head2; float: release synergy share"),
    # Mechanism cards of the named heads: part is "attention", "ov", "pattern" (driven by Q or by K) or "path".
    "cards": _columns("int: layer head; text: site part cell what; float: value low high; text: unit note"),
    # Edges of the named heads cut: arm is "cut" or the control's name.
    "cuts": _columns(
        "text: heads site edges; flag: renormalised; text: arm; float: release low high share mass; text: note"
    ),
    # Where the audio is known: the lens and probes by layer and span, with their nulls. `layer` counts the layers that
    # the stream has passed (0: before the first; -1: the maximum over layers).
    "knowledge": _columns(
        "text: method word cell span; int: layer",
        "float: value low high null excess excess_low excess_high; flag: chosen; int: n; text: note",
    ),
    # By which road does the picture win? relay, generation, sink; arm is "cut" or the control's name.
    "routes": _columns("text: route edges arm; float: effect low high share says_sound mass; text: note"),
    # What the repair plan (`found.plan()`) changes on confirmation: C, what is said, and the controls of `specificity`.
    "repair": _columns("text: quantity; int: n; float: before after change low high bound; text: verdict"),
    # Does it hang on a choice? The search under each variant: who is named, and how that agrees with the main search.
    "robustness": _columns(
        "text: variant named; float: jaccard low high rank_correlation; text: kept lost gained turned note"
    ),
    # The cumulative edit, held out: arm is "set", "random" (one row a draw, at full size) or "see heads".
    "ablation": _columns(
        "text: arm; int: k draw; text: members donor; float: release low high share says_sound says_picture"
    ),
    # Captions on confirmation, as they are and with heads edited (`isolate(captions=True)`): rates of captions that
    # name what is heard, what is seen, another answer; `release` is what `heard` gains, `one_word` the release over G.
    "captions": _columns(
        "text: arm; int: k draw; text: members donor; int: n; float: heard heard_low heard_high",
        "float: seen seen_low seen_high hallucinated hallucinated_low hallucinated_high release low high one_word",
    ),
    # What the model wrote: of each conflict, in `va` and `av`, unedited and under the first arms.
    "caption_texts": _columns("text: id cell arm caption"),
    # What else the set's edit breaks: non-inferiority. Rates before and after, the bound of the fall, the verdict.
    "specificity": _columns("text: control; int: n; float: before after fall bound margin; text: verdict"),
    # Quantities of protocol section 2 by half ("discovery", "confirmation"); `chosen` is "all" or "competent". Quantity
    # "accuracy" has a cell and a rule: right among the "two" answers, or in the whole "vocabulary"; "says sound" and
    # "says picture" are rates of each answer where the sound is muted.
    "behaviour": _columns("text: half chosen quantity cell rule; float: value low high; int: n"),
    # One row per conflict: who it is, where it was dealt, what the unedited model does; `cut_to_s` is the length that
    # all its cells were cut to (NaN where its clips are equally long), `whole_s` that of the longer of its two clips.
    "conflicts": _columns(
        "text: id half; int: component; flag: competent analysed; text: sound_answer picture_answer says",
        "float: M_va M_av M_blank_a M_blank_v M_v_muted M_a_muted C G cut_to_s whole_s",
    ),
}

TABLES["mlps"] = {name: kind for name, kind in TABLES["heads"].items() if name != "head"}

_KINDS: dict[str, tuple[Any, Any, Callable[[str], Any]]] = {
    "text": ("object", "", str),
    "int": ("int64", -1, int),
    "float": ("float64", float("nan"), lambda text: float(text or "nan")),
    "flag": ("bool", False, {"True": True, "False": False}.__getitem__),
}
"""Of each kind the type in the frame, what is missing, and how a cell of a csv is read."""


def table(name: str, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Build one of the record's tables: columns in their order, missing figures NaN, missing words empty."""
    if name not in TABLES:
        raise InputError(unknown("table", name, TABLES))
    columns = TABLES[name]
    if strange := [key for row in rows for key in row if key not in columns]:
        raise InputError(f"table {name!r}: {unknown('column', strange[0], columns)}")
    cells = {column: [row.get(column, _KINDS[kind][1]) for row in rows] for column, kind in columns.items()}
    return _frame(cells, name)


def named_tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Part rows of named nodes: those of heads, and those of MLPs (head -1), which lose that column."""
    heads = [row for row in rows if row["head"] >= 0]
    mlps = [{name: value for name, value in row.items() if name != "head"} for row in rows if row["head"] < 0]
    return {"heads": heads, "mlps": mlps}


def _frame(cells: dict[str, list[Any]], name: str) -> pd.DataFrame:
    kinds = TABLES[name]
    return pd.DataFrame({column: pd.Series(held, dtype=_KINDS[kinds[column]][0]) for column, held in cells.items()})


def read_table(path: Path, name: str, saved: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Open a table that was saved as csv; of a column that came after the record was `saved`, nothing is known."""
    known = TABLES[name]
    with foreign_file(path, f"the table {name!r} of a saved isolation"):
        columns = dict(known if saved is None else saved)
        if not columns.items() <= known.items() or 2 * len(columns) < len(known):
            strange = ", ".join(str(column) for column in columns if column not in known)
            raise ValueError(
                f"it has {len(columns)} of {len(known)} columns{strange and f', and strange ones: {strange}'}"
            )
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file, strict=True)
            found = next(lines, [])
            if found != list(columns):
                raise ValueError(f"its columns should be {','.join(columns)}")
            # A row has every column, so that memory is bounded by the file's size (some 30 times).
            cells: list[Any] = list(zip(*lines, strict=True)) or [()] * len(columns)
        if len(cells) != len(columns):
            raise ValueError(f"its rows have {len(cells)} columns, not {len(columns)}")
        made = zip(columns.items(), cells, strict=True)
        read = {column: [_KINDS[kind][2](cell) for cell in held] for (column, kind), held in made}
        return _frame({one: read.get(one, [_KINDS[kind][1]] * len(cells[0])) for one, kind in known.items()}, name)


SCHEMA_VERSION = 2
MOST = 10_000  # layers, or heads of one: no model has so many
RECORD = "numbers"  # where a run keeps its record, below its own folder
_HEAD: dict[str, type] = {
    "verdict": str,
    "verdict_kind": str,
    "stamps": list,
    "reasons": list,
    "n_layers": int,
    "n_heads": int,
    "summary": dict,
    "protocol": dict,
    "provenance": dict,
}
"""What `isolation.json` says of the finding itself."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Isolation(Brief):
    """A finished isolation; see the module for signs and units, `TABLES` for the columns.

    `verdict` is the finding in words with its numbers, `verdict_kind` its kind ("suppression", "interference",
    "nothing named", "no suppression", "not established", "does not hear", ...), `reasons` what stopped the search or is
    missing, a sentence each. `stamps` belong on every page: "exploratory" (too few conflicts
    for a verdict), "not interpretable" (the search went on where the protocol would have stopped it). `summary` holds
    the figures that the verdict speaks of (G, C, gap, delta, power ...). `arrays` holds every head's effect on every
    conflict, `"half/site/estimand/donor"` -> `[example, layer, node]` (NaN where not measured), its rows the competent
    conflicts of that half in the order of `conflicts`, its nodes the layer's heads and, last, its MLP (in the first
    edition heads alone); also `"half/G"` and `"half/C"` -> `[example]`.
    """

    verdict: str
    n_layers: int
    n_heads: int
    verdict_kind: str = ""
    stamps: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    summary: Mapping[str, float]
    heads: pd.DataFrame = field(default_factory=partial(table, "heads", ()))
    mlps: pd.DataFrame = field(default_factory=partial(table, "mlps", ()))
    evidence: pd.DataFrame = field(default_factory=partial(table, "evidence", ()))
    units: pd.DataFrame = field(default_factory=partial(table, "units", ()))
    sets: pd.DataFrame = field(default_factory=partial(table, "sets", ()))
    members: pd.DataFrame = field(default_factory=partial(table, "members", ()))
    steps: pd.DataFrame = field(default_factory=partial(table, "steps", ()))
    synergies: pd.DataFrame = field(default_factory=partial(table, "synergies", ()))
    cards: pd.DataFrame = field(default_factory=partial(table, "cards", ()))
    cuts: pd.DataFrame = field(default_factory=partial(table, "cuts", ()))
    knowledge: pd.DataFrame = field(default_factory=partial(table, "knowledge", ()))
    routes: pd.DataFrame = field(default_factory=partial(table, "routes", ()))
    repair: pd.DataFrame = field(default_factory=partial(table, "repair", ()))
    robustness: pd.DataFrame = field(default_factory=partial(table, "robustness", ()))
    ablation: pd.DataFrame = field(default_factory=partial(table, "ablation", ()))
    captions: pd.DataFrame = field(default_factory=partial(table, "captions", ()))
    caption_texts: pd.DataFrame = field(default_factory=partial(table, "caption_texts", ()))
    specificity: pd.DataFrame = field(default_factory=partial(table, "specificity", ()))
    behaviour: pd.DataFrame = field(default_factory=partial(table, "behaviour", ()))
    conflicts: pd.DataFrame = field(default_factory=partial(table, "conflicts", ()))
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, columns in TABLES.items():
            if (found := list(getattr(self, name).columns)) != list(columns):
                needs = f"the record needs {list(columns)} (build it with `table`)."
                raise InputError(f"table {name!r} has columns {found}; {needs}")
        for name, most in (("n_layers", self.n_layers), ("n_heads", self.n_heads)):
            if not 0 < most <= MOST:
                raise InputError(f"{name} = {most} is no size of a model; 1 to {MOST} are.")
        for name, (column, most) in product(TABLES, (("layer", self.n_layers), ("head", self.n_heads))):
            last = most if (name, column) == ("knowledge", "layer") else most - 1  # that table counts layers passed
            if column in TABLES[name] and not getattr(self, name)[column].between(-1, last).all():
                raise InputError(f"table {name!r} names a {column} beyond the {most} that the model has.")
        share = self.protocol.get("s")
        for key, value in (*self.summary.items(), *([] if share is None else [("s", share)])):
            if not isinstance(value, int | float | np.number):
                raise InputError(f"{key} is no number: {value!r}.")
        roles = (*ROLE_NAMES, *MIRRORED_SUPPRESSORS, MIRRORED_CARRIER)
        if strange := sorted({*self.heads["role"], *self.mlps["role"]} - set(roles)):
            raise InputError(unknown("role", strange[0], roles))

    @property
    def nodes(self) -> pd.DataFrame:
        """All that is named in one table: `heads`, and after them `mlps` with head -1."""
        if not len(self.mlps):
            return self.heads
        return pd.concat([self.heads, self.mlps.assign(head=-1)], ignore_index=True).reindex(columns=self.heads.columns)

    @property
    def suppressors(self) -> pd.DataFrame:
        """What is confirmed to keep the sound from being said, of every kind: heads, then MLPs (with head -1)."""
        nodes: Any = self.nodes
        return nodes[nodes["role"].isin((*RELEASING, *MIRRORED_SUPPRESSORS)) & nodes["confirmed"]]

    def grid(
        self, estimand: str, donor: str = "", *, half: str = "discovery", site: str = "suffix", column: str = "mean"
    ) -> np.ndarray:
        """Lay one effect out by layer and head, for a heat map.

        Args:
            estimand: such as "release", "direct", "reads picture"; see `evidence["estimand"]`.
            donor: such as "blank_muted"; empty where the estimand has only one.
            half: "discovery" or "confirmation".
            site: the site set.
            column: "mean", "low", "high", "share", "share_low" or "share_high".

        Returns:
            `[layer, head]`, NaN where not measured.

        Raises:
            InputError: an estimand that this record does not hold, or an unknown column.
        """
        frame: Any = self.evidence
        if column not in TABLES["evidence"]:
            raise InputError(unknown("column", column, TABLES["evidence"]))
        keep: Any = (frame["estimand"] == estimand) & (frame["half"] == half) & (frame["site"] == site)
        keep &= frame["head"] >= 0
        rows = frame[keep & (frame["donor"] == donor) if donor else keep]
        if not len(rows):
            pairs = zip(frame["estimand"], frame["donor"], strict=True)
            known = sorted({f"{e} ({d})" if d else str(e) for e, d in pairs})
            raise InputError(unknown("effect", f"{estimand} ({donor})" if donor else estimand, known))
        out = np.full((self.n_layers, self.n_heads), np.nan)
        out[rows["layer"].to_numpy(), rows["head"].to_numpy()] = rows[column].to_numpy()
        return out

    def caption_correlation(self) -> float:
        """Say whether heads that hold back the one-word answer hold it back from captions too.

        Returns:
            Spearman's correlation of `one_word` and `release` over the arms of `captions` that zero heads (the set, its
            members alone, random sets, the heads that `see` needs); NaN below three of them.
        """
        table: Any = self.captions
        arms = table.loc[table["donor"] == "zero", ["one_word", "release"]].dropna()
        return float(arms.corr(method="spearman").iloc[0, 1]) if len(arms) > 2 else float("nan")

    def report(self, path: str | Path, **options: Any) -> Path:
        """Write the finding as one self-contained page.

        Args:
            path: the html file to write.
            **options: passed to `av_lens.reports.write_report` (such as `clips=`).

        Returns:
            The path that was written.

        Raises:
            InputError: an unknown keyword.
        """
        return called("report", upstairs("reports").write_report, self, path, **options)

    def plan(self) -> Any:
        """Write the chosen set's edit as a plan that fits any clip and question (`model.generate(x, plan=...)`).

        Returns:
            An `av_lens.interventions.Plan`; what it mends and breaks stands in `repair`.

        Raises:
            InputError: the finding has no set to edit.
        """
        return upstairs("isolation.explaining.units").plan_of(self)

    def save(self, folder: str | Path) -> Path:
        """Write the record: `isolation.json`, one csv per table, `arrays.npz`.

        Args:
            folder: made if absent; files of an earlier record in it are replaced.

        Returns:
            The folder.
        """
        folder = make_folder(Path(folder))
        for name in TABLES:
            write_whole(folder / f"{name}.csv", getattr(self, name).to_csv(index=False))
        held = io.BytesIO()
        np.savez_compressed(held, allow_pickle=False, **cast(Any, dict(self.arrays)))
        write_whole(folder / "arrays.npz", held.getvalue())
        head = {"schema": "av_lens.isolation", "version": SCHEMA_VERSION}
        head |= {name: getattr(self, name) for name in _HEAD} | {"tables": TABLES}
        head["summary"] = {key: float(value) if np.isfinite(value) else None for key, value in self.summary.items()}
        # Written last: its presence means that all is there.
        write_whole(folder / "isolation.json", json.dumps(head, indent=1, allow_nan=False, default=_plain))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Isolation:
        """Open a saved record.

        Args:
            folder: what `save` wrote, or the folder of a run that keeps it in `numbers`.

        Returns:
            The record, equal table by table and array by array to the one that was saved.

        Raises:
            InputError: no record there, one of another schema version, or a damaged one; the message names the file.
        """
        folder = Path(folder)
        folder = folder / RECORD if (folder / RECORD / "isolation.json").exists() else folder
        if not (folder / "isolation.json").exists():
            raise InputError(
                f"no isolation is saved in {folder}: isolation.json is not there. Give the folder that `save` wrote."
            )
        with foreign_file(folder / "isolation.json", "the head of a saved isolation"):
            head = whole_object(parse_json((folder / "isolation.json").read_bytes()), "it")
        if head.get("version") != SCHEMA_VERSION:
            raise InputError(
                f"{folder} holds an isolation of schema version {head.get('version')}; this av_lens reads version "
                f"{SCHEMA_VERSION}. Open it with the av_lens that wrote it "
                f"({dict(head.get('provenance') or {}).get('av_lens', 'version unknown')})."
            )
        with foreign_file(folder / "arrays.npz", "the arrays of a saved isolation"):
            arrays = read_arrays(folder / "arrays.npz")
        since = dict(head.get("tables") or TABLES)  # a table that came later is empty in an older record
        tables: dict[str, Any] = {n: read_table(folder / f"{n}.csv", n, since[n]) for n in TABLES if n in since}
        with foreign_file(folder / "isolation.json", "the head of a saved isolation"):
            said = {name: _typed(head, name, kind) for name, kind in _HEAD.items()}
            said |= {name: tuple(map(str, said[name])) for name in ("stamps", "reasons")}
            said["summary"] = {k: float("nan") if v is None else v for k, v in said["summary"].items()}
            return cls(arrays=arrays, **said, **tables)


def _typed(head: Mapping[str, Any], name: str, kind: type) -> Any:
    if type(head[name]) is not kind:
        raise ValueError(f"{name} should be a {kind.__name__}, found {type(head[name]).__name__}")
    return head[name]


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be saved as json")
