"""What the distribution says of itself that depends on where the repository lies: its urls, and the README's links.

The address is one setting, `address` under `[tool.hatch.metadata.hooks.custom]` in pyproject.toml. While it is empty
the distribution has no urls, and the README, which is shown alone there, names its files instead of linking to them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PAGES = {"Repository": "", "Documentation": "/tree/main/docs", "Changelog": "/blob/main/docs/changelog.md"}


def standing_alone(readme: str, address: str) -> str:
    """The README with links that lead somewhere wherever it is shown: whole ones, or none without an address."""
    whole = rf"[\1]({address}/blob/main/\2)" if address else r"\1"
    return re.sub(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)]+)\)", whole, readme)


class CustomMetadataHook(MetadataHookInterface):
    """Fills what `[project]` calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README and, where there is an address, the urls."""
        address = str(self.config["address"]).rstrip("/")
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": standing_alone(readme, address)}
        metadata["urls"] = {name: address + page for name, page in PAGES.items()} if address else {}
