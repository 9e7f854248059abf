"""A finding as a folder: the page to read, every figure as a file, every number as data.

`report.html` is the page; `numbers/` is the saved record (csv, json and npz; `Isolation.load` opens it);
`figures/NAME.json` opens with `plotly.io.read_json` and `figures/NAME.html` in any browser, all sharing one
`plotly.min.js` beside them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from av_lens.reports.drawings import drawings
from av_lens.reports.material import Calibration
from av_lens.reports.page import write_report
from av_lens.results.record import Isolation


def write_bundle(
    found: Isolation, folder: str | Path, *, calibration: Calibration | None = None, **options: Any
) -> Path:
    """Write the page, the figures and the numbers of a finding into a folder.

    Args:
        found: the record.
        folder: made if absent; what an earlier bundle wrote there is replaced.
        calibration: how the method did on a model whose truth is known.
        **options: passed to `write_report`, such as `clips=` and `caveats=`.

    Returns:
        The page's path, `folder/report.html`; it is written last, so that its presence means that all is there.
    """
    folder = Path(folder)
    found.save(folder / "numbers")
    if calibration is not None:
        _replace(folder / "numbers" / "calibration.csv", calibration.heads.to_csv(index=False))
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings(found, calibration).items():
        _replace(figures / f"{name}.json", str(drawing.figure.to_json(pretty=True)))
        titled = drawing.figure.update_layout(title={"text": drawing.title}, margin={"t": 84})
        config = {"displaylogo": False, "responsive": True}
        _replace(figures / f"{name}.html", titled.to_html(include_plotlyjs="plotly.min.js", config=config))
    from plotly.offline import get_plotlyjs

    _replace(figures / "plotly.min.js", get_plotlyjs())
    return write_report(found, folder / "report.html", calibration=calibration, **options)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
