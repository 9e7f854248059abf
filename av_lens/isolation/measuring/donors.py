"""What does a head's z become? Donors: other cells, their mirrors, and means over discovery.

In a mirrored base (`av`, `blank_v`) a donor cell is mirrored too: a and v change places. `Means` averages discovery's
`va` (`mean_task`; `av` in a mirrored base) and its `va` asked `see` (`mean_other`, the same in every edited cell), over
the conflicts that share no answer with the edited one.

Choices where the protocol is silent: a donor of other length than the site is aligned from the end, and what overhangs
keeps the run's own z; where the donor is another cell's, it ends where the token ids begin to differ. The mirror of
`audio_only` is `audio_only_v`, the picture's sound alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from av_lens.inputs import AVInputs

if TYPE_CHECKING:
    from av_lens.isolation.measuring.bench import Chunk

_MIRRORS = {
    "va": "av", "vv": "aa", "wa": "wv", "vw": "aw", "blank_a": "blank_v", "v_muted": "a_muted",
    "audio_only": "audio_only_v", "blank_muted": "blank_muted",
}  # fmt: skip
MIRROR = _MIRRORS | {two: one for one, two in _MIRRORS.items()}
MIRRORED_BASES = ("av", "blank_v")
MEAN_CELLS = (("va", "va", "ask"), ("av", "av", "ask"), ("see", "va", "see"))
W_CELLS = ("wa", "wv", "vw", "aw")
MEANS = ("mean_task", "mean_other")
PRIMARY_DONORS = ("blank_muted", "mean_other", "zero")
SECONDARY_DONORS = ("mean_task", "audio_only")
"""Donors of the release alone, shown beside the primary ones."""
OTHER_LAYOUT = ("audio_only", "audio_only_v", "text_only")

AllZ = Float[Tensor, "layer batch site head d_head"]


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
    """Every head's z at the site over discovery, for the two mean donors.

    `z[name]` is `[layer, example, site, head, d_head]` on the CPU, name being "va", "av" (asked their own question) or
    "see" (`va` asked `see`), run when first asked for; `sound` and `picture` are the examples' answers, `ids` names
    the conflicts. `parts` holds the same of other outputs than heads' (`explaining.units`).
    """

    chunks: tuple[Chunk, ...]
    sound: Int[np.ndarray, " example"]
    picture: Int[np.ndarray, " example"]
    ids: tuple[str, ...]
    parts: dict[str, Tensor] = field(default_factory=dict)
    _z: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def over(cls, chunks: Sequence[Chunk]) -> Means:
        """Name a half's conflicts; nothing runs yet."""
        examples = np.concatenate([chunk.examples for chunk in chunks])
        candidates = chunks[0].bench.candidates
        ids = tuple(name for chunk in chunks for name in chunk.ids)
        return cls(tuple(chunks), candidates.sound[examples], candidates.picture[examples], ids)

    @property
    def z(self) -> Mapping[str, Float[Tensor, "layer example site head d_head"]]:
        """The ingredients; sites of different lengths (conflicts asked in different words) are cut to the shortest."""
        if not self._z:
            for name, cell, question in MEAN_CELLS:
                self._z[name] = joined([chunk.run(cell, question).site_z.cpu() for chunk in self.chunks])
        return self._z

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

    def donor(self, name: str, sound: Int[np.ndarray, " batch"], picture: Int[np.ndarray, " batch"]) -> AllZ:
        """Average over the conflicts that share no answer with each edited one, in float32 at least."""
        weights = self.weights(sound, picture)
        kept = self.z[name]
        # In bfloat16 a weight of 1/60 is off by .3%: the mean is taken in float32 at least.
        exact = torch.promote_types(kept.dtype, torch.float32)
        mean = torch.einsum("bn,lnshd->lbshd", torch.from_numpy(weights).to(kept.device, exact), kept.to(exact))
        return mean.to(kept.dtype)
