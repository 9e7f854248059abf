"""A micro audio-visual model whose every number can be worked out by hand.

It is a real Qwen2.5-Omni thinker (towers, rotary positions, grouped keys and values, gated MLPs) wrapped by
`av_lens.load`; only its weights are set by hand, to integers. What makes that possible:

* One number of the stream, the *ballast*, is 2^20 at every position. Beside it nothing else matters to a norm: every
  scale is exactly 2^20 / sqrt(16) = 2^18, the norms' weights are 2^18, and so **every norm is the identity** (frozen or
  recomputed, edited or not). The normed ballast is 1: the constant that a bias-free MLP needs.
* Rotary positions turn the pair (0, 2) of a head's 4 numbers only (theta is huge); keys and queries use 1 and 3.
* Scores are multiples of 512, so every softmax is **hard**: a head reads the mean over the positions with the largest
  score, to the last digit. Gradients of a pattern are therefore 0.
* The towers give codes, not features. Sound s: +1 for a low tone, -1 for a high one, 0 for silence and for a middle
  tone. Picture p: +1 red, -1 blue, 0 green and black; m = 1 where anything is shown (0 for black).
* MLPs are clipped ramps: 256 x silu(256 y) is relu(y) for integers y.

A clip is 1 s: 25 picture tokens and 25 sound tokens. The question is one letter: H (hear) or S (see). Everything below
is at the generation position; layers 0 to 2, four query heads on two key-value heads (heads 0 1 share one, 2 3 the
other), d_model 16, d_head 4.

    L0H0  gate        reads the picture             GATE  += m
    L0H1  writer 1    reads the picture             SEEN  += p
    L0H2  relay       reads the sound               HEARD += s
    L0H3  asker       reads the question            ASKED += 1 if H
    L1H0  carrier     reads HEARD at the question   OUT   += 2 s   if H and GATE = 0, else it reads the sink: 0
    L1H1  echo        shares the carrier's K and V  OUT   += s     if H, else the sink: 0
    L1H2  writer 2    reads the picture             SEEN  += p
    L1 MLP  OR        either writer suffices        OUT   += 3 clip(SEEN, -1, 1)
    L2H0  painter     reads the picture             OUT   += p,  AUX += p
    L2H1  mixer       reads picture and sound alike OUT   += 2 mean of p and s = p + s
    L2 MLP  booster   linear within -2 to 2         OUT   += 2 clip(AUX, -2, 2)
    L2H3  bystander   reads every token alike       REST  += the share of odd text tokens (REST starts at 1 for these)
    L1H3, L2H2        idle: they write nothing

The relay and the asker write at every position after what they read; the carrier finds the question by the key
2 (ASKED + IS_QUESTION): 4 there under H, 2 under S, 2 at the positions after it; the sink's key is 3. The gate takes
the query of all but the sink away.

The unembedding gives the token "a" +OUT, "v" -OUT, "z" REST, all others 0. M = logit(a) - logit(v) = 2 OUT:

    M = 2 [ 2 s (1 - m) + s + 3 clip(2 p, -1, 1) + p + 2 p + p + s ]  =  4 s (1 - m) + 4 s + 14 p       asked H
    M = 2 [                   3 clip(2 p, -1, 1) + p + 2 p + p + s ]  =  2 s + 14 p                     asked S

    cell         p   s   m    M asked H      cell         p   s   m    M asked H
    va          -1  +1   1   4 - 14 = -10    blank_a      0  +1   0    4 + 4 =   8
    vv          -1  -1   1  -4 - 14 = -18    blank_v      0  -1   0            - 8
    aa          +1  +1   1              18    blank_muted  0   0   0             0
    av          +1  -1   1              10    v_muted     -1   0   1           -14
    wa           0  +1   1               4    a_muted     +1   0   1            14
    vw          -1   0   1             -14    wv           0  -1   1            -4

so C = (M(va) - M(av)) / 2 = -10, G = (M(blank_a) - M(blank_v)) / 2 = 8, gap 18.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from tiny import letter, tiny_config, tiny_processor, token_ids

import av_lens as avl

BALLAST, SOUND, PICTURE, THERE, IS_SOUND, IS_PICTURE, IS_QUESTION, HEAR, SINK = range(9)
HEARD, ASKED, GATE, SEEN, AUX, OUT, REST = range(9, 16)
D_MODEL, D_HEAD, N_HEADS, N_KV_HEADS, N_LAYERS = 16, 4, 4, 2, 3
HUGE, UNIT, STEEP = 2.0**20, 1024.0, 256.0  # the ballast, a query, the ramps' slope
SIDE = 140  # pixels: 5 x 5 tokens a picture, and 25 tokens a second of sound
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "black": (0, 0, 0)}
TONES = {"low": 400.0, "middle": 1600.0, "high": 4000.0, "silence": 0.0}  # Hz
PICTURE_CODE = {"red": 1, "blue": -1, "green": 0, "black": 0}
SOUND_CODE = {"low": 1, "high": -1, "middle": 0, "silence": 0}
GATE_HEAD, WRITERS, RELAY, ASKER = (0, 0), ((0, 1), (1, 2)), (0, 2), (0, 3)
CARRIER, ECHO, PAINTER, MIXER, BYSTANDER, IDLE = (1, 0), (1, 1), (2, 0), (2, 1), (2, 3), ((1, 3), (2, 2))


def margin(colour: str, tone: str, question: str = "H") -> int:
    """M of the unedited model, by the table above."""
    p, s, shown = PICTURE_CODE[colour], SOUND_CODE[tone], colour != "black"
    heard = 2 * s * (not shown) + s if question == "H" else 0
    return 2 * (heard + 3 * max(-1, min(1, 2 * p)) + p + 2 * p + p + s)


@cache
def micro_model() -> Any:
    """The model, built once; do not write to its weights."""
    return avl.load("micro", hf_model=micro_hf_model(), processor=micro_processor())


def micro_clip(colour: str, tone: str) -> Any:
    """One second of one colour and one tone."""
    frames = np.broadcast_to(np.array(COLOURS[colour], dtype=np.uint8), (2, SIDE, SIDE, 3))
    time = np.arange(16000) / 16000
    waveform = 0.5 * np.cos(2 * np.pi * TONES[tone] * time) if TONES[tone] else np.zeros(16000)
    return avl.Clip.from_arrays(
        frames=np.array(frames), times=np.array([0.0, 0.5]), waveform=waveform.astype(np.float32), rate=16000
    )


@cache
def micro_input(colour: str = "blue", tone: str = "low", question: str = "H", sound: str = "in_video") -> Any:
    """The encoded clip; blue with the low tone is the conflict `va`."""
    return micro_model().encode(micro_clip(colour, tone), question, sound=sound)


def micro_conflict(question: str = "H") -> Any:
    """Sound a: low, with red; picture v: blue, with the high tone; third w: green, with the middle tone."""
    return avl.Conflict(
        sound=micro_clip("red", "low"),
        picture=micro_clip("blue", "high"),
        third=micro_clip("green", "middle"),
        question=question,
        answers=(letter("a"), letter("v")),
        see="S",
        control="S",
        id="micro",
    )


def micro_processor() -> Any:
    """The tiny processor with pictures of 5 x 5 tokens, colours from -1 to 1, and a template without a system turn."""
    processor = tiny_processor()
    size = {"shortest_edge": 56 * 56, "longest_edge": SIDE * SIDE}
    for part in (processor.image_processor, processor.video_processor):
        part.size, part.image_mean, part.image_std = dict(size), [0.5] * 3, [0.5] * 3
    processor.videos_kwargs = {"size": dict(size)}
    start = processor.chat_template.index("{% if loop.first")
    stop = processor.chat_template.index("{% endif %}", start) + len("{% endif %}")
    processor.chat_template = processor.chat_template[:start] + processor.chat_template[stop:]
    return processor


@torch.no_grad()
def micro_hf_model() -> Any:
    """The HuggingFace model with its weights set."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    config = tiny_config(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_heads=N_HEADS,
        n_kv_heads=N_KV_HEADS,
        intermediate_size=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e38, "mrope_section": [0, 1, 1]},
    )
    with torch.random.fork_rng():
        model = Qwen2_5OmniThinkerForConditionalGeneration(copy.deepcopy(config)).float().eval()
    for parameter in model.parameters():
        parameter.zero_()
    _set_sound(model.model.audio_tower)
    _set_picture(model.model.visual)
    _set_text(model)
    for layer, setter in zip(
        model.model.language_model.layers, (_set_layer_0, _set_layer_1, _set_layer_2), strict=True
    ):
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            _set_norm(norm)
        setter(layer)
    _set_norm(model.model.language_model.norm)
    return model


