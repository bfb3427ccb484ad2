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
    """Print the perplexities among these rows, a line for each protocol and a column for each length."""
    found = [row for row in rows if row["metric"] == "perplexity"]
    lengths = sorted({row["length"] for row in found})
    for data in dict.fromkeys(row["data"] for row in found):
        keys = dict.fromkeys((row["scheme"], row["protocol"]) for row in found if row["data"] == data)
        cells = {(row["scheme"], row["protocol"], row["length"]): row for row in found if row["data"] == data}
        lines = [(*key, *(_value(cells.get((*key, length))) for length in lengths)) for key in keys]
        unit = next(row.get("unit", "token") for row in found if row["data"] == data)
        show(("scheme", "protocol", *lengths_as_text(lengths)), lines, f"{unit} perplexity on {data}", len(lengths))


def lengths_as_text(lengths: Iterable[int]) -> list[str]:
    """Lengths as column heads."""
    return [f"{length:,}" for length in lengths]


def _value(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['value']:.4g}"
