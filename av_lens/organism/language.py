"""The embedded models written out: prompts, towers and fusion layers, on features that were computed once.

Text, placeholders and position ids are the processor's and the model's own, remembered here; features are put where the
processor put placeholders. A frame pair is 36 patches that attend to one another, a sound one window of 200 mel frames.
No media position can see the question that follows it, so several *questions* (blocks) are hung on media that are
computed once: the logits of one plain forward per question at a third of the cost. Not done: decoding, caching keys,
padding.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from av_lens.checks import require_choice
from av_lens.organism import anatomy
from av_lens.organism.anatomy import CLASSES

LAYOUTS: tuple[str, ...] = ("separate", "in_video", "audio", "video")
N_VIDEO, N_AUDIO = 18, 50
MEL_FRAMES = 200
GRID = (2, 6, 6)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question in one layout: ids, position ids, and where the media stand."""

    ids: Tensor  # int64 `[pos]`
    position_ids: Tensor  # int64 `[3, pos]`
    video: Tensor  # int64 positions of the video tokens, in their order
    audio: Tensor  # int64 positions of the audio tokens, in their order
    question: Tensor  # int64 positions of the question's tokens
    suffix: int  # the first position after the media and their boundaries; the rest of the prompt is text

    @property
    def asked(self) -> list[int]:
        """All tokens after the media, up to the answer."""
        return self.ids[self.suffix :].tolist()


def message(question: str, layout: str) -> list[dict[str, Any]]:
    """Write a question as the chat message of a layout."""
    require_choice("layout", layout, LAYOUTS)
    media = {"separate": ["video", "audio"], "in_video": ["video"], "audio": ["audio"], "video": ["video"]}[layout]
    content: list[dict[str, Any]] = [{"type": kind} for kind in media]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


@functools.cache
def _tools() -> tuple[Any, Any]:
    """The processor, and a thinker with one layer whose `get_rope_index` is that of every organism."""
    return anatomy.processor(), anatomy.build_model(anatomy.thinker_config(n_layers=1), seed=0)


@functools.cache
def prompt(question: str, layout: str) -> Prompt:
    """Make the prompt of one question in one layout."""
    processor, model = _tools()
    text = processor.apply_chat_template(message(question, layout), add_generation_prompt=True, tokenize=False)
    arguments: dict[str, Any] = {"text": [text], "return_tensors": "pt"}
    if layout != "audio":
        arguments["videos"] = [np.zeros((4, anatomy.FRAME_SIDE, anatomy.FRAME_SIDE, 3), np.uint8)]
        arguments["videos_kwargs"] = {"fps": 2.0, "do_sample_frames": False, "cap_pixels_per_frame": True}
    if layout != "video":
        arguments["audio"] = [np.zeros(2 * anatomy.SAMPLE_RATE, np.float32)]
    if layout == "in_video":
        arguments |= {"audio_from_video_indices": [0], "load_audio_from_video": True}
    with warnings.catch_warnings():  # the processor gives NumPy a tensor in a way that NumPy 2 deprecates
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        made = processor(**arguments)
    ids = made["input_ids"]
    with torch.no_grad():
        positions, _ = model.model.get_rope_index(
            ids,
            video_grid_thw=made.get("video_grid_thw"),
            attention_mask=torch.ones_like(ids),
            use_audio_in_video=layout == "in_video",
            audio_seqlens=None if layout == "video" else torch.tensor([MEL_FRAMES]),
            second_per_grids=None if layout == "audio" else torch.tensor([1.0]),
        )
    vocabulary = anatomy.vocabulary()
    flat = ids[0]
    media = torch.isin(flat, torch.tensor([vocabulary[token] for token in anatomy.SPECIALS.values()]))
    suffix = int(media.nonzero().max()) + 1
    turn_end = int((flat == vocabulary[anatomy.TURN_END]).nonzero()[0])
    return Prompt(
        ids=flat,
        position_ids=positions[:, 0],
        video=(flat == vocabulary[anatomy.SPECIALS["video_token"]]).nonzero()[:, 0],
        audio=(flat == vocabulary[anatomy.SPECIALS["audio_token"]]).nonzero()[:, 0],
        question=torch.arange(suffix, turn_end),
        suffix=suffix,
    )


