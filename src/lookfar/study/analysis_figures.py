"""Draws what an analysis found: pure functions from plain rows and arrays to altair charts.

A row is a line of `analysis/rows.jsonl` with one key more, `series`: the name of its run in every figure.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import altair as alt
import numpy as np

from lookfar.study.figures import Look, theme
from lookfar.study.pictures import picture

Row = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

HEIGHT = 240  # of a panel, in pixels
CELL = 96  # of a map
GREY = "#8c959f"
RAMP = ("#f4f6fb", "#bcd0f2", "#6f9be6", "#316ddc", "#1f3f8f", "#0d1b45")  # from little to much
APART = ("#922075", "#cf8fc0", "#f6f6f7", "#8fb0ea", "#316ddc")  # below, at and above zero
FAINTEST = 1e-3  # weight that a map still tells from none
STAGES = {"score_spread": "content", "map_spread": "map", "bias_spread": "bias"}
STAGE_COLOURS = ("#316ddc", "#922075", "#ce7029")


def entropy(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """How evenly heads spread, by layer; then entropy against the keys seen, all heads and layers together."""
    strips = [
        _strip(each, looks, "entropy / ln(keys seen)", f"{length:,} tokens", domain=(0.0, 1.0))
        for length, each in _grouped(_of(rows, "entropy_share"), "length").items()
    ]
    found = _longest(_of(rows, "entropy_at"))
    if not found:
        return strips
    context, farthest = found[0]["context"], found[0]["length"]
    points = _means(found, ("series", "keys"))
    even = [{"keys": keys, "value": math.log(keys)} for keys in np.geomspace(2, farthest, 40)]
    x = alt.X(
        "keys:Q",
        title="keys seen (tokens)",
        scale=alt.Scale(type="log", domain=[2, farthest], nice=False),
        axis=alt.Axis(grid=False, tickCount=6, format=",d"),
    )
    y = alt.Y("value:Q", title="entropy (nats)", scale=alt.Scale(domainMin=0))
    layers = [
        _data(even).mark_line(strokeDash=[2, 2], color=GREY, strokeWidth=1.2).encode(x, y),
        *_rule([{"keys": context, "text": "trained length"}] if context < farthest else [], x),
        _shown(points).mark_line(strokeWidth=1.8).encode(x, y, _colour(looks)),
        _shown(points).mark_point(filled=True, size=26, opacity=1).encode(x, y, _colour(looks), _shape(looks)),
    ]
    return [*strips, _panel(layers, f"{farthest:,} tokens (dotted: ln n)")]


def attended_distance(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """The part of query rows whose largest score lies at each distance: faint for each layer, bold for all."""
    panels = []
    for length, each in _grouped(_of(rows, "distance_share"), "length").items():
        layered = _closed(_means(each, ("series", "layer", "distance")))
        together = _closed(_means(each, ("series", "distance")))
        x = alt.X(
            "distance:Q",
            title="attended distance / keys seen",
            scale=alt.Scale(domain=[0, 1]),
            axis=alt.Axis(grid=False, format=".1~f", tickCount=5),
        )
        y = alt.Y("value:Q", title="part of queries", axis=alt.Axis(format="%", tickCount=5))
        layers = [
            _shown(layered)
            .mark_line(strokeWidth=0.8, opacity=0.35, interpolate="step-after")
            .encode(x, y, _colour(looks), detail=["series:N", "layer:N"]),
            _shown(together).mark_line(strokeWidth=2, interpolate="step-after").encode(x, y, _colour(looks)),
        ]
        panels.append(_panel(layers, f"{length:,} tokens"))
    return panels


def sink_mass(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """The mass on the first token by layer, against that of an even spread; and the mass that sinks swallow."""
    panels = []
    for length, each in _grouped(_of(rows, "first_token_mass"), "length").items():
        even = fmean(row["value"] for row in _of(rows, "even_mass") if row["length"] == length)
        title = f"first token, {length:,} tokens (dotted: even)"
        panels.append(_strip(each, looks, "mass on the first token", title, level=even))
    for length, each in _grouped(_of(rows, "sink_mass"), "length").items():
        panels.append(_strip(each, looks, "mass that sinks swallow", f"sinks, {length:,} tokens"))
    return panels


def score_spread(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """How far content, map and bias move the scores of a row, by layer, one panel for each run."""
    found = [{**row, "stage": STAGES[row["metric"]]} for row in rows if row["metric"] in STAGES]
    colour = alt.Color(
        "stage:N",
        scale=alt.Scale(domain=list(STAGES.values()), range=list(STAGE_COLOURS)),
        legend=alt.Legend(title="of the scores", symbolOpacity=1),
    )
    offset = alt.XOffset("stage:N", scale=alt.Scale(domain=list(STAGES.values())))
    return [
        _strip(each, looks, "spread within a row (nats)", f"{series}, {length:,} tokens", colour, offset)
        for series, of_series in _grouped(found, "series").items()
        for length, each in _grouped(_longest(of_series), "length").items()
    ]


def bias_curves(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """Bias against distance, a line for each head; layers that share their curves share a panel."""
    return _curves(_of(rows, "bias"), "distance (positions)", "bias (nats)")


def map_changes(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """What a map adds to the scores on average at each distance, a line for each head."""
    return _curves(_of(rows, "map_change"), "distance (tokens)", "mean change (nats)")


def divergence(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """Two runs: the least and the assigned divergence by layer."""
    found = [row for row in rows if row["metric"] in ("divergence_min", "divergence_assigned")]
    found = [{**row, "kind": row["metric"].removeprefix("divergence_")} for row in found if row["layer"] is not None]
    if not found:
        return []
    names = {"min": "least of all pairs", "assigned": "heads assigned one to one"}
    points = [{**row, "kind": names[row["kind"]], "tokens": f"{row['length']:,}"} for row in found]
    x = _layers(points)
    y = alt.Y("value:Q", title="Jensen-Shannon divergence (nats)", scale=alt.Scale(domain=[0, 0.72], nice=False))
    colour = alt.Color(
        "tokens:N",
        sort=[f"{length:,}" for length in sorted({row["length"] for row in found})],
        scale=alt.Scale(range=["#43b2eb", "#316ddc", "#6232ad", "#922075", "#1f2328"]),
        legend=alt.Legend(title="tokens"),
    )
    dash = alt.StrokeDash(
        "kind:N",
        sort=list(names.values()),
        scale=alt.Scale(domain=list(names.values()), range=[[1, 0], [4, 3]]),
        legend=alt.Legend(title=None, symbolStrokeColor="#1f2328", labelLimit=0),
    )
    layers = [
        _data([{"value": math.log(2)}]).mark_rule(strokeDash=[2, 2], color=GREY).encode(y),
        _data([{"value": math.log(2), "text": "ln 2: nothing in common"}])
        .mark_text(align="right", dy=10, style="note")
        .encode(y, x=alt.value("width"), text="text:N"),
        _shown(points).mark_line(strokeWidth=1.8).encode(x, y, colour, strokeDash=dash),
        _shown(points).mark_point(filled=True, size=30, opacity=1).encode(x, y, colour),
    ]
    return [_panel(layers, f"{found[0]['series']} against {found[0]['against']}")]


def head_pairs(rows: Sequence[Row], looks: Mapping[str, Look]) -> list[alt.LayerChart]:
    """The divergence of every pair of heads at the longest length, by layer: of two runs, or within one."""
    found = _longest(_of(rows, "divergence") or _of(rows, "divergence_within"))
    return [
        _pairs(each, f"layer {layer}", each[0]["series"], each[0].get("against", each[0]["series"]))
        for layer, each in sorted(_grouped(found, "layer").items())
    ]


def attention_maps(arrays: Arrays, length: int) -> alt.FacetChart | None:
    """The weights of every layer and head, darker where there are more."""
    maps = _by_layer(arrays, f"{length}/attention_maps/")

    def shade(cells: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            logs = 1 - np.log10(cells) / math.log10(FAINTEST)
        return np.where(np.triu(np.ones_like(cells), 1) > 0, np.nan, logs.clip(0, 1))

    scale = alt.Scale(type="log", domain=[FAINTEST, 1], range=list(RAMP), interpolate="rgb", clamp=True)
    legend = alt.Legend(title="weight", values=[1, 0.1, 0.01, 0.001], format="~g", gradientLength=120)
    return _maps(maps, length, lambda layer, cells: picture(shade(cells), RAMP), scale, legend, [FAINTEST, 1.0])


def score_changes(arrays: Arrays, length: int) -> alt.FacetChart | None:
    """What a map adds to every score: after less before."""
    before, after = (_by_layer(arrays, f"{length}/scores_{stage}/") for stage in ("before", "after"))
    if not before:
        return None
    changes = {layer: after[layer] - before[layer] for layer in before}
    largest = max(float(np.nanquantile(np.abs(each), 0.99)) for each in changes.values()) or 1.0
    scale = alt.Scale(domain=[-largest, largest], range=list(APART), interpolate="rgb", clamp=True)
    legend = alt.Legend(title="change (nats)", gradientLength=120, format=".2~g", values=[-largest, 0, largest])

    def draw(layer: int, cells: np.ndarray) -> str:
        return picture((cells / largest + 1) / 2, APART)

    return _maps(changes, length, draw, scale, legend, [-largest, largest])


def specification(chart: Any) -> dict[str, Any]:
    """A chart in Vega-Lite with the parameters that the legend of the page sets."""
    parameters = [{"name": "hidden", "value": []}, {"name": "lit", "value": ""}]
    return {**chart.to_dict(validate=False), "params": parameters, "config": theme()}


def for_page(panel: Any) -> Any:
    """A specified panel without its legend of runs: the page has one for all."""
    if isinstance(panel, list):
        return [for_page(each) for each in panel]
    if not isinstance(panel, dict):
        return panel
    if panel.get("field") == "series" and "legend" in panel:
        return {**panel, "legend": None}
    return {key: each if key == "data" else for_page(each) for key, each in panel.items()}


def sheet(panels: Sequence[Mapping[str, Any]], columns: int = 3) -> dict[str, Any]:
    """Specified panels on paper, in lines of at most so many; one that has its own size stays as it is."""
    first = {key: panels[0][key] for key in ("$schema", "params", "config")}
    if len(panels) == 1 and "facet" in panels[0]:
        return {**panels[0], "background": "white"}
    columns = min(columns, len(panels)) if len(panels) != 4 else 2
    inner = [
        {key: panel[key] for key in ("data", "layer", "height", "title") if key in panel} | {"width": 260}
        for panel in panels
    ]
    lines = [inner[start : start + columns] for start in range(0, len(inner), columns)]
    rows = [{"hconcat": line, "spacing": 72, "bounds": "flush"} for line in lines]  # flush: titles stand level
    return {**first, "background": "white", "vconcat": rows, "spacing": 24}


def _strip(
    rows: Sequence[Row],
    looks: Mapping[str, Look],
    title: str,
    name: str,
    colour: alt.Color | None = None,
    offset: alt.XOffset | None = None,
    *,
    domain: tuple[float, float] | None = None,
    level: float | None = None,
) -> alt.LayerChart:
    """A dot for each head, by layer, and a bar at their mean."""
    x = _layers(rows)
    scale = alt.Scale(domain=list(domain)) if domain else alt.Scale(zero=True)
    y = alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5))
    kinds = ("series", "layer") if colour is None else ("series", "layer", "stage")
    colour = _colour(looks) if colour is None else colour
    offset = alt.XOffset("series:N", scale=alt.Scale(domain=list(looks))) if offset is None else offset
    means = _means(rows, kinds)
    width = max(5, min(16, 260 / (len(means) + 1)))  # of a bar
    tooltip = [alt.Tooltip(each) for each in ("series:N", "layer:O", "head:O")]
    tooltip.append(alt.Tooltip("value:Q", format=".4f"))
    layers = [
        _shown(rows)
        .mark_point(filled=True, size=26, opacity=0.55)
        .encode(x, y, colour, xOffset=offset, tooltip=tooltip),
        _shown(means).mark_tick(thickness=2, size=width).encode(x, y, colour, xOffset=offset),
    ]
    if level is not None:
        layers.append(_data([{"value": level}]).mark_rule(strokeDash=[2, 2], color=GREY).encode(y))
    return _panel(layers, name)


def _curves(rows: Sequence[Row], x_title: str, y_title: str) -> list[alt.LayerChart]:
    panels = []
    for series, of_series in _grouped(_longest(rows), "series").items():
        alike: dict[tuple[Any, ...], list[int]] = {}
        layers = _grouped(of_series, "layer")
        for layer, each in sorted(layers.items()):
            curve = tuple((row["head"], row.get("query"), row["distance"], round(row["value"], 6)) for row in each)
            alike.setdefault(curve, []).append(layer)
        for same in alike.values():
            name = "all layers" if len(same) == len(layers) > 1 else f"layer{'s' * (len(same) > 1)} {_listed(same)}"
            panels.append(_curve_panel(layers[same[0]], x_title, y_title, f"{series}, {name}"))
    return panels


def _curve_panel(rows: Sequence[Row], x_title: str, y_title: str, title: str) -> alt.LayerChart:
    heads = max(row["head"] for row in rows)
    x = alt.X(
        "distance:Q", title=x_title, axis=alt.Axis(grid=False, tickCount=5, format=",d"), scale=alt.Scale(nice=False)
    )
    y = alt.Y("value:Q", title=y_title, axis=alt.Axis(tickCount=5))
    colour = alt.Color(
        "head:Q",
        scale=alt.Scale(domain=[0, max(heads, 1)], range=["#6232ad", "#316ddc", "#43b2eb", "#739c7b", "#beb040"]),
        legend=alt.Legend(title="head", format="d", tickMinStep=1, gradientLength=90),
    )
    queries = sorted({row["query"] for row in rows if "query" in row})
    line = _shown(rows).mark_line(strokeWidth=1.4)
    context = rows[0]["context"]
    rule = _rule([{"distance": context, "text": "trained length"}] if context < rows[0]["length"] else [], x)
    if len(queries) < 2:
        return _panel([*rule, line.encode(x, y, colour, detail=["head:N"])], title)
    dash = alt.StrokeDash(
        "query:N",
        sort=queries,
        scale=alt.Scale(domain=queries, range=[[1.5, 2], [5, 3], [1, 0]][-len(queries) :]),
        legend=alt.Legend(title="query at", symbolStrokeColor="#1f2328"),
    )
    return _panel([*rule, line.encode(x, y, colour, strokeDash=dash, detail=["head:N"])], title)


def _pairs(rows: Sequence[Row], title: str, series: str, against: str) -> alt.LayerChart:
    heads = max(row["head"] for row in rows) + 1
    x = alt.X(
        "other_head:O",
        title=f"head of {against}",
        axis=alt.Axis(labelAngle=0, domain=False, ticks=False, titleLimit=HEIGHT),
    )
    y = alt.Y("head:O", title=f"head of {series}", axis=alt.Axis(grid=False, titleLimit=HEIGHT))
    colour = alt.Color(
        "value:Q",
        scale=alt.Scale(domain=[0, math.log(2)], range=list(reversed(RAMP)), interpolate="rgb"),
        legend=alt.Legend(title="divergence (nats)", values=[0, 0.2, 0.4, 0.6], gradientLength=90),
    )
    cells = _shown(rows)
    layers = [cells.mark_rect().encode(x, y, colour)]
    if heads <= 8:
        ink = alt.condition("datum.value > 0.4", alt.value("#1f2328"), alt.value("#ffffff"))
        layers.append(cells.mark_text(fontSize=10).encode(x, y, text=alt.Text("value:Q", format=".2f"), color=ink))
    return _panel(layers, title)


def _maps(
    maps: Mapping[int, np.ndarray],
    length: int,
    draw: Callable[[int, np.ndarray], str],
    scale: alt.Scale,
    legend: alt.Legend,
    ends: Sequence[float],
) -> alt.FacetChart | None:
    """Small squares, a line for each layer and a column for each head, with one legend."""
    if not maps:
        return None
    values = [
        {"layer": layer, "head": head, "url": draw(layer, cells), "middle": length / 2, "end": ends[head % 2]}
        for layer, heads in maps.items()
        for head, cells in enumerate(heads)
    ]
    axis = alt.Axis(grid=False, values=[0, length // 2, length], format=",d", domain=True, ticks=True)
    x = alt.X("middle:Q", title="key", scale=alt.Scale(domain=[0, length], nice=False), axis=axis)
    y = alt.Y("middle:Q", title="query", scale=alt.Scale(domain=[length, 0], nice=False), axis=axis)
    chart = alt.Chart().encode(x, y)
    images = chart.mark_image(width=CELL, height=CELL).encode(url="url:N")
    keys = chart.mark_point(opacity=0, size=0).encode(color=alt.Color("end:Q", scale=scale, legend=legend))
    head = alt.Header(labelExpr="'head ' + datum.value", labelFontSize=11, labelPadding=4, title=None)
    side = alt.Header(labelExpr="'layer ' + datum.value", labelFontSize=11, labelPadding=4, title=None)
    return (
        alt.layer(images, keys, data=alt.Data(values=tuple(values)))
        .properties(width=CELL, height=CELL)
        .facet(column=alt.Column("head:O", header=head), row=alt.Row("layer:O", header=side), spacing=16)
    )


def _by_layer(arrays: Arrays, prefix: str) -> dict[int, np.ndarray]:
    found = {int(name.removeprefix(prefix)): each for name, each in arrays.items() if name.startswith(prefix)}
    return dict(sorted(found.items()))


def _layers(rows: Iterable[Row]) -> alt.X:
    layers = sorted({row["layer"] for row in rows})
    return alt.X("layer:O", title="layer", scale=alt.Scale(domain=layers), axis=alt.Axis(labelAngle=0, grid=False))


def _rule(places: Sequence[Row], x: alt.X) -> list[alt.Chart]:
    if not places:
        return []
    chart = _data(places).encode(x)
    return [
        chart.mark_rule(strokeDash=[3, 3], style="trained"),
        chart.mark_text(y=-8, align="right", dx=0, style="note").encode(text="text:N"),
    ]


def _panel(layers: Sequence[Any], title: str) -> alt.LayerChart:
    return alt.LayerChart(layer=list(layers)).properties(
        height=HEIGHT, width="container", title=alt.TitleParams(title, limit=320)
    )


def _closed(points: Sequence[Row]) -> list[Row]:
    """The bins of a histogram, the last one drawn to its end."""
    last = max(point["distance"] for point in points)
    return [*points, *({**point, "distance": 1.0} for point in points if point["distance"] == last)]


def _means(rows: Iterable[Row], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with the same keys as one, their values averaged."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row["value"])
    return [{**dict(zip(keys, group, strict=True)), "value": fmean(values)} for group, values in groups.items()]


def _longest(rows: Sequence[Row]) -> list[Row]:
    longest = max((row["length"] for row in rows), default=0)
    return [row for row in rows if row["length"] == longest]


def _of(rows: Iterable[Row], metric: str) -> list[Row]:
    return [row for row in rows if row["metric"] == metric]


def _grouped(rows: Iterable[Row], key: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _data(values: Sequence[Any]) -> alt.Chart:
    return alt.Chart(alt.Data(values=tuple(values)))


def _shown(values: Sequence[Any]) -> alt.Chart:
    return _data(values).transform_filter("indexof(hidden, datum.series) < 0")


def _colour(looks: Mapping[str, Look]) -> alt.Color:
    legend = alt.Legend(title="run", labelLimit=280, symbolOpacity=1) if len(looks) > 1 else None
    return alt.Color(
        "series:N", scale=alt.Scale(domain=list(looks), range=[each.colour for each in looks.values()]), legend=legend
    )


def _shape(looks: Mapping[str, Look]) -> alt.Shape:
    scale = alt.Scale(domain=list(looks), range=[look.shape for look in looks.values()])
    return alt.Shape("series:N", scale=scale, legend=None)
