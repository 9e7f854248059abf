"""What stays the same while planted nodes learn, computed once: streams up to the planted layer, media after it.

A step of training runs the planted heads and that layer's MLP (or the planted neurons of the MLP) and the layers after
it at the questions alone. That is exact as long as what is planted writes the same at the media positions as before,
which the loss asks for; what is judged is the whole forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from av_lens.isolation.measuring.engine import MLP
from av_lens.lab.planting.sheets import SHEETS, Sheet, draw_sheet, places, read_at
from av_lens.lab.training.engine import head_slices
from av_lens.lab.training.pools import Material
from av_lens.model.differences import Slice
from av_lens.organism.language import Tree, attend, fed, layers_of, mixed, normalise, projected, rotate, run_layers

HELD_BACK = 0.2  # the share of each sheet that is not learned from: what learning is stopped by


@dataclass(frozen=True, eq=False)
class Lesson:
    """Sheets that share a layout, with what a host's frozen part makes of them."""

    spans: Mapping[str, range]  # each sheet's rows; those of "conflict" come first
    geometry: Tree  # positions and mask
    # where each answer is read, counted from the first question's first position
    asked_at: Int[Tensor, "clip question"]
    targets: Int[Tensor, "clip question"]  # what is to be answered
    shown: Int[Tensor, "clip question"]  # what the host answers
    h: Float[Tensor, "clip pos d_model"]  # the normalised stream that the planted nodes read
    # the stream at the questions, with what the layer's other heads (or the MLP's other neurons) write added
    rest: Float[Tensor, "clip asked d_model"]
    before: Float[Tensor, "planted clip pos d_model"]  # what the planted nodes wrote before planting, each apart
    # what each later layer's heads write where answers are read, in the host
    written: tuple[Float[Tensor, "clip question d_model"], ...]
    # keys of the media and all that stands before the questions, in each later layer of the host
    keys: tuple[Float[Tensor, "clip kv_head prefix d_head"], ...]
    values: tuple[Float[Tensor, "clip kv_head prefix d_head"], ...]  # the same for values
    media: Mapping[str, Int[Tensor, " media_pos"]]  # the positions of "video" and of "audio"
    in_mlp: bool = False  # whether neurons are planted, after which nothing comes in their layer

    def joined(self, layer: Any, rows: Tensor, own: Float[Tensor, "clip asked d_model"]) -> Tensor:
        """The stream after the planted layer at some clips' questions, given what the planted nodes write there."""
        x = self.rest[rows] + own
        return x if self.in_mlp else fed(layer, x)

    def rows(self, name: str, *, held_back: bool) -> range:
        """The rows of a sheet that are learned from, or those that are held back."""
        span = self.spans[name]
        cut = span.start + round((1 - HELD_BACK) * len(span))
        return range(cut, span.stop) if held_back else range(span.start, cut)


