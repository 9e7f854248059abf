"""A model whose heads are known by hand, behind the border of any model: it runs under hooks. Linear, three layers.

Asked what it hears, with K classes and a one-hot vector per class:

* L0H0 carries the sound: 4 x onehot(sound).
* L0H1 is a gate: its signal is 1 where there is a picture; it writes nothing itself.
* L1H0 carries the sound too, 3 x onehot(sound), but only where the gate's signal is 0.
* L2H0 is a picture writer: 6 x onehot(picture).
* L2H1 is a sound opponent: -2 x onehot(sound), where there is a picture.
* L1H1 answers `see`: 8 x onehot(picture), asked anything but the sound. All other heads write noise of size .01.

So M(blank_a) = 4 + 3, G = 7; M(va) = 4 + 0 - 6 - 2, C = -4; the gap is 11. Releases by blank_muted: gate 3, writer 6,
opponent 2. Nothing saturates, so that every figure can be worked out on paper.

Plans are compiled to hooks, fire and are verified as on any model; only what lies between the hooks is made up. It has
no attention to look into and its MLPs write nothing (those of `FedModel` do): `isolated` runs all of `isolate` but the
parts that look there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from av_lens.core.budget import ModelSpec
from av_lens.families.adapter import ReplayTraits
from av_lens.families.decoder import hook_name
from av_lens.inputs import AVInputs
from av_lens.isolation import isolate
from av_lens.isolation.explaining import robustness
from av_lens.isolation.measuring.bench import Bench
from av_lens.isolation.measuring.engine import ModelEngine
from av_lens.isolation.measuring.scoring import Candidates
from av_lens.isolation.running import pipeline
from av_lens.replay.traces import Trace
from av_lens.results.record import Isolation
from av_lens.spans import SpanMap

N_LAYERS, N_HEADS = 3, 4
SPANS = SpanMap.of_roles(["video", "audio", "question", "generation"])
CELLS = {
    name: (picture, sound)
    for name, picture, sound in [
        ("va", "v", "a"), ("vv", "v", "v"), ("aa", "a", "a"), ("av", "a", "v"), ("vw", "v", "w"), ("aw", "a", "w"),
        ("wa", "w", "a"), ("wv", "w", "v"), ("v_muted", "v", None), ("a_muted", "a", None), ("blank_a", None, "a"),
        ("blank_v", None, "v"), ("blank_muted", None, None), ("audio_only", None, "a"), ("video_only", "v", None),
    ]
}  # fmt: skip
Hook = tuple[str, Callable[..., Any]]


def fake_clip(name: str, answer: int) -> Any:
    """A clip that is known by its name, and the class that is seen and heard in it."""
    return SimpleNamespace(sha256=name, window=(0, 1), answer=answer)


@dataclass(frozen=True)
class FakeConflict:
    """A conflict between the classes of two clips."""

    id: str
    sound: Any
    picture: Any
    answers: tuple[Any, Any]
    third: Any = None
    question: str = "hear"
    see: str = "see"
    control: str = "colour"
    prefix: str = ""

    @classmethod
    def of(cls, name: str, a: int, v: int, **more: Any) -> FakeConflict:
        return cls(name, fake_clip(f"{name}-sound", a), fake_clip(f"{name}-picture", v), (a, v), **more)

    def cells(self, model: Any, *, question: str | None = None, **options: Any) -> Mapping[str, AVInputs]:
        clips = {"a": self.sound, "v": self.picture} | ({} if self.third is None else {"w": self.third})
        seed = int.from_bytes(self.id.encode(), "little") % 2**31
        return {
            name: shown(*(None if one is None else clips[one].answer for one in two), question or self.question, seed)
            for name, two in CELLS.items()
            if {*two} <= {*clips, None}
        }


def shown(picture: int | None, sound: int | None, question: str, noise: int) -> AVInputs:
    """Encode an input: the classes that are seen and heard, and the seed of its noise, stand among its tensors."""
    numbers = {"picture": -1 if picture is None else picture, "sound": -1 if sound is None else sound, "noise": noise}
    tensors = {name: torch.tensor([number]) for name, number in numbers.items()}
    ids = torch.zeros(1, len(SPANS), dtype=torch.int64)
    places = torch.zeros(3, 1, len(SPANS), dtype=torch.int64)
    return AVInputs({"input_ids": ids, **tensors}, SPANS, places, (None,), (question,), "paper", {})


@dataclass(frozen=True)
class Shown:
    """What one example shows; None for nothing."""

    picture: int | None
    sound: int | None
    question: str
    noise: int

    @classmethod
    def of(cls, x: AVInputs) -> list[Shown]:
        columns = [[None if n < 0 else n for n in x[name].tolist()] for name in ("picture", "sound")]
        return [cls(*row) for row in zip(*columns, x.questions, x["noise"].tolist(), strict=True)]


class Tokenizer:
    """As many tokens as there are classes, and a few more."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"<{i}>" for i in ids)


