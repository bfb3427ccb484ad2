"""`lookfar duplicates`: counts the held-out documents that the training text has too."""

from typing import Annotated

import typer

from lookfar.cli.options import Overrides, Recipe
from lookfar.errors import UserError


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command(
        "duplicates", epilog='Example:  lookfar duplicates recipes/tiny.toml --set data.source="python_library"'
    )(duplicates)


def duplicates(
    recipe: Recipe,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="The held-out split: valid or test.")] = "valid",
    threshold: Annotated[float, typer.Option(min=0.05, max=1, help="Jaccard similarity from which on.")] = 0.8,
    examples: Annotated[int, typer.Option(min=0, help="Pairs to show.")] = 3,
) -> None:
    """Look for held-out documents that are word for word, or nearly, among those trained on.

    In a mixture each source's held-out documents are looked for in the training text of all sources.
    """
    from lookfar import config
    from lookfar.data.corpus import sources_of
    from lookfar.data.duplicates import Documents, Joined, single
    from lookfar.data.duplicates import duplicates as count

    run = config.read(recipe, overrides or ())
    if run.task.name is not None:
        raise UserError("A task never trains on what it measures; duplicates are of texts.")
    if split not in ("valid", "test"):
        raise UserError(f"No held-out split is called {split!r}; name valid or test.")
    sources = sources_of(run.data)
    trained = [(name, Documents(source, "train")) for name, source in sources]
    lone = [f"the training text of {name}" for name, documents in trained if single(documents)]
    for name, source in sources:
        held_out = Documents(source, "test" if split == "test" else "valid")
        found = count(Joined(trained), held_out, threshold=threshold, examples=examples)
        alone = ["the held-out text"] * single(held_out) + lone
        typer.echo(
            f"{name}: of {found.held_out:,} held-out documents {found.exact:,} are word for word among {found.train:,} "
            f"training documents, and {found.near:,} nearly (similarity {threshold:g} or more)"
            + ("." if alone else f": {found.share:.2%}.")
        )
        if alone:
            typer.echo(
                f"  One document only: {', '.join(alone)}. Documents are compared whole: of copies inside a long "
                "one this tells nothing. Name a folder with a file for each document."
            )
        for pair in found.examples:
            typer.echo(f"  {pair.similarity:.2f}  {pair.held_out}  is like  {pair.train}")
