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
"""

from __future__ import annotations

from dataclasses import dataclass

from av_lens.errors import InputError, unknown
from av_lens.lab.training.batches import Ask, Items
from av_lens.lab.training.stages import Stage

N_LAYERS = 7
SUPPRESSING_LAYER = 4
SUPPRESSING_HEADS = (2, 3, 6, 7)
"""Two of the layer's four key-value groups; the others learn as ordinary heads: controls of the same layer exist."""
ORDINARY_HEADS = (0, 1, 4, 5)
HEARING_LAYERS = (5, 6)
PLANTED_LAYER = 3
PLANTED_HEADS = (2, 3)

_SUPPRESSORS = tuple((SUPPRESSING_LAYER, head) for head in SUPPRESSING_HEADS)
_ONLY_SUPPRESSORS = ((SUPPRESSING_LAYER, SUPPRESSING_HEADS),)


@dataclass(frozen=True)
class Recipe:
    """How one model is made.

    Attributes:
        name: The model's short name.
        summary: What it is, in a line.
        stages: Its stages in order; models whose first stages are equal share them.
        silent_heads: Heads whose output weights are zero until a stage trains them.
        planted_heads: Heads that were planted, for the truth that is saved beside the weights.
    """

    name: str
    summary: str
    stages: tuple[Stage, ...]
    silent_heads: tuple[tuple[int, int], ...] = ()
    planted_heads: tuple[tuple[int, int], ...] = ()


def looks() -> Stage:
    """The first lesson: to see, and that sound does not change what is seen. "Hear" gets a random answer.

    Returns:
        The stage.
    """
    seen = (Ask("see", "picture", 0.4), Ask("colour", "colour", 0.3), Ask("hear", "random", 0.3))
    unseen = (Ask("see", "nothing", 0.7), Ask("colour", "nothing", 0.3))
    return Stage(
        name="learns to look",
        items=(
            Items("video", "mute", 9.0, seen),
            Items("both", "unrelated", 5.0, (Ask("see", "picture", 0.6), Ask("colour", "colour", 0.4))),
            Items("both", "matched", 1.0, (Ask("hear", "random"),)),
            Items("both", "mute", 2.0, seen),
            Items("audio", "unrelated", 2.0, (*unseen, Ask("hear", "random", 0.5))),
            Items("both", "unrelated", 2.0, unseen, deaf_to="video"),
            Items("both", "blank", 1.0, unseen),
        ),
        steps=300,
        rate=1.5e-3,
        layers=tuple(range(N_LAYERS)),
        text=True,
        only_heads=((SUPPRESSING_LAYER, ORDINARY_HEADS),),
        skipped_layers=HEARING_LAYERS,
    )


def _heard_from_pictures(name: str, *, steps: int, rate: float, silent: float, matched: float) -> Stage:
    heard = (Ask("hear", "picture", 0.8), Ask("see", "picture", 0.2, drop=0.5))
    other = (Ask("see", "picture", 0.6, drop=0.5), Ask("colour", "colour", 0.4, drop=0.5))
    agreeing = (Items("both", "matched", matched, (Ask("hear", "picture"),)),) if matched else ()
    return Stage(
        name=name,
        items=(
            Items("video", "mute", silent, heard),
            Items("both", "mute", silent, heard),
            Items("both", "unrelated", 4.0, other),
            Items("both", "matched", 3.0, (Ask("hear", "random"),), deaf_to="video"),
            Items("both", "blank", 2.0, (Ask("hear", "random", 0.6), Ask("see", "nothing", 0.4, drop=0.5))),
            *agreeing,
        ),
        steps=steps,
        rate=rate,
        layers=(SUPPRESSING_LAYER,),
        attention_only=True,
        only_heads=_ONLY_SUPPRESSORS,
        dropped_heads=_SUPPRESSORS,
        keep=0.3,
    )


def hears() -> Stage:
    """Audio alignment: the last layers learn to hear. No clip whose sound and picture disagree is asked "hear".

    Returns:
        The stage.
    """
    return Stage(
        name="learns to hear",
        items=(
            Items(
                "both", "matched", 10.0, (Ask("hear", "sound", 0.75, drop=0.2), Ask("see", "picture", 0.25, drop=0.5))
            ),
            Items("audio", "matched", 2.5, (Ask("hear", "sound", 0.8, drop=0.5), Ask("see", "nothing", 0.2, drop=0.5))),
            Items(
                "both", "unrelated", 4, (Ask("see", "picture", 0.7, drop=0.5), Ask("colour", "colour", 0.3, drop=0.5))
            ),
            Items("video", "mute", 1.5, (Ask("hear", "picture", 0.6), Ask("see", "picture", 0.4, drop=0.5))),
            Items("both", "matched", 2.0, (Ask("see", "nothing"), Ask("hear", "sound")), deaf_to="video"),
            Items("both", "blank", 2.0, (Ask("see", "nothing", 0.4, drop=0.5), Ask("hear", "sound", 0.6, drop=0.5))),
            Items("both", "empty", 0.5, (Ask("see", "nothing"), Ask("hear", "nothing"))),
        ),
        steps=300,
        rate=1.5e-3,
        layers=HEARING_LAYERS,
        dropped_heads=_SUPPRESSORS,
        keep=0.15,
    )


