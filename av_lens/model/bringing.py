"""Bring your own: a text decoder fed by anybody's encoders, as a model that every method of av_lens takes.

`load` opens a folder of saved prompts too: one that holds `bring.json`, {"model": "../folder of the checkpoint"}, and
where they are needed "family" ("qwen2", ...), "prefix" (of the decoder's weights in it, "llm."), "inner" (where its
configuration holds the decoder's) and "tokenizer" (a folder).

Not done: what `embed` computes is taken as it is. Gradients end at its embeddings, and its encoders have no hooks.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from av_lens.checkpoints import BROUGHT, CONFIG, brought, check_configurations, check_weight_files
from av_lens.checks import foreign_file, parse_json
from av_lens.core.placement import require_weights
from av_lens.errors import InputError, ModelError
from av_lens.families.decoder import as_forward
from av_lens.families.given import Given, GivenAxes
from av_lens.families.registry import build_bridge, family_of
from av_lens.families.text_decoders import TextMedia
from av_lens.inputs.answers import appended
from av_lens.inputs.encoder import Asked, Encoder, choose, refuse_special
from av_lens.inputs.model_inputs import AVInputs
from av_lens.media.clip import Clip
from av_lens.model.loading import OPENERS, quiet
from av_lens.model.selfcheck import check_model, check_weights
from av_lens.model.wrapper import HookedAVLLM
from av_lens.spans import GROUPS
from av_lens.whole_files import make_folder, whole_file

Embed = Callable[..., Given]
_USUAL: dict[str, tuple[object, ...]] = {
    "sound": ("auto", "in_video", "separate", None),
    "picture": ("auto", "video", None),
    "fps": (2.0,),
    "system": (None,),
}
"""What an `embed` that does not take these keywords does anyway."""


def wrap(hf_text_model: Any, embed: Embed | None = None, *, tokenizer: Any, name: str = "brought") -> BroughtModel:
    """Make a model of a text decoder and of code that embeds clips and questions for it.

    Args:
        hf_text_model: a HuggingFace causal model of a family that is known (`av-lens models`), on one device. It is
            wrapped in place: keep no other use for it, but take its input embeddings before, if `embed` needs them.
        embed: `embed(clip, question, **asked) -> Given`. The clip may be None, or lack a stream. Of `asked` it gets
            those of `fps`, `system`, `sound` and `picture` that it names (all with `**asked`). None: only what is a
            `Given` already can be encoded.
        tokenizer: the decoder's.
        name: how reports call it.

    Returns:
        The model, after the cheap part of `check_model`.

    Raises:
        ModelError: no adapter for that class, quantised or split weights, NaN among them, another model's tokenizer, or
            a self-check that failed.
        InputError: `embed` cannot be called like that.
    """
    family_of(type(hf_text_model))
    require_weights(hf_text_model)
    check_weights(hf_text_model, tokenizer, name)
    _keywords(embed)
    hf_text_model.__class__ = _fed(type(hf_text_model))
    model = BroughtModel(build_bridge(hf_text_model, tokenizer=tokenizer, name=name), embed, tokenizer, name=name)
    check_model(model, full=False)
    return model


def _fed(own: type[Any]) -> type[Any]:
    """The class whose forward takes ids beside embeddings; a torch hook would stand among the caller's."""

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("inputs_embeds") is not None:
            args = args[1:]
            kwargs.pop("input_ids", None)
        return own.forward(self, *args, **kwargs)

    return type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})


def _keywords(embed: Embed | None) -> frozenset[str]:
    """Which of the keywords of `encode` a user's function takes."""
    if embed is None:
        return frozenset()
    parameters = inspect.signature(embed).parameters
    try:
        inspect.signature(embed).bind(None, "")
    except TypeError as error:
        why = f"embed is called as embed(clip, question, **asked), and yours takes no such call: {error}."
        raise InputError(why) from error
    every = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return frozenset(_USUAL) if every else frozenset(_USUAL) & set(parameters)


