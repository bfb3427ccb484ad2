"""Finding one number in a long text that says the same again and again."""

from collections.abc import Sequence
from random import Random
from string import digits

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task
from lookfar.tasks.symbols import pieces, words
from lookfar.tasks.wording import spell, stated_number

TASK = "Somewhere in this text a key is hidden. Remember it."
FILLER = "The waves come in. The waves go out. The wind is low and the sand is dry. Nothing else happens here."
QUESTION = "What is the key ?"


class Passkey(Task):
    """Finds a key in a text that repeats itself; the length is that of the problem, in symbols.

    Passkey retrieval (Mohtashami and Jaggi, 2023, "Landmark Attention", arXiv 2305.16300), in sentences of our own. The
    key of `size` digits stands at `depth`, 0 for the beginning and 1 for the end of the text, or anywhere.
    """

    trained = range(64, 257, 32)
    tested = range(288, 513, 32)

    def __init__(self, *, size: int = 5, depth: float | None = None) -> None:
        if size < 1:
            raise UserError(f"passkey(size={size}) has no key to find; take at least 1 digit.")
        if depth is not None and not 0 <= depth <= 1:
            raise UserError(f"passkey(depth={depth}) is outside of the text; take 0 to 1.")
        self.size = size
        self.depth = depth
        self.chance = 9.0**-size

    @property
    def symbols(self) -> Sequence[str]:
        return words(*digits, TASK, FILLER, QUESTION, _tell("1"), "The answer is .")

    def example(self, length: int, random: Random) -> Example:
        number = "".join(random.choices(digits[1:], k=self.size))
        shortest = len(pieces(f"{TASK} {_tell(number)} {QUESTION}"))
        if length < shortest:
            raise UserError(f"passkey has no problem of length {length}; its shortest is {shortest}.")
        free = length - shortest
        place = random.randint(0, free) if self.depth is None else round(self.depth * free)
        return self.problem(number, place, free - place)

    def problem(self, number: str, before: int, after: int) -> Example:
        """The problem of a key, with this many symbols of the repeated sentences before and after it."""
        unit = pieces(f" {FILLER}")
        repeated = unit * ((before + after) // len(unit) + 1)
        start, rest = "".join(repeated[:before]), "".join(repeated[before : before + after])
        return Example(f"{TASK}{start} {_tell(number)}{rest} {QUESTION} ", f"The answer is {spell(number)}.", number)

    def answer(self, target: str) -> str | None:
        return stated_number(target)


def _tell(number: str) -> str:
    return f"The key is {spell(number)}."
