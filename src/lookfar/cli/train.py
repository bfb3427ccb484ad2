"""`lookfar train`: trains one run, or goes on with it, and evaluates it."""

import json
from contextlib import nullcontext
from typing import Annotated

import typer

from lookfar.cli.options import Folder, Overrides, Recipe, folder_of


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command(
        "train", epilog="Example:  lookfar train recipes/tiny.toml --folder runs/tiny --set model.scheme=alibi"
    )(train)


def train(
    recipe: Recipe,
    folder: Folder = None,
    set_: Overrides = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="Go on from a checkpoint of another run.", metavar="RUN@UPDATE")
    ] = None,
    reset_optimizer: Annotated[bool, typer.Option("--reset-optimizer", help="Of --from: forget its state.")] = False,
    weights: Annotated[
        str | None, typer.Option(help="Start with the weights of another run alone.", metavar="RUN[@UPDATE]")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace of a few updates, and show what costs most.")
    ] = False,
) -> None:
    """Train one run, then measure it. The same command goes on where it stopped.

    Several processes:  torchrun --nproc-per-node 8 -m lookfar train RECIPE
    """
    from lookfar import config
    from lookfar.cli.progress import watching
    from lookfar.cli.tables import show_rows
    from lookfar.training.processes import is_first
    from lookfar.training.run import run_whole
    from lookfar.training.train import Interrupted

    place = folder_of(recipe, folder)
    begins = {"branch": from_, "reset_optimizer": reset_optimizer or None, "weights": weights}
    told = [
        f"training.{key}={str(value).lower() if value is True else json.dumps(value)}"
        for key, value in begins.items()
        if value
    ]
    run = config.read(recipe, [*(set_ or ()), *told])
    try:
        with watching() if is_first() else nullcontext(lambda event: None) as watch:
            rows = run_whole(run, place, watch, profile=profile)
    except Interrupted as stop:
        if is_first():
            typer.echo(f"{stop} The same command goes on from there.", err=True)
        raise typer.Exit(128 + stop.signal) from None
    if not is_first():
        return
    show_rows(rows)
    typer.echo(f"The run is in {place}. Its report:  lookfar report {place}")
