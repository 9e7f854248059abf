"""Long work in parts: a part that was finished under the same settings is not done again; others leave none.

Each part writes into a folder of its own under another name, which is renamed when the part is done; a ledger beside
them (`parts.json`) says under which settings each was finished. The settings include the package's own source, so that
a changed program never passes off an earlier one's numbers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from av_lens.results.provenance import source_hash
from av_lens.whole_files import make_folder, stored, sweep_partials, whole_folder, write_whole


@dataclass(eq=False)
class Parts:
    """The ledger of a folder's parts.

    Attributes:
        folder: where the parts stand.
        settings: everything that the parts depend on, as plain values.
        seconds: how long each part took that was done in this run.
    """

    folder: Path
    settings: Mapping[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The hash of the settings and of the package's source."""
        text = json.dumps({**self.settings, "source": source_hash()}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def ensure(self, name: str, work: Callable[[Path], object]) -> Path:
        """Do a part, unless it is done."""
        place = self.folder / name
        if place.is_dir() and self._ledger().get(name) == self.key:
            return place
        make_folder(self.folder)
        sweep_partials(self.folder, of=name)
        begun = time.monotonic()
        with whole_folder(place) as partial:
            work(partial)
            shutil.rmtree(place, ignore_errors=True)
        self.seconds[name] = time.monotonic() - begun
        write_whole(self.folder / "parts.json", json.dumps({**self._ledger(), name: self.key}, indent=1))
        return place

    def _ledger(self) -> dict[str, str]:
        return stored(self.folder / "parts.json", lambda found: found) or {}
