"""SCAN: a command such as `jump twice after turn left` becomes the actions it asks for.

After Lake and Baroni, "Generalization without Systematicity" (2018). All 20,910 commands come from the grammar.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from random import Random

from lookfar.errors import UserError, nearest
from lookfar.tasks.base import Example, Task
from lookfar.tasks.wording import SEPARATOR

VERBS = {"walk": ["I_WALK"], "look": ["I_LOOK"], "run": ["I_RUN"], "jump": ["I_JUMP"], "turn": []}
TURNS = {"left": ["I_TURN_LEFT"], "right": ["I_TURN_RIGHT"]}
TIMES = {"once": 1, "twice": 2, "thrice": 3}  # "once" is never written
SHORT = {
    "I_WALK": "Walk",
    "I_LOOK": "Look",
    "I_RUN": "Run",
    "I_JUMP": "Jump",
    "I_TURN_LEFT": "Left",
    "I_TURN_RIGHT": "Right",
}
WORDS = (*VERBS, *TURNS, "opposite", "around", "twice", "thrice", "and", "after")


class Scan(Task):
    """Commands of SCAN; the length of one is the number of its actions.

    The split is that of Kazemnejad et al. (2023): up to 25 actions are trained on, more are tested. (SCAN's own length
    split trains on up to 22.)

    Args:
        prefix: what begins every input. The published models have no other first token that is always the same, and
            do not learn the task without.
        short: whether actions are written `Walk` and `Left`, as the split's authors do, or `I_WALK` and `I_TURN_LEFT`.
    """

    trained = range(1, 26)
    tested = range(26, 49)  # of which only `lengths` has commands

    def __init__(self, *, prefix: str = "Solve: ", short: bool = True) -> None:
        self.prefix = prefix
        self.names = SHORT if short else {name: name for name in SHORT}

    @property
    def symbols(self) -> Sequence[str]:
        """The words of the prefix, the separator, the words of commands and the actions."""
        return tuple(dict.fromkeys((*self.prefix.split(), SEPARATOR.strip(), *WORDS, *self.names.values())))

    @property
    def lengths(self) -> Sequence[int]:
        """The lengths that have commands: 1 to 28 without 23, then 30, 32, 33, 36, 40 and 48."""
        return tuple(_by_length())

    def example(self, length: int, random: Random) -> Example:
        """One of the commands of this many actions, all equally likely.

        Raises:
            UserError: no command has this many actions.
        """
        known = _by_length()
        if length not in known:
            shorter, longer = [each for each in known if each < length], [each for each in known if each > length]
            near = " and ".join(map(str, shorter[-1:] + longer[:1]))
            raise UserError(f"SCAN has no command of {length} actions; the nearest lengths that it has: {near}.")
        command = random.choice(known[length])
        target = " ".join(self.names[action] for action in interpret(command))
        return Example(f"{self.prefix}{command}{SEPARATOR}", target, answer=target)

    def answer(self, target: str) -> str | None:
        """What was written; None where that is nothing."""
        return target.strip() or None

    def all(self) -> Iterator[tuple[str, str]]:
        """Every command with its actions under SCAN's own names, 20,910 in a fixed order."""
        return ((command, " ".join(interpret(command))) for command in _commands())


def interpret(command: str) -> list[str]:
    """The actions that a command asks for, under SCAN's own names: `turn left after run` -> `I_RUN`, `I_TURN_LEFT`.

    Raises:
        UserError: the grammar does not have the command.
    """
    words = command.split()
    joints = [place for place, word in enumerate(words) if word in ("and", "after")]
    if not joints:
        return _phrase(words, command)
    if len(joints) > 1:
        raise UserError(f"{command!r} is not a command of SCAN: it joins {len(joints) + 1} phrases; two is the most.")
    first, second = _phrase(words[: joints[0]], command), _phrase(words[joints[0] + 1 :], command)
    return first + second if words[joints[0]] == "and" else second + first


def _phrase(words: list[str], command: str) -> list[str]:
    """The actions of what stands on one side of `and` or `after`."""
    *core, times = words if words and words[-1] in ("twice", "thrice") else [*words, "once"]
    match core:
        case [verb] if VERBS.get(verb):
            actions = VERBS[verb]
        case [verb, direction] if verb in VERBS and direction in TURNS:
            actions = TURNS[direction] + VERBS[verb]
        case [verb, "opposite", direction] if verb in VERBS and direction in TURNS:
            actions = 2 * TURNS[direction] + VERBS[verb]
        case [verb, "around", direction] if verb in VERBS and direction in TURNS:
            actions = 4 * (TURNS[direction] + VERBS[verb])
        case _:
            raise _refusal(words, command)
    return TIMES[times] * actions


def _refusal(words: list[str], command: str) -> UserError:
    unknown = next((word for word in words if word not in WORDS), None)
    if unknown is not None:
        return UserError(f"{command!r} is not a command of SCAN: {unknown!r}. {nearest(unknown, list(WORDS))}")
    return UserError(
        f"{command!r} is not a command of SCAN: {' '.join(words)!r} must be a verb (walk, look, run, jump, or turn "
        "with a direction), then at most one direction (left or right, with opposite or around before it), then at "
        "most one of twice and thrice."
    )


def _commands() -> Iterator[str]:
    """Every command once."""
    directed = [" ".join(filter(None, each)) for each in product(VERBS, ("", "opposite", "around"), TURNS)]
    plain = [verb for verb, actions in VERBS.items() if actions]
    phrases = [phrase + times for phrase in plain + directed for times in ("", " twice", " thrice")]
    yield from phrases
    for first, joint, second in product(phrases, ("and", "after"), phrases):
        yield f"{first} {joint} {second}"


@cache
def _by_length() -> dict[int, tuple[str, ...]]:
    """The commands of each number of actions, in ascending order."""
    found: dict[int, list[str]] = {}
    for command in _commands():
        found.setdefault(len(interpret(command)), []).append(command)
    return {length: tuple(found[length]) for length in sorted(found)}
