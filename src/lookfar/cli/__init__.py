"""The command `lookfar`: one file a verb."""

import sys
import warnings
from typing import Annotated, Any

import typer

import lookfar
from lookfar.cli import (
    analyze,
    doctor,
    duplicates,
    evaluate,
    explain,
    export,
    generate,
    methods,
    report,
    schedule,
    sight,
    study,
    tasks,
    train,
)
from lookfar.errors import UserError

app = typer.Typer(
    name="lookfar",
    epilog="First steps:  lookfar train recipes/tiny.toml --folder runs/tiny   then   lookfar report runs/tiny",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"lookfar {lookfar.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Train decoder-only transformers at a short length, and see how far each position encoding reaches beyond it."""


VERBS = (
    *(study, train, evaluate, generate, analyze, report, export, methods, explain, schedule, sight, tasks),
    *(duplicates, doctor),
)
for verb in VERBS:
    verb.add(app)


def main() -> None:
    """Run the command. A mistake of the user is one sentence and exit code 2, never a traceback."""
    warnings.showwarning = _show_warning
    try:
        app()
    except UserError as error:
        _leave(str(error), 2)
    except KeyboardInterrupt:
        _leave("Interrupted.", 130)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _leave(f"{where}{error.strerror or error}.", 2)


def _leave(sentence: str, code: int) -> None:
    print(f"lookfar: {sentence}", file=sys.stderr)
    raise SystemExit(code)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    text = message if issubclass(category, UserWarning) else f"{category.__name__}: {message}"
    print(f"warning: {text}", file=sys.stderr)
