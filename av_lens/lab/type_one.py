"""How often do the tests of `isolate` find what is not there, and what is there? By simulation, over designs.

What is drawn and tested: `docs/type_one.md`. Skewed numbers are a shifted gamma distribution's; a source has one effect
whether it is heard or seen; the last design has 12 words for sources. A row is measured once: `OUT/rows.json` keeps it
under its settings and the hash of the rules' code.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from av_lens.core.budget import Progress, silent
from av_lens.lab.pages import FilledPage, Table, markdown
from av_lens.results import dyadic, statistics
from av_lens.results.dyadic import COMPONENT, Dyadic
from av_lens.results.provenance import stamp
from av_lens.results.statistics import sign_flips
from av_lens.whole_files import make_folder, stored, write_whole

PAGE = FilledPage("type_one.md", "type_one.json", "type one")
LEVELS = (0.05, 0.001, 0.0001)
EFFECT = 0.5
AT_ONCE, DESIGNS, POWER_PARTS = 1000, 10, 5
"""Draws at once; designs a row; of so many parts of the draws one is used for power."""
FLIPPED_FAMILY = 50  # sign flips are sampled as for a family of so many: 10,000 of them


@dataclass(frozen=True)
class Design:
    """Conflicts of a half and the sources that they share; `most` are the type I errors allowed at .05 and .001."""

    name: str
    conflicts: int
    sources: int
    most: tuple[float, float] = (0.065, 0.003)

    def drawn(self, rng: np.random.Generator) -> list[tuple[int, ...]]:
        """Draw which sources each conflict has."""
        if self.name == "disjoint":
            return [(2 * i, 2 * i + 1) for i in range(self.conflicts)]
        if self.name.startswith("permutation"):
            order, own = rng.permutation(self.conflicts), np.arange(self.conflicts)
            while ((order == own) | (order[order] == own)).any():  # no clip with itself, no pair twice
                order = rng.permutation(self.conflicts)
            return list(enumerate(order.tolist()))
        pairs: dict[tuple[int, ...], None] = {}
        while len(pairs) < self.conflicts:
            pairs.setdefault(tuple(sorted(rng.choice(self.sources, size=2, replace=False).tolist())))
        return list(pairs)

    def rule(self, sources: list[tuple[int, ...]]) -> Dyadic:
        """Choose what tests it."""
        if self.name == "disjoint":
            return Dyadic.of([(str(i),) for i in range(self.conflicts)], unit=COMPONENT)
        return Dyadic.of([tuple(map(str, one)) for one in sources])


DISJOINT = Design("disjoint", 60, 120)
ROWS = (
    DISJOINT,
    *(Design(f"permutation of {n}", n, n) for n in (60, 120, 500)),
    Design("500 conflicts of 100 clips", 500, 100),
    Design("60 conflicts of 12 words", 60, 12, (0.075, 0.005)),
)
RATIOS, SKEWS = (0, 1, 3), (-2, -1, 0, 1, 2)


def noise(rng: np.random.Generator, skew: float, shape: tuple[int, ...]) -> Float[np.ndarray, "row draw"]:
    """Draw numbers of mean 0, variance 1 and this skewness."""
    if not skew:
        return rng.standard_normal(shape)
    k = 4 / skew**2
    return np.sign(skew) * (rng.standard_gamma(k, shape) - k) / np.sqrt(k)


def simulated(
    design: Design, ratio: float, skew: float, *, draws: int, seed: int
) -> Iterator[tuple[Dyadic, Float[np.ndarray, "conflict draw"]]]:
    """Draw conflicts' values where there is no effect, part by part, with the rule of their design."""
    rng = np.random.default_rng([seed, ROWS.index(design), round(10 * ratio), round(10 * skew) + 100])
    for number in range(DESIGNS):
        sources = design.drawn(rng)
        rule, numbers = design.rule(sources), np.array(sources)
        left = draws // DESIGNS + (number < draws % DESIGNS)
        while left:
            n = min(left, AT_ONCE)
            of = np.sqrt(ratio) * noise(rng, skew, (design.sources, n))
            yield rule, of[numbers].sum(1) + noise(rng, skew, (design.conflicts, n))
            left -= n


