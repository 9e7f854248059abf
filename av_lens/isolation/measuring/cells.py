"""A conflict's cells by the names that the search has for them (`results.exchanged`), and the mirrored conflict."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from av_lens.inputs import AVInputs
from av_lens.memory import Bounded
from av_lens.results.exchanged import exchanged

SUPPRESSED = ("sound", "picture")
CELLS_BYTES = 1 << 28


def mirrored_conflict(one: Any) -> Any:
    """Let a conflict's sound and picture, their answers and their questions change places."""
    return dataclasses.replace(
        one, sound=one.picture, picture=one.sound, answers=one.answers[::-1], question=one.see, see=one.question
    )


class Cells:
    """A conflict's cells; beside `audio_only` its mirror, `audio_only_v`, with sound and picture exchanged."""

    def __init__(self, model: Any, conflict: Any, options: Mapping[str, Any], *, suppressed: str = "sound") -> None:
        self._mirrored = suppressed == "picture"
        asked = conflict.question if options["question"] is None else options["question"]
        self._conflict = mirrored_conflict(conflict) if self._mirrored else conflict
        self._of = lambda one: one.cells(model, **{**options, "question": asked})
        self._own = self._of(self._conflict)

    @property
    def nbytes(self) -> int:
        """How much memory the tensors take of the cells that were encoded."""
        made = [self._own, *([self._mirror] if "_mirror" in self.__dict__ else [])]
        return sum(getattr(cells, "nbytes", 0) for cells in made)

    @cached_property
    def _mirror(self) -> Mapping[str, AVInputs]:
        one = self._conflict
        return self._of(dataclasses.replace(one, sound=one.picture, picture=one.sound, answers=one.answers[::-1]))

    def __getitem__(self, name: str) -> AVInputs:
        alone = "video_only" if self._mirrored else "audio_only"
        if name == "audio_only_v":
            return self._mirror[alone]
        return self._own[exchanged(name) if self._mirrored else name]


class KeptCells:
    """The cells of the conflicts that were asked for last, at most `CELLS_BYTES` of what was encoded of them."""

    def __init__(self) -> None:
        self._kept = Bounded[Cells](CELLS_BYTES)

    def of(self, model: Any, conflict: Any, options: Mapping[str, Any], suppressed: str) -> Cells:
        """Give a conflict's cells."""
        clips = (
            conflict.sound,
            conflict.picture,
            conflict.third,
        )  # the cells hold them: nobody else gets their numbers
        asked = conflict.question if options["question"] is None else options["question"]
        key = (conflict.id, *map(id, clips), asked, getattr(conflict, "prefix", ""), suppressed)
        return self._kept.once(key, lambda: Cells(model, conflict, options, suppressed=suppressed))
