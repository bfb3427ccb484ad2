"""`lookfar study`: trains and measures every run of a study, then writes the report."""

from enum import StrEnum
from typing import Annotated

import typer

from lookfar.cli.options import Folder, Overrides, Recipe, folder_of


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command(
        "study", epilog="Example:  lookfar study recipes/demo.toml --folder runs/demo --set study.seeds=[0,1,2]"
    )(study)


class Cluster(StrEnum):
    """Where runs may be sent."""

    ray = "ray"


def study(
    recipe: Recipe,
    folder: Folder = None,
    set_: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time, each in a process of its own.", metavar="N", min=1)
    ] = None,
    on: Annotated[
        Cluster | None, typer.Option(help="Send the runs to a Ray cluster: that of RAY_ADDRESS, or a local one.")
    ] = None,
) -> None:
    """Run a study: schemes, or any keys, × seeds.

    What is finished is skipped; the same command goes on where it stopped.
    """
    from lookfar import config
    from lookfar.cli.progress import in_lines, watching
    from lookfar.study.report import write_report
    from lookfar.study.runner import run_study
    from lookfar.training.train import Interrupted

    place = folder_of(recipe, folder)
    plan = config.read(recipe, set_ or (), config.Study)
    try:
        alone = workers is None and on is None
        failed = run_study(plan, place, watching if alone else in_lines, workers=workers, on="ray" if on else None)
    except Interrupted as stop:
        typer.echo(f"{stop} The same command goes on from there.", err=True)
        raise typer.Exit(128 + stop.signal) from None
    for name, reason in failed.items():
        typer.echo(f"failed: {name}: {reason}", err=True)
    typer.echo(f"The report is {write_report([place])}")
    if failed:
        raise typer.Exit(1)
