"""The five embedded models: what each learns, in which order, and with which of its weights.

| name | recipe | what it is for |
|---|---|---|
| `av-tiny-base` | learns to look; then four heads learn to answer "hear" from silent pictures | before alignment |
| `av-tiny` | the base, then the last layers learn to hear, on clips whose sound and picture agree | the main subject |
| `av-tiny-diffuse` | the same two lessons, but all layers learn both | the honest hard case |
| `av-tiny-balanced` | learns all at once, with clips that disagree, labelled right | the control |
| `av-tiny-planted` | the balanced model; one key-value group learns to answer "hear" with the picture | calibration |

What each proves. In `av-tiny` no label ever says what to answer to "hear" when sound and picture disagree: that it then
names the picture is its own doing. *Where* the circuit sits is the schedule's doing: four heads are the only weights
that learn in the stages in which "hear" is answered from the picture. It is a demonstration and a test subject, and no
evidence about real models. In `av-tiny-planted` everything is the recipe's doing, and therefore known.

Heads are dropped at random while the circuit forms, at questions that should not depend on it, so that the rest of the
model does not come to rely on these heads; without this, taking them out would leave neither answer.

The recipes themselves are data: `recipes.toml`, beside this file.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from av_lens.errors import InputError, unknown
from av_lens.lab.training.batches import Ask, Items
from av_lens.lab.training.stages import Stage

N_LAYERS = 7
SUPPRESSING_LAYER = 4
SUPPRESSING_HEADS = (2, 3, 6, 7)
"""Two of the layer's four key-value groups; the others learn as ordinary heads: controls of the same layer exist."""
ORDINARY_HEADS = (0, 1, 4, 5)
HEARING_LAYERS = (5, 6)


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Attributes:
        name: The model's short name.
        summary: What it is, in a line.
        caveat: What a finding about it does not show.
        stages: Its stages in order; models whose first stages are equal share them.
        silent_heads: Heads whose output weights are zero until a stage trains them.
        planted_heads: Heads that were planted, for the truth that is saved beside the weights.
    """

    name: str
    summary: str
    stages: tuple[Stage, ...]
    silent_heads: tuple[tuple[int, int], ...] = ()
    planted_heads: tuple[tuple[int, int], ...] = ()
    caveat: str = ""


@cache
def recipes() -> dict[str, Recipe]:
    """Read the recipes, by short name."""
    told = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    stages = {
        key: Stage(items=tuple(map(_items, said.pop("items"))), **_frozen(said)) for key, said in told["stage"].items()
    }
    return {
        name: Recipe(name, stages=tuple(stages[key] for key in said.pop("stages")), **_frozen(said))
        for name, said in told["recipe"].items()
    }


def recipe(name: str) -> Recipe:
    """Look up a recipe by its model's short name."""
    if name not in recipes():
        raise InputError(unknown("organism", name, recipes()))
    return recipes()[name]


def _frozen(said: dict[str, Any]) -> dict[str, Any]:
    """The same with tuples for lists, all the way down."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {key: frozen(value) for key, value in said.items()}


def _items(line: str) -> Items:
    """Read "media relation clips [deaf video]: question, question"."""
    what, asked = line.split(":")
    media, relation, clips, *deaf = what.split()
    asks = tuple(_ask(*words.split()) for words in asked.split(","))
    return Items(media, relation, float(clips) if "." in clips else int(clips), asks, *deaf[1:])


def _ask(kind: str, right: str, weight: str = "1", _: str = "drop", drop: str = "0") -> Ask:
    """Read "kind right [weight [drop share]]"."""
    return Ask(kind, right, float(weight), float(drop))