def _set_norm(norm: Any) -> None:
    norm.weight.fill_(HUGE / D_MODEL**0.5)
    norm.weight[BALLAST] = D_MODEL**-0.5  # the normed ballast is 1


def _set_text(model: Any) -> None:
    ids, embed = token_ids(), model.model.language_model.embed_tokens.weight
    embed[:, BALLAST] = HUGE
    embed[[ids["H"], ids["S"]], IS_QUESTION] = 1.0
    embed[ids["H"], HEAR] = 1.0
    embed[1::2, REST] = 1.0
    embed[ids["<|vision_bos|>"], SINK] = 1.0
    model.lm_head.weight[ids["a"], OUT] = 1.0
    model.lm_head.weight[ids["v"], OUT] = -1.0
    model.lm_head.weight[ids["z"], REST] = 1.0


def _set_sound(tower: Any) -> None:
    """Channel 0 is on where the low tone's mel bin is louder, channel 1 where the high tone's is; norm; their sign."""
    filters = torch.as_tensor(tiny_processor().feature_extractor.mel_filters)  # [frequency, bin], 40 Hz each
    low, high = (int(filters[round(TONES[tone] / 40)].argmax()) for tone in ("low", "high"))
    tower.positional_embedding.positional_embedding.zero_()
    for channel, sign in ((0, 1.0), (1, -1.0)):
        tower.conv1.weight[channel, low, 1], tower.conv1.weight[channel, high, 1] = 64 * sign, -64 * sign
        tower.conv1.bias[channel] = -64 * 0.25  # differences below a quarter (2.5 dB) count as none
        tower.conv2.weight[channel, channel, 1] = 1.0
    width = tower.ln_post.weight.shape[0]
    tower.ln_post.weight.fill_(1.0)
    # One channel on, normed over the width d: it becomes sqrt(d - 1), all others -1 / sqrt(d - 1).
    tower.proj.weight[SOUND, 0], tower.proj.weight[SOUND, 1] = (sign * (width - 1) ** 0.5 / width for sign in (1, -1))
    tower.proj.bias[IS_SOUND], tower.proj.bias[BALLAST] = 1.0, HUGE