class BroughtModel(HookedAVLLM):
    """A `HookedAVLLM` whose inputs come from code, or from files, that are the user's.

    Args:
        bridge: the decoder's.
        embed: the user's function, or None.
        tokenizer: the decoder's.
        **more: as for `HookedAVLLM`.
    """

    def __init__(self, bridge: Any, embed: Embed | None, tokenizer: Any, **more: Any) -> None:
        super().__init__(bridge, SimpleNamespace(tokenizer=tokenizer), **more)
        # What its family says of media in prompts is about a processor that is not here.
        self.family = replace(self.family, media=TextMedia)
        self.embed_clip = embed

    @cached_property
    def encoder(self) -> Encoder:
        """What makes inputs of clips and questions, by the user's function."""
        return BroughtEncoder(self)

    def position_ids(self, tensors: Mapping[str, Any]) -> Tensor:
        """The position ids of an input; of text they are the decoder's own.

        Args:
            tensors: keyword arguments of the HuggingFace forward.

        Returns:
            `[stream, batch, pos]`.
        """
        told = tensors.get("position_ids")
        if told is None:
            ids: Tensor = tensors["input_ids"]
            return torch.arange(ids.shape[1], device=ids.device).expand(self.n_streams, *ids.shape).clone()
        return told if told.ndim == 3 else told[None]

    @property
    def n_streams(self) -> int:
        """By how many streams of position ids the decoder turns: 3 (time, row, column), or 1."""
        rope = getattr(self.config.get_text_config(), "rope_parameters", None) or {}
        of_text = family_of(type(self.hf_model)).media is TextMedia  # whose classes turn by one, whatever is configured
        return 3 if "mrope_section" in rope and not of_text else 1


class BroughtEncoder(Encoder):
    """Turns clips and questions into `AVInputs` by the user's function."""

    def __init__(self, model: BroughtModel) -> None:
        super().__init__(model.processor, model.config, model.position_ids, media=TextMedia)
        self._embed, self._words = model.embed_clip, model.bridge.embed.original_component
        self._dtype, self._n_streams = model.dtype, model.n_streams
        self._sizes = {"d_model": model.spec.d_model, "ids": self._words.weight.shape[0]}

    def _medium(self, medium: Any, fps: float | int, picture: str | None) -> Any:
        return medium if isinstance(medium, Given) else super()._medium(medium, fps, picture)

    def _one(self, clip: Any, question: str, how: Asked) -> AVInputs:
        tokenizer = self.processor.tokenizer
        given = self._given(clip, question, how)
        if given.embeds.shape[1] != self._sizes["d_model"]:
            raise InputError(
                f"embeds is {given.embeds.shape[1]} wide and this decoder's stream {self._sizes['d_model']}: what the "
                "encoders' projector gives is meant, of the checkpoint that this decoder is from."
            )
        if given.ids is not None and int(given.ids.max()) >= self._sizes["ids"]:
            raise InputError(f"ids holds {int(given.ids.max())}, and this decoder knows {self._sizes['ids']} tokens.")
        refuse_special(tokenizer, "prefix", how.prefix)
        if how.prefix:
            ids: list[int] = tokenizer(how.prefix, add_special_tokens=False)["input_ids"]
            given = given.followed(self._embedded(torch.tensor(ids)), ids, self._decoded(np.array(ids)))
        made = self._inputs(given, clip, given.question or question, how)
        answers = appended(tokenizer, how.answer)
        return made.continued(torch.tensor([answers[0]]), self._decoded(np.array(answers[0]))) if answers else made

    @torch.no_grad()
    def _embedded(self, ids: Tensor) -> Tensor:
        """The decoder's embeddings of ids."""
        return self._words(ids.to(self._words.weight.device)).to(ids.device)

    def _inputs(self, given: Given, clip: Any, question: str, how: Asked) -> AVInputs:
        ids = np.zeros(len(given), dtype=np.int64) if given.ids is None else given.ids
        read = given.tokens
        if read is None:
            pairs = zip(self._decoded(ids), given.roles, strict=True)
            read = [role if role in GROUPS["media"] else text for text, role in pairs]
        positions = given.streams(self._n_streams)[:, None]
        embeds, all_ids = given.embeds.to(self._dtype), torch.from_numpy(ids)[None]
        tensors = {
            "input_ids": all_ids,
            "attention_mask": torch.ones_like(all_ids),
            "inputs_embeds": embeds[None],
            "position_ids": as_forward(positions),
        }
        made: dict[str, Any] = {"question": question, "prefix": how.prefix, "system": how.system}
        if not isinstance(clip, Given):
            made |= {"asked": question, "fps": how.fps}
        if clip is not None and not isinstance(clip, Given):
            made |= {"path": clip.path, "sha256": clip.sha256, "window": clip.window, "notes": list(clip.notes)}
        return AVInputs(
            tensors={name: value.to(embeds.device) for name, value in tensors.items()},
            spans=given.span_map(read),
            position_ids=positions,
            clips=(None if isinstance(clip, Given) else clip,),
            questions=(question,),
            layout=str(given.layout),
            provenance=made,
            axes=GivenAxes(embed=self._embedded),
        )

    def _given(self, clip: Any, question: str, how: Asked) -> Given:
        """What the user's function makes of what was asked for, if it heeds that."""
        asked = {name: getattr(how, name) for name in _USUAL}
        if isinstance(clip, Given):
            changed = [name for name, usual in _USUAL.items() if asked[name] != usual[0]]
            if changed:
                raise InputError(f"{changed[0]}= has nothing to act on: a Given is made already.")
            return clip
        if self._embed is None:
            raise InputError("this model was wrapped without embed=, so it takes a Given, such as Given.load(path).")
        sound, picture = choose(clip, how.sound, how.picture)
        shown, heeded = _shown(clip, sound, picture), _keywords(self._embed)
        usual = _USUAL | {"picture": (*_USUAL["picture"], "image")} if shown is not None and shown.is_image else _USUAL
        for name in (name for name in asked if name not in heeded and asked[name] not in usual[name]):
            raise InputError(
                f"{name}={asked[name]!r} is asked of an embed that takes no {name}=: give it that keyword."
            )
        with torch.no_grad():
            given = self._embed(shown, question, **{name: asked[name] for name in sorted(heeded)})
        if not isinstance(given, Given):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"embed gave {type(given).__name__}: it returns av_lens.bring.Given(embeds, roles, ...).")
        for kind, there, roles in (("sound", sound, ("audio",)), ("picture", picture, ("video", "image"))):
            n = sum(role in roles for role in given.roles)
            if (there is not None) != bool(n):
                raise InputError(
                    f"embed was shown {'no' if there is None else 'a'} {kind} and gave {n} positions of it: leave no "
                    "stream out that is there, and put none in that is not."
                )
        woven = {"in_video", "separate"}
        if {how.sound, given.layout} <= woven and how.sound != given.layout:
            raise InputError(
                f"sound={how.sound!r} is asked of an embed that lays sound and picture {given.layout!r}: use "
                f"sound={given.layout!r} (layout= of conflicts and of isolate)."
            )
        return given


