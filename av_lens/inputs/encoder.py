"""`Encoder`: a clip and a question become the tensors that a model takes, with every position explained.

By the checkpoint's own processor and chat template: frames are sampled here (by their true times) and handed over
with the right rate, the sound is woven into the video by the processor's own code, and the result is compared with
the model's own position ids before anything runs on it. `Encoder.encode` returns what one call of the processor
would, except that the mel is trimmed to the sound.

Layouts: sound woven into the video ("in_video"), video then audio ("separate"), either alone, an image with or without
sound, text. Not done: several clips in one prompt, several turns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from av_lens.errors import InputError, ModelError, unknown
from av_lens.inputs.answers import Answer, AnswerLike, resolve
from av_lens.inputs.features import Features
from av_lens.inputs.grammar import Grammar
from av_lens.inputs.layout import (
    Ids,
    Media,
    build_map,
    check_positions,
    expected_positions,
    frame_rate_fault,
    media_roles,
)
from av_lens.inputs.memory import Memory
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.prompt import Prompt, render, tokenize
from av_lens.media.border import MediaBudgetError
from av_lens.media.clip import Clip
from av_lens.media.files import ClipFile
from av_lens.spans import SpanMap

SOUND = ("auto", "in_video", "separate", None)
PICTURE = ("auto", "video", "image", None)
_REMEMBERED = 256  # prompts and layouts
_LAYOUTS: dict[tuple[str | None, str | None], str] = {
    ("video", "in_video"): "in_video",
    ("video", "separate"): "separate",
    ("video", None): "video_only",
    ("image", "separate"): "image_audio",
    ("image", None): "image",
    (None, "separate"): "audio_only",
    (None, None): "text",
}


Medium = Clip | ClipFile | str | os.PathLike[str] | None


def _clip(medium: Any, fps: float | int, picture: str | None) -> Clip | None:
    """The clip of what was handed in."""
    if medium is None or isinstance(medium, Clip):
        return medium
    if isinstance(medium, str | os.PathLike):
        medium = ClipFile(os.fspath(medium))
    if not isinstance(medium, ClipFile):
        raise InputError(
            f"encode(clip, question) takes a Clip, the path of a file, or None for text alone, not "
            f"{type(medium).__name__}. Frames and samples become a clip by avl.Clip.from_arrays."
        )
    return _opened(medium, fps, picture)


@dataclass(frozen=True)
class Choice:
    """Which streams of a clip go in, and how: "video", "image" or None; "in_video", "separate" or None."""

    picture: str | None
    sound: str | None

    @property
    def layout(self) -> str:
        """The layout's name."""
        return _LAYOUTS[self.picture, self.sound]

    @property
    def media(self) -> tuple[str, ...]:
        """The media of the prompt in order, as the chat template names them."""
        separate = ("audio",) if self.sound == "separate" else ()
        return ((self.picture,) if self.picture else ()) + separate


def choose(clip: Clip | None, sound: str | None, picture: str | None) -> Choice:
    """Decide which streams go in, and refuse what the clip does not have.

    Args:
        clip: the clip, or None for text alone.
        sound: as asked: "auto" takes the sound if there is one, into the video if there is one.
        picture: as asked: "auto" takes the picture if there is one, a single frame as an image.

    Returns:
        The choice.

    Raises:
        InputError: for an unknown option or a stream that the clip does not have.
    """
    if sound not in SOUND:
        raise InputError(unknown("option sound=", sound, SOUND))
    if picture not in PICTURE:
        raise InputError(unknown("option picture=", picture, PICTURE))
    has_picture, has_sound = clip is not None and clip.has_picture, clip is not None and clip.has_sound
    if picture in ("video", "image") and not has_picture:
        raise InputError(f"picture={picture!r} is asked of {_named(clip)}, which has no picture: use picture=None")
    if sound in ("in_video", "separate") and not has_sound:
        raise InputError(
            f"sound={sound!r} is asked of {_named(clip)}, which has no audio stream: use sound=None, or give it a "
            "sound with clip.with_sound(other)"
        )
    if picture == "auto":
        picture = ("image" if clip is not None and clip.is_image else "video") if has_picture else None
    if sound == "auto":
        sound = ("in_video" if picture == "video" else "separate") if has_sound else None
    if sound == "in_video" and picture != "video":
        raise InputError(f"sound='in_video' needs a video, and the picture is {picture!r}: use sound='separate'")
    return Choice(picture, sound)


def _opened(file: ClipFile, fps: float | int, picture: str | None) -> Clip:
    """Decode a file; where all its frames would be too many, only those nearest to the asked rate, and say so."""
    try:
        return file.load()
    except MediaBudgetError:
        if picture == "image" or file.fps is not None:
            raise
        clip = replace(file, fps=float(fps)).load()
        note = f"all frames would pass the budget of a clip: read at {fps:g} frames a second, as asked"
        return replace(clip, notes=(*clip.notes, note))


