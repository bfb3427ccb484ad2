"""Draws the loss by place in the window: plain rows of `loss_at` to altair charts."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from lookfar.study.figures import (
    Axes,
    Look,
    Row,
    coloured,
    dashed,
    faded,
    grouped,
    height_of,
    labelled,
    panels_of,
    shaped,
    shortened,
    shown,
)

FEWEST = 8  # windows in which a stretch is scored
TOOLTIP = {
    "series:N": "scheme",
    "place:N": "tokens before it",
    "mean:N": "loss",
    "seeds:Q": "seeds",
    "count:N": "scored",
}


def by_position(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """Loss against how many tokens of the window come before, at the longest length, a panel for each protocol.

    The rows share their data, trained length and unit; a mean is over seeds. A point stands where its stretch ends.
    What few windows score, as all but the end is under sliding ones, is chance and left out.
    """
    found = [row for row in rows if row["metric"] == "loss_at" and 0 < row["value"] < math.inf]
    longest = max((row["length"] for row in found), default=0)
    found = [row for row in found if row["length"] == longest and _windows(row) >= FEWEST]
    found = [row for each in panels_of(found).values() for row in each if len({row["to"] for row in each}) > 1]
    if not found:
        return []
    panels = {title: _points(each) for title, each in panels_of(found).items()}
    values = [point["value"] for each in panels.values() for point in each]
    margin = max(1.02, (max(values) / min(values)) ** 0.06)
    frame = min(values) / margin, max(values) * margin
    return [
        _panel(f"{title}, {found[0]['length']:,} tokens", each, frame, found[0], looks)
        for title, each in panels.items()
    ]


def _windows(row: Row) -> float:
    """How many windows a stretch was scored in."""
    return row["count"] / (row["to"] - row["from"] + 1)


def _points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    points = []
    for series, of_series in sorted(grouped(rows, "series").items()):
        for end, each in sorted(grouped(of_series, "to").items()):
            value, first = fmean(row["value"] for row in each), each[0]["from"]
            place = f"{end:,}" if first == end else f"{first:,} to {end:,}"
            counts = sorted({row["count"] for row in each})
            point = {"series": series, "to": end, "value": value, "mean": f"{value:.4f}", "place": place}
            told = " to ".join(f"{count:,}" for count in (counts[0], counts[-1])[: len(counts)])
            points.append({**point, "seeds": len({row["seed"] for row in each}), "count": told})
    return points


def _panel(
    title: str, points: Sequence[dict[str, Any]], frame: tuple[float, float], row: Row, looks: Mapping[str, Look]
) -> alt.LayerChart:
    context, last = row["context"], max(max(point["to"] for point in points), 2)
    x = alt.X(
        "to:Q",
        title="tokens of the window before it",
        scale=alt.Scale(type="log", domain=[1, last * 1.06], nice=False),
        axis=alt.Axis(
            grid=False, values=[1 << level for level in range(last.bit_length())], format=",d", labelOverlap="greedy"
        ),
    )
    axes = Axes(x, "to", frame, f"loss (nats per {row['unit']})")
    look = {"color": coloured(looks), "opacity": faded()}
    trained = alt.Chart(alt.Data(values=[{"to": context, "text": "trained length"}] if context < last else [])).encode(
        x
    )
    layers = [
        trained.mark_rule(strokeDash=[3, 3], style="trained"),
        trained.mark_text(y=-9, align="left", style="note").encode(text="text:N"),
        shown(points)
        .mark_line(strokeWidth=1.8)
        .encode(x, axes.y("value"), strokeDash=dashed(looks), detail="series:N", **look),
        shown(points)
        .mark_point(filled=True, size=30)
        .encode(
            x,
            axes.y("value"),
            shape=shaped(looks),
            tooltip=[alt.Tooltip(field, title=name) for field, name in TOOLTIP.items()],
            **look,
        ),
    ]
    ends = [
        {"series": series, "label": shortened(series), "x": each[-1]["to"], "value": each[-1]["value"]}
        for series, each in grouped(points, "series").items()
    ]
    chart = alt.LayerChart(layer=[*layers, *labelled(ends, axes, looks)])
    return chart.properties(height=height_of(ends), width="container", title=title)
