"""Expands a study into its runs, each with the name of its folder; a mistake is told before anything is trained."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, product
from pathlib import Path
from typing import Any

from lookfar import config
from lookfar.attention.scheme import parse, spell
from lookfar.config import Run, Study, Variant
from lookfar.errors import UserError, nearest
from lookfar.study.planned import Planned, with_costs
from lookfar.training import schedules
from lookfar.training.check import check
from lookfar.training.problems import problems_of
from lookfar.training.start import refuse_branch

LONGEST = 150  # letters of a folder's name
TRIAL_SEED = 1000  # of trials of rates, however many seeds join later; the next one where it is a seed of the study


@dataclass(frozen=True)
class _Point:
    """What is trained with each seed: names and settings of one combination."""

    base: str  # the name, before the seed
    label: str | None
    settings: tuple[tuple[str, Any], ...]


def expand(study: Study) -> list[Planned]:
    """The runs of a study in the order told, seeds innermost, a branch after the run that it branches off.

    Raises:
        UserError: a run that cannot work, told with its name and the key; two of one name; a branch off nothing.
    """
    planned: dict[str, Planned] = {}
    for each in chain.from_iterable(_with_seeds(study, point) for point in _points(study)):
        if each.name in planned:
            raise UserError(f"The study has {each.name} twice; leave one of the schemes, seeds, values or runs out.")
        planned[each.name] = each
    found = [_branched(each, planned) for each in planned.values()]
    return _in_turn(with_costs(found))


def slug(scheme: str) -> str:
    """A scheme as the name of a folder: `kerple + dape_v2(kernel=3)` -> `kerple+dape_v2-kernel=3`."""
    return _plain(spell(scheme))


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9_.+=]+", "-", text.lower().replace(" ", "")).strip("-")


def rate_of(planned: Planned, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """The rate of the candidate with the lowest held-out loss, the lower of two alike; `rows` are by candidate.

    Raises:
        UserError: no candidate was measured.
    """
    found = []
    for name in planned.candidates:
        losses = [row for row in rows.get(name, ()) if row["metric"] == "loss" and row.get("value") is not None]
        found += [(row["value"], row["candidate"]) for row in losses if row["value"] == row["value"]]
    if not found:
        raise UserError(f"No rate of {planned.name} could be measured; give study.choose_rate lower ones.")
    return min(found)[1]


def _points(study: Study) -> Iterator[_Point]:
    """Every scheme with every run and every combination of the grid."""
    told = study.study
    for scheme in told.schemes or ():
        parse(scheme)
    schemes: list[str | None] = [spell(each) for each in told.schemes] if told.schemes else [None]
    variants: list[Variant | None] = [*told.runs] or [None]
    short = _short_names(list(told.grid))
    for scheme, variant, values in product(schemes, variants, product(*told.grid.values())):
        at = dict(zip(told.grid, values, strict=True))
        changes = {**(variant.set if variant else {}), **({} if scheme is None else {"model.scheme": scheme})}
        _refuse_twice(at, changes, variant, scheme)
        coordinates = [f"{short[key]}={_shown(value)}" for key, value in at.items()]
        own = slug(scheme) if scheme else _pattern(study) if variant is None else None
        names = [own, variant and variant.name, *map(_plain, coordinates)]
        trunk, _, update = str(changes.get("training.branch")).rpartition("@")
        if trunk in {each.name for each in told.runs}:  # that of this scheme and point of the grid
            changes["training.branch"] = f"{_joined([own, trunk, *names[2:]])}@{update}"
        labels = [scheme and len(schemes) > 1 and scheme, variant and (variant.label or variant.name), *coordinates]
        label = " · ".join(each for each in labels if each)
        yield _Point(_joined(names), label if variant or at else None, tuple({**changes, **at}.items()))


def _with_seeds(study: Study, point: _Point) -> Iterator[Planned]:
    """A point with each seed, after the trials of rates where they are wanted."""
    told = study.study
    candidates = []
    trial_seed = next(seed for seed in count(TRIAL_SEED) if seed not in told.seeds)
    for rate in told.choose_rate or ():
        trial = _built(study, point, trial_seed if told.choose_seed is None else told.choose_seed)
        _refuse_choice(point, trial)
        training = {"rate": rate, "updates": told.choose_updates or trial.training.updates}
        content = trial.model_dump()
        content["training"] |= training
        measured = trial.model.context if trial.task.name is None else problems_of(trial.task).longest_trained
        content["evaluation"] |= {"lengths": [measured]}
        if trial.task.name is None:
            content["evaluation"] |= {"split": "valid", "protocols": ["non_overlapping"]}
        name = f"{point.base}-rate={_plain(f'{rate:g}')}-trial"
        candidates.append(Planned(name, _checked(name, content), _notes(point.label, candidate=rate)))
    yield from candidates
    for seed in told.seeds:
        run = _built(study, point, seed)
        yield Planned(
            f"{point.base}-s{seed}", run, _notes(point.label), candidates=tuple(each.name for each in candidates)
        )


def _built(study: Study, point: _Point, seed: int) -> Run:
    content = study.model_dump(exclude={"study"})
    for key, value in (*point.settings, ("training.seed", seed)):
        content = config.put(content, key, value)
    return _checked(f"{point.base}-s{seed}" if point.label else "", content)


def _checked(name: str, content: dict[str, Any]) -> Run:
    try:
        run = config.build(content)
        check(run)
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from error
    return run


def _branched(planned: Planned, others: Mapping[str, Planned]) -> Planned:
    """The run with the run of the same seed that its branch names, where that is one of the study."""
    branch = planned.run.training.branch
    if branch is None or "/" in branch:
        return planned
    base, _, update = branch.rpartition("@")
    trunk = others.get(f"{base}-s{planned.run.training.seed}") or others.get(base)
    if trunk is None or not update.isdigit():
        known = nearest(base, sorted({name.rpartition("-s")[0] for name in others}))
        raise UserError(
            f"{planned.name}: training.branch={branch!r} names no run of the study and update, as 'wsd@800'. {known}"
        )
    training = planned.run.training.model_copy(update={"branch": f"{trunk.name}@{update}"})
    run = planned.run.model_copy(update={"training": training})
    _check_branch(planned.name, run, trunk, int(update))
    return replace(planned, run=run, after=trunk.name)


def _check_branch(name: str, run: Run, trunk: Planned, update: int) -> None:
    before = trunk.run.training
    same_text = run.data == trunk.run.data and run.training.seed == before.seed
    try:
        refuse_branch(trunk.run, run, Path(trunk.name), update, same_text=same_text)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    due = {*range(0, before.updates, before.checkpoint_every or before.updates), before.updates} - {0}
    kept = {*schedules.budgets(before.schedule), *sorted(due)[-before.keep :]}
    if update not in kept:
        raise UserError(
            f"{name}: {trunk.name} keeps no checkpoint of update {update}; give that run "
            f"training.checkpoint_every={update} and training.keep={before.updates // update + 1}."
        )


def _in_turn(planned: Sequence[Planned]) -> list[Planned]:
    """What others need before them, else in the order told."""
    left, found = list(planned), []
    while left:
        ended = {each.name for each in found}
        ready = [each for each in left if each.needs <= ended]
        if not ready:
            raise UserError(f"{left[0].name} branches off {left[0].after}, which branches off it in the end.")
        first = ready[0]
        found.append(first)
        left.remove(first)
    return found


def _refuse_twice(at: Mapping[str, Any], changes: Mapping[str, Any], variant: Variant | None, scheme: Any) -> None:
    if "training.seed" in {**at, **changes}:
        raise UserError("training.seed is varied by study.seeds; leave it out of study.grid and study.runs.")
    if scheme is not None and "model.scheme" in {**at, **(variant.set if variant else {})}:
        raise UserError("model.scheme is varied by study.schemes; leave it out of study.grid and study.runs.")
    twice = [key for key in at if key in changes]
    if twice:
        name = variant.name if variant else ""
        raise UserError(f"{twice[0]} is varied by study.grid and set by the run {name!r}; leave it out of one of them.")


def _refuse_choice(point: _Point, run: Run) -> None:
    if "training.rate" in dict(point.settings):
        raise UserError(
            f"{point.base}: training.rate is told, and study.choose_rate chooses it; leave one of them out."
        )
    if run.training.branch is not None:
        raise UserError(f"{point.base}: a branch has the rate of its run; study.choose_rate cannot choose it another.")


def _notes(label: str | None, **more: Any) -> dict[str, Any]:
    return {**({} if label is None else {"label": label}), **more}


def _pattern(study: Study) -> str:
    schemes = (study.model.scheme,) if isinstance(study.model.scheme, str) else study.model.scheme
    return "+".join(slug(each) for each in schemes)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Keys without their section where that is enough to tell them apart."""
    lasts = [key.rpartition(".")[2] for key in keys]
    return {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _joined(names: Sequence[str | None]) -> str:
    """Names as one, not too long for a folder."""
    name = "-".join(each for each in names if each)
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
