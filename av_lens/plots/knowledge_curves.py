"""Is the sound in there, and where is it lost? The two words by layer and span, beside their nulls.

Above: the share of conflicts (`va`) in which the logit lens has the word among the likeliest at some position of the
span. Below: how often a linear probe tells the class from the span's mean stream, on held-out conflicts. Blue is the
sound, vermilion the picture; bands are 95% intervals; dotted is the null (other sounds' words, shuffled labels). Layers
count those that the stream has passed: 0 is before the first.
"""

from __future__ import annotations

from typing import Any

from av_lens import colours
from av_lens.errors import InputError
from av_lens.plots import _style

_ROWS = (("lens", "va", "word in the lens"), ("probe", "va, av", "class told by a probe"))
_WORDS = (("sound", colours.SOUND), ("picture", colours.PICTURE))


def knowledge(found: Any, *, title: str | None = None) -> Any:
    """Draw what the lens and the probes read, layer by layer.

    Args:
        found: an `Isolation`.
        title: the figure's title.

    Returns:
        A `plotly.graph_objects.Figure`; the lens above, probes below, a column for each span.

    Raises:
        InputError: the isolation did not ask what is known (nothing was measured).
    """
    from plotly.subplots import make_subplots

    frame = drawn(found)
    if not len(frame):
        raise InputError("this isolation holds no lens and no probes, so there is nothing to draw.")
    spans = list(dict.fromkeys(frame["span"]))
    base = _style.figure(title=title, height=520)
    look = _style.copied(base)
    grid: dict[str, Any] = {"shared_xaxes": True, "shared_yaxes": True, "vertical_spacing": 0.1}
    grid |= {"horizontal_spacing": 0.02, "column_titles": spans, "figure": base}
    fig = make_subplots(rows=2, cols=len(spans), **grid)
    fig.update_xaxes(**look)
    fig.update_yaxes(**look, range=[-0.04, 1.04], tickformat=".0%")
    for row, (method, cell, label) in enumerate(_ROWS, 1):
        here = frame[(frame["method"] == method) & (frame["cell"] == cell)]
        fig.update_yaxes(title_text=label, row=row, col=1)
        for column, span in enumerate(spans, 1):
            for word, colour in _WORDS:
                part = here[(here["span"] == span) & (here["word"] == word)].sort_values("layer")
                if len(part):
                    _curve(fig, part, word, colour, row=row, col=column)
    fig.update_xaxes(title_text="layers passed", row=2)
    fig.update_annotations(font={"size": 13})
    fig.update_layout(margin={"t": 96 if title else 70}, legend={"y": 1.1})
    return fig


def drawn(found: Any) -> Any:
    """Choose the rows that `knowledge` draws."""
    frame = found.knowledge
    return frame[frame["method"].isin([method for method, *_ in _ROWS]) & (frame["layer"] >= 0)]


def _curve(fig: Any, part: Any, word: str, colour: str, *, row: int, col: int) -> None:
    """One word's values with their band, and its null."""
    at, first = part["layer"], row == 1 and col == 1
    columns = (part[name] for name in ("value", "low", "high", "null"))
    said = [
        f"<b>{word}</b>, {layers} layers passed<br>{value:.2f} ({low:.2f} to {high:.2f})<br>null {null:.2f}"
        for layers, value, low, high, null in zip(at, *columns, strict=True)
    ]
    here: dict[str, Any] = {"row": row, "col": col}
    _style.band(fig, at, part["low"], part["high"], colour, word, **here)
    here |= {"legendgroup": word, "showlegend": first}
    dots = {"color": colour, "dash": "dot", "width": 1}
    fig.add_scatter(x=at, y=part["null"], mode="lines", name=f"{word}, null", line=dots, hoverinfo="skip", **here)
    _style.marks(fig, at, part["value"], said, mode="lines+markers", name=word, line={"color": colour}, **here)