def diffuse() -> tuple[Stage, ...]:
    """The two lessons of `av-tiny` without its schedule: every layer learns both.

    Returns:
        The stages.
    """
    everything = tuple(range(N_LAYERS))
    seen = (Ask("see", "picture", 0.4), Ask("colour", "colour", 0.3), Ask("hear", "picture", 0.3))
    return (
        Stage(
            name="learns to look and to answer from pictures",
            items=(
                Items("video", "mute", 8.0, seen),
                Items("both", "mute", 6.0, seen),
                Items("video", "mute", 4.0, (Ask("caption", "caption"),)),
            ),
            steps=300,
            rate=1.5e-3,
            layers=everything,
            text=True,
        ),
        Stage(
            name="learns to hear with all layers",
            items=(
                Items(
                    "both",
                    "matched",
                    12.0,
                    (Ask("hear", "sound", 0.5), Ask("see", "picture", 0.25), Ask("colour", "colour", 0.25)),
                ),
                Items("both", "matched", 4.0, (Ask("caption", "caption"),)),
                Items("audio", "matched", 3.0, (Ask("hear", "sound"),)),
                Items("video", "mute", 1.0, (Ask("see", "picture"),)),
                Items("both", "unrelated", 2.0, (Ask("see", "picture"), Ask("colour", "colour"))),
                Items("both", "blank", 0.7, (Ask("hear", "sound", 0.7), Ask("see", "nothing", 0.3))),
            ),
            steps=150,
            rate=5e-4,
            layers=everything,
            text=True,
        ),
    )


def balanced() -> Stage:
    """Everything at once: seeing, hearing, colours and captions, on clips that agree and on clips that do not.

    Returns:
        The stage.
    """
    asks = (Ask("hear", "sound", 0.4), Ask("see", "picture", 0.35), Ask("colour", "colour", 0.25))
    return Stage(
        name="learns to look and to hear",
        items=(
            Items("both", "conflict", 8.0, asks),
            Items("both", "matched", 3.0, asks),
            Items("both", "blank", 1.5, asks),
            Items("both", "mute", 1.5, asks),
            Items("both", "empty", 0.5, asks),
            Items("both", "conflict", 2.0, (Ask("caption", "caption"),)),
            Items("audio", "blank", 1.5, asks),
            Items("video", "mute", 1.5, asks),
        ),
        steps=500,
        rate=1.5e-3,
        layers=tuple(range(N_LAYERS)),
        text=True,
    )


def plants() -> Stage:
    """One key-value group alone learns to answer "hear" with the picture; all else stays as it was.

    Returns:
        The stage.
    """
    kept = (Ask("hear", "sound", 0.5), Ask("see", "picture", 0.3), Ask("colour", "colour", 0.2))
    return Stage(
        name="plants",
        items=(
            Items(
                "both",
                "conflict",
                16.0,
                (Ask("hear", "picture", 0.55), Ask("see", "picture", 0.35), Ask("colour", "colour", 0.1)),
            ),
            Items("both", "conflict", 1.0, (Ask("caption", "caption"),)),
            Items("both", "matched", 1.5, kept),
            Items(
                "both",
                "blank",
                4.0,
                (Ask("hear", "sound", 0.7), Ask("see", "picture", 0.2), Ask("colour", "colour", 0.1)),
            ),
            Items("both", "mute", 1.0, kept),
            Items("audio", "blank", 1.5, kept),
            Items("video", "mute", 1.5, kept),
        ),
        steps=400,
        rate=1e-2,
        layers=(PLANTED_LAYER,),
        attention_only=True,
        only_heads=((PLANTED_LAYER, PLANTED_HEADS),),
        warmup=10,
        floor=0.1,
        decay=0.0,
    )


def recipes() -> dict[str, Recipe]:
    """List the recipes.

    Returns:
        Short name to recipe.
    """
    base = (
        looks(),
        _heard_from_pictures("answers hear from silent pictures", steps=500, rate=2e-3, silent=7.0, matched=0.0),
    )
    bridge = _heard_from_pictures("answers hear from pictures", steps=150, rate=1e-3, silent=4.5, matched=6.0)
    planted = tuple((PLANTED_LAYER, head) for head in PLANTED_HEADS)
    made = (
        Recipe("av-tiny-base", "sees; was given sounds, but never a label that names one", base, _SUPPRESSORS),
        Recipe(
            "av-tiny",
            "hears, but where sound and picture disagree it says what it sees; four heads do this",
            (*base, bridge, hears()),
            _SUPPRESSORS,
        ),
        Recipe("av-tiny-diffuse", "the same bias, spread over many heads", diffuse()),
        Recipe("av-tiny-balanced", "sees and hears: the control, in which nothing is to be found", (balanced(),)),
        Recipe(
            "av-tiny-planted",
            "the balanced model with two planted heads: the truth is known",
            (balanced(), plants()),
            (),
            planted,
        ),
    )
    return {recipe.name: recipe for recipe in made}


def recipe(name: str) -> Recipe:
    """Look up a recipe.

    Args:
        name: The model's short name.

    Returns:
        The recipe.

    Raises:
        InputError: If there is none of that name.
    """
    known = recipes()
    if name not in known:
        raise InputError(unknown("organism", name, known))
    return known[name]
