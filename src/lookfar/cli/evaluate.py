"""`lookfar evaluate`: measures a finished run again, at other lengths, in other protocols, on other text."""

from pathlib import Path
from typing import Annotated

import typer

from lookfar.cli.options import RunFolder, Trust, lengths_of


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command(
        "evaluate", epilog='Example:  lookfar evaluate runs/tiny --lengths 64,128 --protocol "sliding(stride=16)"'
    )(evaluate)


def evaluate(
    run: RunFolder,
    lengths: Annotated[str | None, typer.Option(help="Such as 128,256; by default the run's.")] = None,
    protocol: Annotated[
        list[str] | None, typer.Option(help='Such as "sliding(stride=64)"; by default the run\'s. May be repeated.')
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A UTF-8 text file to measure on, instead of the run's.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Most tokens to score per length.", min=1)] = None,
    scheme: Annotated[str | None, typer.Option(help="Run the same weights under another scheme.")] = None,
    trust: Trust = False,
) -> None:
    """Measure perplexity and bits per byte; the rows go into the run's rows.jsonl."""
    from lookfar.cli.progress import watching
    from lookfar.cli.tables import show_rows
    from lookfar.training.evaluate import evaluate_run

    with watching() as watch:
        rows = evaluate_run(
            run,
            lengths=lengths_of(lengths),
            wanted=protocol,
            data=data,
            tokens=tokens,
            scheme=scheme,
            trust=trust,
            progress=lambda what, part: watch({"event": "evaluation", "what": what, "part": part}),
        )
    show_rows(rows)
