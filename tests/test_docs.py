"""The documentation says what the code says: the table of hooks, the names of the reference, the links."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

import av_lens
from av_lens.families.decoder import COMPONENTS, hook_name
from av_lens.lab.pages import FilledPage

DOCS = Path(__file__).resolve().parents[1] / "docs"
README = DOCS.parent / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
NOT_RUN, GOES_ON = "# not run: ", "# goes on from README.md"


def python_blocks(page: Path) -> list[str]:
    """A page's Python; blocks that cannot run in a test say so to the reader in their first line."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def stored(page: FilledPage) -> dict[str, Any]:
    """The record that a page is made from."""
    return json.loads((DOCS / page.record).read_text())


def component_table() -> str:
    rows = ["| word | hook | axes | |", "|---|---|---|---|"]
    for word, found in COMPONENTS.items():
        name = hook_name(word, None if not found.layered else 0).replace("blocks.0", "blocks.{layer}")
        notes = [found.note] if found.note else []
        notes += [f"gated by `{found.gate}`"] if found.gate else []
        rows.append(f"| `{word}` | `{name}` | {' '.join(found.axes)} | {'; '.join(notes)} |")
    return "\n".join(rows)


def test_the_table_of_hooks_is_the_codes():
    page = (DOCS / "hooks.md").read_text()
    shown = page.split("<!-- components -->\n")[1].split("<!-- /components -->")[0].strip()
    assert shown == component_table()


def test_the_reference_names_every_public_name_once():
    pages = "\n".join(path.read_text() for path in sorted((DOCS / "reference").glob("*.md")))
    listed = re.findall(r"^::: (av_lens\.\S+)$", pages, re.M)
    assert len(listed) == len(set(listed)), "a name stands on two pages, or twice on one"
    public = {f"av_lens.{home}.{name}" for name, home in av_lens._HOMES.items() if home != "errors"}
    assert public <= set(listed)
    index = re.findall(r"\[`(\w+)`\]\[(av_lens\.\S+?)\]", (DOCS / "reference.md").read_text())
    assert sorted(target for _, target in index) == sorted(
        set(listed) - {"av_lens.errors"} | {"av_lens.errors.AvLensError"}
    )
    assert all(target.endswith(f".{name}") for name, target in index)


@pytest.mark.parametrize("region", ["behaviour", "seeds"])
def test_the_organisms_tables_are_the_stored_evaluations(region: str):
    import portraits

    tables = {"behaviour": portraits.shares_table, "seeds": portraits.standing_table}
    shown = (DOCS / "organisms.md").read_text().split(f"<!-- {region} -->\n")[1].split(f"\n<!-- /{region} -->")[0]
    assert shown == portraits.markdown(tables[region]())


def test_the_benchmarks_page_is_the_stored_record():
    from av_lens.lab.replay_benchmark import tables as replay_tables

    assert replay_tables.PAGE.around(DOCS)[1] == replay_tables.page_tables(stored(replay_tables.PAGE))


def test_the_plantbench_page_is_the_stored_record_or_says_that_it_is_the_first_editions():
    from av_lens.lab.plantbench import pages as plantbench_pages

    shown, record = plantbench_pages.PAGE.around(DOCS)[1], stored(plantbench_pages.PAGE)
    if record["criteria"].get("edition") == 2:
        record = plantbench_pages.read_record(DOCS)
        assert shown == plantbench_pages.page_tables(record)
        assert (DOCS / plantbench_pages.FIGURE).read_text() == plantbench_pages.figure(record)
    else:
        assert f"{len(record['models'])} models" in shown
        assert record["criteria"]["hash"][:12] in shown
        assert "still the first edition's" in plantbench_pages.PAGE.around(DOCS)[0]


def test_what_was_found_again_is_the_stored_record():
    from av_lens.lab import seeds

    assert seeds.PAGE.around(DOCS)[1] == seeds.page_tables(stored(seeds.PAGE))


def test_the_page_of_type_one_errors_is_the_stored_record():
    from av_lens.lab import type_one

    assert type_one.PAGE.around(DOCS)[1] == type_one.page_tables(stored(type_one.PAGE))


