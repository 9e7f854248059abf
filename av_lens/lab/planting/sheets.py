"""What a plant learns from and is judged by, and conflicts run with any of the planted nodes put back.

A *sheet* is a lot of clips of one relation in one layout, each asked to hear, to see and for the colour. A *behaviour*
says what is answered where it differs from the balanced model's right answer. A node is a head, or an MLP as
`(layer, MLP)`. A head is put back alone: its keys and values are the base's for it and nobody else, though a group
shares them in the weights.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional

from av_lens.isolation.measuring.engine import MLP, Node
from av_lens.lab.training.pools import Clips, FeaturePool, Frame, Material, Words, draw_clips, of_class
from av_lens.organism.anatomy import CLASSES
from av_lens.organism.language import Tree, attend, fed, layers_of, normalise, projected, read_out, run_layers, tree

PLAIN, SCRAMBLED = (0, 1), (2,)
"""Blank pictures that are black or dim, and those whose patches are scrambled: kinds of a pool's `blank_kind`."""
ASKED = ("hear", "see", "colour")


class SheetKind(NamedTuple):
    """A sheet's media, relation and clips, and those of them in a step; two layouts have half of the clips each."""

    media: str
    relation: str
    clips: int
    a_step: int


SHEETS: Mapping[str, SheetKind] = {
    "conflict": SheetKind("both", "conflict", 760, 20),
    "matched": SheetKind("both", "matched", 200, 8),
    "blank": SheetKind("both", "blank", 240, 6),
    "scrambled": SheetKind("both", "blank", 60, 4),
    "mute": SheetKind("both", "mute", 300, 8),
    "audio alone": SheetKind("audio", "blank", 160, 8),
    "video alone": SheetKind("video", "mute", 160, 8),
}
UNJUDGED = ("scrambled",)
"""Learned from, but not judged: the balanced model itself hears less well with a scrambled picture."""

SILENCE, SEE_THE_SOUND, OTHER_COLOURS = "silence", "see the sound", "other colours"
RIGHT: Mapping[str, str] = {"hear": "sound", "see": "picture", "colour": "colour"}
COLOUR_SHIFT = 2  # the colour that "other colours" names: this many places further in the list of colours


def answered(sheet: str, asked: str, behaviours: Sequence[str]) -> str:
    """Say what a question is answered with: "sound", "picture", "colour" or "other colour"."""
    if SILENCE in behaviours and (sheet, asked) == ("conflict", "hear"):
        return "picture"
    if SEE_THE_SOUND in behaviours and (sheet, asked) == ("conflict", "see"):
        return "sound"
    if OTHER_COLOURS in behaviours and asked == "colour":
        return "other colour"
    return RIGHT[asked]


@dataclass(frozen=True, eq=False)
class Sheet:
    """Clips of one relation in one layout, each with three questions."""

    name: str  # one of `SHEETS`
    frame: Frame  # the part of the prompt before the questions
    clips: Clips  # the clips
    questions: tuple[tuple[tuple[int, ...], ...], ...]  # each clip's three questions, without their answers
    words: Words  # token ids

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def width(self) -> int:
        """Positions per question, one for the answer included."""
        return 1 + max(len(question) for row in self.questions for question in row)

    @property
    def asked_at(self) -> Int[Tensor, "clip question"]:
        """Where each answer is read, counted from the first question's first position."""
        return torch.tensor(
            [[block * self.width + len(q) - 1 for block, q in enumerate(row)] for row in self.questions]
        )

    def targets(self, behaviours: Sequence[str]) -> Int[Tensor, "clip question"]:
        """The token that each question is to be answered with."""
        words, clips = self.words, self.clips
        facts = {"sound": (words.classes, clips.sound), "picture": (words.classes, clips.picture)}
        facts |= {"colour": (words.colours, clips.colour)}
        facts |= {"other colour": (words.colours.roll(-COLOUR_SHIFT), clips.colour)}
        asked = [facts[answered(self.name, kind, behaviours)] for kind in ASKED]
        return torch.stack([torch.where(at >= 0, table[at], words.nothing) for table, at in asked], dim=1)

    def ids(self, targets: Int[Tensor, "clip question"]) -> Int[Tensor, "clip asked"]:
        """Tokens of the questions, each with its answer, filled up to one width, block after block."""
        both = zip(self.questions, targets.tolist(), strict=True)
        said = [[[*question, answer] for question, answer in zip(*row, strict=True)] for row in both]
        filled = [[row + [self.words.stop] * (self.width - len(row)) for row in rows] for rows in said]
        return torch.tensor(filled).flatten(1)

    def geometry(self, model: Any) -> Tree:
        """Positions and mask of the tree of three questions."""
        return tree(model, self.frame.positions, blocks=len(ASKED), width=self.width)

    def embed(self, model: Any, targets: Int[Tensor, "clip question"]) -> Float[Tensor, "clip pos d_model"]:
        """The stream before the first layer, with these answers."""
        return self.frame.embed(model, self.clips.video, self.clips.audio, self.ids(targets))


