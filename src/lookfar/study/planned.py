"""A run of a study before it is trained, and what the runs of one label cost together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lookfar.config import Run
from lookfar.errors import UserError
from lookfar.training.schedules import ends


@dataclass(frozen=True)
class Planned:
    """A run of a study."""

    name: str  # of its folder
    run: Run
    notes: Mapping[str, Any] = field(default_factory=dict)  # what each of its rows says besides
    after: str | None = None  # the run that it branches off
    candidates: tuple[str, ...] = ()  # trials of rates; the best one's is taken

    @property
    def needs(self) -> set[str]:
        """The runs that must have ended before."""
        return {*self.candidates, *([self.after] if self.after else [])}

    @property
    def start(self) -> int:
        """The update that it branches off at."""
        return int(str(self.run.training.branch).rpartition("@")[2]) if self.after else 0


def with_costs(planned: Sequence[Planned]) -> list[Planned]:
    """Note with every budget how many updates its label has spent until then, where a label has several budgets.

    Raises:
        UserError: two runs of one label and seed have the same budget.
    """
    alike: dict[Any, list[Planned]] = {}
    for each in planned:
        alike.setdefault(_curve(each), []).append(each)
    by_name = {each.name: each for each in planned}
    return [each if _curve(each) is None else _with_cost(each, alike[_curve(each)], by_name) for each in planned]


def _curve(planned: Planned) -> tuple[str, int] | None:
    """What the budgets of runs are compared within; None for a run of no label and for trials."""
    label = planned.notes.get("label")
    return None if label is None or "candidate" in planned.notes else (label, planned.run.training.seed)


def _with_cost(planned: Planned, alike: Sequence[Planned], by_name: Mapping[str, Planned]) -> Planned:
    models = sorted((update, each.name) for each in alike for update in ends(each.run.training))
    budgets = [update for update, _ in models]
    if twice := [update for update in budgets if budgets.count(update) > 1]:
        names = " and ".join(name for update, name in models if update == twice[0])
        raise UserError(
            f"{names} share the label {planned.notes['label']!r} and are both measured after {twice[0]} updates; "
            f"give each a label of its own."
        )
    if len(budgets) == 1:
        return planned
    spent = {update: _spent([model for model in models if model[0] <= update], by_name) for update in budgets}
    return replace(planned, notes={**planned.notes, "spent": spent})


def _spent(models: Sequence[tuple[int, str]], by_name: Mapping[str, Planned]) -> int:
    """The updates that models cost together; what they share counts once."""
    reached: dict[str, int] = {}
    for update, name in models:
        run: Planned | None = by_name[name]
        while run is not None:
            reached[run.name] = max(reached.get(run.name, 0), update)
            update, run = run.start, by_name[run.after] if run.after else None
    return sum(update - by_name[name].start for name, update in reached.items())
