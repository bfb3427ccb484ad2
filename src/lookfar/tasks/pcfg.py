"""PCFG SET: string functions composed in prefix notation, such as `echo append A1 B2 , reverse C3 D4`.

After Hupkes et al., "Compositionality Decomposed" (2020); problems are drawn with the statistics of the published ones.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from random import Random

from lookfar.errors import UserError, nearest
from lookfar.tasks.base import Example, Task
from lookfar.tasks.wording import SEPARATOR

COMMA = ","
SYMBOLS = tuple(f"{letter}{number}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for number in range(1, 21))
_KNOWN = frozenset(SYMBOLS)

UNARY: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x[::-1],
    "shift": lambda x: x[1:] + x[:1],
    "echo": lambda x: x + x[-1:],
    "swap_first_last": lambda x: x if len(x) < 2 else [x[-1], *x[1:-1], x[0]],
    "repeat": lambda x: x + x,
}
BINARY: dict[str, Callable[[list[str], list[str]], list[str]]] = {
    "append": lambda x, y: x + y,
    "prepend": lambda x, y: y + x,
    "remove_first": lambda x, y: y,
    "remove_second": lambda x, y: x,
}
FUNCTIONS = (*UNARY, *BINARY)

SHARES = [4] * len(UNARY) + [3] * len(BINARY)  # each unary function 11.1%, each binary one 8.3%
LEAVES = {2: 17, 3: 29, 4: 28, 5: 27}  # symbols of a string that no function made, in per cent
DRAWS = 1000  # of a problem, before the settings are held to be impossible


class Pcfg(Task):
    """Expressions of PCFG SET; the length of one is the number of its functions.

    A function is drawn for each place alone. Of all the trees in which so many unary and binary functions can be put
    together, each is then equally likely, as it is under a probabilistic grammar, where the probability of a tree
    depends on those numbers alone. Symbols are uniform.

    Targets grow exponentially with the functions, so an expression is drawn anew when it, or a part of it, makes a
    string of more than `longest` symbols. This favours short targets a little: of problems with 8 functions it
    discards fewer than 1 in 10,000, with 16 functions 1 in 500.

    Args:
        prefix: what begins every input. Without it the published models do not learn the task.
        longest: symbols that the target, and what any part of the expression makes, may have.

    Raises:
        UserError: `longest` leaves no room for a string.
    """

    trained = range(1, 9)
    tested = range(9, 17)  # where 93% of the published test problems are; the others have up to 35 functions

    def __init__(self, *, prefix: str = "Solve: ", longest: int = 200) -> None:
        if longest < 2 * max(LEAVES):
            raise UserError(f"longest ({longest}) must be {2 * max(LEAVES)} or more, for one function of one string.")
        self.prefix = prefix
        self.longest = longest

    @property
    def symbols(self) -> Sequence[str]:
        """The words of the prefix, the separator, the functions, the comma and the 520 argument symbols."""
        return tuple(dict.fromkeys((*self.prefix.split(), SEPARATOR.strip(), *FUNCTIONS, COMMA, *SYMBOLS)))

    def example(self, length: int, random: Random) -> Example:
        """One expression of this many functions and what it makes.

        Raises:
            UserError: `length` is no number of functions, or `longest` is too small for it.
        """
        if length < 1:
            raise UserError(f"An expression of {length} functions is not possible; 1 is the least.")
        for _ in range(DRAWS):
            expression, size = _written(_tree(length, random))
            if size <= self.longest:
                target = evaluate(expression)
                return Example(f"{self.prefix}{expression}{SEPARATOR}", target, answer=target)
        raise UserError(
            f"None of {DRAWS:,} expressions of {length} functions stays within longest ({self.longest}) symbols; "
            f"try longest={4 * self.longest} or fewer functions."
        )

    def answer(self, target: str) -> str | None:
        """What was written; None where that is nothing."""
        return target.strip() or None


def evaluate(expression: str) -> str:
    """The symbols that an expression makes: `append reverse A1 B2 , C3` -> `B2 A1 C3`. Any depth is possible.

    Raises:
        UserError: the expression is malformed; the word at fault is named with its place.
    """
    words = expression.split()
    waiting: list[list[str] | None] = []  # strings to the right of the word, the nearest last; None is a comma
    symbols: list[str] = []  # of the string that the word is in, backwards
    for place in range(len(words) - 1, -1, -1):
        word, after = words[place], words[place + 1] if place + 1 < len(words) else COMMA
        if word in _KNOWN:
            if after in FUNCTIONS:
                raise _refusal(words, place + 1, "follows a symbol; a comma must be between them")
            symbols.append(word)
            if place == 0 or words[place - 1] not in _KNOWN:
                waiting.append(symbols[::-1])
                symbols = []
        elif word == COMMA:
            if not waiting or waiting[-1] is None:
                raise _refusal(words, place, "has nothing behind it")
            waiting.append(None)
        elif word in UNARY:
            waiting.append(UNARY[word](_argument(waiting, words, place)))
        elif word in BINARY:
            first = _argument(waiting, words, place)
            if not waiting:
                raise _refusal(words, place, "needs two arguments with a comma between them; it has one")
            waiting.pop()
            waiting.append(BINARY[word](first, _argument(waiting, words, place)))
        else:
            raise _refusal(words, place, f"is neither a function nor a symbol. {nearest(word, [*FUNCTIONS, 'A1'])}")
    if not words:
        raise UserError("The expression is empty; write one such as 'reverse A1 B2'.")
    if len(waiting) > 1:
        asked = accumulate((word in BINARY) - (word == COMMA) for word in words)
        idle = next(place for place, each in enumerate(asked) if each < 0)
        raise _refusal(words, idle, "parts what no function takes together")
    return " ".join(_argument(waiting, words, 0))


def _argument(waiting: list[list[str] | None], words: list[str], place: int) -> list[str]:
    if not waiting or (argument := waiting.pop()) is None:
        raise _refusal(words, place, "has no argument")
    return argument


def _refusal(words: list[str], place: int, reason: str) -> UserError:
    around = " ".join(words[max(0, place - 2) : place + 3])
    return UserError(f"{words[place]!r}, word {place + 1} of the expression (… {around} …), {reason}.")


def _tree(functions: int, random: Random) -> list[str]:
    """Functions and strings in prefix order, without commas.

    Of all rotations of a shuffled sequence exactly one is a tree (the cycle lemma), so trees are uniform.
    """
    nodes = random.choices(FUNCTIONS, SHARES, k=functions)
    strings = 1 + sum(name in BINARY for name in nodes)
    for size in random.choices(list(LEAVES), list(LEAVES.values()), k=strings):
        nodes.append(" ".join(random.choices(SYMBOLS, k=size)))
    random.shuffle(nodes)
    wanted = list(accumulate((name in BINARY) - (name not in FUNCTIONS) for name in nodes))
    start = wanted.index(min(wanted)) + 1
    return nodes[start:] + nodes[:start]


def _written(nodes: list[str]) -> tuple[str, int]:
    """A tree with its commas, and the size of the longest string that a part of it makes."""
    done: list[tuple[str, int]] = []  # parts, the leftmost last, with the size of what each makes
    longest = 0
    for name in reversed(nodes):
        if name in UNARY:
            part, size = done.pop()
            size = {"echo": size + 1, "repeat": 2 * size}.get(name, size)
            done.append((f"{name} {part}", size))
        elif name in BINARY:
            (first, size), (second, other) = done.pop(), done.pop()
            size = {"remove_first": other, "remove_second": size}.get(name, size + other)
            done.append((f"{name} {first} {COMMA} {second}", size))
        else:
            done.append((name, len(name.split())))
        longest = max(longest, done[-1][1])
    return done[0][0], longest
