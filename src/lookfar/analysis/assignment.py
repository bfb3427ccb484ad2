"""Pairs rows with columns one to one at the least total cost."""

from jaxtyping import Float
from numpy import ndarray


def assign(costs: Float[ndarray, "n n"]) -> list[int]:
    """The column of each row: the exact optimum, by shortest augmenting paths, in n³ steps.

    Source: the Hungarian method with potentials (Kuhn, 1955; Jonker and Volgenant, 1987).
    """
    count = len(costs)
    of_row, of_column = [0.0] * count, [0.0] * (count + 1)  # potentials
    owner: list[int | None] = [None] * (count + 1)  # the row of each column; the last column is where a path starts
    for row in range(count):
        column, owner[count] = count, row
        least, came, done = [float("inf")] * count, [count] * count, [False] * (count + 1)
        while (at := owner[column]) is not None:
            done[column] = True
            for each in range(count):
                reduced = float(costs[at][each]) - of_row[at] - of_column[each]
                if not done[each] and reduced < least[each]:
                    least[each], came[each] = reduced, column
            nearest = min((each for each in range(count) if not done[each]), key=least.__getitem__)
            step = least[nearest]
            for each in range(count + 1):
                held = owner[each]
                if done[each] and held is not None:
                    of_row[held] += step
                    of_column[each] -= step
                elif not done[each] and each < count:
                    least[each] -= step
            column = nearest
        while column != count:
            owner[column], column = owner[came[column]], came[column]
    columns = {row: column for column, row in enumerate(owner[:count])}
    return [columns[row] for row in range(count)]