class RootMeanSquare(torch.nn.Module):
    """An RMSNorm of one weight; with a huge epsilon it is the identity, to the last bits."""

    def __init__(self, weight: float, epsilon: float, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((width,), weight), requires_grad=False)
        self.variance_epsilon = epsilon

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return self.weight * (stream / (stream.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt())


PLAIN = ReplayTraits()


class FakeModel:
    """The module's model; `writer`, `gate` ... scale the jobs, so that a test can switch them off."""

    name, grammar, dtype, device = "paper", None, torch.float32, torch.device("cpu")
    family = SimpleNamespace(replay_traits=lambda config: PLAIN, added=None)
    norm = (2.0**50, 2.0**100)  # weight and epsilon

    def __init__(
        self, *, n_classes: int = 6, writer: float = 6.0, gate: float = 1.0, opponent: float = 2.0, noise: float = 0.01
    ) -> None:
        self.n_classes, width = n_classes, n_classes + 2
        self.spec = ModelSpec(N_LAYERS, N_HEADS, 2, width, n_classes + 1, 1, width)
        self.tokenizer = Tokenizer(width)
        self.size = {"writer": writer, "gate": gate, "opponent": opponent, "noise": noise}
        self.W_O = torch.eye(n_classes + 1, width).repeat(N_LAYERS, N_HEADS, 1, 1)
        self.W_O[:, :, -1] = 0.0
        self.W_U = torch.eye(width)
        self.hf_model, self.bridge = torch.nn.Module(), torch.nn.Module()
        self.hf_model.register_buffer("sizes", torch.tensor([n_classes, *self.size.values()]))
        self.bridge.cfg = SimpleNamespace(output_logits_soft_cap=-1.0)
        self.bridge.unembed, self.bridge.ln_final = torch.nn.Module(), torch.nn.Module()
        self.bridge.unembed.original_component = torch.nn.Linear(width, width, bias=False).requires_grad_(False)
        self.bridge.unembed.original_component.weight.copy_(self.W_U)
        self.bridge.ln_final.original_component = RootMeanSquare(*self.norm, width)
        self.ln_final = self.bridge.ln_final
        self.config = SimpleNamespace(to_dict=dict)
        self.provenance: dict[str, Any] = {}
        self.hook_dict = dict.fromkeys(
            hook_name(name, layer)
            for name in ("z", "k", "v", "attn_out", "mlp_out", "resid_post")
            for layer in range(N_LAYERS)
        )
        self.runs = 0
        self.known: dict[Shown, torch.Tensor] = {}

    def parameters(self) -> Any:
        return self.bridge.parameters()

    def encode(self, clip: None, question: str) -> AVInputs:
        return shown(None, None, question, 0)

    def trace(self, x: AVInputs) -> Trace:
        none = torch.zeros(0)
        stream = (torch.zeros(len(x), 1, 1),)  # gradients ask for its kind alone
        return Trace(self, x, stream, (), (), (none, none), None, "a model on paper has no layers that restart")

    def _shown(self, x: AVInputs) -> list[Shown]:
        return Shown.of(x)

    def _noise(self, one: Shown) -> torch.Tensor:
        words = (one.noise, len(one.question), 99 if one.picture is None else one.picture)
        rng = np.random.default_rng(words)
        return torch.from_numpy(rng.normal(0, self.size["noise"], (N_LAYERS, N_HEADS, self.n_classes + 1))).float()

    def _heads(self, one: Shown) -> torch.Tensor:
        """Every head's z where the gate's signal is 0, `[layer, head, class + 1]`; the signal is the last entry."""
        if one not in self.known:
            z = self._noise(one)
            z[:, :, -1] = 0.0
            hears, pictured = one.question == "hear", one.picture is not None
            if hears and one.sound is not None:
                z[0, 0, one.sound] += 4
                z[1, 0, one.sound] += 3
                if pictured:
                    z[0, 1, -1] = self.size["gate"]
                    z[2, 0, one.picture] += self.size["writer"]
                    z[2, 1, one.sound] -= self.size["opponent"]
            if not hears and pictured:
                z[1, 1, one.picture] += 8
            self.known[one] = z
        return self.known[one]

    def _gate(self, signals: torch.Tensor) -> torch.Tensor:
        """How far L1H0 is shut, from the heads' signals in the first layer, `[batch, head]`."""
        return signals[:, 1]

    def _encode(self, layer: int, here: torch.Tensor, z: Sequence[torch.Tensor], examples: Sequence[Shown]) -> None:
        """Let a layer's heads depend on what earlier ones hold at the picture's position."""

    def _mlp(self, layer: int, z: Sequence[torch.Tensor], examples: Sequence[Shown]) -> torch.Tensor:
        """What a layer's MLP writes, `[batch, pos, token]`, from every head's z up to its layer."""
        return torch.zeros(*z[0].shape[:2], self.spec.d_model)

    def _stream(self, z: torch.Tensor) -> torch.Tensor:
        """What leaves the last layer, `[batch, pos, token]`, from every head's z, `[layer, batch, pos, head, d]`."""
        written = z[..., : self.n_classes].sum((0, 3)) + torch.linspace(0, 1, self.n_classes)
        return torch.cat([written, torch.full((*written.shape[:2], 2), -9.0)], dim=-1)

    def run_with_hooks(self, x: AVInputs, fwd_hooks: Sequence[Hook] = (), **options: Any) -> torch.Tensor:
        self.runs += 1

        def passed(name: str, activation: torch.Tensor) -> torch.Tensor:
            for at, hook in fwd_hooks:
                made = hook(activation, None) if at == name else None
                activation = activation if made is None else made
            return activation

        examples = self._shown(x)
        own = torch.stack([self._heads(one) for one in examples], dim=1)[:, :, None].repeat(1, 1, len(SPANS), 1, 1)
        z: list[torch.Tensor] = []
        mlps: list[torch.Tensor] = []
        held = torch.zeros(())
        for layer in range(N_LAYERS):
            here = own[layer]
            self._encode(layer, here, z, examples)
            if layer == 1:
                shut = self._gate(z[0][:, -1, :, -1])
                for b, one in enumerate(examples):
                    if one.question == "hear" and one.sound is not None:
                        here[b, :, 0, one.sound] -= 3 * shut[b]
            for name in ("k", "v"):  # nothing comes of them
                passed(hook_name(name, layer), torch.zeros(*here.shape[:2], 2, here.shape[-1]))
            z.append(passed(hook_name("z", layer), here))
            written = z[-1].sum(2) @ self.W_O[0, 0]
            held = held + (passed(hook_name("attn_out", layer), written) - written)  # 0 where nothing is held
            mlps.append(passed(hook_name("mlp_out", layer), self._mlp(layer, z, examples)))
        stream = passed(hook_name("resid_post", N_LAYERS - 1), self._stream(torch.stack(z)) + sum(mlps) + held)
        return self.ln_final.original_component(passed("unembed.hook_in", stream)) @ self.W_U


class FedModel(FakeModel):
    """An MLP suppresses, and no head: L0H2 and L0H3 tell MLP 1 what is seen, and hardly write it themselves.

    Each writes .25 x onehot(picture); MLP 1 writes 14 times what the two write, and 1 x onehot(picture) besides. So
    C = 7 - 7 - 1 - .5; the MLP releases 8, each head 3.5 through the MLP and .25 by itself.
    """

    def __init__(self) -> None:
        super().__init__(writer=0.0, gate=0.0, opponent=0.0)

    def _heads(self, one: Shown) -> torch.Tensor:
        fresh = one not in self.known
        z = super()._heads(one)
        if fresh and one.question == "hear" and one.picture is not None:
            z[0, 2:, one.picture] += 0.25
        return z

    def _mlp(self, layer: int, z: Sequence[torch.Tensor], examples: Sequence[Shown]) -> torch.Tensor:
        out = super()._mlp(layer, z, examples)
        if layer == 1:
            out[..., : self.n_classes] = 14 * z[0][:, :, 2:, : self.n_classes].sum(2)
            for b, one in enumerate(examples):
                if one.question == "hear" and one.picture is not None:
                    out[b, :, one.picture] += 1
        return out


class EncodingModel(FakeModel):
    """What is seen is encoded at the picture's position, whatever is asked: all that see it read it there.

    L0H2 holds onehot(picture) there: L2H0 writes 6 times that where the sound is asked for, L1H1 8 times where
    something else is. L0H3 holds a signal there where there is a picture, which shuts L1H0. So G = 7, C = 4 - 6; at the
    site `video` L0H2 releases 6 and costs seeing 8: a picture encoder; L0H3 releases 3 and costs it nothing.
    """

    def __init__(self) -> None:
        super().__init__(writer=0.0, gate=0.0, opponent=0.0)

    def _encode(self, layer: int, here: torch.Tensor, z: Sequence[torch.Tensor], examples: Sequence[Shown]) -> None:
        classes = slice(self.n_classes)
        for b, one in enumerate(examples):
            hears = one.question == "hear"
            if layer == 0:
                here[b, :, 2:] = 0.0
                if one.picture is not None:
                    here[b, 0, 2, one.picture], here[b, 0, 3, -1] = 1.0, 1.0
            elif layer == 1 and not hears:
                here[b, :, 1, classes] = 8 * z[0][b, 0, 2, classes]
            elif layer == 1 and one.sound is not None:
                here[b, :, 0, one.sound] -= 3 * z[0][b, 0, 3, -1]
            elif layer == 2 and hears:
                here[b, :, 0, classes] += 6 * z[0][b, 0, 2, classes]


def fake_conflicts(n: int = 60, *, n_classes: int = 6, seed: int = 0) -> list[FakeConflict]:
    """Conflicts that share no clip, classes drawn in turn."""
    rng = np.random.default_rng(seed)
    pairs = [rng.permutation(n_classes)[:2].tolist() for _ in range(n)]
    return [FakeConflict.of(f"c{i:03d}", a, v) for i, (a, v) in enumerate(pairs)]


def ring(n: int = 60, n_classes: int = 10) -> list[FakeConflict]:
    """One permutation of n clips; clip i is of class i (two next to each other differ)."""
    clips = [fake_clip(f"clip{i:03d}", i % n_classes) for i in range(n)]
    both = zip(clips, [*clips[1:], clips[0]], strict=True)
    return [FakeConflict(f"c{i:03d}", a, v, (a.answer, v.answer)) for i, (a, v) in enumerate(both)]


class PaperEngine(ModelEngine):
    """The engine of a model on paper, which is small: stacks are larger."""

    def together(self, inputs: AVInputs) -> int:
        return 32


def bench_of(model: FakeModel, conflicts: Sequence[Any], **more: Any) -> Bench:
    """Conflicts on the bench of a model on paper."""
    return Bench(PaperEngine(model), list(conflicts), Candidates.of(conflicts, model.tokenizer), **more)


def isolated(model: FakeModel, conflicts: Sequence[Any], **options: Any) -> Isolation:
    """`isolate`, but for cards, cuts, routes and lens, and variants of encoding and precision."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "EXPLAINED", {})
        patched.setattr(robustness, "variants", lambda *_, **__: [])
        return isolate(model, conflicts, **{"engine": PaperEngine(model)} | options)
