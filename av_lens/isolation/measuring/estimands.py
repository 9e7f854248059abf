"""Which figures are there of a head? Protocol section 4 by name, from the effects of `effects.requests`.

| estimand | of |
|---|---|
| release (donor), direct (donor), fall of G (donor), rise over others (donor) | `effects` says how |
| repair (donor) | direct - release: what later layers make good for |
| release on sound, release on picture (donor) | the release's parts on the two answers; release = first - second |
| direct on sound, direct on picture (donor) | the same of the direct effect |
| reads picture, reads sound, sufficiency, silenced, carries | |
| question's own | release by mean_other minus release by mean_task |

Each but the rise stands once more as "... (norm frozen)": the final norm divides by what it divided by in the cell's
unedited run, so that the read-out is linear. Released by `audio_only` and `mean_task` is secondary: it names nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from av_lens.isolation.measuring.donors import PRIMARY_DONORS
from av_lens.isolation.measuring.effects import Effect, PerHead, Request

FROZEN = " (norm frozen)"
SECONDARY_DONORS = ("mean_task", "audio_only")


def estimands(effects: Mapping[Request, Effect]) -> Iterator[tuple[str, str, PerHead]]:
    """List every estimand with its donor and its effects.

    Args:
        effects: the outcome of every request.

    Yields:
        (estimand, donor, `[example, layer, head]`), NaN where a request was not made.
    """
    for ending, figure in (("", "margin"), (FROZEN, "margin_frozen")):
        for name, donor, values in _of_margin(effects, figure):
            yield f"{name}{ending}", donor, values
        for name, donor, values in _parts(effects, figure.removeprefix("margin")):
            yield f"{name}{ending}", donor, values
    for donor in PRIMARY_DONORS:
        yield "rise over others", donor, _of(effects, Request("va", donor), "rise")


def _of(effects: Mapping[Request, Effect], request: Request, figure: str) -> PerHead:
    found = effects.get(request)
    return np.full_like(next(iter(effects.values())).margin, np.nan) if found is None else getattr(found, figure)


def _of_margin(effects: Mapping[Request, Effect], figure: str) -> Iterator[tuple[str, str, PerHead]]:
    def on(base: str, donor: str, *, freeze: bool = False) -> PerHead:
        return _of(effects, Request(base, donor, freeze=freeze), figure)

    for donor in (*PRIMARY_DONORS, *SECONDARY_DONORS):
        yield "release", donor, on("va", donor)
    for donor in PRIMARY_DONORS:
        yield "direct", donor, on("va", donor, freeze=True)
        yield "repair", donor, on("va", donor, freeze=True) - on("va", donor)
        yield "fall of G", donor, -on("blank_a", donor)
    yield "reads picture", "wa", on("va", "wa")
    yield "reads sound", "vw", on("va", "vw")
    yield "sufficiency", "va", -on("blank_a", "va")
    yield "silenced", "blank_a - blank_muted", on("va", "blank_a") - on("va", "blank_muted")
    yield "carries", "blank_muted", -on("blank_a", "blank_muted")
    yield "question's own", "mean_other - mean_task", on("va", "mean_other") - on("va", "mean_task")


def _parts(effects: Mapping[Request, Effect], ending: str) -> Iterator[tuple[str, str, PerHead]]:
    for donor in PRIMARY_DONORS:
        for name, freeze in (("release", False), ("direct", True)):
            for answer in ("sound", "picture"):
                request = Request("va", donor, freeze=freeze)
                yield f"{name} on {answer}", donor, _of(effects, request, f"on_{answer}{ending}")
