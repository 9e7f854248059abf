"""A finding as one page that a newcomer reads from top to bottom, and that loads nothing; and as a folder.

Verdict first; then how to read it, what the model does, clips to play, the heads, held-out confirmation, calibration
where the truth is known, what all this does and does not prove, and where it comes from. Figures, their script and the
clips are inside the file; a content policy in its head forbids the browser any request. Light and dark follow the
reader's system. Numbers are shown with three figures; the csv files beside the page (`write_bundle`) hold every digit.

Example:
    ```python
    write_report(found, "report.html", clips={"0001": clip})
    ```

`report.html` is the page; `numbers/` is the saved record (csv, json and npz; `Isolation.load` opens it);
`figures/NAME.json` opens with `plotly.io.read_json` and `figures/NAME.html` in any browser, all sharing one
`plotly.min.js` beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from av_lens import __version__
from av_lens.colours import PAGES
from av_lens.media import Clip
from av_lens.plots import THEMES
from av_lens.reports import sections
from av_lens.reports.blocks import blocks
from av_lens.reports.drawings import Calibration, Drawing, drawings, gallery
from av_lens.results.record import SUPPRESSORS, Isolation
from av_lens.whole_files import make_folder, write_whole

_GENERAL = (
    "It is causal about this model on clips like these: the heads were edited and the answer changed, on conflicts "
    "that were not used to find them. It says nothing about other models or other kinds of clip.",
    "A head that is named keeps the sound from being said by at least one of the three edits. That it does so in order "
    "to, or that it does nothing else, is not shown; the specificity table says what was tested.",
    "Nothing found is not nothing there: heads that stand in for each other hide each other, and the search for sets "
    "finds some of these, not all. Only the sites named in the protocol were searched.",
)
_STOPPED = (
    "No head was edited: the search was not begun. This page says how the model behaves on clips like these, and "
    "nothing about its heads, other models or other kinds of clip.",
)


def write_report(
    found: Isolation,
    path: str | Path,
    *,
    clips: Mapping[str, Clip | str | Path] | None = None,
    calibration: Calibration | None = None,
    caveats: Sequence[str] = (),
    title: str | None = None,
    most_clips: int = 12,
    budget_mb: float | int = 24.0,
) -> Path:
    """Write an isolation as one self-contained page."""
    path = Path(path)
    cards = gallery(found.conflicts, clips or {}, most=most_clips, budget_mb=budget_mb)
    drawn = drawings(found, calibration)
    context = _context(found, calibration=calibration, caveats=caveats, title=title)
    text = _render(drawn, {**context, "cards": cards})
    make_folder(path.parent)
    write_whole(path, text)
    return path


def _render(drawn: Mapping[str, Drawing], context: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    from markupsafe import Markup, escape
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html", "j2"], default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawing_template = environment.get_template("figure.html.j2")

    def figure(name: str) -> Markup:
        return Markup(drawing_template.render(drawing=drawn[name]) if name in drawn else "")

    page = environment.get_template("page.html.j2")
    model = escape(context["model"])
    headline = Markup(str(escape(context["title"])).replace(str(model), f"<span>{model}</span>"))  # not broken in two
    shown: dict[str, Any] = {"plotly_js": Markup(get_plotlyjs()), "themes": json.dumps(THEMES), "colours": PAGES}
    return page.render(**context, headline=headline, figure=figure, **shown)


def _context(
    found: Isolation, *, calibration: Calibration | None, caveats: Sequence[str], title: str | None
) -> dict[str, Any]:
    """Gather everything that the template says, as text."""
    figures = {} if calibration is None else calibration.figures
    model = str(found.provenance.get("model", "the model"))
    question = found.protocol.get("question", found.provenance.get("question"))
    provenance = {k: v for k, v in found.provenance.items() if k != "choices"}
    power = float(found.summary.get("power", float("nan")))
    heads, searched = sections.head_rows(found), len(found.evidence) > 0
    return {
        "title": title or f"Which heads keep {model} from saying what it hears?",
        "model": model,
        "when": str(found.provenance.get("created", "")).replace("T", " ") or f"av_lens {__version__}",
        "stamps": [{"name": stamp, "meaning": _stamp(found, stamp)} for stamp in found.stamps],
        "kind": sections.KINDS.get(found.verdict_kind, found.verdict_kind),
        "verdict": found.verdict,
        "reasons": [r for r in found.reasons if r.split(": ")[0] not in found.stamps and r not in found.verdict],
        "tiles": sections.tiles(found),
        "asked": f"“{question}”." if question else "what it hears.",
        "threshold": sections.percent(float(found.protocol["s"])) if "s" in found.protocol else "a fixed share",
        "behaviour": _behaviour(found),
        "other_behaviour": len(set(found.behaviour["chosen"])) > 1,
        "n_conflicts": len(found.conflicts),
        "heads": heads,
        "roles": [
            {"name": role, "meaning": meaning, "suppressor": role in SUPPRESSORS}
            for role, meaning in sections.ROLE_MEANINGS.items()
            if any(row["role"] == role for row in heads)
        ],
        "columns": sections.COLUMNS,
        "power": "" if power != power else f"{sections.number(power)} logits",
        "sets": sections.set_rows(found),
        "specificity": sections.specificity_rows(found),
        "blocks": blocks(found),
        "calibration": calibration,
        "calibration_rows": [] if calibration is None else _calibration_rows(calibration),
        "calibration_figures": [(name.replace("_", " "), sections.number(value)) for name, value in figures.items()],
        "searched": searched,
        "caveats": [*caveats, *(_GENERAL if searched else _STOPPED)],
        "choices": [str(choice) for choice in found.provenance.get("choices", [])],
        "provenance": sections.flat(provenance),
        "protocol": sections.flat(found.protocol),
        "conflicts": _conflict_rows(found),
        "version": __version__,
    }


def _stamp(found: Any, stamp: str) -> str:
    """Say what a stamp means: the record's own reason where it gives one, then what follows from it."""
    own = [reason.removeprefix(f"{stamp}: ") for reason in found.reasons if reason.startswith(f"{stamp}: ")]
    return " ".join([*own, sections.STAMP_MEANINGS.get(stamp, "")]).strip()


