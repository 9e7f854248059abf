"""Which figures are there of a head? Protocol section 4, once: what is run and recorded, what the tables show.

`ESTIMANDS` is the one list. An estimand is the effect of a `Request` (every head in turn gets its z from a donor, in a
base cell and its mirror), minus that of another where it says so. Requests (`requests`), figures (`figures`), rows of
the table of evidence, keys of the record's arrays, and columns of the table of heads (`column`, where
`results.tables` names it) follow from it; tests of roles name estimands by `(name, donor)`.

Every estimand stands there twice: as measured, and with the final norm's scale frozen at the unedited run's
(` (norm frozen)` after its name). Positive is as in the record: an edit lets the model hear more, or a fall of G.

| estimand | of |
|---|---|
| release | on C, by donor; `mean_task` and `audio_only` are secondary donors |
| direct | the same with later heads frozen; `repair` is direct minus release |
| release on sound, release on picture | its part on the two answers, centred over all answers (`direct on ...` too) |
| fall of G | minus the effect on G; with blank_muted it is `carries`, with `va` `sufficiency` |
| reads picture, reads sound, silenced, question's own | donors wa, vw, blank_a - blank_muted, mean_other - mean_task |
| rise over others | rise of the heard sound's answer over the candidates that are neither answer (damage) |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from av_lens.isolation.measuring.donors import MEANS, OTHER_LAYOUT, PRIMARY_DONORS, SECONDARY_DONORS, W_CELLS
from av_lens.isolation.measuring.recordings import MEDIA_SITES
from av_lens.results.tables import TABLES

if TYPE_CHECKING:
    from av_lens.isolation.measuring.bench import Chunk
    from av_lens.isolation.measuring.effects import Effect

PerHead = Float[np.ndarray, "example layer head"]
Figures = Mapping[tuple[str, str], PerHead]


@dataclass(frozen=True)
class Request:
    """An edit of every head in turn: in `base` ("va" or "blank_a") and its mirror, z from `donor`."""

    base: str
    donor: str
    freeze: bool = False
    question: str = "ask"


@dataclass(frozen=True)
class Estimand:
    """A figure of a head: `plus`'s effect less `minus`'s, read from one figure of an `effects.Effect`."""

    name: str
    donor: str
    plus: Request | None = None
    minus: Request | None = None
    figure: str = "margin"
    shown: str = ""

    @property
    def column(self) -> str:
        """Its column in the table of heads, if that has one: by its donor, else (there the row's donor) by its name."""
        names = (self.shown, f"{self.name}_{self.donor}", self.name)
        plain = (name.replace(" ", "_").replace("(", "").replace(")", "") for name in names)
        return next((name for name in plain if name in TABLES["heads"]), "")

    def of(self, effects: Mapping[Request, Effect]) -> PerHead:
        """Compute it; NaN where a request was not measured."""
        asked = [one for one in (self.plus, self.minus) if one is not None]
        if not all(one in effects for one in asked):
            return np.full_like(next(iter(effects.values())).margin, np.nan)
        parts: list[PerHead] = [getattr(effects[one], self.figure) for one in asked]
        return -parts[0] if self.plus is None else parts[0] if self.minus is None else parts[0] - parts[1]


def _c(donor: str, *, freeze: bool = False) -> Request:
    return Request("va", donor, freeze)


def _g(donor: str) -> Request:
    return Request("blank_a", donor)


_MARGINS = (
    *(Estimand("release", donor, _c(donor)) for donor in (*PRIMARY_DONORS, *SECONDARY_DONORS)),
    *(
        one
        for donor in PRIMARY_DONORS
        for one in (
            Estimand("direct", donor, _c(donor, freeze=True)),
            Estimand("repair", donor, _c(donor, freeze=True), _c(donor)),
            Estimand("fall of G", donor, minus=_g(donor)),
        )
    ),
    Estimand("reads picture", "wa", _c("wa")),
    Estimand("reads sound", "vw", _c("vw")),
    Estimand("sufficiency", "va", minus=_g("va")),
    Estimand("silenced", "blank_a - blank_muted", _c("blank_a"), _c("blank_muted")),
    Estimand("carries", "blank_muted", minus=_g("blank_muted")),
    Estimand("question's own", "mean_other - mean_task", _c("mean_other"), _c("mean_task"), shown="question_share"),
)
_PARTS = tuple(
    Estimand(f"{name} on {answer}", donor, _c(donor, freeze=freeze), figure=f"on_{answer}")
    for donor in PRIMARY_DONORS
    for name, freeze in (("release", False), ("direct", True))
    for answer in ("sound", "picture")
)
ESTIMANDS: tuple[Estimand, ...] = (
    *_MARGINS,
    *_PARTS,
    *(replace(e, name=f"{e.name} (norm frozen)", figure=f"{e.figure}_frozen", shown="") for e in (*_MARGINS, *_PARTS)),
    *(Estimand("rise over others", donor, _c(donor), figure="rise") for donor in PRIMARY_DONORS),
)
ROLE_ESTIMANDS = ("release", "direct", "fall of G", "reads picture", "reads sound", "rise over others")
"""What suppressors' roles are told by."""


def figures(effects: Mapping[Request, Effect]) -> dict[tuple[str, str], PerHead]:
    """Compute every estimand, by name and donor."""
    return {(one.name, one.donor): one.of(effects) for one in ESTIMANDS}


def donor_of(name: str) -> str:
    """Name the donor of an estimand that has only one."""
    (donor,) = (one.donor for one in ESTIMANDS if one.name == name)
    return donor


def requests(
    chunks: Sequence[Chunk] | None = None, *, names: Sequence[str] = (), donors: Sequence[str] = PRIMARY_DONORS
) -> list[Request]:
    """List what estimands need (all of them where none is named), less the donors that some conflicts cannot have.

    Runs of the primary donors are listed before others', which is their order in the stacks.
    """
    wanted = [one for one in ESTIMANDS if not names or (one.name in names and {one.donor} & {*donors, *W_CELLS})]
    found = dict.fromkeys(r for one in wanted for r in (one.plus, one.minus) if r is not None)
    there = [one for one in found if chunks is None or _has(chunks, one.donor)]
    place = {donor: number for number, donor in enumerate((*PRIMARY_DONORS, *SECONDARY_DONORS, *W_CELLS))}
    after = len(place)
    return sorted(there, key=lambda r: (r.base != "va", _rank(r), r.freeze, place.get(r.donor, after)))


def _rank(request: Request) -> bool:
    """Whether it comes after the primary donors'; on G the conflict's own z comes first."""
    primary = request.donor in PRIMARY_DONORS
    return primary if request.base == "blank_a" else not primary


def _has(chunks: Sequence[Chunk], donor: str) -> bool:
    if donor in W_CELLS:
        return any(chunk.has_third for chunk in chunks)
    if donor in MEANS:
        return chunks[0].means is not None
    return donor not in OTHER_LAYOUT or chunks[0].site not in MEDIA_SITES
