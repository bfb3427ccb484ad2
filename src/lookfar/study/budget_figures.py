"""Draws what a model at each budget costs, and the rates that made it: plain rows and histories to altair charts."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import altair as alt

from lookfar.study.figures import (
    Axes,
    Look,
    Row,
    budgets_of,
    coloured,
    dashed,
    faded,
    grouped,
    height_of,
    labelled,
    readable,
    shaped,
    shortened,
    shown,
)
from lookfar.study.rate_curves import corners

GREY = "#8c959f"
HEIGHT = 110  # of a panel of rates, in pixels


def cost(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """Held-out loss at each budget against the updates spent on it and those before; no panel without budgets.

    The loss is that at the trained length, in the first protocol; bars reach from the lowest seed to the highest.
    """
    rows = [row for row in rows if row["metric"] == "perplexity" and row["length"] == row["context"]]
    budgets = budgets_of(rows)
    if not budgets:
        return []
    protocol = min(row["protocol"] for row in rows)
    points = [
        _point(series, budget, each)
        for series, of_series in grouped(rows, "series").items()
        for budget, each in sorted(grouped(_finite(of_series, protocol), "update").items())
    ]
    if not points:
        return []
    x = alt.X(
        "spent:Q",
        title="updates spent on this and all smaller budgets",
        scale=alt.Scale(domain=[0, max(point["spent"] for point in points) * 1.03], nice=False),
        axis=alt.Axis(grid=False, tickCount=6, format=",d"),
    )
    low, high = min(point["low"] for point in points), max(point["high"] for point in points)
    margin = (high / low) ** 0.08
    axes = Axes(x, "spent", (low / margin, high * margin), f"held-out loss (nats per {rows[0]['unit']})")
    contours = [sorted(each, key=lambda point: point["spent"]) for each in grouped(points, "budget").values()]
    tooltip = [
        alt.Tooltip(f"{key}:N", title=title)
        for key, title in {
            "series": "",
            "budget": "budget",
            "spent": "spent",
            "mean": "loss",
            "seeds": "by seed",
        }.items()
    ]
    look = {"color": coloured(looks), "opacity": faded()}
    layers = [
        alt.Chart(alt.Data(values=[point for each in contours for point in each]))
        .mark_line(color=GREY, strokeWidth=0.8, strokeDash=[2, 3])
        .encode(x, axes.y("value"), detail="budget:N"),
        alt.Chart(alt.Data(values=[_headline(each) for each in contours]))
        .mark_text(dx=-8, dy=9, align="right", style="note")
        .encode(x, axes.y("value"), text="text:N"),
        shown([point for point in points if point["low"] < point["high"]])
        .mark_rule(strokeWidth=1.2)
        .encode(x, axes.y("low"), alt.Y2("high:Q"), **look),
        shown(points)
        .mark_line(strokeWidth=1.8)
        .encode(x, axes.y("value"), strokeDash=dashed(looks), detail="series:N", **look),
        shown(points)
        .mark_point(filled=True, size=45)
        .encode(x, axes.y("value"), shape=shaped(looks), tooltip=tooltip, **look),
    ]
    last = [each[-1] for each in grouped(points, "series").values()]
    ends = [{**point, "label": shortened(point["series"]), "x": point["spent"]} for point in last]
    chart = alt.LayerChart(layer=[*layers, *labelled(ends, axes, looks)])
    return [chart.properties(height=height_of(ends), width="container")]


def rates(histories: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """The rates that were used against updates, a panel for each series with all its runs; seeds have the same."""
    first = [each[0] for each in grouped([each for each in histories if _has_rates(each)], "curve").values()]
    runs = [_rates(each, first) for each in first]
    if not runs:
        return []
    x = alt.X(
        "update:Q",
        title="updates",
        scale=alt.Scale(domain=[0, max(run[-1]["update"] for run in runs)], nice=False),
        axis=alt.Axis(grid=False, tickCount=5, format=",d"),
    )
    top = max(point["rate"] for run in runs for point in run)
    y = alt.Y(
        "rate:Q",
        title="rate",
        scale=alt.Scale(domain=[0, top * 1.05], nice=False),
        axis=alt.Axis(tickCount=3, format="~g"),
    )
    panels = []
    for series, each in grouped([point for run in runs for point in run], "series").items():
        line = shown(each).mark_line(strokeWidth=1.8).encode(x, y, coloured(looks), detail="curve:N", opacity=faded())
        panels.append(alt.LayerChart(layer=[line], title=alt.TitleParams(shortened(series), offset=8)))
    return [panel.properties(height=HEIGHT, width="container") for panel in panels]


def _finite(rows: Sequence[Row], protocol: str) -> list[Row]:
    return [row for row in rows if row["protocol"] == protocol and 1 < row["value"] < math.inf and "update" in row]


def _point(series: str, budget: int, rows: Sequence[Row]) -> dict[str, Any]:
    losses = [math.log(row["value"]) for row in rows]
    return {
        "series": series,
        "budget": budget,
        "spent": fmean(row.get("spent", budget) for row in rows),
        "value": fmean(losses),
        "low": min(losses),
        "high": max(losses),
        "mean": readable(fmean(losses), 4),
        "seeds": ", ".join(f"{row['seed']}: {readable(loss, 4)}" for row, loss in zip(rows, losses, strict=True)),
    }


def _headline(contour: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the budget of a contour is told: at its lower left, where no curve passes."""
    first = min(contour, key=lambda point: (point["spent"], point["value"]))
    return {"spent": first["spent"], "value": first["value"], "text": f"{first['budget']:,} updates"}


def _has_rates(history: Row) -> bool:
    return bool(history["update"]) and None not in history["rate"]


def _rates(history: Row, others: Sequence[Row]) -> list[dict[str, Any]]:
    """The corners of a run's curve; that of a branch begins where it leaves the run of its series."""
    about = {"series": history["series"], "curve": history["curve"]}
    before, used = history["update"][0] - 1, [*history["rate"]]
    trunks = [each for each in others if each["series"] == history["series"] and before in each["update"]]
    if trunks:
        used.insert(0, trunks[0]["rate"][trunks[0]["update"].index(before)])
        before -= 1
    return [
        {**about, "update": corner["update"] + before, "rate": corner["rate"] * max(used)}
        for corner in corners([rate / max(used) for rate in used])
    ]
