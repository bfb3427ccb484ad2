"""`lookfar generate`: writes on from a prompt, to the terminal as it comes."""

from typing import Annotated

import typer

from lookfar.cli.options import RunFolder, Trust


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("generate", epilog='Example:  lookfar generate runs/demo/alibi-s0 --prompt "def main(" --tokens 200')(
        generate
    )


def generate(
    run: RunFolder,
    prompt: Annotated[list[str], typer.Option(help="The text to write on from. May be repeated.")],
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens to write.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text to stop at. May be repeated.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="The most time to spend.")] = None,
    block: Annotated[
        int | None, typer.Option(min=1, help="Predict so many tokens at once, with a model that has slots.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="Run the same weights under another scheme.")] = None,
    trust: Trust = False,
) -> None:
    """Write on from a prompt with the weights of a run; the first is shown as it comes, others after it.

    A run of a task reads a prompt as it reads a problem: after BOS where it has one, and without a space at the end.
    """
    from lookfar.data.writing import Writer
    from lookfar.model.generate import Sampling, stream
    from lookfar.tasks.symbols import BOS
    from lookfar.training import folder
    from lookfar.training.checkpoint import load
    from lookfar.training.measure import numbers_of
    from lookfar.training.problems import tokenizer_of

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    model, tokenizer = load(run, scheme=scheme, trust=trust), tokenizer_of(run)
    writers = [Writer(tokenizer, stop or []) for _ in prompt]
    trained, _ = folder.read(run)
    first, numbers = [], None
    if trained.task.name is not None:
        prompt = [each.removesuffix(" ") for each in prompt]  # that space belongs to what is written
        first, numbers = [BOS] * trained.task.bos, numbers_of(trained, model)
    given, later = [first + tokenizer.encode(each).tolist() for each in prompt], ["" for _ in prompt[1:]]
    typer.echo(prompt[0], nl=False)
    for step in stream(
        model,
        given,
        tokens=tokens,
        sampling=sampling,
        stop=writers[0].stops,
        seconds=seconds,
        block=block,
        positions=None if numbers is None else numbers.measured,
    ):
        shown, *others = (writer.add(token) for writer, token in zip(writers, step, strict=True))
        typer.echo(shown, nl=False)
        later = [text + more for text, more in zip(later, others, strict=True)]
    typer.echo(writers[0].rest())
    for asked, text, writer in zip(prompt[1:], later, writers[1:], strict=True):
        typer.echo(f"\n{asked}{text}{writer.rest()}")
