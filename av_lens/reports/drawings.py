"""The page's figures, each with its numbers as a table; clips to play, and how the method did where truth was known."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from av_lens import plots
from av_lens.errors import InputError
from av_lens.media import Clip, load_clip
from av_lens.media.clip import data_uri
from av_lens.plots import curves
from av_lens.reports.sections import head_name, mirrored, number
from av_lens.results.exchanged import exchanged
from av_lens.results.record import Isolation


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """How the instrument did on a planted model; `heads` holds one row per head, best rank first."""

    sentence: str
    passed: bool
    model: str
    heads: pd.DataFrame
    figures: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""

    def __post_init__(self) -> None:
        needed = ["rank", "layer", "head", "release", "share", "planted", "kind", "role"]
        if list(self.heads.columns) != needed:
            raise InputError(f"a calibration's heads have the columns {needed}; got {list(self.heads.columns)}.")

    def first(self) -> Any:
        """Choose the heads that a page lists: enough to hold all that were planted."""
        heads: Any = self.heads
        return heads.head(max(12, int(heads["planted"].sum()) + 4))


@dataclass(frozen=True)
class Card:
    """One clip of the gallery; `says` is the unedited model's word, `source` and `poster` are data URIs."""

    id: str
    sound: str
    picture: str
    says: str
    half: str
    source: str
    poster: str
    size: int


def gallery(
    conflicts: pd.DataFrame, clips: Mapping[str, Clip | str | Path], *, most: int = 12, budget_mb: float | int = 24.0
) -> tuple[Card, ...]:
    """Embed the first clips, in the table's order, as mp4 data URIs."""
    if strange := sorted(set(clips) - set(conflicts["id"])):
        raise InputError(f"clips were given for conflicts that this record does not hold: {strange[:5]}.")
    table: Any = conflicts[conflicts["id"].isin(list(clips))]
    cards: list[Card] = []
    spent = 0.0
    for row in table.sort_values("competent", ascending=False, kind="stable").head(most).to_dict("records"):
        given = clips[row["id"]]
        clip = given if isinstance(given, Clip) else load_clip(str(given))
        ready = not isinstance(given, Clip) and Path(given).suffix.lower() == ".mp4"
        data = Path(str(given)).read_bytes() if ready else clip.to_mp4_bytes()
        spent += len(data) / 2**20
        if spent > budget_mb:
            break
        words = (str(row[name]) for name in ("id", "sound_answer", "picture_answer", "says", "half"))
        cards.append(Card(*words, source=data_uri("video/mp4", data), poster=_poster(clip), size=len(data)))
    return tuple(cards)


