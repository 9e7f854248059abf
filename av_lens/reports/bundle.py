"""A finding as a folder: the page to read, every figure as a file, every number as data.

`report.html` is the page; `numbers/` is the saved record (csv, json and npz; `Isolation.load` opens it);
`figures/NAME.json` opens with `plotly.io.read_json` and `figures/NAME.html` in any browser, all sharing one
`plotly.min.js` beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from av_lens.reports.drawings import drawings
from av_lens.reports.material import Calibration
from av_lens.reports.page import write_report
from av_lens.results.record import Isolation
from av_lens.whole_files import make_folder, write_whole


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
