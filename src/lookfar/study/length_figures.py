"""Draws a length study: accuracy against length, mean reciprocal ranks, what scratchpads do. Rows to altair charts.

A row is a line of `rows.jsonl`: `scheme`, `seed`, `data`, `protocol`, `length`, `metric`, `value`, and of tasks `split`
("held_out", "longer" or "other"), `trained` (the longest trained length) and `scratchpad` (its parts or None). The
looks of schemes are those of the other figures. Rows of one figure share their protocol.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from textwrap import wrap
from typing import Any

import altair as alt

from lookfar.errors import UserError
from lookfar.study.figures import Look, Row, readable, theme
from lookfar.study.statistics import Missing, Ties, interval, mean_reciprocal_rank, over_lengths

WIDTH, HEIGHT = 190, 150  # of a small panel, in pixels
COLUMNS = 4  # of panels, at most
LETTER = 5.6  # the width of one in a note, on average
BAR = 9.0  # the width of one of several bars side by side
NONE = "none"  # how no scratchpad is called


def accuracy(rows: Iterable[Row], looks: Mapping[str, Look]) -> alt.ConcatChart:
    """Accuracy against length, a panel for each task and scratchpad, with what was trained on shaded.

    Lines are means over seeds, bands the bootstrap interval over seeds where there are several. A line is broken where
    no seed has a number, and its points are hollow where only some of the scheme's seeds have one.
    """
    panels = defaultdict(list)
    for row in rows:
        if row["metric"] == "accuracy":
            panels[row["data"], row.get("scratchpad")].append(row)
    several = len({scratchpad for _, scratchpad in panels}) > 1
    charts = [
        _curves(_title(data, scratchpad, several), panels[data, scratchpad], looks)
        for data, scratchpad in sorted(panels, key=lambda key: (key[0], key[1] or ""))
    ]
    return _sheet(charts, COLUMNS)


def ranking(rows: Iterable[Row], looks: Mapping[str, Look], *, ties: Ties = "average") -> alt.LayerChart:
    """Mean reciprocal ranks on longer lengths, the best scheme first, with bootstrap intervals over seeds.

    The line below the title counts the cells, and says how many measurements are missing.
    """
    found = mean_reciprocal_rank(rows, ties=ties)
    bars = [
        {
            "scheme": scheme,
            "value": each.value,
            "label": readable(each.value, 2) if each.value < 1 else "1.0",
            "low": each.interval[0] if each.interval else None,
            "high": each.interval[1] if each.interval else None,
            "edge": max(each.value, each.interval[1] if each.interval else 0),
        }
        for scheme, each in found.schemes.items()
    ]
    cells, seeds = next((each.cells, each.seeds) for each in found.schemes.values())
    order = [bar["scheme"] for bar in sorted(bars, key=lambda bar: (-bar["value"], bar["scheme"]))]
    notes = [
        f"over {cells:,} cells (task, scratchpad and seed), {seeds} seed{'s' * (seeds > 1)}",
        *_told(found.missing),
    ]
    y = alt.Y("scheme:N", sort=order, title=None, axis=alt.Axis(labelLimit=240, domain=False, ticks=False))
    x = alt.X(
        "value:Q", title="mean reciprocal rank", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5, format="~f")
    )
    whiskers = [bar for bar in bars if bar["low"] is not None]
    layers = [
        _data(bars).mark_bar(height={"band": 0.62}).encode(x, y, color=_colour(looks, None)),
        _data(whiskers).mark_rule(strokeWidth=1.2, style="label").encode(alt.X("low:Q"), y, x2="high:Q"),
        _data(bars).mark_text(align="left", dx=6, style="label").encode(alt.X("edge:Q"), y, text="label:N"),
    ]
    width, height = 2 * WIDTH, 26 * len(bars)
    title = _headed("Length generalisation by rank", notes, width)
    return alt.LayerChart(layer=layers, width=width, height=height, title=title, config=_config())


def scratchpads(rows: Iterable[Row], looks: Mapping[str, Look]) -> alt.ConcatChart:
    """Mean accuracy on longer lengths by scratchpad, a panel for each task and a bar for each scheme.

    Whiskers are bootstrap intervals over seeds. Where a scheme lacks a length, that seed of it has no mean; the
    panel says so.
    """
    means, missing = over_lengths(rows)
    values: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, of_schemes in means.items():
        for scheme, value in of_schemes.items():
            values[cell.data][cell.scratchpad or NONE, scheme].append(value)
    schemes = [scheme for scheme in looks if any(key[1] == scheme for each in values.values() for key in each)]
    charts = []
    for data in sorted(values):
        gone = [each for each in missing if each.cell.data == data]
        charts.append(_bars(_name(data), values[data], schemes, _told(gone), looks))
    return _sheet(charts, COLUMNS // 2)


def _curves(title: str, rows: Sequence[Row], looks: Mapping[str, Look]) -> alt.LayerChart:
    points = _points(rows)
    known = [point for point in points if point["value"] is not None]
    notes = ["hollow: some seeds have no number"] * any(not point["whole"] for point in known)
    lengths = sorted({row["length"] for row in rows})
    trained = max((row["trained"] for row in rows if row.get("trained") is not None), default=None)
    scale = alt.Scale(domain=[lengths[0], max(lengths[-1], lengths[0] + 1)], nice=False, zero=False)
    x = alt.X(
        "length:Q", title="length", scale=scale, axis=alt.Axis(grid=False, tickCount=6, tickMinStep=1, format="d")
    )
    y = alt.Y("value:Q", title="accuracy", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5, format="~f"))
    tooltip = [
        *(alt.Tooltip("scheme:N"), alt.Tooltip("length:Q"), alt.Tooltip("value:Q", title="accuracy", format=".3f")),
        alt.Tooltip("seeds:N", title="seeds"),
    ]
    layers = [
        _data(points).mark_area(opacity=0.16).encode(x, alt.Y("low:Q"), alt.Y2("high:Q"), _colour(looks)),
        _data(points).mark_line(strokeWidth=1.8).encode(x, y, _colour(looks), strokeDash=_dash(looks)),
        _data([point for point in known if point["whole"]])
        .mark_point(filled=True, size=16, opacity=1)
        .encode(x, y, _colour(looks), shape=_shape(looks), tooltip=tooltip),
        _data([point for point in known if not point["whole"]])
        .mark_point(filled=False, fill="white", size=24, strokeWidth=1.2, opacity=1)
        .encode(x, y, _colour(looks), shape=_shape(looks), tooltip=tooltip),
    ]
    if trained is not None and trained >= lengths[0]:
        span = [{"first": lengths[0], "last": min(trained, lengths[-1]), "text": f"trained up to {trained}"}]
        shade = _data(span).encode(alt.X("first:Q"))
        layers = [
            shade.mark_rect(opacity=0.14, style="trained").encode(x2="last:Q"),
            shade.mark_text(y=-11, align="left", style="note").encode(text="text:N"),
            *layers,
        ]
    return alt.LayerChart(layer=layers, width=WIDTH, height=HEIGHT, title=_headed(title, notes, WIDTH, offset=8))


def _points(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The mean and the interval over seeds at every length of every scheme; no value where no seed has a number."""
    groups: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
    of_scheme = defaultdict(set)
    for row in rows:
        scheme, seed, by_seed = row["scheme"], row["seed"], groups[row["scheme"], row["length"]]
        if seed in by_seed:
            where = f"{row['data']}, length {row['length']}, seed {seed}"
            raise UserError(f"{scheme!r} has two rows of accuracy for {where}; choose the rows of one run.")
        by_seed[seed] = math.nan if row["value"] is None else float(row["value"])
        of_scheme[scheme].add(seed)
    points = []
    for (scheme, length), by_seed in sorted(groups.items(), key=lambda item: item[0]):
        known, seeds = [value for value in by_seed.values() if not math.isnan(value)], len(of_scheme[scheme])
        low, high = interval([[value] for value in known]) or (None, None)
        point = {"scheme": scheme, "length": length, "value": fmean(known) if known else None, "low": low, "high": high}
        points.append(point | {"whole": len(known) == seeds, "seeds": f"{len(known)} of {seeds}"})
    return points


