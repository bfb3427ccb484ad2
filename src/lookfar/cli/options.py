"""Arguments that several verbs share, and how they are read."""

from pathlib import Path
from typing import Annotated

import typer

from lookfar.errors import UserError

Recipe = Annotated[Path, typer.Argument(help="A recipe, such as recipes/tiny.toml.", metavar="RECIPE.toml")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a finished run.", metavar="RUN")]
Folder = Annotated[Path | None, typer.Option(help="Where to work; by default runs/NAME-OF-RECIPE.", metavar="DIR")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change a key of the recipe: training.updates=40. May be repeated.", metavar="KEY=VALUE"
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="Allow the run to import code of the user's own modules.")]


def lengths_of(text: str | None, option: str = "--lengths", example: str = "128,256") -> tuple[int, ...] | None:
    """Read `128,256`."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} {text!r} is not a list of whole numbers; write it as {example}.") from error


def folder_of(recipe: Path, folder: Path | None) -> Path:
    """The folder that was named, or the one that belongs to a recipe."""
    return Path("runs", recipe.stem) if folder is None else folder
