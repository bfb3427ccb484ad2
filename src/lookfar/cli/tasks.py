"""`lookfar tasks`: lists the synthetic problems with a length, and prints examples of one."""

import json
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from lookfar.errors import UserError

if TYPE_CHECKING:
    from lookfar.tasks.base import Task

LONGEST = 5000  # length of a problem whose steps are written: each step may repeat what is left of the problem


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command(
        "tasks", epilog='Example:  lookfar tasks "addition(order=reversed)" --length 5 --count 3 --scratchpad icovr'
    )(tasks)


def tasks(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A task, such as 'copy(variant=repeated)'; without one, the list of all.", metavar="[NAME]"
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(help="By default the longest that is trained on.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="How many examples; by default 3.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another one gives other examples; by default 0.")] = None,
    scratchpad: Annotated[
        str | None, typer.Option(help="Write the steps with these parts, some of the letters icovr.", metavar="PARTS")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each example as a line of JSON.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every problem as a line of JSON, where a task has an end: scan.")
    ] = False,
) -> None:
    """List all tasks, or print examples of one: what a model reads, and what it is to write."""
    from lookfar import plugins

    stated = any(each is not None for each in (length, count, seed, scratchpad)) or as_json
    if name is None:
        if stated or everything:
            raise UserError("Which task? Name one, such as 'lookfar tasks addition --length 5'.")
        _list()
        return
    terms = plugins.parse(name)
    if len(terms) > 1:
        raise UserError(f"{name!r} names {len(terms)} tasks; examples are printed of one.")
    task = plugins.build("tasks", terms[0])
    if everything:
        if stated or terms[0].settings:
            raise UserError("--all prints every problem as it is, in JSON; leave settings and other options out.")
        lines = _all(task, terms[0].name)
    else:
        asked = task.trained[-1] if length is None else length
        if scratchpad is not None and asked > LONGEST:
            raise UserError(f"The steps of a problem of length {asked} fill gigabytes; ask for {LONGEST} or less.")
        lines = _examples(task, asked, 3 if count is None else count, seed or 0, scratchpad, as_json)
    for line in lines:
        typer.echo(line)


def _list() -> None:
    from lookfar import plugins

    rows = [("task", "trained", "tested", "chance", "settings")]
    for name in plugins.names("tasks"):
        thing = plugins.find("tasks", name)
        task = thing()
        rows.append((name, _lengths(task.trained), _lengths(task.tested), f"{task.chance:.2g}", _settings(thing)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _examples(task: "Task", length: int, count: int, seed: int, scratchpad: str | None, as_json: bool) -> Iterator[str]:
    from lookfar.tasks.scratchpad import Scratchpad

    pad, random = None if scratchpad is None else Scratchpad(scratchpad), Random(seed)
    for _ in range(count):
        example = task.example(length, random)
        written = example.target if pad is None else pad.write(example)
        if as_json:
            yield json.dumps({"length": length, "input": example.input, "output": written, "answer": example.answer})
        else:
            yield f"{example.input}\n    {written}"


def _all(task: Any, name: str) -> Iterator[str]:
    if not hasattr(task, "all"):
        raise UserError(f"{name!r} has no end, so that not all of it can be printed; give --count in place of --all.")
    for problem, solution in task.all():
        yield json.dumps({"input": problem, "output": solution})


def _lengths(lengths: range) -> str:
    step = f" by {lengths.step}" if lengths.step > 1 else ""
    return f"{lengths[0]}-{lengths[-1]}{step}"


def _settings(thing: type) -> str:
    """Each setting with its default; of words, all, the default first."""
    from lookfar import plugins

    told, types = [], plugins.settings(thing)
    for key, default in plugins.defaults(thing).items():
        words = [each for each in get_args(types[key]) if isinstance(each, str) and each != default]
        told.append("|".join([str(plugins.Term("", {key: default})).strip("()"), *words]))
    return ", ".join(told)