def _behaviour(found: Any) -> list[dict[str, Any]]:
    captions = {
        "competent": "Conflicts chosen by competence: each sound is heard and each picture seen on its own",
        "all": "All conflicts, without that choice",
    }
    chosen = [name for name in captions if (found.behaviour["chosen"] == name).any()]
    return [{"name": n, "caption": captions[n], "rows": sections.behaviour_rows(found, n)} for n in chosen]


def _calibration_rows(calibration: Calibration, *, most: int = 12) -> list[dict[str, Any]]:
    heads: Any = calibration.heads
    planted = int(heads["planted"].sum())
    return [
        {
            "rank": int(row["rank"]),
            "head": f"L{row['layer']} H{row['head']}",
            "planted": bool(row["planted"]),
            "kind": row["kind"],
            "role": row["role"],
            "release": sections.number(float(row["release"]), sign=True),
            "share": sections.percent(float(row["share"])),
        }
        for row in heads.head(max(most, planted + 4)).to_dict("records")
    ]


def _conflict_rows(found: Any) -> list[dict[str, str]]:
    return [
        {
            "id": str(row["id"]),
            "half": row["half"] or sections.MISSING,
            "component": str(row["component"]),
            "competent": "yes" if row["competent"] else "no",
            "sound": row["sound_answer"],
            "picture": row["picture_answer"],
            "says": row["says"] or sections.MISSING,
            **{name: sections.number(float(row[name]), sign=True) for name in ("M_va", "M_av", "C", "G")},
        }
        for row in found.conflicts.to_dict("records")
    ]


def write_bundle(
    found: Isolation, folder: str | Path, *, calibration: Calibration | None = None, **options: Any
) -> Path:
    """Write the page, the figures and the numbers of a finding into a folder."""
    folder = Path(folder)
    found.save(folder / "numbers")
    if calibration is not None:
        write_whole(folder / "numbers" / "calibration.csv", calibration.heads.to_csv(index=False))
    figures = folder / "figures"
    make_folder(figures)
    for name, drawing in drawings(found, calibration).items():
        write_whole(figures / f"{name}.json", str(drawing.figure.to_json(pretty=True)))
        titled = drawing.figure.update_layout(title={"text": drawing.title}, margin={"t": 84})
        config = {"displaylogo": False, "responsive": True}
        write_whole(figures / f"{name}.html", titled.to_html(include_plotlyjs="plotly.min.js", config=config))
    from plotly.offline import get_plotlyjs

    write_whole(figures / "plotly.min.js", get_plotlyjs())
    return write_report(found, folder / "report.html", calibration=calibration, **options)
