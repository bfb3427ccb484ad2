"""Tables on the terminal."""

from collections.abc import Iterable, Sequence
from typing import Any


def show(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None, right: int = 0) -> None:
    """Print a table; the last `right` columns are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_style="", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        number = index >= len(columns) - right
        table.add_column(column, justify="right" if number else "left", no_wrap=number or index == 0)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(highlight=False, markup=False).print(table)


def show_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Print the perplexities and accuracies among these rows, a line for each protocol and a column for each length."""
    rows = list(rows)
    for metric in ("perplexity", "accuracy"):
        of_metric = [row for row in rows if row["metric"] == metric]
        for data in dict.fromkeys(row["data"] for row in of_metric):
            found = [row for row in of_metric if row["data"] == data]
            unit = f"{found[0].get('unit', 'token')} " if metric == "perplexity" else ""
            _show_lengths(found, f"{unit}{metric} on {data}")


def _show_lengths(rows: list[dict[str, Any]], title: str) -> None:
    lengths = sorted({row["length"] for row in rows})
    several = len({row.get("update") for row in rows if row.get("checkpoint") != "best"}) > 1  # budgets
    cells = {(*_line(row, several), row["length"]): row for row in rows}
    keys = dict.fromkeys(_line(row, several) for row in rows)
    lines = [(*key, *(_value(cells.get((*key, length))) for length in lengths)) for key in keys]
    show(("scheme", "protocol", *lengths_as_text(lengths)), lines, title, len(lengths))


def _line(row: dict[str, Any], several: bool) -> tuple[str, str]:
    """What tells a measurement from others of its length; its budget where there are several."""
    best = ", best checkpoint" if row.get("checkpoint") == "best" else ""
    numbered = f", {row['numbering']}" if row.get("numbering") else ""
    budget = f", after {row['update']:,} updates" if several and row.get("update") is not None and not best else ""
    return row["scheme"], row["protocol"] + numbered + budget + best


def lengths_as_text(lengths: Iterable[int]) -> list[str]:
    """Lengths as column heads."""
    return [f"{length:,}" for length in lengths]


def _value(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['value']:.4g}"