def _bars(
    title: str,
    values: Mapping[tuple[str, str], Sequence[float]],
    schemes: Sequence[str],
    notes: Sequence[str],
    looks: Mapping[str, Look],
) -> alt.LayerChart:
    bars = []
    for (scratchpad, scheme), each in values.items():
        low, high = interval([[value] for value in each]) or (None, None)
        bar = {"scratchpad": scratchpad, "scheme": scheme, "value": fmean(each), "seeds": len(each)}
        bars.append(bar | {"low": low, "high": high})
    order = sorted({bar["scratchpad"] for bar in bars}, key=lambda name: (name != NONE, name))
    x = alt.X("scratchpad:N", sort=order, title="scratchpad", axis=alt.Axis(labelAngle=0, ticks=False, labelLimit=90))
    inner = alt.XOffset("scheme:N", sort=list(schemes))
    y = alt.Y(
        "value:Q", title="accuracy, longer", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5, format="~f")
    )
    tooltip = [alt.Tooltip("scheme:N"), alt.Tooltip("value:Q", format=".3f"), alt.Tooltip("seeds:Q")]
    layers = [
        _data(bars).mark_bar().encode(x, y, _colour(looks), xOffset=inner, tooltip=tooltip),
        _data([bar for bar in bars if bar["low"] is not None])
        .mark_rule(strokeWidth=1, style="label")
        .encode(x, alt.Y("low:Q"), alt.Y2("high:Q"), xOffset=inner),
    ]
    width = max(WIDTH, int(len(order) * max(64, BAR * len(schemes) + 14)))
    return alt.LayerChart(layer=layers, width=width, height=HEIGHT, title=_headed(title, notes, width))


