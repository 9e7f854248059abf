"""A model whose heads are known by hand, behind the isolation's `Engine`: linear, three layers, every job written down.

Asked what it hears, with K classes and a one-hot vector per class:

* L0H0 carries the sound: 4 x onehot(sound).
* L0H1 is a gate: its signal is 1 where there is a picture; it writes nothing itself.
* L1H0 carries the sound too, 3 x onehot(sound), but only where the gate's signal is 0.
* L2H0 is a picture writer: 6 x onehot(picture).
* L2H1 is a sound opponent: -2 x onehot(sound), where there is a picture.
* L1H1 answers `see`: 8 x onehot(picture), asked anything but the sound. All other heads write noise of size .01.

So M(blank_a) = 4 + 3, G = 7; M(va) = 4 + 0 - 6 - 2, C = -4; the gap is 11. Releases by blank_muted: gate 3, writer 6,
opponent 2. Nothing saturates, so that every figure can be worked out on paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from av_lens.isolation.measuring.edited_runs import UNDER, joined
from av_lens.isolation.measuring.seam import Edited, Recording, Swap
from av_lens.spans import SpanMap

N_LAYERS, N_HEADS, SITE = 3, 4, 2
SPANS = SpanMap.of_roles(["video", "audio", "question", "generation"])
CELLS = {
    name: (picture, sound)
    for name, picture, sound in [
        ("va", "v", "a"), ("vv", "v", "v"), ("aa", "a", "a"), ("av", "a", "v"), ("vw", "v", "w"), ("aw", "a", "w"),
        ("wa", "w", "a"), ("wv", "w", "v"), ("v_muted", "v", None), ("a_muted", "a", None), ("blank_a", None, "a"),
        ("blank_v", None, "v"), ("blank_muted", None, None), ("audio_only", None, "a"), ("audio_only_v", None, "v"),
    ]
}  # fmt: skip


@dataclass(frozen=True)
class FakeConflict:
    """A conflict between class numbers; clips are named by their hashes."""

    id: str
    a: int
    v: int
    third: Any = None
    question: str = "hear"
    see: str = "see"
    control: str = "colour"
    prefix: str = ""

    @property
    def answers(self) -> tuple[int, int]:
        return self.a, self.v

    @property
    def sound(self) -> Any:
        return SimpleNamespace(sha256=f"{self.id}-sound", window=(0, 1), answer=self.a)

    @property
    def picture(self) -> Any:
        return SimpleNamespace(sha256=f"{self.id}-picture", window=(0, 1), answer=self.v)


@dataclass(frozen=True)
class Shown:
    """One input: the class that is seen and heard (None for nothing), and what is asked."""

    picture: int | None
    sound: int | None
    question: str
    noise: int
    batch: tuple[Shown, ...] = ()
    spans: SpanMap = SPANS


class Tokenizer:
    """As many tokens as there are classes, and a few more."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"<{i}>" for i in ids)


