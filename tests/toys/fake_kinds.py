"""Other models on paper: one that hides its heads behind each other, one that mutters, two that do not hear."""

from __future__ import annotations

import torch
from fake_model import FakeModel


class Redundant(FakeModel):
    """Two picture writers of which each is enough (L2H0, L2H2), and two gates of which each is enough (L0H1, L0H2).

    The picture's answer is written as strongly as the stronger writer has it, and the sound of L1H0 is shut out as far
    as the stronger gate says: G = 7, C = 4 + 0 - 6 = -2, and no single head releases anything.
    """

    def __init__(self, *, writer=6.0):
        super().__init__(writer=writer, opponent=0.0, noise=1e-3)

    def _heads(self, one):
        if one not in self.known:
            z = super()._heads(one)
            if one.question == "hear" and one.sound is not None and one.picture is not None:
                z[2, 2, one.picture] += self.size["writer"]
                z[0, 2, -1] = 1.0
        return self.known[one]

    def _gate(self, signals):
        return torch.maximum(signals[:, 1], signals[:, 2])

    def _stream(self, z):
        stream, k = super()._stream(z), self.n_classes
        stream[..., :k] -= torch.minimum(z[2, :, :, 0, :k], z[2, :, :, 2, :k])  # the sum becomes the maximum
        return stream


class Muttering(FakeModel):
    """Always says a word that is no answer."""

    def _stream(self, z):
        stream = super()._stream(z)
        stream[..., -1] = 30.0
        return stream


class Deaf(FakeModel):
    """Hears nothing, or nothing of some conflicts."""

    def _heads(self, one):
        z = super()._heads(one).clone()
        if self.misses(one):
            z[0, 0], z[1, 0] = 0, 0
        return z

    @staticmethod
    def misses(one):
        return one.sound is not None


class HardOfHearing(Deaf):
    """Misses the sound of every other conflict when it is alone: G is still above 0."""

    @staticmethod
    def misses(one):
        return one.picture is None and one.noise // 2**24 % 2 == 1