def test_the_page_of_true_shapes_is_the_stored_record():
    from av_lens.lab import true_shape_costs

    record = json.loads((DOCS / true_shape_costs.RECORD).read_text())
    assert (DOCS / true_shape_costs.PAGE).read_text() == true_shape_costs.page(record)
    assert record["peak_gb"] < 20 * 1.024**3  # GiB
    assert "not interpretable" in record["stamps"]


def test_what_fits_is_worked_out_from_the_sizes():
    from av_lens.lab import true_shape_costs

    shown = (DOCS / "gpu.md").read_text().split("<!-- fits -->\n")[1].split("\n<!-- /fits -->")[0]
    assert shown == true_shape_costs.fits()


def script(name: str) -> Any:
    """One of the commands that fill pages."""
    spec = importlib.util.spec_from_file_location(name, DOCS.parent / ".ci" / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def test_the_table_of_models_is_the_stored_record():
    models = script("models")
    record = json.loads(models.RECORD.read_text())
    assert list(record["families"]) == list(models.tiny()), "run `python .ci/models.py`"
    assert FilledPage("models.md", "", "families").around(DOCS)[1] == models.table(record), "run `python .ci/models.py`"
    states = [[held for _, held, _ in one["checks"]] for one in record["families"].values()]
    assert all(False not in one and one.count(True) > 8 for one in states)  # a check that takes nothing proves nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", list(script("models").tiny()))
def test_what_is_said_to_be_proved_is_proved_again(name: str):
    models = script("models")
    stored_one, again = json.loads(models.RECORD.read_text())["families"][name], models.proved(name)
    assert again["class"] == stored_one["class"]
    assert [check[:2] for check in again["checks"]] == [check[:2] for check in stored_one["checks"]]


def test_the_picture_of_the_rooms_is_the_imports():
    drawn = script("rooms")
    assert drawn.PICTURE.read_text() == drawn.picture(), "run `python .ci/rooms.py`"
    levels = drawn.levels(drawn.imports())
    assert levels[-1] == [drawn.GROUND]
    assert sum(map(len, levels)) == len(drawn.imports())


def test_every_toy_stands_on_the_page_of_toys():
    toys = DOCS.parent / "tests" / "toys"
    told = set(re.findall(r"`(\w+\.py)`", (toys / "README.md").read_text())) - {"conftest.py"}
    assert told == {path.name for path in toys.glob("*.py")}


def test_the_page_on_the_package_names_files_that_are_there():
    text = (DOCS / "architecture.md").read_text()
    named = {name for name in re.findall(r"`([\w/.]+\.py)`", text) if "<" not in name}
    places = (DOCS.parent / "av_lens", DOCS.parent)
    missing = {name for name in named if not any((place / name).is_file() for place in places)}
    assert not missing, missing


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([\w/.-]+\.md)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_typed_names_are_there(path: Path):
    for name in set(re.findall(r"\bavl\.(\w+)", path.read_text())):
        assert name in av_lens.__all__, f"{path.name} writes avl.{name}"
    for block in python_blocks(path):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("av_lens"):
                home = importlib.import_module(node.module or "")
                assert all(alias.name == "*" or hasattr(home, alias.name) for alias in node.names), block


@pytest.mark.parametrize("path", [p for p in PAGES if "import *" in p.read_text()], ids=lambda p: p.name)
def test_bare_names_are_there(path: Path):
    """What a page takes by `import *` is public where it takes it from: else its blocks fail, which only run slowly."""
    nodes = [node for block in python_blocks(path) for node in ast.walk(ast.parse(block))]
    known = set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                whole = importlib.import_module(getattr(node, "module", None) or alias.name)
                known |= set(whole.__all__) if alias.name == "*" else {alias.asname or alias.name}
    names = [node for node in nodes if isinstance(node, ast.Name)]
    known |= {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    assert {node.id for node in names} <= known, {node.id for node in names} - known


def run_blocks(blocks: list[str], page: str) -> None:
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        if not block.startswith(NOT_RUN):
            exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in PAGES if python_blocks(p)], ids=lambda p: p.name)
def test_what_a_page_shows_runs(path: Path, tmp_path: Path, monkeypatch):
    """Each page's blocks in order, in one namespace, in an empty folder; what goes on from README runs after it."""
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in python_blocks(path) if not block.startswith(GOES_ON)]
    if path == README:
        blocks += [block for page in PAGES for block in python_blocks(page) if block.startswith(GOES_ON)]
    run_blocks(blocks, path.name)
