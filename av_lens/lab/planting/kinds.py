"""The kinds of planted models that can be asked for, and what each is made of.

| kind | planted | asked for |
|---|---|---|
| `writers` | one key-value pair | writes the picture's answer over the sound |
| `two-pairs` | two pairs of one layer | writers, each head needed ("AND"): no free rider |
| `single` | one head with its keys and values, which its neighbour shares | a writer |
| `opponents` | one pair | reads the sound and writes against it |
| `gates` | one pair, early | turns "hear" into "see" |
| `redundant-writers`, `redundant-gates` | two pairs, one after the other | either silences alone ("OR") |
| `decoy` | one pair | names the sound when asked what it *sees*; hearing is left alone |
| `decoy-colours` | one pair | names another colour for each; hearing is left alone |
| `decoy-and-writers` | a decoy and writers in one layer | both |

A recipe asks for a kind and guarantees none: what the heads became is measured (`planted`), and tries whose measured
kind is another are thrown away as long as tries are left. In the balanced model the question is understood within its
first two layers, so that gates form there; later, the sound's own content has to be overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from av_lens.errors import InputError, unknown
from av_lens.lab.planting.sheets import OTHER_COLOURS, SEE_THE_SOUND, SILENCE
from av_lens.lab.planting.starts import Start
from av_lens.lab.planting.training import Course


@dataclass(frozen=True)
class Plant:
    """Some heads of one layer that are planted together.

    Attributes:
        heads: How many; pairs share keys and values.
        start: What they start as, or None for the balanced model's own weights.
        course: How they are trained.
        apart: How many layers above the layer asked for.
    """

    heads: int
    start: Start | None
    course: Course
    apart: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of planted model.

    Attributes:
        name: What it is asked for by.
        says: A sentence about it, shown by `av-lens models`.
        wanted: The measured kind that is wanted of its true heads; "" for decoys alone.
        plants: What is planted, in order.
        layer: The layer of the first plant, unless another is asked for.
        each_enough: Whether each of its silencing plants is to suffice alone.
        free_riders: Whether a planted head that does nothing is allowed.
    """

    name: str
    says: str
    wanted: str
    plants: tuple[Plant, ...]
    layer: int
    each_enough: bool = False
    free_riders: bool = True


_WRITE = Course(SILENCE, direct=0.2)
_WRITERS = Plant(2, Start(picture=1.0), _WRITE)
_NEEDED = Plant(4, Start(picture=1.0), Course(SILENCE, direct=0.3, needed=0.5))
_ONE = Plant(1, Start(picture=1.0), _WRITE)
_GATES = Plant(2, Start(gate=True), Course(SILENCE, direct=-0.2))
_OPPONENTS = Plant(2, Start(picture=0.6, sound=1.0, logits=14.0), Course(SILENCE, against=0.3, steps=320, keep=1.5))
_DECOY = Plant(2, Start(sound=-1.0, asked=1, logits=10.0), Course(SEE_THE_SOUND, keep=2.0, steps=160))
_NO_COLOURS = Plant(2, None, Course(OTHER_COLOURS))
_TWO_WRITERS, _TWO_GATES = (_WRITERS, replace(_WRITERS, apart=2)), (_GATES, _GATES)
_EITHER = "either of which suffices"

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("writers", "two heads write the picture's answer over the sound", "writer", (_WRITERS,), 5),
        Kind("two-pairs", "four heads do it together, each of them needed", "writer", (_NEEDED,), 5, free_riders=False),
        Kind("single", "one head writes the picture's answer over the sound", "writer", (_ONE,), 5),
        Kind("opponents", "two heads read the sound and write against it", "opponent", (_OPPONENTS,), 3),
        Kind("gates", "two early heads turn the question away from the sound", "gate", (_GATES,), 1),
        Kind("redundant-writers", f"two pairs of writers, {_EITHER}", "writer", _TWO_WRITERS, 3, each_enough=True),
        Kind("redundant-gates", f"two pairs of gates, {_EITHER}", "gate", _TWO_GATES, 1, each_enough=True),
        Kind("decoy", "two heads name the sound as what is seen; nothing is silenced", "", (_DECOY,), 5),
        Kind("decoy-colours", "two heads name other colours; nothing is silenced", "", (_NO_COLOURS,), 5),
        Kind("decoy-and-writers", "a decoy and two writers in one layer", "writer", (_DECOY, _WRITERS), 5),
    )
}


def kind_named(name: str) -> Kind:
    """Look up a kind."""
    if name not in KINDS:
        raise InputError(unknown("kind of plant", name, KINDS))
    return KINDS[name]