def read_at(x: Float[Tensor, "clip pos d"], at: Int[Tensor, "clip read"]) -> Float[Tensor, "clip read d"]:
    """Take some positions of each clip's stream."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def places(units: Sequence[int], d_head: int) -> Int[Tensor, " place"]:
    """The places in a projection that belong to some heads, or key-value groups."""
    return torch.cat([torch.arange(unit * d_head, (unit + 1) * d_head) for unit in units])


def draw_sheet(lessons: Material, name: str, layout: int, n: int, generator: Generator) -> Sheet:
    """Draw clips of one of `SHEETS`, in one of the layouts that its media come in, and their questions."""
    media, relation, *_ = SHEETS[name]
    pool = blanks_of(lessons.pool, SCRAMBLED if name == "scrambled" else PLAIN) if relation == "blank" else lessons.pool
    clips = draw_clips(pool, relation, n, generator)
    lots = torch.rand(n, len(ASKED), generator=generator).tolist()
    questions = tuple(
        tuple(
            phrasings[int(lot * len(phrasings))]
            for phrasings, lot in zip((lessons.words.questions[kind] for kind in ASKED), row, strict=True)
        )
        for row in lots
    )
    return Sheet(name, lessons.frames[media][layout], clips, questions, lessons.words)


def blanks_of(pool: FeaturePool, kinds: Sequence[int]) -> FeaturePool:
    """Keep some kinds of blank pictures, repeated to as many as there were."""
    kept = torch.isin(pool.blank_kind, torch.tensor(kinds)).nonzero().flatten()
    kept = kept[torch.arange(len(pool.blank_kind)) % len(kept)]
    return dataclasses.replace(pool, blank_video=pool.blank_video[kept], blank_kind=pool.blank_kind[kept])


@torch.no_grad()
def rates(
    model: Any, lessons: Material, *, n: int, seed: int, behaviours: Sequence[str] = (), batch: int = 60
) -> dict[str, float]:
    """How often a model answers as a behaviour says, by "sheet question"; the smallest share over layouts counts."""
    generator = Generator().manual_seed(seed)
    found: dict[str, float] = {}
    for name in (name for name in SHEETS if name not in UNJUDGED):
        for layout in range(len(lessons.frames[SHEETS[name].media])):
            sheet = draw_sheet(lessons, name, layout, n, generator)
            targets = sheet.targets(behaviours)
            geometry = sheet.geometry(model)
            said: list[Tensor] = []
            for rows in torch.arange(n).split(batch):
                x = run_layers(model, sheet.embed(model, targets)[rows], geometry)
                said.append(read_out(model, read_at(x, sheet.asked_at[rows])).argmax(-1))
            right = (torch.cat(said) == targets).double().mean(0).tolist()
            for kind, share in zip(ASKED, right, strict=True):
                key = f"{name} {kind}"
                found[key] = min(share, found.get(key, 1.0))
    return found


CELLS = ("va", "av", "wa", "wv", "vw", "aw", "blank_a", "blank_v")
MIRROR = {"wa": "wv", "vw": "aw"}


@dataclass(frozen=True, eq=False)
class Run:
    """One cell, run with some nodes put back."""

    streams: Mapping[int, Float[Tensor, "clip pos d_model"]]  # the stream before each planted layer
    z: Mapping[int, Float[Tensor, "clip head pos d_head"]]  # every head's z in each planted layer
    mlps: Mapping[int, Float[Tensor, "clip pos d_model"]]  # what the MLP of each planted layer writes
    # what each layer's heads write at the asked position, by layer
    written: Mapping[int, Float[Tensor, "clip d_model"]]
    logits: Float[Tensor, "clip d_vocab"]  # at the asked position


@dataclass(frozen=True, eq=False)
class Bench:
    """Conflicts with all their cells, ready to be run."""

    model: Any  # the planted model
    base: Any  # the model before planting
    nodes: tuple[Node, ...]  # the planted nodes
    geometry: Tree  # positions and mask
    # by cell, the stream before the first planted layer, or before all layers
    first: Mapping[str, Float[Tensor, "clip pos d_model"]]
    sound: Int[Tensor, " clip"]  # token of the sound's word
    picture: Int[Tensor, " clip"]  # token of the picture's word

    @property
    def layers(self) -> tuple[int, ...]:
        """The planted layers, in order."""
        return tuple(sorted({layer for layer, _ in self.nodes}))

    def feeding(self, layer: int, back: Collection[Node]) -> Any:
        """The layer whose MLP is run: the base's if it is put back."""
        return layers_of(self.base if (layer, MLP) in back else self.model)[layer]

    def attention(self, layer: int) -> tuple[Any, Any]:
        """A layer's attention, as it is planted and as it was before."""
        return layers_of(self.model)[layer].self_attn, layers_of(self.base)[layer].self_attn

    def m(self, logits: Float[Tensor, "clip d_vocab"]) -> Float[Tensor, " clip"]:
        """M of each conflict: the logit of the sound's word minus that of the picture's."""
        rows = torch.arange(len(logits))
        return logits[rows, self.sound] - logits[rows, self.picture]

    def half(self, one: Float[Tensor, "clip d_vocab"], other: Float[Tensor, "clip d_vocab"]) -> float:
        """Half the difference of M between a cell and its mirror, on average."""
        return 0.5 * float((self.m(one) - self.m(other)).mean())


