"""Question: which characters of the prompt are whose? The chat template's text, cut into pieces with roles.

The checkpoint's own template is rendered with a marker in the place of the user's text (and of the system message), so
that what stands before, in between and after is known exactly and nothing is searched for. Roles of the pieces:

* `system`: the system message's text, given or the template's default;
* `boundary`: media begin and end tokens and the framing of the turns, up to the question;
* `question`: the user's text;
* `header`: everything after the question: the end of the user's turn, the assistant's header, then the prefix. So
  question | header | generation is all of the prompt that follows the media, and nothing leaks past an edit of it.

Prefix and answer are tokenized apart, so that they never change the tokens before them.

Not done: several turns, tools, several pictures or sounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from av_lens.errors import InputError, ModelError
from av_lens.families.media_layout import MediaLayout

_QUESTION_MARK = "\ue000question\ue001"  # private-use characters: no text holds them
_SYSTEM_MARK = "\ue000system\ue001"
Pieces = tuple[tuple[str, str], ...]
"""Texts, each with its role; joined they are the prompt."""


@dataclass(frozen=True)
class Prompt:
    """Token ids with a role each; media positions still count as `boundary` and get their role from their id."""

    ids: tuple[int, ...]
    roles: tuple[str, ...]


def render(layout: MediaLayout, media: Sequence[str], question: str, *, system: str | None = None) -> Pieces:
    """Render the chat template (or the template's lack) and cut its text into pieces, each medium one placeholder."""
    processor = layout.processor
    for name, text in (("question", question), ("system message", system or "")):
        refuse_special(processor.tokenizer, name, text)
    if not question.strip():
        raise InputError("the question is empty: ask something, such as 'What do you hear?'")
    if getattr(processor, "chat_template", None) is None:
        shown = "".join(layout.bare(kind) for kind in media)
        return (system or "", "system"), (shown, "boundary"), (question, "question")
    content = [{"type": kind, kind: "-"} for kind in media] + [{"type": "text", "text": _QUESTION_MARK}]
    conversation: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        conversation.insert(0, {"role": "system", "content": [{"type": "text", "text": _SYSTEM_MARK}]})
    try:
        text: str = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a small program from the checkpoint, run in transformers' sandbox
        raise ModelError(f"this checkpoint's chat template fails ({error}); mend chat_template.jinja.") from error
    if text.count(_QUESTION_MARK) != 1 or text.count(_SYSTEM_MARK) != (system is not None):
        raise ModelError("this checkpoint's chat template does not show each message exactly once; av_lens needs that")
    before, after = text.split(_QUESTION_MARK)
    return (*_before_question(layout, before, system), (question, "question"), (after, "header"))


def _before_question(layout: MediaLayout, before: str, system: str | None) -> Pieces:
    if system is not None:
        start, rest = before.split(_SYSTEM_MARK)
        return (start, "boundary"), (system, "system"), (rest, "boundary")
    found = None if layout.system_turn is None else layout.system_turn.search(before)
    if found is None:
        return ((before, "boundary"),)
    start, stop = found.span(1)
    return (before[:start], "boundary"), (before[start:stop], "system"), (before[stop:], "boundary")


def refuse_special(tokenizer: Any, name: str, text: str) -> None:
    """Refuse text that would be read as special tokens."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token in sorted(added | set(tokenizer.all_special_tokens)):
        if token in text:
            raise InputError(
                f"the {name} holds the special token {token!r}, which would break the prompt; leave it out"
            )


def tokenize(
    tokenizer: Any, pieces: Pieces, *, expansions: Mapping[str, str], prefix: str = "", answer_ids: Sequence[int] = ()
) -> Prompt:
    """Turn the pieces into token ids with roles; the last position before the answer is `generation`."""
    refuse_special(tokenizer, "prefix", prefix)
    texts, borders, total = [], [], 0
    for text, role in pieces:
        for placeholder, expansion in expansions.items():
            if role != "question":
                text = text.replace(placeholder, expansion)
        total += len(text)
        texts.append(text)
        borders.append((total, role))
    encoded = tokenizer("".join(texts), return_offsets_mapping=True)
    roles: list[str] = []
    piece = 0
    for start, stop in encoded["offset_mapping"]:
        while stop > start and start >= borders[piece][0]:
            piece += 1
        roles.append(borders[piece][1])
    ids: list[int] = list(encoded["input_ids"])
    if prefix:
        extra = tokenizer(prefix, add_special_tokens=False)["input_ids"]
        ids += extra
        roles += ["header"] * len(extra)
    if roles:
        roles[-1] = "generation"
    return Prompt((*ids, *answer_ids), (*roles, *["generated"] * len(answer_ids)))
