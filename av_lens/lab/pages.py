"""Tables as markdown, and pages of the documentation with a part that a command fills, between two comments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from av_lens.errors import InputError
from av_lens.whole_files import write_whole

Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""


def markdown(table: Table, *, left: Collection[int] = (0,)) -> str:
    """Write a pipe table; the columns named are aligned left, the others right."""
    head, rows = table
    rule = "|".join("---" if column in left else "---:" for column in range(len(head)))
    first, *others = ("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (head, *rows))
    return "\n".join([first, f"|{rule}|", *others])


@dataclass(frozen=True)
class FilledPage:
    """A page of the documentation, the part of it that a command fills, and the record that the part is made from.

    Attributes:
        name: the page's file.
        record: the record's file, beside it.
        mark: what the two comments around the part are called.
    """

    name: str
    record: str
    mark: str

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
