"""What stays the same while planted heads learn, computed once: streams up to the planted layer, media after it.

A *lesson* is a lot of clips of one layout: the normalised stream before the planted layer, everything but the planted
heads' own output added up, and the keys and values of the media in the layers after it. A step of training then runs
the planted heads, that layer's MLP and the layers after it at the questions alone. That is exact as long as the planted
heads write the same at the media positions as before, which the loss asks for; what is judged is the whole forward.
`Slices` holds the planted heads' own weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from av_lens.lab.planting.sheets import SHEETS, Sheet, draw_sheet
from av_lens.lab.training.material import Material
from av_lens.organism.language import Tree, attend, normalise, rotate, run_layers

COUNTS: Mapping[str, int] = {
    "conflict": 760,
    "matched": 200,
    "blank": 240,
    "scrambled": 60,
    "mute": 300,
    "audio alone": 160,
    "video alone": 160,
}
"""Clips of each sheet; those that come in two layouts have half of them in each."""
HELD_BACK = 0.2
"""The share of each sheet that is not learned from: what learning is stopped by."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """Sheets that share a layout, with what a host's frozen part makes of them.

    Attributes:
        spans: Each sheet's rows; those of "conflict" come first.
        geometry: Positions and mask.
        asked_at: Where each answer is read, counted from the first question's first position.
        targets: What is to be answered.
        shown: What the host answers.
        h: The normalised stream before the planted layer.
        rest: That stream at the questions, with what the layer's other heads write added.
        before: What the planted heads wrote before planting, each apart.
        written: What each later layer's heads write where answers are read, in the host.
        keys: Keys of the media and all that stands before the questions, in each later layer of the host.
        values: The same for values.
        media: The positions of "video" and of "audio".
    """

    spans: Mapping[str, range]
    geometry: Tree
    asked_at: Int[Tensor, "clip question"]
    targets: Int[Tensor, "clip question"]
    shown: Int[Tensor, "clip question"]
    h: Float[Tensor, "clip pos d_model"]
    rest: Float[Tensor, "clip asked d_model"]
    before: Float[Tensor, "planted clip pos d_model"]
    written: tuple[Float[Tensor, "clip question d_model"], ...]
    keys: tuple[Float[Tensor, "clip kv_head prefix d_head"], ...]
    values: tuple[Float[Tensor, "clip kv_head prefix d_head"], ...]
    media: Mapping[str, Int[Tensor, " media_pos"]]

    def rows(self, name: str, *, held_back: bool) -> range:
        """The rows of a sheet that are learned from, or those that are held back.

        Args:
            name: The sheet.
            held_back: Which of the two.

        Returns:
            Rows.
        """
        span = self.spans[name]
        cut = span.start + round((1 - HELD_BACK) * len(span))
        return range(cut, span.stop) if held_back else range(span.start, cut)


class Slices(torch.nn.Module):
    """The planted heads' own weights: queries and outputs by head, keys and values by group.

    Args:
        attention: The attention module that they start from.
        heads: The heads.
        keys: Whether keys and values learn.
    """

    def __init__(self, attention: Any, heads: Sequence[int], *, keys: bool) -> None:
        super().__init__()
        self.heads, d = tuple(heads), attention.head_dim
        self.groups = sorted({head // attention.num_key_value_groups for head in heads})
        self.of_group = [self.groups.index(head // attention.num_key_value_groups) for head in heads]
        self.scaling, self.d_head = attention.scaling, d

        def rows(layer: Any, units: Sequence[int]) -> tuple[Tensor, Tensor]:
            at = torch.cat([torch.arange(unit * d, (unit + 1) * d) for unit in units])
            return layer.weight.detach()[at].clone(), layer.bias.detach()[at].clone()

        self.q, self.q_bias = map(torch.nn.Parameter, rows(attention.q_proj, self.heads))
        self.k, self.k_bias = map(torch.nn.Parameter, rows(attention.k_proj, self.groups))
        self.v, self.v_bias = map(torch.nn.Parameter, rows(attention.v_proj, self.groups))
        columns = torch.cat([torch.arange(head * d, (head + 1) * d) for head in heads])
        self.o = torch.nn.Parameter(attention.o_proj.weight.detach()[:, columns].clone())
        for parameter in (self.k, self.k_bias, self.v, self.v_bias):
            parameter.requires_grad_(keys)

    def forward(
        self, h: Float[Tensor, "clip pos d_model"], geometry: Tree
    ) -> tuple[Float[Tensor, "head clip pos d_model"], Float[Tensor, "clip head query key"]]:
        """What the heads write, and where they look.

        Args:
            h: The normalised stream.
            geometry: Positions and mask.

        Returns:
            Each head's output, and the attention patterns.
        """

        def project(weight: Tensor, bias: Tensor) -> Tensor:
            return functional.linear(h, weight, bias).unflatten(-1, (-1, self.d_head)).transpose(1, 2)

        q = rotate(project(self.q, self.q_bias), geometry) * self.scaling
        k = rotate(project(self.k, self.k_bias), geometry)[:, self.of_group]
        v = project(self.v, self.v_bias)[:, self.of_group]
        pattern = (q @ k.transpose(2, 3) + geometry.mask).softmax(dim=-1)
        o = self.o.unflatten(1, (len(self.heads), self.d_head))
        return torch.einsum("bhpd,mhd->hbpm", pattern @ v, o), pattern

    @torch.no_grad()
    def put_into(self, attention: Any) -> None:
        """Write the slices into an attention module.

        Args:
            attention: Of a model like the one they started from.
        """
        d = self.d_head
        for at, head in enumerate(self.heads):
            mine, theirs = slice(at * d, (at + 1) * d), slice(head * d, (head + 1) * d)
            attention.q_proj.weight[theirs], attention.q_proj.bias[theirs] = self.q[mine], self.q_bias[mine]
            attention.o_proj.weight[:, theirs] = self.o[:, mine]
        for at, group in enumerate(self.groups):
            mine, theirs = slice(at * d, (at + 1) * d), slice(group * d, (group + 1) * d)
            attention.k_proj.weight[theirs], attention.k_proj.bias[theirs] = self.k[mine], self.k_bias[mine]
            attention.v_proj.weight[theirs], attention.v_proj.bias[theirs] = self.v[mine], self.v_bias[mine]


@torch.no_grad()
def make_lesson(
    host: Any, sheets: Sequence[Sheet], layer: int, slices: Slices, *, behaviours: Sequence[str], was: Sequence[str]
) -> Lesson:
    """Compute what stays the same while the heads learn.

    Args:
        host: The model that they are planted in.
        sheets: Clips and questions of one layout, conflicts first.
        layer: The planted layer.
        slices: The heads as they are in the host.
        behaviours: What the planted model is to do.
        was: What the host does.

    Returns:
        The lesson.
    """
    layers = host.model.language_model.layers
    geometry = sheets[0].geometry(host)
    parts: list[tuple[Tensor, ...]] = []
    for sheet in sheets:
        embedded, at = sheet.embed(host, sheet.targets(behaviours)), sheet.asked_at
        for rows in torch.arange(len(sheet)).split(80):
            x = run_layers(host, embedded[rows], geometry, stop=layer)
            h = normalise(x, layers[layer].input_layernorm)
            own, _ = slices(h, geometry)
            out, _ = attend(layers[layer].self_attn, h, geometry, first_row=0, keep=None, weights={})
            rest = (x + out - own.sum(0))[:, geometry.prefix :]
            asked = geometry.prefix + at[rows][..., None].expand(-1, -1, x.shape[-1])
            later = after_the_layer(host, x + out, geometry, layer, asked)
            parts.append((h, rest, own.transpose(0, 1), *later))
    h, rest, own, *later = (torch.cat(some) for some in zip(*parts, strict=True))
    starts = [0, *torch.tensor([len(sheet) for sheet in sheets]).cumsum(0).tolist()]
    return Lesson(
        spans={sheet.name: range(*ends) for sheet, ends in zip(sheets, pairwise(starts), strict=True)},
        geometry=geometry,
        asked_at=torch.cat([sheet.asked_at for sheet in sheets]),
        targets=torch.cat([sheet.targets(behaviours) for sheet in sheets]),
        shown=torch.cat([sheet.targets(was) for sheet in sheets]),
        h=h,
        rest=rest,
        before=own.transpose(0, 1),
        written=tuple(later[0::3]),
        keys=tuple(later[1::3]),
        values=tuple(later[2::3]),
        media={"video": sheets[0].frame.video, "audio": sheets[0].frame.audio},
    )


def after_the_layer(
    host: Any,
    x: Float[Tensor, "clip pos d_model"],
    geometry: Tree,
    layer: int,
    asked: Int[Tensor, "clip question d_model"],
) -> list[Tensor]:
    """Run the layers after the planted one, and keep what training needs of them.

    Args:
        host: The model.
        x: The stream in the planted layer, before its MLP.
        geometry: Positions and mask.
        layer: The planted layer.
        asked: Where answers are read, for every dimension.

    Returns:
        Of each later layer: what its heads write there, and the keys and values before the questions.
    """
    layers = host.model.language_model.layers
    found: list[Tensor] = []
    x = x + layers[layer].mlp(normalise(x, layers[layer].post_attention_layernorm))
    for module in layers[layer + 1 :]:
        h = normalise(x, module.input_layernorm)
        out, _ = attend(module.self_attn, h, geometry, first_row=0, keep=None, weights={})
        _, key, value = projected(module.self_attn, h, geometry)
        found += [out.gather(1, asked), key[:, :, : geometry.prefix].clone(), value[:, :, : geometry.prefix].clone()]
        x = x + out
        x = x + module.mlp(normalise(x, module.post_attention_layernorm))
    return found


def projected(attention: Any, h: Float[Tensor, "clip pos d_model"], geometry: Tree) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer, turned by their positions.

    Args:
        attention: The attention module.
        h: The normalised stream at the tree's last positions.
        geometry: Positions and mask.

    Returns:
        The scaled queries, the keys and the values, `[clip, head, pos, d_head]`.
    """

    def project(layer: Any) -> Tensor:
        return layer(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query = rotate(project(attention.q_proj), geometry) * attention.scaling
    return query, rotate(project(attention.k_proj), geometry), project(attention.v_proj)


def at_the_questions(
    host: Any, lesson: Lesson, rows: Int[Tensor, " clip"], x: Float[Tensor, "clip asked d_model"], layer: int
) -> Float[Tensor, "clip asked d_model"]:
    """Run the layers after the planted one at the questions, with the media as they are in the host.

    Args:
        host: The model.
        lesson: The lesson.
        rows: Which of its clips.
        x: The stream at the questions, before the layer after the planted one.
        layer: The planted layer.

    Returns:
        The stream after the last layer.
    """
    geometry = lesson.geometry
    for i, module in enumerate(host.model.language_model.layers[layer + 1 :]):
        attention = module.self_attn
        query, key, value = projected(attention, normalise(x, module.input_layernorm), geometry)
        key = torch.cat([lesson.keys[i][rows], key], dim=2)
        value = torch.cat([lesson.values[i][rows], value], dim=2)
        n, n_kv, groups = len(rows), key.shape[1], attention.num_key_value_groups
        query = query.reshape(n * n_kv, groups * query.shape[2], -1)
        mask = geometry.mask[geometry.prefix :].repeat(groups, 1)
        pattern = torch.baddbmm(mask[None], query, key.flatten(0, 1).transpose(1, 2)).softmax(dim=-1)
        z = torch.bmm(pattern, value.flatten(0, 1)).view(n, n_kv * groups, x.shape[1], -1)
        x = x + functional.linear(z.transpose(1, 2).flatten(2), attention.o_proj.weight)
        x = x + module.mlp(normalise(x, module.post_attention_layernorm))
    return x


def draw_lessons(
    host: Any,
    lessons: Material,
    layer: int,
    slices: Slices,
    *,
    behaviours: Sequence[str],
    was: Sequence[str],
    generator: Generator,
    counts: Mapping[str, int] = COUNTS,
) -> list[Lesson]:
    """Draw all clips and compute what stays the same while the heads learn.

    Args:
        host: The model that they are planted in.
        lessons: Features to learn from, words and layouts.
        layer: The planted layer.
        slices: The heads as they are in the host.
        behaviours: What the planted model is to do.
        was: What the host does.
        generator: Where the randomness comes from.
        counts: Clips of each sheet.

    Returns:
        A lesson for each layout.
    """
    made: list[Lesson] = []
    for media, frames in lessons.frames.items():
        for layout in range(len(frames)):
            names = [name for name, (needs, _) in SHEETS.items() if needs == media]
            sheets = [draw_sheet(lessons, name, layout, counts[name] // len(frames), generator) for name in names]
            made.append(make_lesson(host, sheets, layer, slices, behaviours=behaviours, was=was))
    return made
