"""`lookfar methods`: the catalogue, and a page for each method."""

import inspect
import textwrap
from typing import Annotated

import typer


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("methods", epilog="Example:  lookfar methods alibi")(methods)


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method; without one, the table of all.", metavar="[NAME]")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """List all methods, or print the page of one: formula, paper, settings."""
    from lookfar.cli.tables import show
    from lookfar.model import catalogue

    if name is not None:
        typer.echo(page(name))
    elif markdown:
        typer.echo(catalogue.markdown())
    else:
        show(catalogue.COLUMNS, catalogue.table(), "Methods; combine them as in 'kerple + dape_v2(kernel=3)'")


def page(name: str) -> str:
    """The page of one method."""
    from lookfar import plugins
    from lookfar.model import catalogue

    if name == "nope":
        return catalogue.NOPE
    thing = plugins.find("methods", name)
    defaults = plugins.defaults(thing)
    settings = [
        f"    {key} = {str(value).lower() if isinstance(value, bool) else value}" for key, value in defaults.items()
    ]
    entry = catalogue.describe(name)
    return "\n".join(
        [
            f"{name} ({entry.kind})",
            "",
            inspect.getdoc(thing) or "",
            "",
            "Settings:" if settings else "No settings.",
            *settings,
            "",
            f"Parameters of its own: {entry.parameters}, in a layer of 12 heads of width 64.",
            f"Decoding: {catalogue.decoding(name)}.",
            f"Cost: {catalogue.cost(name)}.",
            f"Kernels that take it on a CPU: {entry.kernels}.",
            "",
            *textwrap.wrap(f"Known quirks: {thing.quirks}", 118),
        ]
    )
