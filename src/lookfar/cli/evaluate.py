"""`lookfar evaluate`: measures a finished run again, or a model of the hub, at any length, protocol and text."""

from pathlib import Path
from typing import Annotated

import typer

from lookfar.cli.options import Trust, lengths_of
from lookfar.errors import UserError


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command(
        "evaluate", epilog='Example:  lookfar evaluate runs/tiny --lengths 64,128 --protocol "sliding(stride=16)"'
    )(evaluate)


def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            help="The folder of a finished run, or hf:NAME or hf:FOLDER for a causal model of transformers.",
            metavar="RUN",
        ),
    ],
    lengths: Annotated[str | None, typer.Option(help="Such as 128,256; by default the run's.")] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(help='Such as "sliding(stride=64)" or "last(k=256)"; by default the run\'s. May be repeated.'),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A UTF-8 text file to measure on, instead of the run's; for hf: also a folder or a source."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Most tokens to score per length.", min=1)] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Also write the loss by place in the window.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where the rows of an hf: model are written, if anywhere.", metavar="DIR")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="Run the same weights under another scheme.")] = None,
    trust: Trust = False,
) -> None:
    """Measure perplexity and bits per byte; the rows go into the run's rows.jsonl. See docs/protocols.md."""
    from lookfar.cli.progress import watching
    from lookfar.cli.tables import show_rows
    from lookfar.evaluation.base import Progress, Row

    def of_run(progress: Progress) -> list[Row]:
        from lookfar.training.evaluate import evaluate_run

        if folder is not None:
            raise UserError("The rows of a run go into its own folder; --folder is for hf: models.")
        return evaluate_run(
            Path(run),
            lengths=asked,
            wanted=protocol,
            data=None if data is None else Path(data),
            tokens=tokens,
            by_position=by_position,
            scheme=scheme,
            trust=trust,
            progress=progress,
        )

    def of_hub(progress: Progress) -> list[Row]:
        from lookfar.interop import hugging_face

        if data is None or asked is None:
            raise UserError(f"{run} was not trained here: give --data FILE and --lengths, such as --lengths 512,1024.")
        if scheme is not None:
            raise UserError(f"{run} has its own way to see position; --scheme is for runs.")
        return hugging_face.evaluate(
            run.removeprefix(hugging_face.PREFIX),
            data=data,
            lengths=asked,
            wanted=protocol or ("non_overlapping", "sliding"),
            tokens=tokens,
            by_position=by_position,
            trust=trust,
            folder=folder,
            progress=progress,
        )

    asked = lengths_of(lengths)
    with watching() as watch:
        measure = of_hub if run.startswith("hf:") else of_run
        rows = measure(lambda what, part: watch({"event": "evaluation", "what": what, "part": part}))
    show_rows(rows)
