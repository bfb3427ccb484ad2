"""`lookfar doctor`: looks at this computer, and says what to do before training can start."""

import json
from pathlib import Path
from typing import Annotated

import typer


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("doctor", epilog="Example:  lookfar doctor --folder runs && lookfar train recipes/tiny.toml")(doctor)


def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs will be.", metavar="DIR")] = Path("runs"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda …")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what works here, what is missing and what to do; the exit code is 1 where training cannot start."""
    from lookfar.cli.tables import show
    from lookfar.training.readiness import can_start, examine

    findings = list(examine(folder, device))
    ready = can_start(findings)
    if as_json:
        typer.echo(json.dumps({"ready": ready, "findings": [each.row() for each in findings]}, indent=2))
    else:
        show(("what", "", "found", "what to do"), [(f.subject, f.state, f.found, f.advice) for f in findings])
        typer.echo("Training can start." if ready else "Training cannot start: mend what is wrong.")
    raise typer.Exit(0 if ready else 1)
