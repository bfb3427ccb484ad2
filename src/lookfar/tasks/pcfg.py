"""PCFG SET: string functions composed in prefix notation, such as `echo append A1 B2 , reverse C3 D4`.

After Hupkes et al., "Compositionality Decomposed" (2020); problems are drawn with the statistics of the published ones,
or read from their files.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, count
from pathlib import Path
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
LONGEST = 200  # symbols that a target may have

Pairs = dict[int, tuple[tuple[str, str], ...]]  # by the number of functions: expressions and what they make


class Pcfg(Task):
    """Expressions of PCFG SET; the length of one is the number of its functions.

    A function is drawn for each place alone. Of all the trees in which so many unary and binary functions can be put
    together, each is then equally likely, as it is under a probabilistic grammar, where the probability of a tree
    depends on those numbers alone. Symbols are uniform.

    Targets grow exponentially with the functions, so an expression is drawn anew when it, or a part of it, makes a
    string of more than `longest` symbols. This favours short targets a little: of problems with 8 functions it
    discards fewer than 1 in 10,000, with 16 functions 1 in 500.

    With a `folder` none is drawn: the problems are those of its files. By default the lengths of `train.src` are
    trained and those of `test.src` tested, each up to the first gap; the published tests then end at 30 functions, and
    three problems with more are left out.

    Args:
        prefix: what begins every input. Without it the published models do not learn the task.
        longest: symbols that the target, and what any part of the expression makes, may have. It is not of files.
        folder: where `train.src`, `train.tgt`, `test.src` and `test.tgt` of the published productivity split lie, an
            expression and a target on each line.

    Raises:
        UserError: `longest` leaves no room for a string, or is set beside a `folder`; a file is missing or is not of
            this split; the interpreter does not understand a line or contradicts it.
    """

    trained = range(1, 9)
    tested = range(9, 17)  # where 93% of the published test problems are; the others have up to 35 functions

    def __init__(self, *, prefix: str = "Solve: ", longest: int = LONGEST, folder: str | None = None) -> None:
        if longest < 2 * max(LEAVES):
            raise UserError(f"longest ({longest}) must be {2 * max(LEAVES)} or more, for one function of one string.")
        if folder is not None and longest != LONGEST:
            raise UserError("longest is of expressions that are drawn; those of files stay. Leave it or folder out.")
        self.prefix = prefix
        self.longest = longest
        self.pairs: Pairs | None = None
        if folder is not None:
            train, test = _read(Path(folder).expanduser().resolve())
            self.trained, self.tested = _unbroken(train), _unbroken(test)
            self.pairs = train | test

    @property
    def symbols(self) -> Sequence[str]:
        """The words of the prefix, the separator, the functions, the comma and the 520 argument symbols."""
        return tuple(dict.fromkeys((*self.prefix.split(), SEPARATOR.strip(), *FUNCTIONS, COMMA, *SYMBOLS)))

    def example(self, length: int, random: Random) -> Example:
        """One expression of this many functions and what it makes; of those in files, all are equally likely.

        Raises:
            UserError: `length` is no number of functions, `longest` is too small for it, or the files have none of it.
        """
        if self.pairs is not None:
            return self._told(*random.choice(_of_length(self.pairs, length)))
        if length < 1:
            raise UserError(f"An expression of {length} functions is not possible; 1 is the least.")
        for _ in range(DRAWS):
            expression, size = _written(_tree(length, random))
            if size <= self.longest:
                return self._told(expression, evaluate(expression))
        raise UserError(
            f"None of {DRAWS:,} expressions of {length} functions stays within longest ({self.longest}) symbols; "
            f"try longest={4 * self.longest} or fewer functions."
        )

    def answer(self, target: str) -> str | None:
        """What was written; None where that is nothing."""
        return target.strip() or None

    def _told(self, expression: str, target: str) -> Example:
        return Example(f"{self.prefix}{expression}{SEPARATOR}", target, answer=target)


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


def _unbroken(pairs: Pairs) -> range:
    """The lengths from the shortest to the last before a gap."""
    return range(min(pairs), next(each for each in count(min(pairs)) if each not in pairs))


def _of_length(pairs: Pairs, length: int) -> tuple[tuple[str, str], ...]:
    if length not in pairs:
        shorter, longer = [each for each in pairs if each < length], [each for each in pairs if each > length]
        near = " and ".join(map(str, shorter[-1:] + longer[:1]))
        raise UserError(
            f"The files have no expression of {length} functions; the nearest lengths that they have: {near}."
        )
    return pairs[length]


@cache  # some seconds, for 92,000 problems
def _read(folder: Path) -> tuple[Pairs, Pairs]:
    """The problems of the files, those that are trained on and those that are tested; lengths in ascending order."""
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}; pcfg's files lie in data/pcfgset/productivity of "
            "github.com/i-machine-think/am-i-compositional."
        )
    train, test = _pairs(folder, "train"), _pairs(folder, "test")
    if max(train) >= min(test):
        raise UserError(
            f"{folder} is not split by length: train.src has up to {max(train)} functions, and test.src {min(test)} "
            "and more. Take the files of the productivity split."
        )
    return train, test


def _pairs(folder: Path, part: str) -> Pairs:
    """The problems of two files, each checked by the interpreter."""
    source, target = folder / f"{part}.src", folder / f"{part}.tgt"
    expressions, made = _lines(source), _lines(target)
    if len(expressions) != len(made):
        raise UserError(f"{source} has {len(expressions):,} lines and {target} {len(made):,}; each needs its solution.")
    found: dict[int, list[tuple[str, str]]] = {}
    for number, (expression, given) in enumerate(zip(expressions, made, strict=True), start=1):
        try:
            right = evaluate(expression)
        except UserError as error:
            raise UserError(f"{source}, line {number}: {error}") from error
        if right != given:
            raise UserError(f"{target}, line {number}: {expression!r} makes {right!r}, not {given!r}.")
        functions = sum(word in FUNCTIONS for word in expression.split())
        found.setdefault(functions, []).append((expression, right))
    return {length: tuple(found[length]) for length in sorted(found)}


def _lines(file: Path) -> list[str]:
    """The lines of a file, with single spaces."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{file} cannot be read: {reason}.") from error
    if not lines:
        raise UserError(f"{file} is empty; it needs a problem on each line.")
    return [" ".join(line.split()) for line in lines]
