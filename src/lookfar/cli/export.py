"""`lookfar export`: writes the weights of a run into one plain file."""

from pathlib import Path
from typing import Annotated

import typer

from lookfar.cli.options import RunFolder


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("export", epilog="Example:  lookfar export runs/demo/alibi-s0 --to alibi.safetensors")(export)


def export(
    run: RunFolder,
    to: Annotated[
        Path, typer.Option(help="A file *.safetensors, or a folder for recipe and tokenizer too.", metavar="PLACE")
    ],
    which: Annotated[str, typer.Option(help="The checkpoint: last, best, or a number of updates.")] = "last",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Write the weights of a run as plain safetensors, however many processes saved them."""
    from lookfar.training.export import export as write

    typer.echo(f"The weights are in {write(run, to, which=which, overwrite=overwrite)}")