def _set_picture(tower: Any) -> None:
    """Numbers 0 and 1 of a patch are R - B and 2 G - R - B, summed over its 392 pixels; black gives exactly 0."""
    for i, weights in enumerate(((1.0, 0.0, -1.0), (-1.0, 2.0, -1.0))):
        for channel, weight in enumerate(weights):
            tower.patch_embed.proj.weight[i, channel] = weight * 2.0**-6
    tower.merger.ln_q.weight.fill_(1.0)
    # Normed over 32: red (4, -4), blue (-4, -4), green (0, sqrt 32), black (0, 0). Ramps that saturate to 1 follow.
    first, second = tower.merger.mlp[0], tower.merger.mlp[2]
    for unit, (place, weight) in enumerate(((0, 64 / 4), (0, -64 / 4), (1, 64 / 32**0.5))):
        first.weight[unit, place] = weight
    second.weight[PICTURE, 0], second.weight[PICTURE, 1] = 1 / 64, -1 / 64
    second.weight[THERE, :3] = 1 / 64
    second.bias[IS_PICTURE], second.bias[BALLAST] = 1.0, HUGE


def _set_heads(layer: Any, queries: dict[int, dict[int, float]], keys: Any, values: Any, writes: Any) -> None:
    """Set one layer's attention.

    `queries[head][place]`: a constant; `keys[kv_head][place]` and `values[kv_head][place]`: weights by stream number;
    `writes[head]`: `{stream number: {place of the value: weight}}`.
    """
    attention = layer.self_attn
    for head, constants in queries.items():
        for place, constant in constants.items():
            attention.q_proj.bias[head * D_HEAD + place] = constant
    for linear, given in ((attention.k_proj, keys), (attention.v_proj, values)):
        for kv_head, places in given.items():
            for place, weights in places.items():
                for number, weight in weights.items():
                    linear.weight[kv_head * D_HEAD + place, number] = weight
    for head, given in writes.items():
        for number, weights in given.items():
            for place, weight in weights.items():
                attention.o_proj.weight[number, head * D_HEAD + place] = weight


