"""Draws what an analysis found as one offline page, and as figures for a paper; reads its folder and nothing else."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lookfar import files
from lookfar.analysis.runs import ARRAYS, ARRAYS_OF_OTHER, ROWS
from lookfar.errors import UserError
from lookfar.study.page import compose, definitions, figure, publish, resource, vega_lite

KINDS = ("svg", "pdf", "png")


def write_page(folder: Path) -> Path:
    """Write `index.html`, and `figures/*` as SVG, PDF and PNG beside it, from what `analyze_run` left in the folder.

    Raises:
        UserError: nothing was analysed there, or the page cannot be written.
    """
    import vl_convert

    from lookfar.study import analysis_figures, figures  # late, as vl_convert: `lookfar --help` has no time for altair

    rows = files.read_lines(folder / ROWS)
    arrays = [_read(folder / name) for name in (ARRAYS, ARRAYS_OF_OTHER)]
    if not rows:
        raise UserError(f"There is no analysis in {folder}; make one with lookfar analyze RUN.")
    rows, names = _named(rows)
    looks = figures.looks(names)
    words = json.loads(resource("words.json"))["analysis"]
    drawn = {}
    for name in words["figures"]:
        draw = getattr(analysis_figures, name)
        if name in ("attention_maps", "score_changes"):
            for series, of_run in zip(names, arrays, strict=False):
                for length in sorted({int(each.split("/")[0]) for each in of_run}):
                    chart = draw(of_run, length)
                    if chart is not None:
                        title = f"{name}_{list(names).index(series)}_{length}"
                        told = f"{words['figures'][name]} {escape(series)}, {length:,} tokens."
                        drawn[title] = ([analysis_figures.specification(chart)], told)
        elif panels := draw(rows, looks):
            drawn[name] = ([analysis_figures.specification(panel) for panel in panels], words["figures"][name])
    for old in (folder / "figures").glob("*"):  # of another analysis
        if old.name.startswith(tuple(words["figures"])):
            old.unlink()
    sections = []
    for name, (panels, caption) in drawn.items():
        svg = vl_convert.vegalite_to_svg(analysis_figures.sheet(panels), vl_version=vega_lite())
        publish(folder / "figures" / f"{name}.svg", svg.encode())
        publish(folder / "figures" / f"{name}.pdf", vl_convert.svg_to_pdf(svg))
        publish(folder / "figures" / f"{name}.png", vl_convert.svg_to_png(svg, scale=2))
        sections.append(figure(analysis_figures.for_page(panels), caption, name, KINDS))
    publish(folder / "index.html", compose("What attention does", looks, _head(rows, names, words), sections).encode())
    return folder / "index.html"


def _head(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], words: Mapping[str, Any]) -> str:
    first = rows[0]
    lengths = " and ".join(f"{length:,}" for length in sorted({row["length"] for row in rows}))
    inputs = max(row["value"] for row in rows if row["metric"] == "inputs")
    assigned = [row for row in rows if row["metric"] == "divergence_assigned" and row["layer"] is None]
    least = [row for row in rows if row["metric"] == "divergence_min" and row["layer"] is None]
    of_task = sorted({row["problems"] for row in rows if "problems" in row})
    what = f"problems of length {' and '.join(map(str, of_task))}, in" if of_task else "windows of"
    facts = [
        ("Runs", ", ".join(names)),
        ("Task" if of_task else "Text", first["data"]),
        ("Inputs", f"{inputs:.0f} {what} {lengths} tokens, trained at {first['context']:,}"),
    ]
    facts += [
        (
            f"Divergence at {one['length']:,}",
            f"{one['value']:.3f} nats assigned, {low['value']:.3f} at least; ln 2 is 0.693",
        )
        for one, low in zip(assigned, least, strict=True)
    ]
    title = " against ".join(names)
    return f'<h1>{escape(title)}</h1>\n<p class="lead">{words["lead"]}</p>\n{definitions(facts)}'


def _named(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows with their `series`, and the scheme of each: a series is a scheme, with the run where two share one."""
    runs = {row["run"]: row["scheme"] for row in rows}
    alike = len(set(runs.values())) < len(runs)
    names = {run: f"{scheme} · {run}" if alike else scheme for run, scheme in runs.items()}
    told = [{**row, "series": names[row["run"]]} for row in rows]
    told = [{**row, "against": names.get(row["against"], row["against"])} if "against" in row else row for row in told]
    return told, {names[run]: scheme for run, scheme in runs.items()}


def _read(file: Path) -> dict[str, np.ndarray]:
    if not file.exists():
        return {}
    with np.load(file, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}
