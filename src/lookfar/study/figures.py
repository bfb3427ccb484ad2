"""Draws measurement rows and training logs: pure functions from plain rows to altair charts.

A row is a line of `rows.jsonl` with one key more, `series`: the name under which its curve appears (its scheme, unless
several folders bring the same one). A history is what one run logged: `series`, `run`, `update`, `loss` and `rate`,
and `curve`: what its seeds share and no other run of the series.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from statistics import geometric_mean, median
from typing import Any

import altair as alt
import numpy as np

Row = Mapping[str, Any]

# Ten colours whose every pair stays 0.09 apart in OKLab, also as seen with protanopia, deuteranopia and tritanopia, and
# that stand out from white and from near-black by 2.2 to 1. The shape says it again where there is no colour.
COLOURS = (
    *("#316ddc", "#ce7029", "#922075", "#43b2eb", "#876e7e"),
    *("#beb040", "#2f6b36", "#6232ad", "#739c7b", "#ee79b9"),
)
SHAPES = (
    "M0.9,0A0.9,0.9,0,1,1,-0.9,0A0.9,0.9,0,1,1,0.9,0Z",  # disc
    "M-0.8,-0.8H0.8V0.8H-0.8Z",  # square
    "M0,-1.15L1.15,0L0,1.15L-1.15,0Z",  # diamond
    "M0,-1.05L1.1,0.85H-1.1Z",  # triangle
    "M-0.35,-1.05H0.35V-0.35H1.05V0.35H0.35V1.05H-0.35V0.35H-1.05V-0.35H-0.35Z",  # plus
    "M0,1.05L1.1,-0.85H-1.1Z",  # triangle on its tip
    "M0,-1.25L0.33,-0.45L1.19,-0.39L0.53,0.17L0.73,1.01L0,0.55L-0.73,1.01L-0.53,0.17L-1.19,-0.39L-0.33,-0.45Z",  # star
    "M-0.6,-1.05L0,-0.5L0.6,-1.05L1.05,-0.6L0.5,0L1.05,0.6L0.6,1.05L0,0.5L-0.6,1.05L-1.05,0.6L-0.5,0L-1.05,-0.6Z",  # x
    "M1.05,0L-0.85,1.1V-1.1Z",  # triangle to the right
)
DASHES = ((1.0, 0.0), (6.0, 2.5), (2.0, 2.0), (8.0, 2.5, 2.0, 2.5))
ARROW = "M0,-1.1L0.75,0.3H0.25V1.1H-0.25V0.3H-0.75Z"
CROSS = SHAPES[7]

HEIGHT = 300  # of a panel, in pixels
LINE = 14.0  # between two labels
POINTS = 400  # of one run in a loss curve, at most


@dataclass(frozen=True)
class Look:
    """How one series is drawn, alike in every figure."""

    colour: str
    shape: str  # an SVG path within the unit square, around the origin
    dash: tuple[float, ...]


def looks(schemes: Mapping[str, str]) -> dict[str, Look]:
    """Give every series the colour of its scheme; `schemes` maps series to schemes. The order of rows has no say."""
    colours = {scheme: index for index, scheme in enumerate(sorted(set(schemes.values())))}
    seen: dict[str, int] = defaultdict(int)
    chosen: dict[str, Look] = {}
    for series in sorted(schemes, key=lambda name: (schemes[name], name)):
        index, variant = colours[schemes[series]], seen[schemes[series]]
        seen[schemes[series]] += 1
        dash = DASHES[(index // len(COLOURS) + variant) % len(DASHES)]
        chosen[series] = Look(COLOURS[index % len(COLOURS)], SHAPES[(index + 4 * variant) % len(SHAPES)], dash)
    return chosen


def perplexity(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """Perplexity against length, a panel for each protocol, and for each budget where there are several.

    The rows share their data, trained length and unit; the panels share the axis of perplexity.
    """
    rows = [row for row in rows if row["metric"] == "perplexity"]
    points = {title: _points(each) for title, each in panels_of(rows).items()}
    finite = [point for each in points.values() for point in each if point["piece"] is not None]
    if not finite:
        return []
    frame = _frame(finite)
    return [_perplexity_panel(title, each, frame, rows[0], looks) for title, each in points.items()]


def loss(histories: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """Training loss against updates, one panel or none: that of every run faint, its running median over seeds bold."""
    histories = [finite for finite in map(_finite, histories) if finite["update"]]
    if not histories:
        return []
    most = max(100, min(POINTS, POINTS * 15 // len(histories)))
    curves = [_smoothed(each) for each in grouped(histories, "curve").values()]
    x = alt.X(
        "update:Q",
        title="updates",
        scale=alt.Scale(domain=[0, max(curve["update"][-1] for curve in curves)], nice=False),
        axis=alt.Axis(grid=False, tickCount=6, format=",d"),
    )
    faint = max(0.07, min(0.25, 4 / len(histories)))
    axes = Axes(x, "update", _loss_frame([curve["smooth"] for curve in curves]), "training loss (nats)")
    tooltip = [alt.Tooltip("series:N", title="scheme"), alt.Tooltip("last:Q", title="last running median")]
    layers = [
        shown([_thinned(history, most) for history in histories])
        .transform_flatten(["update", "loss"])
        .mark_line(clip=True, strokeWidth=0.6)
        .encode(x, axes.y("loss"), coloured(looks), detail="run:N", opacity=faded(faint)),
        shown(curves)
        .transform_flatten(["update", "smooth"])
        .mark_line(clip=True, strokeWidth=1.8)
        .encode(
            x, axes.y("smooth"), coloured(looks), dashed(looks), detail="curve:N", opacity=faded(), tooltip=tooltip
        ),
    ]
    longest = {curve["series"]: curve for curve in sorted(curves, key=lambda curve: curve["update"][-1])}
    ends = [
        {"series": name, "label": shortened(name), "x": curve["update"][-1], "value": curve["last"]}
        for name, curve in longest.items()
    ]
    chart = alt.LayerChart(layer=[*layers, *labelled(ends, axes, looks)])
    return [chart.properties(height=height_of(ends), width="container")]


def specification(chart: alt.LayerChart) -> dict[str, Any]:
    """A panel in Vega-Lite, as wide as its container; its parameters name the series to hide and the one to light."""
    parameters = [{"name": "hidden", "value": []}, {"name": "lit", "value": ""}]
    return {**chart.to_dict(validate=False), "params": parameters, "config": theme()}


def sheet(groups: Sequence[tuple[str, Sequence[Row]]], names: Iterable[str], width: int = 900) -> dict[str, Any]:
    """Specified panels on paper: those of a group side by side where they fit into the width, groups below each other.

    A group is its title and its panels; `names` are the series, for which the margins leave room.
    """
    margin = 90 + 5.7 * max(len(shortened(name)) + 7 for name in names)
    blocks = []
    for title, each in groups:
        columns = min(len(each), max(1, int(width // (200 + margin))))
        size = {"width": int(max(200, min(480, width / columns - margin)))}
        inner = [
            {key: panel[key] for key in ("data", "layer", "height", "title") if key in panel} | size for panel in each
        ]
        lines = [{"hconcat": inner[start : start + columns], "spacing": 12} for start in range(0, len(inner), columns)]
        block = {"vconcat": lines, "spacing": 24}
        several = {"title": {"text": title, "fontSize": 14, "offset": 12}} if len(groups) > 1 else {}
        blocks.append(block | several)
    shared = {key: groups[0][1][0][key] for key in ("$schema", "params", "config")}
    return {**shared, "background": "white", "vconcat": blocks, "spacing": 36}


def theme() -> dict[str, Any]:
    """The Vega configuration that every figure shares. Its four greys are known to the style sheet of the page."""
    return json.loads(files("lookfar.study").joinpath("theme.json").read_text(encoding="utf-8"))


def readable(value: float, digits: int = 3) -> str:
    """A number as a reader wants it: `digits` significant ones, thousands parted, an exponent from ten millions on."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞"
    if abs(value) >= 1e7:
        return f"{value:.{digits - 1}e}".replace("e+0", "e").replace("e+", "e")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending places as little as possible until neighbours are `gap` apart, all between `low` and `high`."""
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    blocks: list[list[float]] = []
    for index, place in enumerate(wanted):
        blocks.append([place - index * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [float(np.mean(block)) for block in blocks for _ in block]
    limit = high - (len(wanted) - 1) * gap
    return [min(max(place, low), limit) + index * gap for index, place in enumerate(level)]


def thin(losses: Sequence[float], most: int = POINTS) -> list[int]:
    """Which losses to draw: the lowest and highest of each of `most` / 2 stretches, so that no spike is lost."""
    if len(losses) <= most:
        return list(range(len(losses)))
    stretches = np.array_split(np.arange(len(losses)), most // 2)
    values = np.asarray(losses)
    return sorted({int(each[pick(values[each])]) for each in stretches for pick in (np.argmin, np.argmax)})


def smoothing(updates: int) -> int:
    """How many updates the running median looks at: a twentieth of all, an odd number."""
    return updates // 40 * 2 + 1


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range of a log axis: the coarsest ladder that has at least four of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for ladder in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.5, 2, 3, 4, 5, 6, 8),
        (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9),
    ):
        found = [step * 10.0**decade for decade in decades for step in ladder if low <= step * 10.0**decade <= high]
        if len(found) >= 4:
            return found[:: math.ceil(len(found) / 10)]
    size = 10.0 ** math.floor(math.log10((high - low) / 2))
    size = next(each * size for each in (5, 2, 1, 0.5) if (high - low) / (each * size) >= 4)
    return [round(size * index, 10) for index in range(math.ceil(low / size), math.floor(high / size) + 1)]


@dataclass(frozen=True)
class Axes:
    x: alt.X
    field: str  # of x
    frame: tuple[float, float]  # of y
    title: str  # of y

    def y(self, field: str) -> alt.Y:
        scale = alt.Scale(type="log", domain=list(self.frame), nice=False)
        return alt.Y(
            f"{field}:Q", scale=scale, axis=alt.Axis(values=ticks(*self.frame), format=",~f", title=self.title)
        )


_POINT = {
    "series:N": "scheme",
    "length:Q": "length",
    "factor:N": "of the trained",
    "mean:N": "perplexity",
    "seeds:N": "by seed",
    "documents:N": "95% over documents",
    "count:N": "tokens scored",
}
_BEYOND = {"series:N": "scheme", "beyond:N": "outside the frame"}


def _perplexity_panel(
    title: str, points: Sequence[dict[str, Any]], frame: tuple[float, float], row: Row, looks: Mapping[str, Look]
) -> alt.LayerChart:
    context, lengths = row["context"], sorted({point["length"] for point in points})
    x = alt.X(
        "length:Q",
        title="length in tokens (× trained length)",
        scale=alt.Scale(type="log", domain=[min(*lengths, context) / 1.06, max(*lengths, context) * 1.06], nice=False),
        axis=alt.Axis(
            values=lengths,
            grid=False,
            labelExpr=f"[format(datum.value, ',d'), format(datum.value / {context}, '.3~f') + '×']",
            labelOverlap="greedy",
        ),
    )
    axes = Axes(x, "length", frame, f"perplexity per {row['unit']}")
    look, shape = {"color": coloured(looks), "opacity": faded()}, shaped(looks)
    finite = [point for point in points if point["piece"] is not None]
    lost = [{**point, "value": frame[1], "beyond": point["mean"]} for point in points if point["piece"] is None]
    trained = alt.Chart(alt.Data(values=[{"length": context, "text": "trained length"}])).encode(x)
    layers = [
        trained.mark_rule(strokeDash=[3, 3], style="trained"),
        trained.mark_text(y=-9, align="left", style="note").encode(text="text:N"),
        shown([point for point in finite if point["low"] < point["high"]])
        .mark_area(clip=True)
        .encode(x, axes.y("low"), alt.Y2("high:Q"), coloured(looks), detail="piece:N", opacity=faded(0.16)),
        shown([point for point in finite if point["least"] is not None])
        .mark_rule(clip=True, strokeWidth=1.2)
        .encode(x, axes.y("least"), alt.Y2("most:Q"), **look),
        shown(finite)
        .mark_line(clip=True, strokeWidth=1.8)
        .encode(x, axes.y("value"), strokeDash=dashed(looks), detail="piece:N", **look),
        shown(_departures(points, frame[1]))
        .mark_point(filled=True, size=60, shape=ARROW)
        .encode(x, axes.y("value"), tooltip=_tooltip(_BEYOND), **look),
        shown(lost)
        .mark_point(filled=True, size=30, shape=CROSS)
        .encode(x, axes.y("value"), tooltip=_tooltip(_BEYOND), **look),
        shown([point for point in finite if point["value"] <= frame[1]])
        .mark_point(filled=True, size=30)
        .encode(x, axes.y("value"), shape=shape, tooltip=_tooltip(_POINT), **look),
    ]
    ends = [_end(each, frame[1]) for each in grouped(points, "series").values()]
    chart = alt.LayerChart(layer=[*layers, *labelled(ends, axes, looks)])
    return chart.properties(height=height_of(ends), width="container", title=title)


def _points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One point for each series and length, over seeds. A line is drawn through the finite points of a `piece`."""
    points = []
    for series, of_series in sorted(grouped(rows, "series").items()):
        piece = 0
        for length, each in sorted(grouped(of_series, "length").items()):
            values = [float(row["value"]) for row in each]
            finite = all(math.isfinite(value) and value > 0 for value in values)
            piece += not finite
            counts = sorted({row["count"] for row in each})
            value = (values[0] if len(values) == 1 else geometric_mean(values)) if finite else None
            bounds = [(row["seed"], row["low"], row["high"]) for row in each if _bounded(row)]
            alone = bounds[0] if finite and len(values) == len(bounds) == 1 else (None, None, None)
            points.append(
                {
                    "series": series,
                    "length": length,
                    "factor": f"{length / each[0]['context']:.3g}×",
                    "value": value,
                    "low": min(values) if finite else None,
                    "high": max(values) if finite else None,
                    "mean": _unfinite(values) if value is None else readable(value, 6),
                    "seeds": ", ".join(f"{row['seed']}: {readable(row['value'], 6)}" for row in each),
                    "least": alone[1],
                    "most": alone[2],
                    "documents": _intervals(bounds) or "not known",
                    "count": " to ".join(f"{count:,}" for count in (counts[0], counts[-1])[: len(counts)]),
                    "piece": f"{series} {piece}" if finite else None,
                }
            )
    return points


