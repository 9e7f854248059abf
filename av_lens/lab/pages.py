"""Long work in parts, each done once under its settings; and pages of the documentation that a command fills.

A part is written under another name and renamed when done; `parts.json` says under which settings. These include the
package's own source, so that a changed program never passes off an earlier one's numbers.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from av_lens.errors import InputError
from av_lens.results.provenance import source_hash
from av_lens.whole_files import make_folder, stored, sweep_partials, whole_folder, write_whole


@dataclass(eq=False)
class Parts:
    """The ledger of a folder's parts."""

    folder: Path  # where the parts stand
    settings: Mapping[str, Any]  # everything that the parts depend on, as plain values
    seconds: dict[str, float] = field(default_factory=dict)  # how long each part took that was done in this run

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


Table = tuple[list[str], list[list[str]]]  # headings and rows


def markdown(table: Table, *, left: Collection[int] = (0,)) -> str:
    """Write a pipe table; the columns named are aligned left, the others right."""
    head, rows = table
    rule = "|".join("---" if column in left else "---:" for column in range(len(head)))
    first, *others = ("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (head, *rows))
    return "\n".join([first, f"|{rule}|", *others])


@dataclass(frozen=True)
class FilledPage:
    """A page of the documentation, the part of it that a command fills, and the record that the part is made from."""

    name: str  # the page's file
    record: str  # the record's file, beside it
    mark: str  # what the two comments around the part are called

    @property
    def empty(self) -> str:
        """The two comments with nothing between them."""
        return f"<!-- {self.mark} -->\n\n<!-- /{self.mark} -->"

    def around(self, folder: Path) -> tuple[str, str, str]:
        """Read what stands before, in and after the part, the comments with the ends."""
        page, opened, closed = folder / self.name, f"<!-- {self.mark} -->\n", f"\n<!-- /{self.mark} -->"
        text = page.read_text("utf-8") if page.exists() else ""
        head, begun, rest = text.partition(opened)
        shown, ended, tail = ("\n" + rest).partition(closed)
        if not begun or not ended:
            raise InputError(f"{page} is not there or lacks the comments {opened.strip()} and {closed.strip()}.")
        return head + opened, shown[1:], closed + tail

    def store(self, folder: str | Path, record: str, shown: str, *, beside: Mapping[str, str] | None = None) -> Path:
        """Fill the part, and write the record and what else stands beside the page: all of it, or nothing."""
        head, _, tail = self.around(Path(folder))
        for name, content in {self.record: record, **(beside or {})}.items():
            write_whole(Path(folder) / name, content)
        write_whole(Path(folder) / self.name, head + shown + tail)
        return Path(folder) / self.name
