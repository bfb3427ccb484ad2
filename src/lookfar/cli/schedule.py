"""`lookfar schedule`: draws learning rates against updates, in the terminal and as a figure."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

WIDTH, HEIGHT = 64, 6  # of a curve, in characters of 2 × 4 dots
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille character, by column and row


def add(app: typer.Typer) -> None:
    """Put the verb into the command."""
    app.command(
        "schedule",
        epilog='Example:  lookfar schedule cosine "wsd_s(budgets=[1000, 2000, 4000])" --figure rates.svg',
    )(schedule)


def schedule(
    schedules: Annotated[
        list[str], typer.Argument(help='Such as "wsd(decay=0.2, shape=sqrt)". Several are compared.', metavar="NAME...")
    ],
    updates: Annotated[
        int | None, typer.Option(min=1, max=10_000_000, help="By default the last budget, or 1000.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Updates; by default a twentieth of all, or of the first budget.")
    ] = None,
    floor: Annotated[float, typer.Option(min=0, max=1, help="The lowest rate, as a part of the peak.")] = 0.1,
    figure: Annotated[
        Path | None, typer.Option(help="Draw all in one picture: an SVG, PNG or PDF.", metavar="FILE")
    ] = None,
) -> None:
    """Draw learning-rate schedules: the factor of the peak rate at each update."""
    from lookfar import plugins
    from lookfar.config import TrainingConfig
    from lookfar.training.schedules import budgets, check, rate
    from lookfar.training.schedules import warmup as length_of_warmup

    if figure is not None:
        from lookfar.study.rate_curves import check_kind

        check_kind(figure)
    longest = max((last for each in schedules for last in budgets(each)), default=1000)
    configs = {}
    for expression in dict.fromkeys(str(plugins.parse(each)[0]) for each in schedules):
        length = updates or max(budgets(expression), default=longest)
        configs[expression] = TrainingConfig(schedule=expression, updates=length, warmup=warmup, floor=floor)
        check(configs[expression])
    curves = {each: [rate(update, config) for update in range(config.updates)] for each, config in configs.items()}
    for expression, rates in curves.items():
        rising = f"{len(rates):,} updates, warm-up {length_of_warmup(configs[expression]):,}"
        told = f"mean {sum(rates) / len(rates):.3f}, last {rates[-1]:.3g}; {falls(rates)}"
        typer.echo("\n".join([expression, *sketch(rates), f"     {rising}, {told}", ""]))
    if figure is not None:
        from lookfar.study.rate_curves import rate_curves, save

        save(rate_curves(curves), figure)
        typer.echo(f"The figure is {figure}")


def falls(rates: Sequence[float], most: int = 4) -> str:
    """The stretches of updates, counted from 1, in which rates fall: `falls at updates 901-1,000`."""
    lower = [place + 1 for place, (before, now) in enumerate(pairwise(rates), start=1) if now < before]
    starts = [place for before, place in pairwise((-1, *lower)) if place != before + 1]
    ends = [place for place, after in pairwise((*lower, -1)) if after != place + 1]
    told = [f"{start:,}-{end:,}" if start < end else f"{start:,}" for start, end in zip(starts, ends, strict=True)]
    rest = f" and {len(told) - most} times more" if len(told) > most else ""
    return f"falls at updates {', '.join(told[:most])}{rest}" if told else "never falls"


def sketch(rates: Sequence[float]) -> list[str]:
    """The curve of these rates, between 0 and 1, as lines of text with its axes."""
    cells = [[0x2800] * WIDTH for _ in range(HEIGHT)]
    for column, (low, high) in enumerate(_columns(rates)):
        for dot in range(_dot(high), _dot(low) + 1):
            cells[dot // 4][column // 2] |= DOTS[column % 2][dot % 4]
    names = ["1", *[""] * (HEIGHT - 2), "0"]
    lines = [f"{name:>3} │{''.join(map(chr, row))}" for name, row in zip(names, cells, strict=True)]
    return [*lines, f"    └{'─' * WIDTH}", f"     1{f'{len(rates):,}':>{WIDTH - 1}}"]


def _columns(rates: Sequence[float]) -> Iterator[tuple[float, float]]:
    """The lowest and highest rate of each column of dots, joined to the column before."""
    before = rates[0]
    for column in range(2 * WIDTH):
        start = column * len(rates) // (2 * WIDTH)
        stretch = rates[start : max(start + 1, (column + 1) * len(rates) // (2 * WIDTH))]
        yield min(before, *stretch), max(before, *stretch)
        before = stretch[-1]


def _dot(rate: float) -> int:
    return round((1 - rate) * (4 * HEIGHT - 1))
