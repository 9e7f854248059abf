"""What do nodes' outputs become? Donors of other lengths, and means over discovery (protocol section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.inputs import AVInputs
from av_lens.isolation.measuring.engine import MEAN_CELLS, AllOutputs, Z

if TYPE_CHECKING:
    from av_lens.isolation.measuring.bench import Chunk


def align_end(
    donor: Float[Tensor, "layer batch donor_site ..."],
    base: Float[Tensor, "layer batch site ..."],
    *,
    most: int | None = None,
) -> Float[Tensor, "layer batch site ..."]:
    """Lay a donor over a run of another length, from the end, at most so many; what overhangs is the base's."""
    have, want = donor.shape[2], base.shape[2]
    k = min(have, want) if most is None else min(have, want, most)
    if have == want == k:
        return donor
    out = base.clone()
    out[:, :, want - k :] = donor[:, :, have - k :]
    return out


def joined(parts: Sequence[Float[Tensor, "layer _batch _site ..."]]) -> Float[Tensor, "layer example site ..."]:
    """Join what several stacks have at a site, all cut from the end to the shortest site."""
    shortest = min(part.shape[2] for part in parts)
    return torch.cat([part[:, :, part.shape[2] - shortest :] for part in parts], dim=1)


def equal_ending(one: AVInputs, two: AVInputs) -> int | None:
    """Count the positions at the end at which two inputs have equal token ids; None where their layout is the same."""
    if one.spans.roles == two.spans.roles:
        return None
    first, second = one.ids[0].tolist(), two.ids[0].tolist()
    same = [a == b for a, b in zip(reversed(first), reversed(second), strict=False)]
    return same.index(False) if False in same else len(same)


@dataclass(eq=False)
class Means:
    """Every node's output at the site over discovery: `outputs(part, name)` is `[layer, example, site, ...]`."""

    chunks: tuple[Chunk, ...]
    sound: Int[np.ndarray, " example"]
    picture: Int[np.ndarray, " example"]
    ids: tuple[str, ...]
    _kept: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @classmethod
    def over(cls, chunks: Sequence[Chunk]) -> Means:
        """Name a half's conflicts; nothing runs yet."""
        examples = np.concatenate([chunk.examples for chunk in chunks])
        candidates = chunks[0].bench.candidates
        ids = tuple(name for chunk in chunks for name in chunk.ids)
        return cls(tuple(chunks), candidates.sound[examples], candidates.picture[examples], ids)

    def outputs(self, part: str, name: str) -> Float[Tensor, "layer example site ..."]:
        """The ingredients; sites of different lengths (conflicts asked in different words) are cut to the shortest."""
        if (part, name) not in self._kept:
            (of,) = (one[1:] for one in MEAN_CELLS if one[0] == name)
            found = [chunk.output(*of, part=part).cpu() for chunk in self.chunks]
            self._kept[part, name] = joined(found)
        return self._kept[part, name]

    def weights(
        self, sound: Int[np.ndarray, " batch"], picture: Int[np.ndarray, " batch"]
    ) -> Float[np.ndarray, "batch example"]:
        """Weigh the conflicts that share no answer with each edited one, alike; NaN where there is none."""
        apart = np.ones((len(sound), len(self.sound)), dtype=bool)
        for mine in (sound, picture):
            for theirs in (self.sound, self.picture):
                apart &= mine[:, None] != theirs[None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return apart / apart.sum(1, keepdims=True)

    def donor(
        self, name: str, sound: Int[np.ndarray, " batch"], picture: Int[np.ndarray, " batch"], part: str = Z
    ) -> AllOutputs:
        """Average over the conflicts that share no answer with each edited one, in float32 at least."""
        weights = self.weights(sound, picture)
        kept = self.outputs(part, name)
        # In bfloat16 a weight of 1/60 is off by .3%: the mean is taken in float32 at least.
        exact = torch.promote_types(kept.dtype, torch.float32)
        mean = torch.einsum("bn,ln...->lb...", torch.from_numpy(weights).to(kept.device, exact), kept.to(exact))
        return mean.to(kept.dtype)