def _sheet(charts: Sequence[alt.LayerChart], most: int) -> alt.ConcatChart:
    """Panels side by side, at most so many, under one legend."""
    if not charts:
        raise UserError("There is no accuracy to draw.")
    columns = math.ceil(len(charts) / math.ceil(len(charts) / most))
    sheet = alt.ConcatChart(concat=list(charts), columns=columns, spacing=28, config=_config())
    return sheet.resolve_scale(color="shared", shape="shared", strokeDash="shared")


def _headed(text: str, notes: Iterable[str], width: int, offset: int = 14) -> alt.TitleParams:
    """A title with notes below it in lines that are no wider than the panel."""
    note, lines = theme()["style"]["note"], [line for each in notes for line in wrap(each, int(width / LETTER))]
    size = {"subtitleColor": note["color"], "subtitleFontSize": note["fontSize"], "subtitlePadding": 5}
    return alt.TitleParams(text, subtitle=lines, offset=offset, **size)


def _title(data: str, scratchpad: str | None, several: bool) -> str:
    return f"{_name(data)} · {scratchpad or 'no scratchpad'}" if several else _name(data)


def _name(data: str) -> str:
    """A task without the hexadecimal digits that stand for its version."""
    return data.partition("@")[0]


def _told(missing: Sequence[Missing]) -> list[str]:
    if not missing:
        return []
    scheme, cell, reason = missing[0]
    count = f"{len(missing)} means are" if len(missing) > 1 else "1 mean is"
    first = f"{scheme} on {_name(cell.data)}, scratchpad {cell.scratchpad or NONE}, seed {cell.seed}, is {reason}"
    return [f"{count} missing: {first}{', and others' * (len(missing) > 1)}"]


def _data(values: Sequence[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=tuple(values)))


def _config() -> alt.Config:
    return alt.Config(**theme())


def _legend(names: Iterable[str]) -> alt.Legend:
    """One line where the names fit beside each other, else as many columns as the longest leaves room for."""
    widths = [LETTER * len(name) + 36 for name in names]
    columns = len(widths) if sum(widths) <= 3 * WIDTH else max(1, int(3 * WIDTH / max(widths)))
    return alt.Legend(orient="top", title=None, columns=columns, labelLimit=240, symbolSize=80, symbolOpacity=1)


def _colour(looks: Mapping[str, Look], legend: Any = True) -> alt.Color:
    scale = alt.Scale(domain=list(looks), range=[look.colour for look in looks.values()])
    return alt.Color("scheme:N", scale=scale, legend=_legend(looks) if legend else None)


def _shape(looks: Mapping[str, Look]) -> alt.Shape:
    scale = alt.Scale(domain=list(looks), range=[look.shape for look in looks.values()])
    return alt.Shape("scheme:N", scale=scale, legend=_legend(looks))


def _dash(looks: Mapping[str, Look]) -> alt.StrokeDash:
    scale = alt.Scale(domain=list(looks), range=[list(look.dash) for look in looks.values()])
    return alt.StrokeDash("scheme:N", scale=scale, legend=_legend(looks))


def panels(chart: alt.ConcatChart | alt.LayerChart) -> list[dict[str, Any]]:
    """The panels of a figure for the page, which has one legend for all; each is as wide as its place."""
    whole = chart.to_dict(validate=False)
    inner = whole.pop("concat", [whole])
    shared = {key: whole[key] for key in ("$schema", "config", "datasets") if key in whole}
    parameters = [{"name": "hidden", "value": []}, {"name": "lit", "value": ""}]
    return [{**shared, **_live(each), "params": parameters, "width": "container"} for each in inner]


def _live(specification: Mapping[str, Any]) -> dict[str, Any]:
    """A panel whose marks of a hidden scheme are gone, without a legend of its own."""
    found = {key: value for key, value in specification.items() if key not in ("$schema", "config", "datasets")}
    if "layer" in found:
        return {**found, "layer": [_live(each) for each in found["layer"]]}
    encoding = {
        name: {**channel, "legend": None} if name in ("color", "shape", "strokeDash") else channel
        for name, channel in found.get("encoding", {}).items()
    }
    hides = {"filter": "!isDefined(datum.scheme) || indexof(hidden, datum.scheme) < 0"}
    return {**found, "encoding": encoding, "transform": [*found.get("transform", []), hides]}
