"""Following a chain of signs to the value of a variable."""

from collections.abc import Sequence
from random import Random
from string import ascii_lowercase

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Step, Task
from lookfar.tasks.symbols import words
from lookfar.tasks.wording import check_length, stated


class Lego(Task):
    """Follows a chain of variables, each plus or minus the one before; the length is the number of variables.

    Split `len_tr8_ts16` of `s2s_lego` of Kazemnejad et al., 2023, arXiv 2305.19466, after Zhang et al., 2022, arXiv
    2206.04301; `shuffled=true` mixes the clauses (`_perm`). Any variable of the second half of the chain is asked for.
    Variables are drawn from `variables` names: the 26 letters, then `a1`, `b1`, …; lengths above 26 need more of them.
    The steps of its scratchpad have no variables that are a state.
    """

    trained = range(4, 9)
    tested = range(9, 17)
    chance = 0.5

    def __init__(self, *, shuffled: bool = False, variables: int = 26) -> None:
        if variables < 2:
            raise UserError(f"lego(variables={variables}) has too few variables; take at least 2.")
        self.shuffled = shuffled
        self.variables = variables

    @property
    def symbols(self) -> Sequence[str]:
        return words(*self._names(), "If = + - 1, . Then, what is the value of ? The answer is")

    def asked(self, length: int) -> range:
        """The places in the chain, counted from 0, of the variables that are asked for."""
        return range((length + 1) // 2, length)

    def example(self, length: int, random: Random) -> Example:
        check_length("lego", length, 2)
        if length > self.variables:
            raise UserError(f"lego has {self.variables} variables; for length {length} take lego(variables={length}).")
        names = random.sample(self._names(), length)
        signs = random.choices("+-", k=length)
        asked = random.choice(self.asked(length))
        order = random.sample(range(length), length) if self.shuffled else range(length)
        return self.problem(names, "".join(signs), asked, order)

    def problem(self, names: Sequence[str], signs: str, asked: int, order: Sequence[int] | None = None) -> Example:
        """The problem of a chain: its names and signs, the place that is asked for, and the order of its clauses."""
        values = ["+1" if signs[: place + 1].count("-") % 2 == 0 else "-1" for place in range(len(signs))]
        clauses = [f"{names[0]} = {signs[0]}1"]
        clauses += [f"{names[place]} = {signs[place]} {names[place - 1]}" for place in range(1, len(names))]
        order = range(len(names)) if order is None else order
        told = ", ".join(clauses[place] for place in order)
        steps = tuple(
            Step(
                input=names[place],
                computation=f"{signs[place]} {names[place - 1]} = {signs[place]} {values[place - 1]}" if place else "",
                output=values[place],
                remaining=", ".join(clauses[each] for each in order if each > place),
            )
            for place in range(asked + 1)
        )
        answer = values[asked]
        problem = f"If {told}. Then, what is the value of {names[asked]}? "
        return Example(problem, f"The answer is {answer}.", answer, steps)

    def answer(self, target: str) -> str | None:
        return stated(target)

    def _names(self) -> list[str]:
        return [f"{ascii_lowercase[each % 26]}{each // 26 or ''}" for each in range(self.variables)]
