"""What is shipped: its licence and citation, a README that reads well alone, urls from one setting."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.wheel import WheelBuilder
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

import av_lens

ROOT = Path(__file__).resolve().parents[1]


def metadata(address: str | None = None) -> Any:
    """The core metadata of the distribution, with another address than the one that is set."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if address is not None:
        config["tool"]["hatch"]["metadata"]["hooks"]["custom"]["address"] = address
    return ProjectMetadata(str(ROOT), PluginManager(), config)


def targets(readme: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", readme)


def test_without_an_address_there_are_no_urls_and_no_broken_links():
    core = metadata("").core
    assert core.urls == {}
    assert all(target.startswith("https://") for target in targets(core.readme))
    assert "docs/toolbox.md)" in core.readme  # still named


def test_with_an_address_urls_and_links_lead_there():
    core, address = metadata("https://example.org/owner/av_lens/").core, "https://example.org/owner/av_lens"
    assert core.urls["Repository"] == address
    assert all(url.startswith(address) for url in core.urls.values())
    assert all(target.startswith("https://") for target in targets(core.readme))
    assert f"[docs/toolbox.md]({address}/blob/main/docs/toolbox.md)" in core.readme


def test_the_readmes_own_links_lead_to_files():
    linked = [target for target in targets((ROOT / "README.md").read_text()) if "://" not in target]
    assert linked
    assert [target for target in linked if not (ROOT / target).is_file()] == []


def test_licence_citation_and_version_are_said_once():
    core = metadata().core
    assert core.license_expression == "MIT"
    assert core.license_files == ["docs/license.md"]
    citation = (ROOT / "av_lens" / "CITATION.cff").read_text()
    assert f"\nversion: {av_lens.__version__}\n" in citation
    assert core.config["version"] == av_lens.__version__


@pytest.mark.slow
def test_the_wheel_holds_them(tmp_path: Path):
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        licence = next(name for name in names if ".dist-info/licenses/" in name)
        assert opened.read(licence) == (ROOT / "docs" / "license.md").read_bytes()
    assert {"av_lens/CITATION.cff", "av_lens/py.typed", "av_lens/reports/templates/page.css"} <= set(names)
    assert "av_lens/organism/checkpoints/av-tiny/model.safetensors" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"av_lens"}
