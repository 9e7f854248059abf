"""`Encoder`: a clip and a question become the tensors that a model takes, with every position explained.

It works by the checkpoint's own processor and chat template, and by what the family says of media
(`families.media_layout`); `encode` returns what one call of the processor would, except that the mel is trimmed. The
template is rendered with a marker in the place of the user's text (and of the system message), so that nothing is
searched for. Roles of the pieces:

* `system`: the system message's text, given or the template's default;
* `boundary`: media begin and end tokens and the framing of the turns, up to the question;
* `question`: the user's text;
* `header`: everything after the question: the end of the user's turn, the assistant's header, then the prefix.

Prefix and answer are tokenized apart, so that they never change the tokens before them. Not done: several turns, tools,
several clips in one prompt.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
from torch import Tensor

from av_lens.errors import InputError, ModelError, unknown
from av_lens.families.given import Given
from av_lens.families.media_layout import Media, MediaLayout
from av_lens.families.registry import family_of
from av_lens.inputs.answers import Answer, AnswerLike, Grammar, appended
from av_lens.inputs.model_inputs import AVInputs
from av_lens.media.arrays import MediaBudgetError
from av_lens.media.clip import Clip
from av_lens.media.source import ClipFile
from av_lens.memory import Memory
from av_lens.spans import SpanMap

_QUESTION_MARK = "\ue000question\ue001"  # private-use characters: no text holds them
_SYSTEM_MARK = "\ue000system\ue001"
Pieces = tuple[tuple[str, str], ...]  # texts, each with its role; joined they are the prompt


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
    text, begins = "".join(texts), getattr(tokenizer, "bos_token", None)
    once = bool(begins) and text.startswith(str(begins))  # the template has written it already
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not once)
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


SOUND = ("auto", "in_video", "separate", None)
PICTURE = ("auto", "video", "image", None)
_REMEMBERED = 256  # prompts and layouts
LAYOUT_NAMES: dict[tuple[str | None, str | None], str] = {
    ("video", "in_video"): "in_video",
    ("video", "separate"): "separate",
    ("video", None): "video_only",
    ("image", "separate"): "image_audio",
    ("image", None): "image",
    (None, "separate"): "audio_only",
    (None, None): "text",
}
"""Layouts by what goes in: the picture, and the sound."""
Medium = Clip | ClipFile | Given | str | os.PathLike[str] | None


def _clip(medium: Any, fps: float | int, picture: str | None) -> Clip | None:
    """The clip of what was handed in; of a file too large to decode whole the frames at the asked rate, and said so."""
    if medium is None or isinstance(medium, Clip):
        return medium
    file = ClipFile(os.fspath(medium)) if isinstance(medium, str | os.PathLike) else medium
    if not isinstance(file, ClipFile):
        raise InputError(
            f"encode(clip, question) takes a Clip, the path of a file, or None for text alone, not "
            f"{type(medium).__name__}. Frames and samples become a clip by avl.Clip.from_arrays."
        )
    try:
        return file.load()
    except MediaBudgetError:
        if picture == "image" or file.fps is not None:
            raise
        clip = replace(file, fps=float(fps)).load()
        note = f"all frames would pass the budget of a clip: read at {fps:g} frames a second, as asked"
        return replace(clip, notes=(*clip.notes, note))


def choose(
    clip: Clip | None,
    sound: str | None,
    picture: str | None,
    kinds: Sequence[str] = ("audio", "video", "image"),
    *,
    woven: bool = True,
) -> tuple[str | None, str | None]:
    """Decide which streams go in (sound, picture) and how, and refuse what the clip does not have.

    "auto" takes both; a still, or the middle frame for a model that takes no video, goes in as an image.
    """
    if sound not in SOUND:
        raise InputError(unknown("option sound=", sound, SOUND))
    if picture not in PICTURE:
        raise InputError(unknown("option picture=", picture, PICTURE))
    for name, asked, wanted in (("sound", sound, "audio"), ("picture", picture, picture)):
        if asked not in ("auto", None) and wanted not in kinds:
            raise InputError(f"{name}={asked!r} is asked of a model that takes {_listed(kinds)}: use {name}=None")
    has_picture = clip is not None and clip.has_picture and bool({"video", "image"} & {*kinds})
    has_sound = clip is not None and clip.has_sound and "audio" in kinds
    named = "no clip" if clip is None else repr(clip)
    if picture in ("video", "image") and not has_picture:
        raise InputError(f"picture={picture!r} is asked of {named}, which has no picture: use picture=None")
    if sound in ("in_video", "separate") and not has_sound:
        raise InputError(
            f"sound={sound!r} is asked of {named}, which has no audio stream: use sound=None, or give it a sound with "
            "clip.with_sound(other)"
        )
    if picture == "auto":
        still = clip is not None and (clip.is_image or "video" not in kinds)
        picture = ("image" if still else "video") if has_picture else None
    if sound == "auto":
        sound = ("in_video" if picture == "video" and woven else "separate") if has_sound else None
    if sound == "in_video" and not woven:
        raise InputError("sound='in_video' is asked of a model that takes sound beside a video: use sound='separate'")
    if sound == "in_video" and picture != "video":
        raise InputError(f"sound='in_video' needs a video, and the picture is {picture!r}: use sound='separate'")
    return sound, picture


def _listed(kinds: Sequence[str]) -> str:
    return " and ".join(["text", *kinds]) if kinds else "text alone"


class Asking(TypedDict, total=False):
    """The keywords of `Encoder.encode`, for those that hand them on."""

    sound: str | None
    picture: str | None
    fps: float | int
    system: str | None
    prefix: str
    answer: AnswerLike | Answer | None


@dataclass(frozen=True)
class Asked:
    """How something is asked: what these keywords came to."""

    sound: str | None
    picture: str | None
    fps: float | int
    system: str | None
    prefix: str
    answer: AnswerLike | Answer | None


class Encoder:
    """Turns clips and questions into `AVInputs` for one model.

    Args:
        processor: the checkpoint's processor.
        config: the model's configuration.
        position_ids: computes the model's own position ids: the keyword arguments of the forward ->
            `[stream, batch, pos]`.
        grammar: the questions that an embedded model understands; None takes any.
        media: what is said of media in its prompts; None for what the configuration's family says.
        cache_bytes: memory for features that are computed once and shared.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        position_ids: Callable[[Mapping[str, Any]], Tensor],
        *,
        grammar: Grammar | Mapping[str, Any] | None = None,
        media: type[MediaLayout] | None = None,
        cache_bytes: int = 512 << 20,
    ) -> None:
        self.processor = processor
        say = media or family_of(config.model_type).media
        self.layout: MediaLayout = say(processor, config, cache_bytes=cache_bytes)
        self.position_ids = position_ids
        self.grammar = grammar if isinstance(grammar, Grammar) or grammar is None else Grammar.from_json(grammar)
        self._texts: dict[int, str] = {}
        self._prompts: Memory[Prompt] = Memory(_REMEMBERED)
        self._positions: Memory[Tensor] = Memory(_REMEMBERED)

    def encode(
        self,
        clip: Medium | Sequence[Medium],
        question: str | Sequence[str],
        *,
        sound: str | None = "auto",
        picture: str | None = "auto",
        fps: float | int = 2.0,
        system: str | None = None,
        prefix: str = "",
        answer: AnswerLike | Answer | None = None,
    ) -> AVInputs:
        """Make the model's input of a clip and a question, or of lists of either."""
        how = Asked(sound, picture, fps, system, prefix, answer)
        clips = [self._medium(each, fps, picture) for each in (clip if isinstance(clip, list | tuple) else [clip])]
        questions: list[Any] = list(question) if isinstance(question, list | tuple) else [question]
        strange = [type(each).__name__ for each in questions if not isinstance(each, str)]
        if strange:
            raise InputError(f"encode(clip, question) asks a text, or a list of them, not {strange[0]}.")
        count = max(len(clips), len(questions))
        if {len(clips), len(questions)} - {1, count} or not clips or not questions:
            raise InputError(
                f"{len(clips)} clips and {len(questions)} questions: give as many of one as of the other, or one"
            )
        pairs = zip(clips * (count // len(clips)), questions * (count // len(questions)), strict=True)
        return AVInputs.stack([self._one(each, asked, how) for each, asked in pairs])

    def _medium(self, medium: Any, fps: float | int, picture: str | None) -> Clip | None:
        return _clip(medium, fps, picture)

    def _one(self, clip: Clip | None, question: str, how: Asked) -> AVInputs:
        layout, tokenizer = self.layout, self.processor.tokenizer
        sound, picture = choose(clip, how.sound, how.picture, layout.kinds, woven=layout.woven)
        layout.require_frame_rate(how.fps, interleaved=sound == "in_video")
        asked = question if self.grammar is None else self.grammar.match(question)
        media = Media() if clip is None else layout.media(clip, picture=picture, sound=sound, fps=how.fps)
        answers = appended(tokenizer, how.answer)
        expansions = layout.expansions(media)
        kinds = (*((picture,) if picture else ()), *(("audio",) if sound == "separate" else ()))
        prompt = self._prompts.once(
            (kinds, asked, how.system, tuple(expansions.items()), how.prefix, *answers),
            lambda: tokenize(
                tokenizer,
                render(layout, kinds, asked, system=how.system),
                expansions=expansions,
                prefix=how.prefix,
                answer_ids=answers[0] if answers else (),
            ),
        )
        ids = np.array(prompt.ids, dtype=np.int64)
        spans = layout.span_map(ids, prompt.roles, self._decoded(ids), media)
        tensors = layout.tensors(ids, media)
        # Position ids follow from the ids, the grids and the lengths alone: one layout is checked once.
        found = self._positions.once(
            (prompt.ids, media.shape), lambda: self._checked_positions(tensors, ids, media, spans, how.fps)
        )
        return AVInputs(
            tensors=tensors,
            spans=spans,
            position_ids=found.clone(),
            clips=(clip,),
            questions=(asked,),
            layout=LAYOUT_NAMES[picture, sound],
            provenance=self._provenance(clip, question, asked, media, how),
            axes=layout.axes,
        )

    def _checked_positions(
        self, tensors: Mapping[str, Any], ids: np.ndarray, media: Media, spans: SpanMap, fps: float | int
    ) -> Tensor:
        try:
            found = self.position_ids(tensors)
        except (IndexError, RuntimeError) as error:
            raise InputError(
                f"the model cannot compute position ids for this input ({error}): its layout is not one that it knows"
            ) from error
        self.layout.check_positions(ids, media, spans, found[:, 0].cpu().numpy(), fps=fps)
        return found

    def _decoded(self, ids: np.ndarray) -> tuple[str, ...]:
        new = set(ids.tolist()) - self._texts.keys()
        self._texts |= {token: self.processor.tokenizer.decode([token]) for token in new}
        return tuple(self._texts[token] for token in ids.tolist())

    def _provenance(self, clip: Clip | None, question: str, asked: str, media: Media, how: Asked) -> dict[str, Any]:
        import transformers

        made: dict[str, Any] = {
            "processor": type(self.processor).__name__,
            "transformers": transformers.__version__,
            "question": question,
            "asked": asked,
            "prefix": how.prefix,
            "system": how.system,
        }
        if clip is not None:
            made |= {"path": clip.path, "sha256": clip.sha256, "window": clip.window, "notes": list(clip.notes)}
            made |= self.layout.provenance(clip, media, how.fps)
        return made