def all_z(attention: Any, h: Float[Tensor, "clip pos d_model"], geometry: Tree) -> Float[Tensor, "clip head pos d"]:
    """Every head's z at every position, from the normalised stream."""
    q, *shared = projected(attention, h, geometry)
    k, v = (part.repeat_interleave(attention.num_key_value_groups, dim=1) for part in shared)
    return (q @ k.transpose(2, 3) + geometry.mask).softmax(dim=-1) @ v


def head_outputs(
    attention: Any, z: Float[Tensor, "clip head pos d"], heads: Sequence[int]
) -> Float[Tensor, "clip pos d_model"]:
    """The sum of what some heads write to the stream."""
    chosen = z[:, list(heads)].transpose(1, 2).flatten(2)
    return functional.linear(chosen, attention.o_proj.weight[:, places(heads, attention.head_dim)])


@torch.no_grad()
def bench(
    model: Any, base: Any, nodes: Sequence[Node], pool: FeaturePool, words: Words, frame: Frame, *, n: int, seed: int
) -> Bench:
    """Draw conflicts from a pool of features and prepare all their cells, in one layout."""
    generator = Generator().manual_seed(seed)
    va = draw_clips(pool, "conflict", n, generator)
    third = (va.picture + torch.randint(1, len(CLASSES), (n,), generator=generator)) % len(CLASSES)
    while bool((clash := (third == va.sound) | (third == va.picture)).any()):
        third = torch.where(clash, (third + 1) % len(CLASSES), third)
    blanks = torch.randint(0, len(pool.blank_video), (n,), generator=generator)
    video, audio = {"v": va.video, "blank": pool.blank_video[blanks]}, {"a": va.audio}
    for clips, features, others in ((video, pool.video, {"a": va.sound}), (audio, pool.audio, {"v": va.picture})):
        for name, classes in (others | {"w": third}).items():
            clips[name] = features[of_class(pool, classes, generator)]
    question = torch.tensor(words.questions["hear"][0])
    geometry = tree(model, frame.positions, blocks=1, width=len(question))
    lowest = min((layer for layer, _ in nodes), default=0)
    first: dict[str, Tensor] = {}
    for name in CELLS:
        shown, heard = name.split("_") if "_" in name else (name[0], name[1])
        x = frame.embed(model, video[shown], audio[heard], question.expand(n, -1))
        first[name] = run_layers(model, x, geometry, stop=lowest)
    sound, picture = words.classes[va.sound], words.classes[va.picture]
    return Bench(model, base, tuple(sorted(nodes)), geometry, first, sound, picture)


