"""Finding one of several hidden numbers in a long text of random words."""

from collections.abc import Sequence
from random import Random
from string import digits

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task
from lookfar.tasks.symbols import GREEK, pieces, words
from lookfar.tasks.wording import spell, stated_number

_WORDS = (
    "river stone window paper garden winter summer bread water candle market bridge forest letter ocean valley harbour "
    "morning evening table ladder basket feather copper silver thunder meadow orchard pebble lantern village station "
    "kettle blanket engine mirror button hammer needle thread pocket saddle island"
)
FILLER = tuple(_WORDS.split())


class Needle(Task):
    """Finds the number of a name among random words; the length is that of the problem, in symbols.

    Needles in a haystack, several of them with one asked for, as in RULER (Hsieh et al., 2024, arXiv 2404.06654), in
    words of our own. The needle that is asked for stands at `depth`, 0 for the beginning and 1 for the end of the text,
    or anywhere; the other `needles` - 1 stand anywhere.
    """

    trained = range(64, 257, 32)
    tested = range(288, 513, 32)

    def __init__(self, *, needles: int = 4, size: int = 4, depth: float | None = None) -> None:
        if not 1 <= needles <= len(GREEK):
            raise UserError(f"needle(needles={needles}) is not possible; there are 1 to {len(GREEK)} names.")
        if size < 1:
            raise UserError(f"needle(size={size}) has no number to find; take at least 1 digit.")
        if depth is not None and not 0 <= depth <= 1:
            raise UserError(f"needle(depth={depth}) is outside of the text; take 0 to 1.")
        self.needles = needles
        self.size = size
        self.depth = depth
        self.chance = 9.0**-size

    @property
    def symbols(self) -> Sequence[str]:
        return words(*digits, *GREEK, "The number of is . What the ? answer", *FILLER)

    def example(self, length: int, random: Random) -> Example:
        names = random.sample(GREEK, self.needles)
        numbers = ["".join(random.choices(digits[1:], k=self.size)) for _ in names]
        free = length - self._shortest()
        if free < 0:
            raise UserError(f"needle has no problem of length {length}; its shortest is {self._shortest()}.")
        places = [random.randint(0, free) for _ in names]
        if self.depth is not None:
            places[0] = round(self.depth * free)
        return self.problem(random.choices(FILLER, k=free), list(zip(places, names, numbers, strict=True)))

    def problem(self, filler: Sequence[str], needles: Sequence[tuple[int, str, str]]) -> Example:
        """The problem of words and needles, each the number of words before it, a name and its digits.

        The first needle is asked for.
        """
        text, start = [], 0
        for place, name, number in sorted(needles, key=lambda each: each[0]):
            text += [*filler[start:place], _tell(name, number)]
            start = place
        (_, asked, number), *_ = needles
        problem = f"{' '.join([*text, *filler[start:]])} {_ask(asked)} "
        return Example(problem, f"The answer is {spell(number)}.", number)

    def answer(self, target: str) -> str | None:
        return stated_number(target)

    def _shortest(self) -> int:
        """The symbols of the needles and of the question, in which all names and numbers are equally long."""
        told = " ".join([_tell(GREEK[0], "1" * self.size)] * self.needles)
        return len(pieces(f"{told} {_ask(GREEK[0])}"))


def _tell(name: str, number: str) -> str:
    return f"The number of {name} is {spell(number)}."


def _ask(name: str) -> str:
    return f"What is the number of {name} ?"