def _shown(clip: Clip | None, sound: str | None, picture: str | None) -> Clip | None:
    """The clip with the streams that were asked for; None where none were."""
    if clip is None or (sound is None and picture is None):
        return None
    if sound is None and clip.has_sound:
        cut = replace(clip, waveform=None)
        cut.__dict__["picture_hash"] = clip.picture_hash
        return cut
    if picture is None and clip.has_picture:
        return replace(clip, frames=None, times=np.empty(0))
    return clip


class Saved:
    """An `embed` that answers from a folder of saved `Given`s, one for each clip (as it is shown) and question.

    What is missing is made by `embed`, where there is one, and kept. Else it is refused, and a file `NAME.ask` says
    what is wanted, media included, to whoever runs the model's own code (the exporter of "Bring your own in 30 lines").

    Args:
        folder: where the files are.
        embed: makes what is missing; None where the model's code runs elsewhere.
    """

    def __init__(self, folder: str | Path, embed: Embed | None = None) -> None:
        self.folder, self.embed = Path(folder), embed
        make_folder(self.folder)

    def __call__(self, clip: Clip | None, question: str, *, fps: float | int = 2.0, system: str | None = None) -> Given:
        """The `Given` of a clip and a question."""
        path = self._path(clip, question, fps, system)
        if path.is_file():
            return Given.load(path)
        if self.embed is None:
            wanted = self._ask(path, clip, {"question": question, "fps": fps, "system": system})
            raise InputError(
                f"{path} is not there yet: the Given of {clip!r} asked {question!r}. {wanted.name} beside it says what "
                "is wanted; run the exporter in the model's own environment, then this again."
            )
        taken = {name: value for name, value in (("fps", fps), ("system", system)) if name in _keywords(self.embed)}
        made = self.embed(clip, question, **taken)
        made.save(path)
        return made

    def _path(self, clip: Clip | None, question: str, fps: float | int, system: str | None) -> Path:
        """The file of a clip and a question, called by their content."""
        of = None if clip is None else (clip.picture_hash, round(clip.picture_end, 6), clip.sound_hash)
        name = hashlib.sha256(json.dumps([of, question, float(fps), system]).encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"

    def _ask(self, path: Path, clip: Clip | None, told: dict[str, Any]) -> Path:
        """Leave word that a file is wanted: safetensors with what is seen and heard."""
        tensors: dict[str, Tensor] = {}
        if clip is not None:
            told = told | {"rate": clip.rate, "duration": clip.duration}
            shown = clip.times if clip.has_picture else None
            media = {"frames": clip.frames, "times": shown, "waveform": clip.waveform}
            tensors = {name: torch.from_numpy(np.array(one)) for name, one in media.items() if one is not None}
        with whole_file(path.with_suffix(".ask")) as beside:
            save_file(tensors, beside, metadata={"told": json.dumps(told)})
        return path.with_suffix(".ask")

    def ask_all(self, conflicts: Iterable[Any], *, questions: Iterable[str] = ("question", "see", "control")) -> int:
        """Leave word of every cell of conflicts, under each of their questions.

        Args:
            conflicts: `Conflict`s; cells with a third clip are among them where they bring one.
            questions: which of their questions.

        Returns:
            How many are wanted that are not there.
        """
        wanted = set[Path]()
        for conflict in conflicts:
            cells = conflict.cells(None)
            alone = [_shown(cells.clip(name), "separate", None) for name in ("audio_only", "vv")]
            shown = [None, *alone, *(cells.clip(name) for name in cells if name != "audio_only")]
            for clip, asked in product(shown, (getattr(conflict, one) for one in questions)):
                path = self._path(clip, asked, 2.0, None)
                if not path.is_file():
                    wanted.add(self._ask(path, clip, {"question": asked, "fps": 2.0, "system": None}))
        return len(wanted)


def load_text_model(
    folder: str | Path,
    *,
    family: str | None = None,
    prefix: str = "",
    inner: str = "",
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
) -> Any:
    """Load the text decoder out of a checkpoint that holds more; no code of the checkpoint is run.

    Args:
        folder: the checkpoint, as safetensors.
        family: "qwen2", "qwen3", "llama", "mistral" or another that is known; None for what config.json says.
        prefix: what its weights' names begin with there, such as "llm.".
        inner: where config.json holds the decoder's configuration, such as "llm_config"; "" where it is the whole.
        dtype: its precision; "auto" for the checkpoint's.
        device: where to.

    Returns:
        The HuggingFace model, in evaluation mode.

    Raises:
        ModelError: no such folder, pickled or quantised weights, weights that are missing (the message names them), or
            no adapter for that family.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ModelError(f"the checkpoint folder {str(place)!r} does not exist.")
    check_configurations(place)
    check_weight_files(place)
    with foreign_file(place / CONFIG, "a configuration", error=ModelError):
        config: dict[str, Any] = dict(parse_json((place / CONFIG).read_bytes(), finite=False))
        for name in inner.split(".") if inner else ():
            config = dict(config[name])
        if config.get("quantization_config"):
            raise ModelError(f"the weights in {str(place)!r} are quantised: load those that they were made from.")
        named = [family] if family else [*(config.get("architectures") or ()), str(config.get("model_type"))]
        found = family_of(*named)
        kind = found.model_class.config_class
        known = {*kind().to_dict(), "rope_theta", "rope_scaling"} - {"architectures", "model_type", "auto_map"}
        hf_config = kind.from_dict({name: value for name, value in config.items() if name in known})
    how: dict[str, Any] = {"key_mapping": {f"^{re.escape(prefix)}": ""}} if prefix else {}
    with quiet(bar=False), foreign_file(place, f"a checkpoint of {found.architecture}", error=ModelError):
        hf_model, report = found.model_class.from_pretrained(
            str(place),
            config=hf_config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **how,
        )
    beyond = [name for name in report["unexpected_keys"] if name.startswith("model.layers.")]
    sizes = [name for name, *_ in report["mismatched_keys"]]
    for what, names in (("missing", report["missing_keys"]), ("of another size", sizes), ("beyond its layers", beyond)):
        if names:
            raise ModelError(
                f"{len(names)} weights of {found.architecture} are {what} in {str(place)!r} with prefix={prefix!r} "
                f"({', '.join(sorted(names)[:3])}, ...): see how the names in its safetensors begin."
            )
    return hf_model.eval().to(device)


def _open_folder(folder: Path, *, device: Any, dtype: Any) -> BroughtModel:
    """Open a folder of saved `Given`s with the decoder that its bring.json names."""
    from transformers import AutoTokenizer

    place, told = brought(folder)
    words = folder / told.pop("tokenizer") if "tokenizer" in told else place
    hf_model = load_text_model(place, **told, dtype=dtype or "auto", device=device or "cpu")
    with foreign_file(words, "a folder with a tokenizer", error=ModelError):
        tokenizer = AutoTokenizer.from_pretrained(str(words), trust_remote_code=False, local_files_only=True)
    return wrap(hf_model, Saved(folder), tokenizer=tokenizer, name=str(folder))


OPENERS[BROUGHT] = _open_folder
