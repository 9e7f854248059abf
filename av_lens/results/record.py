"""What did an isolation find, and can it be opened again years later?

`Isolation` is the whole finding as data: the verdict in words, the named heads with their evidence, the set and its
controls, behaviour, every head's effects on every conflict, the protocol that was written beforehand and where it all
came from. It is saved as json (words, protocol, provenance, the tables' columns), csv (tables) and npz (arrays), with a
schema version and without pickle.

Sign: every effect is on the model's hearing. Positive means that the edit gives hearing back, so a positive
*release* belongs to a head that keeps the sound from being said. Figures are logits unless a column says share
(of G, hearing with nothing to see) or rate. Not measured is NaN.

Not done here: no model, no statistics, no figures (`found.report` hands itself to the room that writes pages).

Example:
    ```python
    found.save("out")
    again = Isolation.load("out")
    again.heads.query("confirmed")
    ```
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from av_lens.brief import Brief
from av_lens.checks import called, foreign_file, parse_json, whole_object
from av_lens.errors import InputError, unknown
from av_lens.results.tables import RELEASING, ROLE_NAMES, TABLES, read_table, table
from av_lens.upstairs import upstairs
from av_lens.whole_files import make_folder, read_arrays, write_whole

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


def _empty(name: str) -> Callable[[], pd.DataFrame]:
    return lambda: table(name, [])


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Isolation(Brief):
    """A finished isolation; see the module for signs and units, `TABLES` for the columns.

    `verdict` is the finding in words with its numbers, `verdict_kind` its kind ("suppression", "interference",
    "nothing named", "no suppression", "not established", "does not hear", ...), `reasons` what stopped the search or is
    missing, a sentence each. `stamps` belong on every page: "exploratory" (too few conflicts
    for a verdict), "not interpretable" (the search went on where the protocol would have stopped it). `summary` holds
    the figures that the verdict speaks of (G, C, gap, delta, power ...). `arrays` holds every head's effect on every
    conflict, `"half/site/estimand/donor"` -> `[example, layer, head]` (NaN where not measured), its rows the competent
    conflicts of that half in the order of `conflicts`; also `"half/G"` and `"half/C"` -> `[example]`.
    """

    verdict: str
    n_layers: int
    n_heads: int
    verdict_kind: str = ""
    stamps: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    summary: Mapping[str, float]
    heads: pd.DataFrame = field(default_factory=_empty("heads"))
    evidence: pd.DataFrame = field(default_factory=_empty("evidence"))
    units: pd.DataFrame = field(default_factory=_empty("units"))
    sets: pd.DataFrame = field(default_factory=_empty("sets"))
    members: pd.DataFrame = field(default_factory=_empty("members"))
    steps: pd.DataFrame = field(default_factory=_empty("steps"))
    synergies: pd.DataFrame = field(default_factory=_empty("synergies"))
    cards: pd.DataFrame = field(default_factory=_empty("cards"))
    cuts: pd.DataFrame = field(default_factory=_empty("cuts"))
    knowledge: pd.DataFrame = field(default_factory=_empty("knowledge"))
    routes: pd.DataFrame = field(default_factory=_empty("routes"))
    repair: pd.DataFrame = field(default_factory=_empty("repair"))
    robustness: pd.DataFrame = field(default_factory=_empty("robustness"))
    ablation: pd.DataFrame = field(default_factory=_empty("ablation"))
    specificity: pd.DataFrame = field(default_factory=_empty("specificity"))
    behaviour: pd.DataFrame = field(default_factory=_empty("behaviour"))
    conflicts: pd.DataFrame = field(default_factory=_empty("conflicts"))
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
        for name, frame in ((name, getattr(self, name)) for name in TABLES):
            for column, most in (("layer", self.n_layers), ("head", self.n_heads)):
                last = most if (name, column) == ("knowledge", "layer") else most - 1  # that table counts layers passed
                if column in frame and not frame[column].between(-1, last).all():
                    raise InputError(f"table {name!r} names a {column} beyond the {most} that the model has.")
        figures = {**self.summary, **{key: self.protocol[key] for key in ("s",) if self.protocol.get(key) is not None}}
        if wrong := [key for key, value in figures.items() if not isinstance(value, int | float | np.number)]:
            raise InputError(f"{wrong[0]} is no number: {figures[wrong[0]]!r}.")
        if strange := sorted(set(self.heads["role"]) - set(ROLE_NAMES)):
            raise InputError(unknown("role", strange[0], ROLE_NAMES))

    @property
    def suppressors(self) -> pd.DataFrame:
        """The confirmed heads that keep the sound from being said: writers, opponents, gates, kind undetermined."""
        keep = self.heads["role"].isin(RELEASING) & self.heads["confirmed"]
        return cast(pd.DataFrame, self.heads[keep])

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
        if donor:
            keep &= frame["donor"] == donor
        if not keep.any():
            pairs = zip(frame["estimand"], frame["donor"], strict=True)
            known = sorted({f"{e} ({d})" if d else str(e) for e, d in pairs})
            raise InputError(unknown("effect", f"{estimand} ({donor})" if donor else estimand, known))
        out = np.full((self.n_layers, self.n_heads), np.nan)
        rows = frame[keep]
        out[rows["layer"].to_numpy(), rows["head"].to_numpy()] = rows[column].to_numpy()
        return out

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
        write: Any = upstairs("reports").write_report
        written: Any = called("report", write, self, path, **options)
        return Path(written) if written is not None else Path(path)

    def plan(self) -> Any:
        """Write the chosen set's edit as a plan that fits any clip and question (`model.generate(x, plan=...)`).

        Returns:
            An `av_lens.interventions.Plan`; what it mends and breaks stands in `repair`.

        Raises:
            InputError: the finding has no set to edit.
        """
        return upstairs("isolation.explaining.repair").plan_of(self)

    def save(self, folder: str | Path) -> Path:
        """Write the record: `isolation.json`, one csv per table, `arrays.npz`.

        Args:
            folder: made if absent; files of an earlier record in it are replaced.

        Returns:
            The folder.
        """
        folder = Path(folder)
        make_folder(folder)
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
        if (folder / RECORD / "isolation.json").exists():
            folder = folder / RECORD
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
        tables: dict[str, Any] = {name: read_table(folder / f"{name}.csv", name) for name in TABLES}
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
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be saved as json")