def _bounded(row: Row) -> bool:
    """Whether a row has an interval over documents that can be drawn."""
    return all(isinstance(row.get(end), int | float) and 0 < row[end] < math.inf for end in ("low", "high"))


def _intervals(bounds: Sequence[tuple[int, float, float]]) -> str:
    return ", ".join(f"{seed}: {readable(low, 4)} to {readable(high, 4)}" for seed, low, high in bounds)


def _unfinite(values: Sequence[float]) -> str:
    wrong = [readable(value) for value in values if not (math.isfinite(value) and value > 0)]
    return " or ".join(sorted(set(wrong))) + (f" in {len(wrong)} of {len(values)} seeds" if len(values) > 1 else "")


def _frame(points: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The perplexities that are shown: all, unless a minority explodes and would flatten the rest to one line."""
    series = grouped(points, "series").values()
    low = min(point["low"] if point["least"] is None else point["least"] for point in points)
    high = max(point["high"] if point["most"] is None else point["most"] for point in points)
    usual = 3 * median(min(point["value"] for point in each) for each in series)
    usual = max(usual, 10 * low, median(max(point["high"] for point in each) for each in series))
    top = high if high <= 1.5 * usual else usual
    return low / 1.05, max(top, low * 1.2) * 1.05


def _departures(points: Sequence[dict[str, Any]], top: float) -> list[dict[str, Any]]:
    """Where curves leave the frame, and what they reach outside."""
    gone = []
    for series, each in grouped(points, "series").items():
        outside = [point for point in each if point["piece"] is None or point["value"] > top]
        beyond = ", ".join(f"{point['mean']} at {point['length']:,}" for point in outside)
        places = [each[0]["length"]] if each[0]["piece"] and each[0]["value"] > top else []
        for before, after in pairwise(each):
            if before["piece"] and before["piece"] == after["piece"] and before["value"] <= top < after["value"]:
                share = math.log(top / before["value"]) / math.log(after["value"] / before["value"])
                places.append(before["length"] * (after["length"] / before["length"]) ** share)
        gone += [{"series": series, "length": place, "value": top, "beyond": beyond} for place in places]
    return gone


def _end(points: Sequence[dict[str, Any]], top: float) -> dict[str, Any]:
    """The label at the end of a curve; what lies outside the frame is told in numbers."""
    last, series, label = points[-1], points[-1]["series"], shortened(points[-1]["series"])
    if last["piece"] is None:
        return {"series": series, "label": f"{label} × {last['mean']}", "x": None, "value": math.inf}
    if last["value"] > top:
        return {"series": series, "label": f"{label} ↑ {readable(last['value'])}", "x": None, "value": last["value"]}
    return {"series": series, "label": label, "x": last["length"], "value": last["value"]}


def shortened(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:16]}…{name[-15:]}"


def labelled(ends: Sequence[dict[str, Any]], axes: Axes, looks: Mapping[str, Look]) -> list[alt.Chart]:
    """Names in the right margin, moved apart where curves end close together, each tied to the end of its curve."""
    low, high = map(math.log, axes.frame)
    height, edge = height_of(ends), alt.value("width")
    ends = [{**end, "value": min(end["value"], axes.frame[1])} for end in sorted(ends, key=lambda end: end["value"])]
    wanted = [(math.log(end["value"]) - low) / (high - low) * height for end in ends]
    places = [
        {**end, "place": math.exp(low + place / height * (high - low)), axes.field: end["x"]}
        for end, place in zip(ends, spread(wanted, LINE, 0.0, float(height)), strict=True)
    ]
    look = {"color": coloured(looks), "opacity": faded()}
    return [
        shown([place for place in places if place["x"] is not None])
        .mark_rule(strokeWidth=0.7, x2Offset=13)
        .encode(axes.x, axes.y("value"), x2=edge, y2="place:Q", color=coloured(looks), opacity=faded(0.6)),
        shown(places)
        .mark_point(filled=True, size=30, xOffset=19)
        .encode(axes.y("place"), x=edge, shape=shaped(looks), **look),
        shown(places)
        .mark_text(align="left", xOffset=28, style="label")
        .encode(axes.y("place"), x=edge, text="label:N", opacity=faded()),
    ]


def height_of(ends: Sequence[Any]) -> int:
    return max(HEIGHT, int(LINE * len(ends)))


def panels_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by protocol, and by budget where there are several, under a title."""
    several = len(budgets_of(rows)) > 1
    panels: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["protocol"], several and row.get("update", 0))):
        after = f" after {row['update']:,} updates" if several and "update" in row else ""
        panels.setdefault(row["protocol"].replace("_", "-") + after, []).append(row)
    return panels


