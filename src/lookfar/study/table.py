"""A table of the page: a line for each series, a column for each number, sorted by a click."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

from lookfar.study.page import swatch


@dataclass(frozen=True)
class Column:
    """Numbers of one kind: under which head, and how they are shown."""

    head: str
    note: str
    values: Mapping[str, Sequence[float]]  # by series, one a seed
    show: Callable[[Sequence[float]], str]
    best: Callable[[Iterable[float]], float] | None = None
    foot: str = ""


def table(groups: Mapping[str, Sequence[Column]], looks: Mapping[str, Any], caption: str, *, foot: str = "") -> str:
    """The columns under the names of their groups; what is best of a column is bold. `foot` names the last line."""
    columns = [column for each in groups.values() for column in each]
    spans = [
        f'<th class="span" colspan="{len(each)}"><span>{escape(name)}</span></th>' for name, each in groups.items()
    ]
    heads = [
        f'<th scope="col" data-column="{place}"><button type="button"><span>{column.head}</span>'
        f"<small>{escape(column.note)}</small></button></th>"
        for place, column in enumerate([Column("scheme", "", {}, str), *columns])
    ]
    cells = [_cells(column) for column in columns]
    body = [
        f'<tr data-series="{escape(name)}"><td data-value="{escape(name)}">{swatch(look)} {escape(name)}</td>'
        + "".join(of_column.get(name, '<td data-value="">–</td>') for of_column in cells)
        + "</tr>\n"
        for name, look in looks.items()
        if any(name in column.values for column in columns)
    ]
    ends = f"<td>{foot}</td>" + "".join(f"<td>{column.foot}</td>" for column in columns)
    whole = (
        f"<thead><tr><td></td>{''.join(spans)}</tr>\n<tr>{''.join(heads)}</tr></thead>\n"
        f"<tbody>{''.join(body)}</tbody>\n" + f"<tfoot><tr>{ends}</tr></tfoot>" * bool(foot)
    )
    return f'<figure><div class="scroll"><table>{whole}</table></div><figcaption>{caption}</figcaption></figure>'


def _cells(column: Column) -> dict[str, str]:
    means = {name: fmean(each) for name, each in column.values.items()}
    finite = [mean for mean in means.values() if math.isfinite(mean)]
    best = column.best(finite) if column.best and len(means) > 1 and finite else None
    cells = {}
    for name, mean in means.items():
        shown, exact = column.show(column.values[name]), ", ".join(f"{value:.6g}" for value in column.values[name])
        shown = f"<b>{shown}</b>" if mean == best else shown
        cells[name] = f'<td data-value="{mean if math.isfinite(mean) else ""}" title="{exact}">{shown}</td>'
    return cells
