"""Writes `docs/benchmarks.md` and its figures from the rows of `results/`: what attention costs under every method.

    python docs/benchmarks.py

Nothing is measured: the rows come from `python -m benchmarks --only attention --folder results/cpu`.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import altair as alt

from lookfar.study.figures import COLOURS, readable
from lookfar.study.rate_curves import save

ROOT = Path(__file__).parent.parent
PAGE, FIGURES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "figures"
PLACES = {"cpu": "On a CPU", "gpu": "On a GPU"}  # folders of results
BASE = "plain causal"
INTRODUCTION = """# What attention costs

Time over that of torch's plain causal attention of the same heads, width and type, measured in turns in one run:
medians. *forward+backward* includes the gradients of all that a method learns, *decode* is one query against so many
cached keys. `lookfar` is the kernel that it chooses by itself, told in brackets; *eager square* the full square of
scores under autograd, the usual code of a method. Memory is what one call adds at its peak to its inputs.

`python docs/benchmarks.py` makes this page from the rows of [results](../results).
"""
Row = dict[str, Any]


def main() -> None:
    """Write the page and a figure for every place where something was measured."""
    for place in measured():
        figure = FIGURES / f"attention_{place}.svg"
        save(chart(rows_of(place)), figure)
        print(f"wrote {figure.relative_to(ROOT)}")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def measured() -> list[str]:
    """The places that have rows."""
    return [place for place in PLACES if (ROOT / "results" / place / "attention.jsonl").exists()]


def rows_of(place: str) -> list[Row]:
    """The rows of a place, as they were measured."""
    text = (ROOT / "results" / place / "attention.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def page() -> str:
    """The text of the page."""
    return "\n".join([INTRODUCTION, *(section(place, rows_of(place)) for place in measured())])


def section(place: str, rows: list[Row]) -> str:
    """Heading, figure and tables of one place; a table for each type, width of a head and pass."""
    facts = rows[0]
    threads = f", {facts['threads']} threads" if "threads" in facts else ""
    lines = [
        f"## {PLACES[place]}",
        "",
        f"{facts['processor']}{threads}, torch {facts['torch']}: `{facts['command']}`.",
        "",
        f"![Time of forward and backward over plain causal attention](figures/attention_{place}.svg)",
        "",
    ]
    for title, each in _grouped(rows, lambda row: f"{row['pass']}, {_sizes(row)}").items():
        lines += [f"### {title}", "", *table(each, lambda row: readable(row["ratio_to_causal"])), ""]
        if each[0]["pass"] == "forward+backward":
            lines += ["Peak memory in MB:", "", *table(each, _memory), ""]
    return "\n".join(lines)


def table(rows: list[Row], cell: Any) -> list[str]:
    """A line for every scheme and implementation, a column for every length."""
    lengths = sorted({row["length"] for row in rows})
    lines = [
        "| scheme | by | " + " | ".join(f"{length:,}" for length in lengths) + " |",
        "|---|---|" + "--:|" * len(lengths),
    ]
    for (scheme, implementation), each in _grouped(rows, lambda row: (row["scheme"], row["implementation"])).items():
        if implementation == BASE:
            continue
        cells = {row["length"]: cell(row) for row in each}
        kernels = "/".join(dict.fromkeys(row["kernel"] for row in each if row["kernel"]))
        by = f"**lookfar** ({kernels})" if implementation == "lookfar" else implementation
        lines.append(f"| `{scheme}` | {by} | " + " | ".join(cells.get(length, "") for length in lengths) + " |")
    return lines


def chart(rows: list[Row]) -> alt.VConcatChart:
    """A panel for each length: the time of forward and backward over plain causal, a line for each scheme."""
    rows = [row for row in rows if row["pass"] == "forward+backward" and row["implementation"] != BASE]
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    ways = ["lookfar", *sorted({row["implementation"] for row in rows} - {"lookfar"})]
    ratios = [row["ratio_to_causal"] for row in rows]
    scale = alt.Scale(type="log", domain=[min([0.9, *ratios]) / 1.1, max(ratios) * 1.1], nice=False)
    y = alt.Y("scheme:N", title=None, sort=schemes, axis=alt.Axis(labelLimit=200))
    colour = alt.Color(
        "by:N",
        title=None,
        sort=ways,
        scale=alt.Scale(domain=ways, range=[*COLOURS[: len(ways)]]),
        legend=alt.Legend(orient="top"),
    )
    panels = []
    by_size = _grouped(rows, lambda row: f"{row['length']:,} tokens, {_sizes(row)}")
    for title, each in by_size.items():
        last = each is [*by_size.values()][-1]
        told = "times plain causal attention, forward and backward" if last else None
        x = alt.X("ratio:Q", title=told, scale=scale, axis=alt.Axis(format="~g", tickCount=8))
        values = [
            {"scheme": row["scheme"], "by": row["implementation"], "ratio": row["ratio_to_causal"]} for row in each
        ]
        points = alt.Chart(alt.Data(values=values)).encode(x, y, colour)
        rule = alt.Chart(alt.Data(values=[{"ratio": 1}])).mark_rule(color="#8c959f", strokeDash=[2, 3]).encode(x)
        others = points.transform_filter("datum.by !== 'lookfar'").mark_point(filled=True, size=34, opacity=0.75)
        own = points.transform_filter("datum.by === 'lookfar'").mark_point(filled=True, size=80, shape="diamond")
        layers = alt.LayerChart(layer=[rule, others, own], title=alt.TitleParams(title, offset=8))
        panels.append(layers.properties(width=520, height=15 * len(schemes)))
    return alt.VConcatChart(vconcat=panels, spacing=12)


def _sizes(row: Row) -> str:
    return f"batch {row['batch']}, {row['heads']} heads of {row['width']}, {row['dtype']}"


def _memory(row: Row) -> str:
    return "" if row["peak_megabytes"] is None else readable(row["peak_megabytes"])


def _grouped(rows: list[Row], key: Any) -> dict[Any, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


if __name__ == "__main__":
    main()