def budgets_of(rows: Sequence[Row]) -> list[int]:
    """After how many updates models were measured, where some series has several such; else none."""
    of_series = {
        name: {row["update"] for row in each if "update" in row} for name, each in grouped(rows, "series").items()
    }
    return sorted(set().union(*of_series.values())) if any(len(each) > 1 for each in of_series.values()) else []


def _finite(history: Row) -> dict[str, Any]:
    pairs = [pair for pair in zip(history["update"], history["loss"], strict=True) if 0 < pair[1] < math.inf]
    return {
        "curve": history["series"],
        **history,
        "update": [update for update, _ in pairs],
        "loss": [value for _, value in pairs],
    }


def _thinned(history: Row, most: int) -> dict[str, Any]:
    kept = thin(history["loss"], most)
    losses = tuple(float(f"{history['loss'][index]:.4g}") for index in kept)
    about = {key: history[key] for key in ("series", "run")}
    return {**about, "update": tuple(history["update"][index] for index in kept), "loss": losses}


def _smoothed(histories: Sequence[Row]) -> dict[str, Any]:
    """The running median of all seeds together, at 200 updates; every loss takes part, none is thinned before."""
    updates = np.concatenate([history["update"] for history in histories])
    order = np.argsort(updates, kind="stable")
    updates, losses = updates[order], np.concatenate([history["loss"] for history in histories])[order]
    half = smoothing(int(updates[-1])) // 2
    at = np.unique(np.linspace(updates[0], updates[-1], 200).round().astype(int))
    spans = zip(np.searchsorted(updates, at - half), np.searchsorted(updates, at + half, side="right"), strict=True)
    pairs = [(int(u), float(np.median(losses[a:b]))) for u, (a, b) in zip(at, spans, strict=True) if b > a]
    smooth = tuple(float(f"{value:.5g}") for _, value in pairs)
    about = {key: histories[0][key] for key in ("series", "curve")}
    return {**about, "update": tuple(update for update, _ in pairs), "smooth": smooth, "last": smooth[-1]}


