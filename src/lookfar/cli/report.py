"""`lookfar report`: draws runs on one page."""

from pathlib import Path
from typing import Annotated

import typer


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("report", epilog="Example:  lookfar report runs/demo runs/mine --output both.html")(report)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Runs, or studies with their runs.", metavar="DIR...")],
    output: Annotated[Path | None, typer.Option(help="The page; by default report.html in the first folder.")] = None,
) -> None:
    """Write report.html and its figures as SVG and PDF."""
    from lookfar.study.report import write_report

    typer.echo(f"The report is {write_report(folders, output)}")
