"""What has been measured already? Measurements on disk, so that a run that was killed goes on where it was.

Only what costs runs of the model is stored; everything that is computed from it (tests, roles, verdicts) is computed
again, so that a resumed run gives the same numbers as one that was never interrupted. A measurement is known by a name
and by everything that it depends on: the run's own key (protocol, weights, clips, program) and what its caller adds,
such as which conflicts, which heads, which donor. Each is a file of arrays, written beside its place and moved there
when it is whole; a file that is broken is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from av_lens.results.provenance import plain

Arrays = dict[str, np.ndarray]
FOLDER = "measured"


@dataclass(eq=False)
class Store:
    """Measurements of one run.

    Attributes:
        folder: where they are kept; None keeps nothing.
        key: what the whole run depends on; measurements of another key are not seen.
        recalled: how many measurements were found.
        made: how many were made.
    """

    folder: Path | None = None
    key: str = ""
    recalled: int = 0
    made: int = 0
    on_made: list[Callable[[str], None]] = field(default_factory=list)

    def recall(self, name: str, depends: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Give a measurement: the stored one, or a new one, which is then stored.

        Args:
            name: what is measured, as words.
            depends: everything that the measurement depends on beside the run's key, as plain values and arrays.
            compute: measures it.

        Returns:
            The arrays by name.
        """
        if self.folder is None:
            return compute()
        place = self.folder / FOLDER / f"{_slug(name)}-{self.digest(name, depends)}.npz"
        found = _opened(place)
        if found is not None:
            self.recalled += 1
            return found
        made = compute()
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.part")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **cast(Any, made))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, place)
        self.made += 1
        for told in self.on_made:
            told(name)
        return made

    def digest(self, name: str, depends: Mapping[str, Any]) -> str:
        """Hash what a measurement depends on.

        Args:
            name: what is measured.
            depends: plain values and arrays.

        Returns:
            The first 20 hex digits of a sha256.
        """
        text = json.dumps([self.key, name, plain(depends)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)[:40].strip("-")


def _opened(place: Path) -> Arrays | None:
    """Read a stored measurement; None where there is none that is whole."""
    try:
        with np.load(place, allow_pickle=False) as data:
            return {key: data[key] for key in data.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