def _loss_frame(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The losses that are shown: those after the first tenth, in which all curves fall steeply."""
    low = min(min(curve) for curve in curves)
    return low / 1.03, max(low * 1.1, *(max(curve[len(curve) // 10 :]) for curve in curves)) * 1.02


def shown(values: Sequence[Any]) -> alt.Chart:
    data = alt.Data(values=tuple(values))  # a tuple: altair copies lists at every step
    return alt.Chart(data).transform_filter("indexof(hidden, datum.series) < 0")


def _tooltip(titles: Mapping[str, str]) -> list[alt.Tooltip]:
    return [alt.Tooltip(field, title=title) for field, title in titles.items()]


def faded(value: float = 1.0) -> Any:
    return alt.condition("lit == '' || lit == datum.series", alt.value(value), alt.value(value * 0.12))


def coloured(looks: Mapping[str, Look]) -> alt.Color:
    return alt.Color("series:N", scale=_scale(looks, [look.colour for look in looks.values()]), legend=None)


def shaped(looks: Mapping[str, Look]) -> alt.Shape:
    return alt.Shape("series:N", scale=_scale(looks, [look.shape for look in looks.values()]), legend=None)


def dashed(looks: Mapping[str, Look]) -> alt.StrokeDash:
    return alt.StrokeDash("series:N", scale=_scale(looks, [list(look.dash) for look in looks.values()]), legend=None)


def _scale(looks: Mapping[str, Look], values: list[Any]) -> alt.Scale:
    return alt.Scale(domain=list(looks), range=values)


def grouped(rows: Iterable[Any], key: str) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups
