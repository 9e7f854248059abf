"""Prove what is promised of each family on its tiny checkpoint, and write it down: `python .ci/models.py [FAMILY ...]`.

Runs `av_lens.lab.guarantees.check` on every checkpoint of `tests/toys/tiny_families.py` (random weights; the real model
and processor classes), writes the verdicts to `av_lens/families/proved.json`, which `av-lens models` reads, and fills
the table of `docs/models.md`. With names, these families alone are proved again and the others are kept.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toys")]
RECORD = ROOT / "av_lens" / "families" / "proved.json"
PLANS = 40
_FIGURES = re.compile(r": (memory and seconds)$")


def tiny() -> dict[str, Any]:
    """The tiny checkpoints by name."""
    return importlib.import_module("tiny_families").TINY


def proved(name: str) -> dict[str, Any]:
    """One family's verdicts: the class, what it takes, and each guarantee with what was found; no seconds."""
    from av_lens.families.registry import family_of
    from av_lens.lab.guarantees import check

    made = tiny()[name]
    hf_model = made.hf_model(0)
    family = family_of(type(hf_model))
    report = check(hf_model=hf_model, processor=made.processor(), plans=PLANS)
    checks = [[one.name, one.held, one.found] for one in report.checks if not _FIGURES.search(one.name)]
    return {"class": family.architecture, "takes": list(family.media.kinds), "checks": checks}


def files() -> dict[str, str]:
    """The first sentence of each family's file, by the family's class."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "av_lens" / "families").glob("*.py")):
        held = vars(importlib.import_module(f"av_lens.families.{path.stem}"))
        for family in held.get("FAMILIES", [held["FAMILY"]] if "FAMILY" in held else []):
            found[family.architecture] = str(held["__doc__"]).splitlines()[0].rstrip(".")
    return found


def table(record: dict[str, Any]) -> str:
    """The table of the page."""
    from av_lens.cli.faults import families, verdict
    from av_lens.lab.pages import markdown

    known, rows = dict(families()), list[list[str]]()
    proofs = {one["class"]: one["checks"] for one in record["families"].values()}
    for name, said in sorted(files().items(), key=lambda file: file[1]):
        checks = proofs.get(name, [])
        layouts = [one.partition(":")[0] for one, *_ in checks if ": position ids" in one]
        refused = [one for one, held, found in checks if held is None and found.startswith("not taken")]
        taken = ", ".join(layouts) + (f"; not {', '.join(refused)}" if refused else "")
        proved = verdict(checks) if checks else "not proved here"
        rows.append([f"**{said}**<br>`{name}`", known.get(name, ""), taken, proved])
    return markdown((["family", "opens", "layouts", "proved"], rows), left=range(4))


def write(record: dict[str, Any]) -> None:
    """Write the record and fill the page."""
    from av_lens.lab.pages import FilledPage
    from av_lens.whole_files import write_whole

    page = FilledPage("models.md", "", "families")
    head, _, tail = page.around(ROOT / "docs")
    write_whole(RECORD, json.dumps(record, indent=1) + "\n")
    write_whole(ROOT / "docs" / page.name, head + table(record) + tail)


def main(names: list[str]) -> int:
    """Prove the named families, or all; 1 where anything failed."""
    from av_lens.results.provenance import stamp

    unknown = set(names) - set(tiny())
    if unknown:
        sys.stderr.write(f"no tiny checkpoint of {', '.join(sorted(unknown))}; there are: {', '.join(tiny())}\n")
        return 2
    kept = json.loads(RECORD.read_text())["families"] if RECORD.exists() else {}
    record = stamp(plans=PLANS) | {"families": {name: kept[name] for name in tiny() if name in kept}}
    failed = 0
    for name in names or list(tiny()):
        record["families"][name] = proved(name)
        wrong = [one for one in record["families"][name]["checks"] if one[1] is False]
        failed += len(wrong)
        sys.stdout.write(
            "\n  ".join([f"{name}: {len(wrong)} failed", *(f"{one[0]}: {one[2]}" for one in wrong)]) + "\n"
        )
    record["families"] = {name: record["families"][name] for name in tiny() if name in record["families"]}
    write(record)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
