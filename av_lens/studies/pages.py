"""Pages of the documentation with a part that a command fills, between two comments."""

from __future__ import annotations

from pathlib import Path

from av_lens.errors import InputError
from av_lens.results.whole_files import write_whole


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


def fill(page: Path, opened: str, closed: str, text: str) -> Path:
    """Fill the part of a page between its comments.

    Args:
        page: the page.
        opened: the comment before the part, with its end of line.
        closed: the comment after it, with the end of line before.
        text: what is to stand there.

    Returns:
        The page.

    Raises:
        InputError: no such page, or one without the comments.
    """
    head, tail = parts_of(page, opened, closed)
    write_whole(page, head + opened + text + closed + tail)
    return page