def row_of(design: Design, ratio: float, skew: float, *, draws: int, seed: int) -> dict[str, Any]:
    """Measure one row: the share of draws below every level, without and with an effect, by rule."""
    found: dict[str, list[np.ndarray]] = {}
    df = np.nan
    for number, (rule, values) in enumerate(simulated(design, ratio, skew, draws=draws, seed=seed)):
        df = float(rule.pivots(values[:, :1])[1].df[0])
        first = not number % POWER_PARTS
        for what, mu in (("type I", 0.0), ("power", EFFECT))[: 1 + first]:
            t, spread = rule.pivots(values + mu)
            p = {"t'": stats.t.sf(t, spread.df)}
            if design is DISJOINT:
                p["sign flips"] = sign_flips(values + mu, range(len(values)), family=FLIPPED_FAMILY).p
                p["as used"] = np.where(spread.g < 0, p["t'"], p["sign flips"])
            for name, one in p.items():
                found.setdefault(f"{what}, {name}", []).append(np.stack([one < level for level in LEVELS]).mean(1))
                found.setdefault(f"n {what}, {name}", []).append(np.array([len(one)]))
    out = asdict(design) | {"ratio": ratio, "skew": skew, "draws": draws, "df": df}
    for name in [one for one in found if not one.startswith("n ")]:
        shares = np.average(found[name], axis=0, weights=np.concatenate(found[f"n {name}"]))
        out[name] = [round(float(share), 6) for share in shares]
    return out


def _code(path: str) -> str:
    """A file's code without its docstrings."""
    tree = ast.parse(Path(path).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def run_type_one(
    *, out: str | Path = "av-lens-type-one", draws: int = 20_000, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure every row that is not there yet."""
    place, tell = make_folder(Path(out)) / "rows.json", progress or silent
    code = [_code(str(file)) for file in (dyadic.__file__, statistics.__file__, __file__)]
    key = hashlib.sha256(json.dumps([draws, seed, code]).encode()).hexdigest()
    rows: dict[str, Any] = stored(place, lambda found: found["rows"] if found["key"] == key else None) or {}
    cases = list(product(ROWS, RATIOS, SKEWS))
    for number, (design, ratio, skew) in enumerate(cases, 1):
        name = f"{design.name}, {ratio}, {skew}"
        if name not in rows:
            rows[name] = row_of(design, ratio, skew, draws=draws, seed=seed)
            write_whole(place, json.dumps({"key": key, "rows": rows}, indent=1) + "\n")
        tell("type I errors", number, len(cases))
    return stamp(draws=draws, seed=seed, levels=list(LEVELS), effect=EFFECT, rows=list(rows.values()))


def tables(record: dict[str, Any]) -> list[Table]:
    """Tabulate the rows: t' over all designs, then the rules of the disjoint one side by side."""
    levels = [f"{level:g}" for level in record["levels"]]
    heads = ["design", "source : own", "skewness", *(f"type I at {one}" for one in levels)]
    heads += [f"power at {one}" for one in levels[:2]] + ["within"]
    listed = [[*_case(row), *_shares(row, "type I, t'", 3), *_shares(row, "power, t'", 2), _within(row, "t'")]
              for row in record["rows"]]  # fmt: skip
    rules = ["source : own", "skewness"]
    rules += [f"{name} at {one}" for name in ("sign flips", "as used") for one in levels]
    rules += ["flips within", "as used within", "power of flips at 0.001", "as used"]
    both = ("sign flips", "as used")
    beside = [
        [*_case(row)[1:], *(one for name in both for one in _shares(row, f"type I, {name}", 3)),
         *(_within(row, name) for name in both), *(f"{row[f'power, {name}'][1]:.2f}" for name in both)]
        for row in record["rows"] if row["name"] == DISJOINT.name
    ]  # fmt: skip
    return [(heads, listed), (rules, beside)]


def _case(row: dict[str, Any]) -> list[str]:
    return [row["name"], f"{row['ratio']:g} : 1", f"{row['skew']:+g}" if row["skew"] else "0"]


def _shares(row: dict[str, Any], name: str, n: int) -> list[str]:
    return [f"{share:.2f}" if "power" in name else f"{share:.4g}" for share in row[name][:n]]


def _within(row: dict[str, Any], name: str) -> str:
    held = all(share <= most for share, most in zip(row[f"type I, {name}"], row["most"], strict=False))
    return "yes" if held else "no"


def page_tables(record: dict[str, Any]) -> str:
    """Write the tables as markdown, with how many rows are within what is allowed."""
    rows = record["rows"]
    within = sum(_within(row, "t'") == "yes" for row in rows)
    worst = max(row["type I, t'"][2] for row in rows)
    said = (
        f"{record['draws']:,} draws a row; t' is within the bounds in {within} of {len(rows)} rows. At .0001 the "
        f"largest type I error is {worst:.2g}."
    )
    one, two = (markdown(table) for table in tables(record))
    return "\n\n".join([said, one, "The disjoint design by the rules side by side:", two])


def store(record: dict[str, Any], folder: str | Path) -> Path:
    """Write the record, and fill the page beside it."""
    return PAGE.store(folder, json.dumps(record, indent=1, allow_nan=False) + "\n", page_tables(record))