def _poster(clip: Clip) -> str:
    """Encode the middle frame, so that the page shows something before anybody presses play."""
    if clip.frames is None:
        return ""
    from PIL import Image

    frame = Image.fromarray(np.array(clip.frames[len(clip.frames) // 2]))
    frame.thumbnail((360, 360))
    kept = io.BytesIO()
    frame.save(kept, format="JPEG", quality=88)
    return data_uri("image/jpeg", kept.getvalue())


_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True, eq=False)
class Drawing:
    """One figure of the page: its id and file name, title, caption, plotly figure, and its numbers as text."""

    name: str
    title: str
    caption: str
    figure: Any
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()

    @property
    def spec(self) -> str:
        """The figure as json that is safe inside a script element."""
        text = json.dumps(json.loads(self.figure.to_json()))
        return "".join(_ESCAPES.get(letter, letter) for letter in text)


def drawings(found: Isolation, calibration: Calibration | None = None) -> dict[str, Drawing]:
    """Draw everything that the record has the numbers for."""
    tables: Any = found
    made = [_behaviour(found), _release(found), *_maps(found), _confirmation(found), _knowledge(found)]
    if mirrored(found):
        kept = [drawing for drawing in made if drawing is not None]
        made = [replace(one, title=exchanged(one.title), caption=exchanged(one.caption)) for one in kept]
    if (tables.evidence["estimand"] == "dla").any():
        caption = "Each head's direct share of the logit difference at the asked position, the largest first."
        made.append(Drawing("attribution", "Direct attribution", caption, plots.attribution(found)))
    if calibration is not None:
        made.append(_calibration(calibration))
    return {drawing.name: drawing for drawing in made if drawing is not None}


def leading_donor(found: Isolation) -> str:
    """Name the donor that the verdict speaks of: the chosen set's, else the first head's, else `blank_muted`."""
    donors = [*found.sets.loc[found.sets["chosen"], "donor"], *found.heads["donor"], "blank_muted"]
    return str(donors[0])


def _behaviour(found: Any) -> Drawing | None:
    chosen = next((c for c in ("competent", "all") if (found.behaviour["chosen"] == c).any()), None)
    if chosen is None:
        return None
    caption = (
        "Above, in logits: what sound and picture do to the answer, hearing with nothing to see (G), under "
        "conflict (C), and the gap between them; to the right of zero is towards the sound. Below: how often the "
        "right answer is the better of the two, cell by cell. Filled: discovery half; open: confirmation half; "
        "lines: 95% intervals."
    )
    return Drawing("behaviour", "Sound, picture and the answer", caption, plots.behaviour(found, chosen=chosen))


def _release(found: Any) -> Drawing | None:
    rows = found.evidence[found.evidence["estimand"] == "release"]
    if not len(rows):
        return None
    total = len(rows.drop_duplicates(["layer", "head"]))
    figure = plots.release(found, site=str(rows["site"].iloc[0]))
    shown = len(figure.layout.yaxis.tickvals)
    caption = (
        f"The {shown} of {total} heads and MLPs with the largest release. Release: how far hearing under conflict "
        "rises when the head is replaced by what it would have been had it neither seen nor heard (blank_muted), had "
        "something else been asked (mean_other), or by nothing (zero). A head counts only right of the dotted "
        "line."
    )
    if found.heads["confirmed"].any():
        caption += " ✓: confirmed on the held-out half."
    wanted = rows[rows["half"] == "discovery"].sort_values("share", ascending=False).head(3 * shown)
    cells = tuple(
        (head_name(r), r["donor"], *(number(r[c]) for c in ("mean", "low", "high", "share")))
        for r in wanted.to_dict("records")
    )
    columns = ("head", "donor", "release (logits)", "low", "high", "share of G")
    return Drawing("release", "Which heads keep the sound from being said", caption, figure, columns, cells)


def _maps(found: Any) -> list[Drawing | None]:
    donor = leading_donor(found)
    named = {(int(a), int(b)) for a, b in zip(found.suppressors["layer"], found.suppressors["head"], strict=True)}
    named = {head for head in named if head[1] >= 0}
    outlined = " Outlined: confirmed suppressors." if named else ""
    release = (
        f"Release of every head by the donor {donor}, discovery half. Blue: editing the head gives hearing "
        f"back; vermilion: it takes hearing away.{outlined}"
    )
    writes = (
        "What every head writes directly into the answer under conflict, discovery half. Blue: for the sound; "
        f"vermilion: for the picture.{outlined}"
    )
    kinds = (("release", donor, "Release", release), ("dla", "", "Direct attribution", writes))
    drawn: list[Drawing | None] = []
    for estimand, by, name, caption in kinds:
        sites = found.evidence.query("estimand == @estimand and half == 'discovery'")["site"]
        if not len(sites):
            continue
        values = found.grid(estimand, by, site=str(sites.iloc[0]))
        figure = plots.heads(values, unit="logits", named=named)
        if not np.isfinite(values).all():
            caption += " Hatched: not measured."
        rows = tuple(
            (f"L{layer}", *(number(float(v), sign=True) for v in values[layer])) for layer in range(found.n_layers)
        )
        columns = ("layer", *(f"H{head}" for head in range(found.n_heads)))
        drawn.append(Drawing(f"map-{estimand}", f"{name}, head by head", caption, figure, columns, rows))
    return drawn


def _confirmation(found: Any) -> Drawing | None:
    arms = {"see heads" if arm == "hear heads" else arm for arm in found.ablation["arm"]}
    if not arms & {"set", "ranked heads"}:
        return None
    said = {
        "set": "Solid: the heads of the set, edited one after another in the order fixed on discovery.",
        "random": "Grey marks and pale rings: random heads of the same layers.",
        "see heads": "Diamond: as many top heads for what is seen.",
        "ranked heads": "Dotted: the k heads of largest single release together, which shows how spread the effect is.",
    }
    begin = "Held-out conflicts; release above, with its interval, and below it how often the model says each answer."
    caption = " ".join([begin, *(sentence for arm, sentence in said.items() if arm in arms)])
    title = "The set on held-out conflicts" if "set" in arms else "The largest single releases together, held out"
    figures = ("release", "low", "high", "says_sound", "says_picture")
    rows = tuple(
        (*(str(r[c]) for c in ("arm", "k", "members")), *(number(r[c]) for c in figures))
        for r in found.ablation[found.ablation["arm"] != "random"].to_dict("records")
    )
    columns = ("arm", "k", "members", "release (logits)", "low", "high", "says the sound", "says the picture")
    return Drawing("confirmation", title, caption, plots.confirmation(found), columns, rows)


def _knowledge(found: Any) -> Drawing | None:
    if not len(curves.drawn(found)):
        return None
    caption = (
        "Above: the share of conflicts in which the logit lens has the word among the likeliest at some position of "
        "the span. Below: how often a linear probe of the span's mean stream tells the class. Bands: 95% intervals; "
        "dotted: the null (other sounds' words, shuffled labels)."
    )
    return Drawing("knowledge", "The two words, layer by layer", caption, plots.knowledge(found))


def _calibration(calibration: Calibration) -> Drawing:
    frame: Any = calibration.heads
    values = np.full((int(frame["layer"].max()) + 1, int(frame["head"].max()) + 1), np.nan)
    values[frame["layer"].to_numpy(), frame["head"].to_numpy()] = frame["release"].to_numpy(float)
    planted = frame[frame["planted"].astype(bool)]
    named = [(int(a), int(b)) for a, b in zip(planted["layer"], planted["head"], strict=True)]
    figure = plots.heads(values, unit="logits", named=named)
    caption = f"The largest release of every head of {calibration.model}. Outlined: the heads that were planted."
    return Drawing("calibration", "Where the truth is known", caption, figure)
