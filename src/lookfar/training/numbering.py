"""Numbers the tokens of the lines of an update by the place of each line alone: nothing is saved of it."""

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lookfar.batch import consecutive, within
from lookfar.config import Run
from lookfar.model import numbering
from lookfar.tasks import numbering as of_digits
from lookfar.training.problems import padded, problems_of


class Numbers:
    """The numbers of the tokens of a batch; what is random in them is drawn at once for all lines.

    Args:
        random: of the update.
        farthest: how many positions the model has; None: any.
    """

    def __init__(self, run: Run, random: torch.Generator, farthest: int | None) -> None:
        expression, batch, context = run.training.numbering, run.training.batch, run.model.context
        task = run.task.name is not None
        self.digits = of_digits.find(expression, problems_of(run.task), farthest) if task else None
        self.chances = self.numbers = None
        if self.digits is not None:
            self.chances = torch.rand(batch, generator=random).tolist()
        else:
            self.numbers = numbering.find(expression, context)(batch, context, random)

    def of(
        self,
        place: int,
        tokens: Int[np.ndarray, "b l"],
        parts: Int[Tensor, "b t"] | None,
        chance: Float[Tensor, "b c"],
    ) -> Num[Tensor, "#b t"] | None:
        """The numbers of the inputs of some lines; None: 0, 1, 2, … within each part.

        Args:
            place: of the first of these lines in the batch.
            tokens: of the lines, of which the last is no input.
            parts: the document of each input, where there are several or some is padding.
            chance: which numbers a short part takes.
        """
        if self.digits is not None and self.chances is not None:
            drawn = self.chances[place : place + len(tokens)]
            lines = [self.digits.trained(line, each)[:-1] for line, each in zip(tokens, drawn, strict=True)]
            return torch.from_numpy(padded(lines, 0)).to(chance.device)
        if self.numbers is None:
            return None
        several = len(self.numbers) > 1
        numbers = (self.numbers[place : place + len(tokens)] if several else self.numbers).to(chance.device)
        if parts is None:
            return numbers
        if several:
            return within(numbers, chance, parts)
        # a formula: each part begins with the first numbers
        return numbers.expand(len(tokens), -1).gather(1, consecutive(parts))