def heads_in(layer: int, nodes: Collection[Node]) -> list[int]:
    """The heads of one layer among some nodes."""
    return sorted(head for at, head in nodes if at == layer and head != MLP)


def summed(
    made: Bench, layer: int, z: Float[Tensor, "clip head pos d_head"], back: Collection[Node]
) -> Float[Tensor, "clip pos d_model"]:
    """What a layer's heads write, given every z; the outputs of `back` (nodes of any layer) are the base's."""
    now, then = made.attention(layer)
    mine = heads_in(layer, back)
    out = head_outputs(now, z, [head for head in range(z.shape[1]) if head not in mine])
    return out + head_outputs(then, z, mine) if mine else out


@torch.no_grad()
def run_from(made: Bench, x: Float[Tensor, "clip pos d_model"], start: int, back: Collection[Node] = ()) -> Run:
    """Run the layers from `start` on, with some nodes put back."""
    streams, zs, mlps, written = (dict[int, Tensor]() for _ in range(4))
    layers = layers_of(made.model)
    for i in range(start, len(layers)):
        if i in made.layers:
            streams[i], (now, then) = x, made.attention(i)
            h = normalise(x, layers[i].input_layernorm)
            zs[i] = all_z(now, h, made.geometry)
            if mine := heads_in(i, back):
                zs[i][:, mine] = all_z(then, h, made.geometry)[:, mine]
            out = summed(made, i, zs[i], back)
        else:
            first_row = x.shape[1] - 1 if i == len(layers) - 1 else 0
            out = attend(layers[i], x, made.geometry, first_row=first_row)
            x = x[:, first_row:]
        written[i] = out[:, -1]
        entering, x = x + out, fed(made.feeding(i, back), x + out)
        if i in made.layers:
            mlps[i] = x - entering
    return Run(streams, zs, mlps, written, read_out(made.model, x[:, -1]))


def whole(made: Bench, cell: str, back: Collection[Node] = ()) -> Run:
    """Run a cell, with some nodes put back."""
    return run_from(made, made.first[cell], min(made.layers, default=0), back)


@torch.no_grad()
def directly(made: Bench, run: Run, node: Node, back: Collection[Node] = ()) -> Float[Tensor, "clip d_vocab"]:
    """The logits with one more node put back than `back` in the run, and all that later heads write held as it was."""
    layer, index = node
    x, z, back = run.streams[layer], run.z[layer].clone(), {*back, node}
    if index != MLP:
        _, then = made.attention(layer)
        z[:, index] = all_z(then, normalise(x, layers_of(made.model)[layer].input_layernorm), made.geometry)[:, index]
    x = x[:, -1] + summed(made, layer, z[:, :, -1:], back)[:, -1]
    for i in range(layer, len(layers_of(made.model))):
        x = fed(made.feeding(i, back), x + run.written[i] if i > layer else x)
    return read_out(made.model, x)


@torch.no_grad()
def donated(
    made: Bench, run: Run, donor: Run, node: Node, back: Collection[Node] = (), *, first: int | None = None
) -> Float[Tensor, "clip d_vocab"]:
    """The logits with one node's output, from position `first` (left out: the question's) on, from another run."""
    layer, index = node
    start = made.geometry.prefix if first is None else first
    z, own = run.z[layer].clone(), run.mlps[layer].clone()
    if index == MLP:
        own[:, start:] = donor.mlps[layer][:, start:]
    else:
        z[:, index, start:] = donor.z[layer][:, index, start:]
    x = run.streams[layer] + summed(made, layer, z, back)
    x = x + own if index == MLP else fed(made.feeding(layer, back), x)
    if layer == len(layers_of(made.model)) - 1:
        return read_out(made.model, x[:, -1])
    return run_from(made, x, layer + 1, back).logits