@dataclass(frozen=True, eq=False)
class Frame:
    """The part of a prompt that comes before the question, in one layout."""

    ids: Int[Tensor, " prefix"]  # its tokens
    positions: Int[Tensor, "3 prefix"]  # the model's own position ids
    video: Int[Tensor, " video_pos"]  # where the picture's features go
    audio: Int[Tensor, " audio_pos"]  # where the sound's features go

    def embed(
        self,
        model: Any,
        video: Float[Tensor, "clip video_pos d_model"] | None,
        audio: Float[Tensor, "clip audio_pos d_model"] | None,
        questions: Int[Tensor, "clip asked"],
    ) -> Float[Tensor, "clip pos d_model"]:
        """Build the stream before the first layer, of clips with their questions; media that it lacks are not used."""
        table = model.model.language_model.embed_tokens.weight
        prefix = table[self.ids].expand(len(questions), -1, -1).clone()
        for at, features in ((self.video, video), (self.audio, audio)):
            if features is not None and len(at):
                prefix[:, at] = features
        return torch.cat([prefix, table[questions]], dim=1)

    def blocked(self, deaf_to: str, length: int) -> Bool[Tensor, "pos pos"]:
        """True where a query (first axis) may not see a key: with "video", text and audio positions the video's."""
        every = torch.arange(length)
        asking = torch.isin(every, self.audio) | (every >= len(self.ids))
        return asking[:, None] & torch.isin(every, self.video) & (deaf_to == "video")


def make_frame(layout: str) -> Frame:
    """Take the part of a layout's prompt that comes before the question."""
    made = prompt(anatomy.QUESTIONS["hear"][0], layout)
    return Frame(made.ids[: made.suffix], made.position_ids[:, : made.suffix], made.video, made.audio)


def answer_ids(text: str) -> list[int]:
    """Spell an answer as the model writes it: after a space, one token a word."""
    vocabulary = anatomy.vocabulary()
    space = anatomy.byte_symbols()[ord(" ")]
    return [vocabulary[space + word] for word in text.split(" ")]


def class_ids() -> Tensor:
    """List the answer token of every class."""
    return torch.tensor([answer_ids(name)[0] for name in anatomy.CLASSES])


PATCHES = 36  # patches of one frame pair; attention never leaves a pair
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NOTHING = len(CLASSES)
IGNORED = -100


@dataclass(frozen=True, eq=False)
class Views:
    """What the towers learn from."""

    # uint8 `[clip, time, height, width, rgb]`; four frames, or eight of which every second is taken
    frames: UInt8[Tensor, "clip time height width rgb"]
    mel: Float32[Tensor, "clip mel frame"]  # log-mel spectrograms `[clip, mel, frame]`
    picture: Int64[Tensor, " clip"]  # class of each picture; `len(CLASSES)` where there is nothing to see
    sound: Int64[Tensor, " clip"]  # class of each sound; `len(CLASSES)` where there is nothing to hear
    colour: Int64[Tensor, " clip"]  # colour of each picture; -100 where there is nothing to see

    def taken(self, at: Int64[Tensor, "taken"]) -> Views:
        """Take some of the clips."""
        return Views(*(getattr(self, field.name)[at] for field in fields(self)))


def cut(frames: UInt8[Tensor, "clip 4 3 height width"]) -> UInt8[Tensor, "patch pixel"]:
    """Cut frames into patches, in the order of the video processor."""
    n, time, _, height, width = frames.shape
    parts = frames.view(n, time // 2, 2, 3, height // 28, 2, 14, width // 28, 2, 14)
    return parts.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * 2 * 14 * 14)


def patches(frames: UInt8[Tensor, "clip 4 height width 3"]) -> Float32[Tensor, "patch pixel"]:
    """Normalize frames and cut them into patches as the video processor does."""
    pixels = cut(frames.permute(0, 1, 4, 2, 3).contiguous()).float().unflatten(1, (3, -1))
    mean, deviation = torch.tensor(MEAN)[:, None] * 255, torch.tensor(DEVIATION)[:, None] * 255
    return pixels.sub_(mean).div_(deviation).flatten(1)


def _embedded(tower: Any, pixels: UInt8[Tensor, "patch pixel"]) -> Float32[Tensor, "patch d_tower"]:
    """The patch embedding of raw pixels: the normalization goes into the filters, which is quicker."""
    filters = tower.patch_embed.proj.weight.flatten(1).unflatten(1, (3, -1))
    scaled = filters / (torch.tensor(DEVIATION)[:, None] * 255)
    offset = (scaled * torch.tensor(MEAN)[:, None] * 255).sum((1, 2))
    return functional.linear(pixels.float(), scaled.flatten(1), -offset)


