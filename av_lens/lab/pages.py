"""Pages of the documentation with a part that a command fills, between two comments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from av_lens.errors import InputError
from av_lens.whole_files import write_whole


def parts_of(page: Path, opened: str, closed: str) -> tuple[str, str]:
    """Read what stands before and after the part that is filled.

    Args:
        page: the page.
        opened: the comment before the part, with its end of line.
        closed: the comment after it, with the end of line before.

    Returns:
        The text up to the first comment, and the text from behind the second.

    Raises:
        InputError: no such page, or one without the comments.
    """
    text = page.read_text("utf-8") if page.exists() else ""
    head, begun, rest = text.partition(opened)
    _, ended, tail = ("\n" + rest).partition(closed)
    if not begun or not ended:
        raise InputError(f"{page} is not there or lacks the comments {opened.strip()} and {closed.strip()}.")
    return head, tail


def fill(page: Path, opened: str, closed: str, text: str, *, beside: Mapping[str, str]) -> Path:
    """Fill the part of a page between its comments, and write the files beside it that it is made from.

    Args:
        page: the page.
        opened: the comment before the part, with its end of line.
        closed: the comment after it, with the end of line before.
        text: what is to stand there.
        beside: name to text of each file beside the page; none is written where the page cannot be filled.

    Returns:
        The page.

    Raises:
        InputError: no such page, or one without the comments.
    """
    head, tail = parts_of(page, opened, closed)
    for name, content in beside.items():
        write_whole(page.parent / name, content)
    write_whole(page, head + opened + text + closed + tail)
    return page
