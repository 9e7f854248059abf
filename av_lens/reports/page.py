"""A finding as one page that a newcomer reads from top to bottom, and that loads nothing; and as a folder."""

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
from av_lens.results.record import MIRRORED_SUPPRESSORS, SUPPRESSORS, Isolation
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

_CHOSEN = {
    "competent": "Conflicts chosen by competence: each sound is heard and each picture seen on its own",
    "all": "All conflicts, without that choice",
}


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
    context = _context(found, calibration, caveats, title)
    text = rendered("page.html.j2", drawn, {**context, "cards": cards})
    make_folder(path.parent)
    write_whole(path, text)
    return path


def rendered(template: str, drawn: Mapping[str, Drawing], context: dict[str, Any]) -> str:
    """Fill a page's template, its figures and scripts inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape
    from plotly.offline import get_plotlyjs

    strict: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **strict)
    drawing_template = environment.get_template("figure.html.j2")

    def figure(name: str) -> Markup:
        return Markup(drawing_template.render(drawing=drawn[name]) if name in drawn else "")

    page = environment.get_template(template)
    model = escape(context["model"])
    headline = Markup(str(escape(context["title"])).replace(str(model), f"<span>{model}</span>"))  # not broken in two
    shown: dict[str, Any] = {"plotly_js": Markup(get_plotlyjs()), "themes": json.dumps(THEMES), "colours": PAGES}
    shown |= {"say": sections, "version": __version__}
    return page.render(**context, headline=headline, figure=figure, **shown)


def _context(
    found: Isolation, calibration: Calibration | None, caveats: Sequence[str], title: str | None
) -> dict[str, Any]:
    tables: Any = found
    model = str(found.provenance.get("model", "the model"))
    question = found.protocol.get("question", found.provenance.get("question"))
    provenance = {k: v for k, v in found.provenance.items() if k not in ("choices", "sources")}
    power = float(found.summary.get("power", float("nan")))
    searched, mirrored = len(found.evidence) > 0, sections.mirrored(found)
    return {
        "title": title or f"Which heads keep {model} from saying what it {'sees' if mirrored else 'hears'}?",
        "mirrored": mirrored,
        "refused": "not interpretable" in found.stamps,
        "model": model,
        "what": "isolation",
        "when": str(found.provenance.get("created", "")).replace("T", " ") or f"av_lens {__version__}",
        "stamps": [{"name": stamp, "meaning": _stamp(found, stamp)} for stamp in found.stamps],
        "kind": sections.KINDS.get(found.verdict_kind, found.verdict_kind),
        "verdict": found.verdict,
        "reasons": [r for r in found.reasons if r.split(": ")[0] not in found.stamps and r not in found.verdict],
        "tiles": sections.tiles(found),
        "asked": f"“{question}”." if question else "what it hears.",
        "threshold": sections.percent(float(found.protocol["s"])) if "s" in found.protocol else "a fixed share",
        "behaviour": [
            {"name": name, "caption": caption, "rows": rows}
            for name, caption in _CHOSEN.items()
            if (rows := sections.behaviour_rows(found, name))
        ],
        "other_behaviour": len(set(found.behaviour["chosen"])) > 1,
        "n_conflicts": len(found.conflicts),
        "heads": tables.nodes.to_dict("records"),
        "suppressors": (*SUPPRESSORS, *MIRRORED_SUPPRESSORS),
        "power": "" if power != power else f"{sections.number(power)} logits",
        "sets": tables.sets.sort_values("chosen", ascending=False, kind="stable").to_dict("records"),
        "specificity": tables.specificity.to_dict("records"),
        "blocks": blocks(found),
        "calibration": calibration,
        "calibration_rows": [] if calibration is None else calibration.first().to_dict("records"),
        "searched": searched,
        "caveats": [*caveats, *(_GENERAL if searched else _STOPPED)],
        "choices": [str(choice) for choice in found.provenance.get("choices", [])],
        "provenance": sections.flat(provenance),
        "protocol": sections.flat(found.protocol),
        "conflicts": tables.conflicts.to_dict("records"),
    }


def _stamp(found: Any, stamp: str) -> str:
    """Say what a stamp means: the record's own reason where it gives one, then what follows from it."""
    said = (reason.partition(": ") for reason in found.reasons)
    own = [reason for name, _, reason in said if name == stamp]
    return " ".join([*own, sections.STAMP_MEANINGS.get(stamp, "")]).strip()


def write_bundle(
    found: Isolation, folder: str | Path, *, calibration: Calibration | None = None, **options: Any
) -> Path:
    """Write the page, the figures and the numbers of a finding into a folder."""
    folder = Path(folder)
    found.save(folder / "numbers")
    if calibration is not None:
        write_whole(folder / "numbers" / "calibration.csv", calibration.heads.to_csv(index=False))
    figures = make_folder(folder / "figures")
    for name, drawing in drawings(found, calibration).items():
        write_whole(figures / f"{name}.json", str(drawing.figure.to_json(pretty=True)))
        titled = drawing.figure.update_layout(title={"text": drawing.title}, margin={"t": 84})
        config = {"displaylogo": False, "responsive": True}
        write_whole(figures / f"{name}.html", titled.to_html(include_plotlyjs="plotly.min.js", config=config))
    from plotly.offline import get_plotlyjs

    write_whole(figures / "plotly.min.js", get_plotlyjs())
    return write_report(found, folder / "report.html", calibration=calibration, **options)