def _set_clip(layer: Any, source: int, reach: float, height: float) -> None:
    """OUT += height * clip(source, -reach, reach) = height * (relu(x + reach) - relu(x - reach) - reach)."""
    mlp = layer.mlp
    for unit, shift in ((0, reach), (1, -reach), (2, reach)):
        mlp.gate_proj.weight[unit, source] = STEEP if unit < 2 else 0.0
        mlp.gate_proj.weight[unit, BALLAST] = STEEP * shift
        mlp.up_proj.weight[unit, BALLAST] = 1.0
    for unit, sign in ((0, 1.0), (1, -1.0), (2, -1.0)):
        mlp.down_proj.weight[OUT, unit] = sign * height / STEEP


def _set_layer_0(layer: Any) -> None:
    _set_heads(
        layer,
        queries={0: {1: UNIT}, 1: {1: UNIT}, 2: {1: UNIT}, 3: {3: UNIT}},
        keys={0: {1: {IS_PICTURE: 1.0}}, 1: {1: {IS_SOUND: 1.0}, 3: {IS_QUESTION: 1.0}}},
        values={0: {0: {PICTURE: 1.0}, 1: {THERE: 1.0}}, 1: {0: {SOUND: 1.0}, 1: {HEAR: 1.0}}},
        writes={0: {GATE: {1: 1.0}}, 1: {SEEN: {0: 1.0}}, 2: {HEARD: {0: 1.0}}, 3: {ASKED: {1: 1.0}}},
    )


def _set_layer_1(layer: Any) -> None:
    _set_heads(
        layer,
        queries={0: {1: UNIT, 3: UNIT}, 1: {1: UNIT, 3: UNIT}, 2: {1: UNIT}},
        keys={0: {1: {ASKED: 2.0, IS_QUESTION: 2.0}, 3: {SINK: 3.0}}, 1: {1: {IS_PICTURE: 1.0}}},
        values={0: {0: {HEARD: 1.0}}, 1: {0: {PICTURE: 1.0}}},
        writes={0: {OUT: {0: 2.0}}, 1: {OUT: {0: 1.0}}, 2: {SEEN: {0: 1.0}}},
    )
    layer.self_attn.q_proj.weight[1, GATE] = -UNIT  # head 0, place 1: the gate shuts the carrier's query
    _set_clip(layer, SEEN, reach=1.0, height=3.0)


def _set_layer_2(layer: Any) -> None:
    _set_heads(
        layer,
        queries={0: {1: UNIT}, 1: {1: UNIT, 3: UNIT}},
        keys={0: {1: {IS_PICTURE: 1.0}, 3: {IS_SOUND: 1.0}}},
        values={0: {0: {PICTURE: 1.0}, 1: {SOUND: 1.0}}, 1: {0: {REST: 1.0}}},
        writes={0: {OUT: {0: 1.0}, AUX: {0: 1.0}}, 1: {OUT: {0: 2.0, 1: 2.0}}, 3: {REST: {0: 1.0}}},
    )
    _set_clip(layer, AUX, reach=2.0, height=2.0)