def _named(clip: Clip | None) -> str:
    return "no clip" if clip is None else repr(clip)


class Encoder:
    """Turns clips and questions into `AVInputs` for one model.

    Args:
        processor: the checkpoint's processor (`Qwen2_5OmniProcessor`).
        config: the thinker's config.
        position_ids: computes the model's own position ids: the keyword arguments of the forward -> `[3, batch, pos]`.
        grammar: the questions that an embedded model understands; None takes any.
        cache_bytes: memory for features that are computed once and shared.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        position_ids: Callable[[Mapping[str, Any]], Tensor],
        *,
        grammar: Grammar | Mapping[str, Any] | None = None,
        cache_bytes: int = 512 << 20,
    ) -> None:
        self.processor = processor
        self.known = Ids.of(config)
        self.position_ids = position_ids
        self.grammar = grammar if isinstance(grammar, Grammar) or grammar is None else Grammar.from_json(grammar)
        self.features = Features(processor, cache_bytes=cache_bytes)
        self._texts: dict[int, str] = {}
        self._prompts: Memory[Prompt] = Memory(_REMEMBERED)
        self._layouts: Memory[Tensor] = Memory(_REMEMBERED)
        for name, found in (("audio", self.known.audio), ("video", self.known.video), ("image", self.known.image)):
            wanted = int(getattr(processor, f"{name}_token_id"))
            if wanted != found:
                raise ModelError(
                    f"the processor writes {name} as token {wanted} and the model reads token {found}: they belong to "
                    "different checkpoints; load the processor from the model's own folder"
                )

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
        """Make the model's input of a clip and a question, or of lists of either.

        Args:
            clip: the clip (or its file, or the file's path), None for text alone, or a list of them. Of a file whose
                frames together pass the budget of a clip only those at `fps` are decoded, which its notes say.
            question: the question, or a list of them; one of either is used for all of the other.
            sound: "in_video" (woven into the video), "separate" (after it), None (left out), or "auto".
            picture: "video", "image" (the frame nearest the middle), None (left out), or "auto".
            fps: frames per second to sample, at least 1.
            system: the system message; the template's own when None.
            prefix: text of the assistant before the asked position, such as "I hear a".
            answer: an answer to append after the prompt, as `generated` positions: token ids, an `Answer`, or a word
                (`model.encode` reads it in the form that the model says).

        Returns:
            One example, or a stack of examples of one layout.

        Raises:
            InputError: for streams that the clip does not have, a frame rate that the model cannot take, a question
                outside the grammar, text with special tokens, or positions on which the model disagrees.
            AlignmentError: for a list whose examples have different layouts.
        """
        options: dict[str, Any] = {
            "sound": sound, "picture": picture, "fps": fps, "system": system, "prefix": prefix, "answer": answer
        }  # fmt: skip
        clips = [_clip(each, fps, picture) for each in (clip if isinstance(clip, list | tuple) else [clip])]
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
        return AVInputs.stack([self._one(each, asked, **options) for each, asked in pairs])

    def _one(
        self,
        clip: Clip | None,
        question: str,
        *,
        sound: str | None,
        picture: str | None,
        fps: float | int,
        system: str | None,
        prefix: str,
        answer: AnswerLike | Answer | None,
    ) -> AVInputs:
        choice = choose(clip, sound, picture)
        frames_per_patch = int(self.processor.video_processor.temporal_patch_size)
        fault = frame_rate_fault(fps, frames_per_patch, self.known, interleaved=choice.sound == "in_video")
        if fault:
            raise InputError(fault)
        asked = question if self.grammar is None else self.grammar.match(question)
        media = self._media(clip, choice, fps)
        answers = () if answer is None else resolve(self.processor.tokenizer, answer).options
        if len(answers) > 1:
            raise InputError(f"answer= appends one answer, and {answer!r} lists {len(answers)} synonyms; choose one")
        expansions = self._expansions(media)
        words = (choice.media, asked, system, tuple(expansions.items()), prefix, *answers)
        prompt = self._prompts.once(
            words,
            lambda: tokenize(
                self.processor,
                render(self.processor, choice.media, asked, system=system),
                expansions=expansions,
                prefix=prefix,
                answer_ids=answers[0] if answers else (),
            ),
        )
        ids = np.array(prompt.ids, dtype=np.int64)
        spans = build_map(ids, media_roles(ids, prompt.roles, self.known), self._decoded(ids), media, self.known)
        tensors = _tensors(ids, media)
        # Position ids follow from the ids, the grids and the lengths alone: one layout is checked once.
        layout = (prompt.ids, media.shape)
        found = self._layouts.once(layout, lambda: self._checked_positions(tensors, ids, media, spans, fps))
        return AVInputs(
            tensors=tensors,
            spans=spans,
            position_ids=found.clone(),
            clips=(clip,),
            questions=(asked,),
            layout=choice.layout,
            provenance=self._provenance(clip, question, asked, media, fps, prefix, system),
        )

    def _media(self, clip: Clip | None, choice: Choice, fps: float | int) -> Media:
        if clip is None:
            return Media()
        video = self.features.video(clip, fps) if choice.picture == "video" else None
        return Media(
            video=video,
            image=self.features.image(clip) if choice.picture == "image" else None,
            sound=self.features.sound(clip) if choice.sound else None,
            seconds_per_grid=int(self.processor.video_processor.temporal_patch_size) / fps if video else None,
            interleaved=choice.sound == "in_video",
        )

    def _expansions(self, media: Media) -> dict[str, str]:
        processor, made = self.processor, {}
        if media.image is not None:
            made[processor.image_token] = processor.image_token * media.image.n_tokens
        if media.video is not None and not media.interleaved:
            made[processor.video_token] = processor.video_token * media.video.n_tokens
        if media.sound is not None and not media.interleaved:
            made[processor.audio_token] = processor.audio_token * media.sound.n_tokens
        if media.video is not None and media.sound is not None and media.interleaved:
            made[processor.video_token] = processor.replace_video_with_audio_token(
                {"video_grid_thw": [np.array(media.video.grid)], "video_second_per_grid": [media.seconds_per_grid]},
                0,
                {"num_audio_tokens": [media.sound.n_tokens]},
                0,
                position_id_per_seconds=self.known.per_second,
                seconds_per_chunk=self.known.chunk_s,
            )
        return made

    def _checked_positions(
        self, tensors: Mapping[str, Any], ids: np.ndarray, media: Media, spans: SpanMap, fps: float | int
    ) -> Tensor:
        try:
            found = self.position_ids(tensors)
        except (IndexError, RuntimeError) as error:
            raise InputError(
                f"the model cannot compute position ids for this input ({error}): its layout is not one that it knows"
            ) from error
        check_positions(expected_positions(ids, media, self.known), found[:, 0].cpu().numpy(), spans, fps=fps)
        return found

    def _decoded(self, ids: np.ndarray) -> tuple[str, ...]:
        for token in np.unique(ids).tolist():
            if token not in self._texts:
                self._texts[token] = self.processor.tokenizer.decode([token])
        return tuple(self._texts[token] for token in ids.tolist())

    def _provenance(
        self,
        clip: Clip | None,
        question: str,
        asked: str,
        media: Media,
        fps: float | int,
        prefix: str,
        system: str | None,
    ) -> dict[str, Any]:
        import transformers

        made: dict[str, Any] = {
            "processor": type(self.processor).__name__,
            "transformers": transformers.__version__,
            "question": question,
            "asked": asked,
            "prefix": prefix,
            "system": system,
        }
        if clip is not None:
            made |= {"path": clip.path, "sha256": clip.sha256, "window": clip.window, "notes": list(clip.notes)}
        if media.video is not None:
            shown = len(media.video.frames)
            made |= {
                "fps": fps,
                "frames": shown,
                "frame_rule": "nearest true time to i/fps",
                "repeated_last_frame": media.video.frame_start_s.size - shown,
                "grid": list(media.video.token_grid),
                "video_options": self.features.video_options(),
            }
        if media.sound is not None and clip is not None:
            wanted = int(self.processor.feature_extractor.sampling_rate)
            made |= {"mel_frames": media.sound.mel.shape[-1], "mel": "trimmed to the sound"}
            made |= {"resampled": [clip.rate, wanted]} if clip.rate != wanted else {}
        return made


def _tensors(ids: np.ndarray, media: Media) -> dict[str, Any]:
    tensors: dict[str, Any] = {"input_ids": torch.from_numpy(ids)[None]}
    tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
    tensors["use_audio_in_video"] = media.interleaved
    if media.image is not None:
        tensors["pixel_values"] = media.image.pixels
        tensors["image_grid_thw"] = torch.tensor([media.image.grid])
    if media.video is not None:
        tensors["pixel_values_videos"] = media.video.pixels
        tensors["video_grid_thw"] = torch.tensor([media.video.grid])
        tensors["video_second_per_grid"] = torch.tensor([media.seconds_per_grid])
    if media.sound is not None:
        frames = media.sound.mel.shape[-1]
        tensors["input_features"] = media.sound.mel
        tensors["feature_attention_mask"] = torch.ones((1, frames), dtype=torch.long)
    return tensors
