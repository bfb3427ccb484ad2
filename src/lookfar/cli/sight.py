"""`lookfar sight`: draws who sees whom, in the terminal and as a figure."""

from pathlib import Path
from typing import Annotated, Any

import typer

CELL = 22  # of the figure, in pixels
SEEN, HIDDEN, ITSELF = "#2f6f9f", "#eef1f4", "#d98c2b"


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command("sight", epilog="Example:  lookfar sight --documents ..aaaab --slots 3 --window 4 --figure sight.svg")(
        sight
    )


def sight(
    tokens: Annotated[int | None, typer.Option(min=1, max=200, help="How many; by default 8.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Tokens that a query sees, itself included.")] = None,
    documents: Annotated[
        str | None, typer.Option(help="A letter for each token, a dot for padding: ..aaabb", metavar="LETTERS")
    ] = None,
    slots: Annotated[int, typer.Option(min=0, max=100, help="Tokens to be predicted at once, after the text.")] = 0,
    ends: Annotated[
        str | None, typer.Option(help="How many tokens each slot follows: 3,3,5. By default all.", metavar="N,N,…")
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="All slots at one position, not at 1, 2, 3, … after.")
    ] = False,
    ahead: Annotated[bool, typer.Option("--ahead", help="The text sees what is after it, too.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Write an SVG here, too.", metavar="FILE.svg")] = None,
) -> None:
    """Draw who sees whom: a line for each query, a column for each key."""
    from lookfar import files
    from lookfar.cli.options import lengths_of
    from lookfar.errors import UserError

    if figure is not None and figure.suffix != ".svg":
        raise UserError(f"{figure} is not an SVG; name it sight.svg.")
    if figure is not None and not figure.absolute().parent.is_dir():
        raise UserError(f"There is no folder {figure.parent} for the figure.")
    if documents == "":
        raise UserError("--documents names no token; write it as ..aaabb.")
    if documents is not None and tokens not in (None, len(documents)):
        raise UserError(f"--documents {documents} has {len(documents)} tokens, not {tokens}; leave --tokens out.")
    if (ends is not None or shared) and not slots:
        raise UserError("Only slots have --ends or --shared; add --slots.")
    count = len(documents) if documents is not None else 8 if tokens is None else tokens
    followed = None if ends is None else lengths_of(ends, "--ends", "3,3,5")
    seen = _sight(count, window, documents, slots, followed, shared, ahead)
    visible = seen.visible()[0, 0].tolist()
    positions = [str(number) for number in seen.key_positions[0].tolist()]
    names = [*(documents or "t" * count), *"s" * slots]
    typer.echo("\n".join(drawing(visible, names, positions)))
    if figure is not None:
        files.write(figure, svg(visible, names, positions).encode())
        typer.echo(f"\nThe figure is {figure}")


def drawing(visible: list[list[bool]], names: list[str], positions: list[str]) -> list[str]:
    """The mask as text: ● seen, ◆ itself, · hidden."""
    wide = max(2, *map(len, positions)) + 1
    head = " " * 10 + "".join(name.rjust(wide) for name in names)
    marks = (
        "".join(("◆" if place == row else "●" if sees else "·").rjust(wide) for place, sees in enumerate(line))
        for row, line in enumerate(visible)
    )
    lines = [f"{name}{number.rjust(5)}    {line}" for name, number, line in zip(names, positions, marks, strict=True)]
    legend = "● seen   ◆ itself   · hidden       t text, s slot, . padding; a letter: its document; below: positions"
    return [head, "position  " + "".join(number.rjust(wide) for number in positions), *lines, "", legend]


def svg(visible: list[list[bool]], names: list[str], positions: list[str]) -> str:
    """The mask as a figure."""
    margin, size = 3 * CELL, len(names) * CELL
    parts = []
    for row, line in enumerate(visible):
        for column, sees in enumerate(line):
            colour = ITSELF if row == column else SEEN if sees else HIDDEN
            place = f'x="{margin + column * CELL}" y="{margin + row * CELL}"'
            parts.append(f'<rect {place} width="{CELL - 2}" height="{CELL - 2}" rx="3" fill="{colour}"/>')
    for place, (name, number) in enumerate(zip(names, positions, strict=True)):
        middle = margin + place * CELL + CELL / 2 - 1
        for x, y, word in (
            (middle, margin - 1.45 * CELL, name),
            (middle, margin - 0.5 * CELL, number),
            (margin - 1.6 * CELL, middle + 4, name),
            (margin - 0.6 * CELL, middle + 4, number),
        ):
            parts.append(f'<text x="{x:g}" y="{y:g}">{word}</text>')
    whole = size + margin + CELL / 2
    legend = "rows ask, columns are seen; beside each token its position"
    parts.append(f'<text x="{margin}" y="{whole + CELL / 2:g}" text-anchor="start">{legend}</text>')
    wide = max(whole, margin + 340)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {whole + CELL:g}" '
        f'width="{wide:g}" height="{whole + CELL:g}" font-family="sans-serif" font-size="12" text-anchor="middle" '
        'fill="#333">\n<title>Who sees whom</title>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _sight(
    tokens: int,
    window: int | None,
    documents: str | None,
    slots: int,
    ends: tuple[int, ...] | None,
    shared: bool,
    ahead: bool,
) -> Any:
    import torch

    from lookfar.batch import consecutive
    from lookfar.errors import UserError
    from lookfar.sight import Sight

    numbers = None
    if documents is not None:
        wrong = next((letter for letter in documents if letter != "." and not letter.isalpha()), None)
        if wrong is not None:
            raise UserError(f"{wrong!r} in --documents is neither a letter nor a dot; write it as ..aaabb.")
        numbers = torch.tensor([[-1 if letter == "." else ord(letter) for letter in documents]])
    known = {
        "positions": None if numbers is None else consecutive(numbers),
        "documents": numbers,
        "window": window,
    }
    if slots:
        if ends is not None and len(ends) != slots:
            raise UserError(f"--ends names {len(ends)} places for {slots} slots; give one for each.")
        followed = None if ends is None else torch.tensor([ends])
        offsets = torch.zeros(1, slots, dtype=torch.long) if shared else None
        return Sight.slots(tokens, slots, ends=followed, offsets=offsets, ahead=ahead, **known)
    return Sight.bidirectional(tokens, **known) if ahead else Sight.causal(tokens, **known)
