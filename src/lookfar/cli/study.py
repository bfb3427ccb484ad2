"""`lookfar study`: trains and measures every scheme with every seed, then writes the report."""

import typer

from lookfar.cli.options import Folder, Overrides, Recipe, folder_of


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command(
        "study", epilog="Example:  lookfar study recipes/demo.toml --folder runs/demo --set study.seeds=[0,1,2]"
    )(study)


def study(recipe: Recipe, folder: Folder = None, set_: Overrides = None) -> None:
    """Run a study: schemes × seeds. What is finished is skipped; the same command goes on where it stopped."""
    from lookfar import config
    from lookfar.cli.progress import watching
    from lookfar.study.report import write_report
    from lookfar.study.runner import run_study
    from lookfar.training.train import Interrupted

    place = folder_of(recipe, folder)
    plan = config.read(recipe, set_ or (), config.Study)
    try:
        failed = run_study(plan, place, watching)
    except Interrupted as stop:
        typer.echo(f"{stop} The same command goes on from there.", err=True)
        raise typer.Exit(128 + stop.signal) from None
    typer.echo(f"The report is {write_report([place])}")
    for name, reason in failed.items():
        typer.echo(f"failed: {name}: {reason}", err=True)
    if failed:
        raise typer.Exit(1)
