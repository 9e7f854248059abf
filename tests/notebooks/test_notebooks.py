"""Every notebook runs from top to bottom and still says what its prose says."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def said(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") or str(output.get("data", {}).get("text/plain", "")) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_short_of_breath_and_rich_in_prose(path: Path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert max(len(source.splitlines()) for source in code) <= 12
    assert len(prose) >= len(code) // 2
    assert "Recap" in prose[-1]
    assert "falsified" in prose[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning")
def test_five_minutes_runs_and_its_story_holds():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    text = said(notebook)
    assert "nothing to see, what do you hear: siren" in text
    assert "dog and siren, what do you hear:  dog" in text
    assert "dog and siren, what do you see:   dog" in text
    assert "What do you hear?  without the top four: siren  without four others: dog" in text
    assert "What do you see?   without the top four: dog    without four others: dog" in text
