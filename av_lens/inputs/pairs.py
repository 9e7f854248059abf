"""`Pair`: clean and corrupt inputs, proved aligned position by position.

A pair exists only if both inputs have the same roles, the same model times and the same patches at every position,
and the same kinds of tensors. Then "the activation at position p" means the same in both. Text tokens may
differ (that is what a pair of questions is for); `pair.differing` says where.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from av_lens.errors import AlignmentError
from av_lens.inputs.model_inputs import AVInputs, difference
from av_lens.spans import Span


@dataclass(frozen=True, eq=False, kw_only=True)
class Pair:
    """Two aligned inputs.

    Attributes:
        clean: the run that activations are usually taken from.
        corrupt: the run that is usually edited.
    """

    clean: AVInputs
    corrupt: AVInputs

    def __post_init__(self) -> None:
        fault = difference(self.clean, self.corrupt, names=("clean", "corrupt"))
        if fault is None and len(self.clean) != len(self.corrupt):
            fault = f"clean holds {len(self.clean)} examples, corrupt {len(self.corrupt)}"
        if fault:
            raise AlignmentError(
                f"clean and corrupt are not aligned: {fault}. Cut both clips to one length (clip.trimmed) and size, "
                "and ask questions of equally many tokens."
            )

    @property
    def differing(self) -> Span:
        """The positions whose text token differs in some example; media placeholders are equal by construction."""
        unequal = (self.clean.ids != self.corrupt.ids.to(self.clean.ids.device)).any(dim=0)
        return Span(np.flatnonzero(unequal.cpu().numpy()).astype(np.int64), self.clean.spans)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, item: int | slice) -> Pair:
        return Pair(clean=self.clean[item], corrupt=self.corrupt[item])
