"""`lookfar analyze`: looks into the attention of a finished run, alone or against another."""

from pathlib import Path
from typing import Annotated

import typer

from lookfar.cli.options import RunFolder, Trust


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("analyze", epilog="Example:  lookfar analyze runs/nope --against runs/t5 --length 64 --length 256")(
        analyze
    )


def analyze(
    run: RunFolder,
    against: Annotated[
        Path | None, typer.Option(help="Another run of the same tokens and heads.", metavar="RUN")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 file; by default the run's held-out text.")] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=2, help="Tokens of an input, or length of problems; by default as trained, and beyond. Repeatable."
        ),
    ] = None,
    inputs: Annotated[int, typer.Option(min=1, help="Windows of the text, or problems, at each length.")] = 4,
    analysis: Annotated[
        list[str] | None, typer.Option(help="Such as entropy; by default all. May be repeated.", metavar="NAME")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="By default analysis/ in the run's folder.", metavar="DIR")
    ] = None,
    trust: Trust = False,
) -> None:
    """Attention maps, biases, distances, entropy, sinks and divergences: rows, figures and an offline page."""
    from lookfar.analysis.runs import analyze_run
    from lookfar.cli.progress import watching
    from lookfar.study.analysis_page import write_page

    output = folder or run / "analysis"
    with watching() as watch:
        analyze_run(
            run,
            against=against,
            lengths=length,
            inputs=inputs,
            text=text,
            wanted=analysis,
            output=output,
            trust=trust,
            progress=lambda what, part: watch({"event": "evaluation", "what": what, "part": part}),
        )
    typer.echo(f"The analysis is {write_page(output)}")