def _attend(
    layer: Any,
    query: Float[Tensor, "group pos d"],
    key: Float[Tensor, "group pos d"],
    value: Float[Tensor, "group pos d"],
) -> Float[Tensor, "group pos d"]:
    """Full attention within each group, for a tower's attention module."""
    q, k, v = (part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def vision_features(
    model: Any, pixels: Float32[Tensor, "patch pixel"] | UInt8[Tensor, "patch pixel"]
) -> Float32[Tensor, "clip video_pos d_model"]:
    """Run the vision tower on clips of four 84 x 84 frames."""
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb_vision
    from transformers.vision_utils import get_vision_position_ids

    tower = model.model.visual
    grid = torch.tensor([[1, 6, 6]])
    if pixels.dtype == torch.uint8:
        hidden = _embedded(tower, pixels)
    else:  # the convolution's strides are its size: a product
        hidden = functional.linear(pixels, tower.patch_embed.proj.weight.flatten(1))
    hidden = hidden.view(-1, PATCHES, tower.config.hidden_size)
    cos, sin = tower.rotary_pos_emb(hidden[0], get_vision_position_ids(grid, tower.spatial_merge_size))
    for block in tower.blocks:
        attention, normed = block.attn, block.norm1(hidden)
        query, key = (
            part(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for part in (attention.q, attention.k)
        )
        shape = query.shape  # [pos, group, head, d_head]: one rotation for all groups
        query, key = apply_rotary_pos_emb_vision(query.flatten(1, 2), key.flatten(1, 2), cos, sin)
        query, key = (part.view(shape).transpose(0, 1).flatten(2) for part in (query, key))
        hidden = hidden + attention.proj(_attend(attention, query, key, attention.v(normed)))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return tower.merger(hidden.flatten(0, 1)).view(-1, N_VIDEO, tower.config.out_hidden_size)


def audio_hidden(model: Any, mel: Float32[Tensor, "clip mel frame"]) -> Float32[Tensor, "clip audio_pos d_tower"]:
    """Run the audio tower on sounds of two seconds, up to its projector."""
    tower = model.model.audio_tower
    hidden = functional.gelu(tower.conv1(mel))
    hidden = functional.gelu(tower.conv2(hidden)).transpose(1, 2)
    hidden = hidden + tower.positional_embedding.positional_embedding[: hidden.shape[1]]
    for layer in tower.layers:
        attention, normed = layer.self_attn, layer.self_attn_layer_norm(hidden)
        mixed = _attend(attention, attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        hidden = hidden + attention.out_proj(mixed)
        hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
    return tower.ln_post(hidden.unflatten(1, (N_AUDIO, 2)).mean(2))


@torch.no_grad()
def watch(model: Any, views: Views, *, batch: int = 120) -> tuple[Tensor, Tensor]:
    """Run both towers over clips."""
    seen = [vision_features(model, patches(frames[:, :: frames.shape[1] // 4])) for frames in views.frames.split(batch)]
    heard = [audio_hidden(model, mel) for mel in views.mel.split(batch)]
    return torch.cat(seen), torch.cat(heard)


BLOCKED = -1e9  # what is added to the score of a key that may not be seen


@dataclass(frozen=True, eq=False)
class Tree:
    """The geometry of one prefix with blocks hung on it; shared by all clips of a batch."""

    prefix: int  # how many positions come before the blocks
    blocks: int  # how many blocks there are
    width: int  # how many positions each block has (shorter questions are filled up at their end)
    cos: Float[Tensor, "pos d_head"]  # rotary cosines
    sin: Float[Tensor, "pos d_head"]  # rotary sines
    mask: Float[Tensor, "pos pos"]  # 0 where a key may be seen, `BLOCKED` where not; query first


def tree(
    model: Any,
    prefix_positions: Int[Tensor, "3 prefix"],
    *,
    blocks: int,
    width: int,
    blocked: Bool[Tensor, "pos pos"] | None = None,
) -> Tree:
    """The geometry of `blocks` questions of `width` positions after one prefix, `blocked` query-key pairs cut too."""
    n = prefix_positions.shape[1]
    first = int(prefix_positions.max()) + 1
    block = torch.arange(first, first + width).expand(3, width)
    positions = torch.cat([prefix_positions, *([block] * blocks)], dim=1)
    reference = model.model.language_model.embed_tokens.weight.new_zeros(1)
    cos, sin = model.model.language_model.rotary_emb(reference, positions[:, None])
    length = n + blocks * width
    hung = (torch.arange(length) - n).div(width, rounding_mode="floor").clamp(min=-1)  # the block; -1: the prefix
    seen = ((hung < 0) | (hung[:, None] == hung)).tril()
    if blocked is not None:
        seen &= ~blocked
    mask = torch.zeros(length, length).masked_fill(~seen, BLOCKED)
    return Tree(prefix=n, blocks=blocks, width=width, cos=cos[0], sin=sin[0], mask=mask)


def layers_of(model: Any) -> Any:
    """The fusion layers."""
    return model.model.language_model.layers


def rotate(x: Float[Tensor, "batch head pos d_head"], geometry: Tree) -> Float[Tensor, "batch head pos d_head"]:
    """Turn queries or keys by their positions; where they are fewer than the tree's, they are its last ones."""
    first = geometry.cos.shape[0] - x.shape[2]
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * geometry.cos[first:] + turned * geometry.sin[first:]


def normalise(x: Float[Tensor, "*batch d_model"], norm: Any) -> Float[Tensor, "*batch d_model"]:
    """Apply a root-mean-square norm, of which the HuggingFace module holds the weight."""
    return functional.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def projected(
    attention: Any, h: Float[Tensor, "batch pos d_model"], geometry: Tree, *, first_row: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's scaled queries (from `first_row` on), keys and values, turned: each `[batch, head, pos, d_head]`."""

    def project(layer: Any, x: Tensor) -> Tensor:
        return layer(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = rotate(project(attention.q_proj, h[:, first_row:]), geometry) * attention.scaling
    return query, rotate(project(attention.k_proj, h), geometry), project(attention.v_proj, h)


def mixed(
    query: Float[Tensor, "batch head rows d_head"],
    key: Float[Tensor, "batch kv_head pos d_head"],
    value: Float[Tensor, "batch kv_head pos d_head"],
    geometry: Tree,
) -> Float[Tensor, "batch head rows d_head"]:
    """Every head's z at the last rows."""
    n_kv, rows = key.shape[1], query.shape[2]
    groups = query.shape[1] // n_kv
    query = query.reshape(len(query) * n_kv, groups * rows, -1)
    mask = geometry.mask[-rows:].repeat(groups, 1)
    pattern = torch.baddbmm(mask[None], query, key.flatten(0, 1).transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(pattern, value.flatten(0, 1)).view(len(key), n_kv * groups, rows, -1)


def attend(
    layer: Any,
    x: Float[Tensor, "batch pos d_model"],
    geometry: Tree,
    *,
    first_row: int = 0,
    keep: Float[Tensor, "batch head asked"] | None = None,
) -> Float[Tensor, "batch rows d_model"]:
    """What a layer's attention writes from `first_row` on; `keep` multiplies each head's z at the blocks' positions."""
    attention = layer.self_attn
    h = normalise(x, layer.input_layernorm)
    z = mixed(*projected(attention, h, geometry, first_row=first_row), geometry)
    if keep is not None:
        asked = z[:, :, geometry.prefix - first_row :] * keep[..., None]
        z = torch.cat([z[:, :, : geometry.prefix - first_row], asked], dim=2)
    return functional.linear(z.transpose(1, 2).flatten(2), attention.o_proj.weight)


def fed(layer: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """The stream after a layer's feed-forward part."""
    return x + layer.mlp(normalise(x, layer.post_attention_layernorm))


def run_layers(
    model: Any,
    x: Float[Tensor, "batch pos d_model"],
    geometry: Tree,
    *,
    start: int = 0,
    stop: int | None = None,
    keep: Mapping[int, Float[Tensor, "batch head asked"]] | None = None,
    skip: Collection[int] = (),
) -> Float[Tensor, "batch rows d_model"]:
    """Run layers `start` to `stop`, not those in `skip`; the last of all gives the blocks' positions only."""
    layers = layers_of(model)
    for i in range(start, len(layers) if stop is None else stop):
        first_row = geometry.prefix if i == len(layers) - 1 else 0
        if i in skip:
            x = x[:, first_row:]
            continue
        out = attend(layers[i], x, geometry, first_row=first_row, keep=(keep or {}).get(i))
        x = fed(layers[i], x[:, first_row:] + out)
    return x


def read_out(model: Any, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """The logits of a stream that has passed all layers."""
    return model.lm_head(normalise(x, model.model.language_model.norm))