class Slices(torch.nn.Module):
    """The planted heads' own weights: queries and outputs by head, keys and values by group."""

    def __init__(self, attention: Any, heads: Sequence[int]) -> None:
        super().__init__()
        self.heads, self.d_head, self.scaling = tuple(heads), attention.head_dim, attention.scaling
        self.groups = sorted({head // attention.num_key_value_groups for head in heads})
        self.of_group = [self.groups.index(head // attention.num_key_value_groups) for head in heads]

        def rows(layer: Any, units: Sequence[int]) -> tuple[Tensor, Tensor]:
            at = places(units, self.d_head)
            return layer.weight.detach()[at].clone(), layer.bias.detach()[at].clone()

        self.q, self.q_bias = map(torch.nn.Parameter, rows(attention.q_proj, self.heads))
        self.k, self.k_bias = map(torch.nn.Parameter, rows(attention.k_proj, self.groups))
        self.v, self.v_bias = map(torch.nn.Parameter, rows(attention.v_proj, self.groups))
        self.o = torch.nn.Parameter(attention.o_proj.weight.detach()[:, places(heads, self.d_head)].clone())

    def forward(self, h: Float[Tensor, "clip pos d_model"], geometry: Tree) -> Float[Tensor, "head clip pos d_model"]:
        """Each head's output, from the normalised stream."""

        def project(weight: Tensor, bias: Tensor) -> Tensor:
            return functional.linear(h, weight, bias).unflatten(-1, (-1, self.d_head)).transpose(1, 2)

        q = rotate(project(self.q, self.q_bias), geometry) * self.scaling
        k = rotate(project(self.k, self.k_bias), geometry)[:, self.of_group]
        v = project(self.v, self.v_bias)[:, self.of_group]
        pattern = (q @ k.transpose(2, 3) + geometry.mask).softmax(dim=-1)
        o = self.o.unflatten(1, (len(self.heads), self.d_head))
        return torch.einsum("bhpd,mhd->hbpm", pattern @ v, o)

    def passed(self, layer: Any, x: Float[Tensor, "clip pos d_model"], geometry: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """What the heads read, the stream with all that the layer's heads write, and the stream after the layer."""
        joined = x + attend(layer, x, geometry)
        return normalise(x, layer.input_layernorm), joined, fed(layer, joined)

    def parts(self, model: Any, layer: int) -> list[Slice]:
        """The slices of a model's weights that are these."""
        return head_slices(model, [(layer, head) for head in self.heads])

    @torch.no_grad()
    def put_into(self, layer: Any) -> None:
        """Write the slices into the layer of a model like the one they started from."""
        attention = layer.self_attn
        attention.o_proj.weight[:, places(self.heads, self.d_head)] = self.o
        for name, units in (("q", self.heads), ("k", self.groups), ("v", self.groups)):
            part, at = getattr(attention, f"{name}_proj"), places(units, self.d_head)
            part.weight[at], part.bias[at] = getattr(self, name), getattr(self, f"{name}_bias")


class Neurons(torch.nn.Module):
    """Planted neurons of one MLP, those that wrote least: their rows of its gate and input, columns of its output."""

    heads = (MLP,)

    def __init__(self, mlp: Any, n: int) -> None:
        super().__init__()
        weights = self.weights_of(mlp)
        sizes = torch.stack([weight.detach().norm(dim=1) for weight in weights]).prod(0)
        self.at, self.act = sizes.argsort()[:n].sort().values.tolist(), mlp.act_fn
        self.gate, self.up, self.down = (torch.nn.Parameter(weight.detach()[self.at].clone()) for weight in weights)

    @staticmethod
    def weights_of(mlp: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of an MLP, a row for each neuron."""
        return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T

    def forward(self, h: Float[Tensor, "clip pos d_model"], geometry: Tree) -> Float[Tensor, "1 clip pos d_model"]:
        """What the neurons write together, from the normalised stream."""
        return ((self.act(h @ self.gate.T) * (h @ self.up.T)) @ self.down)[None]

    def passed(self, layer: Any, x: Float[Tensor, "clip pos d_model"], geometry: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """What the neurons read, and twice the stream after the layer, which holds all that they write."""
        joined = x + attend(layer, x, geometry)
        after = fed(layer, joined)
        return normalise(joined, layer.post_attention_layernorm), after, after

    def parts(self, model: Any, layer: int) -> list[Slice]:
        """The slices of a model's weights that are these."""
        mlp = f"model.language_model.layers.{layer}.mlp"
        names = (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
        return [Slice(f"{mlp}.{name}.weight", axis, at, at + 1) for name, axis in names for at in self.at]

    @torch.no_grad()
    def put_into(self, layer: Any) -> None:
        """Write the neurons into the layer of a model like the one they started from."""
        for weight, mine in zip(self.weights_of(layer.mlp), (self.gate, self.up, self.down), strict=True):
            weight[self.at] = mine


@torch.no_grad()
def make_lesson(
    host: Any,
    sheets: Sequence[Sheet],
    layer: int,
    slices: Slices | Neurons,
    *,
    behaviours: Sequence[str],
    was: Sequence[str],
) -> Lesson:
    """Compute what stays the same while `slices` learn `behaviours` in a host that did `was`; conflicts come first."""
    planted, *after = layers_of(host)[layer:]
    geometry = sheets[0].geometry(host)
    parts: list[tuple[Tensor, ...]] = []
    for sheet in sheets:
        embedded, at = sheet.embed(host, sheet.targets(behaviours)), sheet.asked_at
        for rows in torch.arange(len(sheet)).split(80):
            x = run_layers(host, embedded[rows], geometry, stop=layer)
            h, joined, x = slices.passed(planted, x, geometry)
            own = slices(h, geometry)
            rest = (joined - own.sum(0))[:, geometry.prefix :]
            later: list[Tensor] = []
            for module in after:
                out = attend(module, x, geometry)
                _, *seen = projected(module.self_attn, normalise(x, module.input_layernorm), geometry)
                later += [
                    read_at(out, geometry.prefix + at[rows]),
                    *(part[:, :, : geometry.prefix].clone() for part in seen),
                ]
                x = fed(module, x + out)
            parts.append((h, rest, own.transpose(0, 1), *later))
    h, rest, own, *later = (torch.cat(some) for some in zip(*parts, strict=True))
    starts = accumulate(map(len, sheets), initial=0)
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
        in_mlp=isinstance(slices, Neurons),
    )


def at_the_questions(
    host: Any, lesson: Lesson, rows: Int[Tensor, " clip"], x: Float[Tensor, "clip asked d_model"], layer: int
) -> Float[Tensor, "clip asked d_model"]:
    """Run the layers after the planted one at the questions of some clips, with the media as they are in the host."""
    for i, module in enumerate(layers_of(host)[layer + 1 :]):
        query, key, value = projected(module.self_attn, normalise(x, module.input_layernorm), lesson.geometry)
        key = torch.cat([lesson.keys[i][rows], key], dim=2)
        value = torch.cat([lesson.values[i][rows], value], dim=2)
        z = mixed(query, key, value, lesson.geometry)
        x = fed(module, x + functional.linear(z.transpose(1, 2).flatten(2), module.self_attn.o_proj.weight))
    return x


def draw_lessons(
    host: Any,
    lessons: Material,
    layer: int,
    slices: Slices | Neurons,
    *,
    behaviours: Sequence[str],
    was: Sequence[str],
    generator: Generator,
    counts: Mapping[str, int] | None = None,
) -> list[Lesson]:
    """Draw all clips, `counts` of each sheet, and compute for each layout what stays the same while the heads learn."""
    made: list[Lesson] = []
    for media, frames in lessons.frames.items():
        names = [name for name, kind in SHEETS.items() if kind.media == media]
        wanted = {name: (counts or {}).get(name, SHEETS[name].clips) // len(frames) for name in names}
        for layout in range(len(frames)):
            sheets = [draw_sheet(lessons, name, layout, wanted[name], generator) for name in names]
            made.append(make_lesson(host, sheets, layer, slices, behaviours=behaviours, was=was))
    return made