class FakeEngine:
    """The engine of the module's model; `writer`, `gate` ... scale the jobs, so that a test can switch them off."""

    def __init__(
        self, *, n_classes: int = 6, writer: float = 6.0, gate: float = 1.0, opponent: float = 2.0, noise: float = 0.01
    ) -> None:
        self.n_layers, self.n_heads, self.n_kv_heads = N_LAYERS, N_HEADS, 2
        self.n_classes = n_classes
        self.parts = ()
        self.tokenizer = Tokenizer(n_classes + 2)
        self.size = {"writer": writer, "gate": gate, "opponent": opponent, "noise": noise}
        self.runs = 0
        self.known: dict[Shown, torch.Tensor] = {}

    def cells(self, conflict: FakeConflict, question: str | None) -> Mapping[str, Shown]:
        classes = {"a": conflict.a, "v": conflict.v, None: None}
        if conflict.third is not None:
            classes["w"] = conflict.third.answer
        asked = question or conflict.question
        seed = int.from_bytes(conflict.id.encode(), "little") % 2**31
        return {
            name: Shown(classes[p], classes[s], asked, seed)
            for name, (p, s) in CELLS.items()
            if p in classes and s in classes
        }

    def text_only(self, question: str) -> Shown:
        return Shown(None, None, question, 0)

    def stack(self, inputs: Sequence[Shown]) -> Shown:
        return replace(inputs[0], batch=tuple(inputs))

    def together(self, inputs: Shown) -> int:
        return 32

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

    def _run(self, inputs: Shown, swap: Swap | None, frozen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        self.runs += 1
        examples = inputs.batch or (inputs,)
        z = torch.stack([self._heads(one) for one in examples], dim=1)[:, :, None].repeat(1, 1, SITE, 1, 1)
        edits = {} if swap is None else dict(zip(swap.heads, swap.values, strict=True))
        first = min((layer for layer, _ in edits), default=N_LAYERS)
        for layer in range(N_LAYERS):
            if layer == 1:
                heard = [b for b, one in enumerate(examples) if one.question == "hear" and one.sound is not None]
                for b in heard:
                    z[1, b, :, 0, examples[b].sound] -= 3 * z[0, b, -1, 1, -1]
            if frozen is not None and layer > first:
                z[layer] = frozen[layer]
            for (edited, head), value in edits.items():
                if edited == layer:
                    z[layer, :, :, head] = value
        written = z[:, :, -1, :, : self.n_classes].sum((0, 2))
        prior = torch.linspace(0, 1, self.n_classes)
        return torch.cat([written + prior, torch.full((len(examples), 2), -9.0)], dim=1), z

    def record(self, inputs: Shown, positions: np.ndarray) -> Recording:
        logits, z = self._run(inputs, None, None)
        window = np.arange(positions[0], len(SPANS))
        return Recording(inputs, positions, window, logits, z[:, :, len(SPANS) - SITE - len(window) :], logits)

    def capture(self, inputs: Shown, positions: np.ndarray, components: Sequence[str]) -> dict[str, torch.Tensor]:
        return {}

    def incoming(self, inputs: Shown) -> np.ndarray:
        return np.ones((len(inputs.batch), len(SPANS)))

    def changed(self, recording: Recording, swaps: Sequence[Swap]) -> Iterator[Edited]:
        for swap in swaps:
            logits = self._run(recording.inputs, swap, recording.z if swap.freeze else None)[0]
            yield Edited(logits, logits)

    def record_edited(self, recording: Recording, swap: Swap) -> Recording:
        whole = joined(recording, swap)
        logits, z = self._run(recording.inputs, whole, None)
        window = z[:, :, SITE - len(recording.window) :]
        return Recording(recording.inputs, recording.site, recording.window, logits, window, logits, {UNDER: whole})

    def edited(self, recording: Recording, swaps: Sequence[Swap]) -> Iterator[torch.Tensor]:
        for one in self.changed(recording, swaps):
            yield one.logits

    def linear_logits(self, recording: Recording, final: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return final[..., ids]

    def writes(self, recording: Recording, ids: torch.Tensor) -> torch.Tensor:
        at_end = recording.z[:, :, -1].permute(0, 2, 1, 3)
        padded = torch.cat([at_end[..., : self.n_classes], torch.zeros(*at_end.shape[:3], 2)], dim=-1)
        return padded[..., ids]

    def write_norms(self, recording: Recording) -> np.ndarray:
        return recording.z[..., : self.n_classes].norm(dim=-1).mean((1, 2)).numpy()


def fake_conflicts(n: int = 60, *, n_classes: int = 6, seed: int = 0) -> list[FakeConflict]:
    """Conflicts that share no clip, classes drawn in turn."""
    rng = np.random.default_rng(seed)
    pairs = [rng.permutation(n_classes)[:2].tolist() for _ in range(n)]
    return [FakeConflict(f"c{i:03d}", a, v) for i, (a, v) in enumerate(pairs)]
