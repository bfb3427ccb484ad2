"""Draws learning rates against updates: plain numbers to one altair chart, and a chart to a file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import altair as alt
import numpy as np
import vl_convert

from lookfar import files
from lookfar.errors import UserError
from lookfar.study.figures import COLOURS, theme

KINDS = (".svg", ".png", ".pdf")
OFF = 0.001  # of the peak
HEIGHT = 100  # of a panel, in pixels
GREY = "#d0d7de"


def rate_curves(curves: Mapping[str, Sequence[float]]) -> alt.VConcatChart:
    """A panel for each name: the factor of the peak rate at updates 1, 2, …, before the other curves in grey."""
    scale = alt.Scale(domain=[0, max(map(len, curves.values()))], nice=False)
    y = alt.Y("rate:Q", title="part of the peak", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=3))
    data = {name: alt.Data(values=corners(rates)) for name, rates in curves.items()}
    panels = []
    for index, name in enumerate(curves):
        title = "update" if index + 1 == len(curves) else None
        x = alt.X("update:Q", title=title, scale=scale, axis=alt.Axis(format=",d", grid=False))
        lines = {each: alt.Chart(values).encode(x, y) for each, values in data.items()}
        own = lines.pop(name).mark_line(strokeWidth=2, color=COLOURS[index % len(COLOURS)])
        others = [each.mark_line(strokeWidth=1, color=GREY) for each in lines.values()]
        panel = alt.LayerChart(layer=[*others, own], title=alt.TitleParams(name, offset=8))
        panels.append(panel.properties(width=560, height=HEIGHT))
    return alt.VConcatChart(vconcat=panels, spacing=8)


def save(chart: alt.VConcatChart, path: Path) -> None:
    """Write a chart as SVG, PNG or PDF; the ending of the path says which.

    Raises:
        UserError: another ending, or a place that cannot be written.
    """
    check_kind(path)
    specification = {**chart.to_dict(validate=False), "config": theme(), "background": "white"}
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    svg = vl_convert.vegalite_to_svg(specification, vl_version=version)
    content = {
        ".svg": svg.encode,
        ".png": lambda: vl_convert.svg_to_png(svg, scale=2),
        ".pdf": lambda: vl_convert.svg_to_pdf(svg),
    }[path.suffix.lower()]()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another place for the figure.") from error


def check_kind(path: Path) -> None:
    """Raise a `UserError` for a path whose ending names no kind of figure."""
    if path.suffix.lower() not in KINDS:
        raise UserError(f"The figure {path} must end in one of {', '.join(KINDS)}.")


def corners(rates: Sequence[float]) -> tuple[dict[str, int | float], ...]:
    """The corners of a curve between which straight lines are nowhere off by more than `OFF`."""
    values, kept, spans = np.asarray(rates), {0, len(rates) - 1}, [(0, len(rates) - 1)]
    while spans:
        first, last = spans.pop()
        off = np.abs(values[first : last + 1] - np.linspace(values[first], values[last], last - first + 1))
        corner = first + int(off.argmax())
        if off.max() > OFF:
            kept.add(corner)
            spans += [(first, corner), (corner, last)]
    return tuple({"update": place + 1, "rate": float(rates[place])} for place in sorted(kept))
