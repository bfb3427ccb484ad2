"""How tasks write numbers, answers and refusals."""

import re

from lookfar.errors import UserError

SEPARATOR = "[SEP] "  # between a problem and its solution, where the problem does not end in a mark of its own
NEXT = "[NEXT]"  # between two solutions


def spell(number: int | str) -> str:
    """Digits with a space between them: `53` is `5 3`, and `-2` is `- 2`."""
    return " ".join(str(number))


def stated(target: str) -> str | None:
    """What the last sentence of the form `The answer is … .` states, with single spaces; None where there is none."""
    found = re.findall(r"The answer is\s([^.]*)\.", target)
    return " ".join(found[-1].split()) if found else None


def stated_number(target: str) -> str | None:
    """The whole number that the last `The answer is … .` states, without spaces and leading zeros."""
    found = re.fullmatch(r"(-?)0*(\d+)", (stated(target) or "").replace(" ", ""))
    return found[1] + found[2] if found else None


def check_length(name: str, length: int, shortest: int) -> None:
    """Refuse a length that is too short."""
    if length < shortest:
        raise UserError(f"{name} has no problem of length {length}; its shortest is {shortest}.")
