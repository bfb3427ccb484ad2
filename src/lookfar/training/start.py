"""Where a run begins that does not begin at nothing: at a checkpoint of another run, or with its weights alone."""

import warnings
from pathlib import Path
from typing import Any

import torch

from lookfar.config import Run, TaskConfig
from lookfar.errors import UserError
from lookfar.model.decoder import Decoder
from lookfar.training import checkpoint, schedules
from lookfar.training import folder as run_folder

TIED = ("cosine", "linear", "cyclic_cosine")  # schedules whose every rate depends on where the run ends


def begin(run: Run, model: Decoder, folder: Path) -> tuple[int, dict[str, Any] | None]:
    """Bring the model to where the run begins: how many updates are done there, and the training state to go on from.

    `training.branch` goes on from a checkpoint of another run, its place in the data included; `training.weights`
    takes weights alone and names what did not fit.

    Raises:
        UserError: no such checkpoint, another model or text, or a schedule that cannot be branched.
    """
    if run.training.branch is not None:
        return _branch(run, model, folder)
    if run.training.weights is not None:
        _take(run.training.weights, model, folder)
    return 0, None


def refuse(run: Run, label: str, folder: Path) -> None:
    """Raise a `UserError` where the run could not begin as it says; nothing is built or read but recipes."""
    if run.training.branch is not None:
        source, update = _place(run.training.branch, folder)
        before, trained_on = run_folder.read(source)
        refuse_branch(before, run, source, update, same_text=trained_on == label)
    elif run.training.weights is not None:
        _place(run.training.weights, folder)


def _branch(run: Run, model: Decoder, folder: Path) -> tuple[int, dict[str, Any] | None]:
    source, update = _place(str(run.training.branch), folder)
    state = checkpoint.restore(source, update, model)
    return update, {**state, "seconds": 0.0, **({"optimizer": None} if run.training.reset_optimizer else {})}


def refuse_branch(before: Run, run: Run, source: Path, update: int, *, same_text: bool) -> None:
    """Raise a `UserError` where a run cannot go on from the update of another."""
    kept = {"device": run.model.device, "vocabulary": before.model.vocabulary}
    if run.model.model_copy(update=kept) != before.model.model_copy(update=kept):
        raise UserError(f"A branch of {source} has its model: leave [model] as it is there, or start by --weights.")
    if not same_text:
        raise UserError(f"A branch of {source} goes on in its text; to train on another, start by --weights.")
    if _without_examples(before.task) != _without_examples(run.task):
        raise UserError(f"A branch of {source} goes on with its task: leave [task] as it is, or start by --weights.")
    if before.training.optimizer != run.training.optimizer and not run.training.reset_optimizer:
        raise UserError(
            f"The state of {before.training.optimizer!r} in {source} is nothing to {run.training.optimizer!r}; "
            "forget it by training.reset_optimizer=true (--reset-optimizer)."
        )
    if early := [each for each in schedules.budgets(run.training.schedule) if each <= update]:
        told = ", ".join(map(str, early))
        raise UserError(f"Budgets of {told} updates lie before the branch at {source}@{update}; leave them out.")
    if run.training.updates <= update:
        raise UserError(f"{update} updates are done at {source}@{update}; set training.updates above that.")
    name = schedules.name_of(run.training.schedule)
    if name in TIED and (reason := schedules.refusal(before.training, run.training, update)):
        raise UserError(f"A branch cannot go on by {name!r}. {reason}")


def _without_examples(task: TaskConfig) -> TaskConfig:
    return task.model_copy(update={"examples": 1})


def _take(named: str, model: Decoder, folder: Path) -> None:
    source, update = _place(named, folder)
    found = checkpoint.read_weights(source / "checkpoints" / str(update))
    own = model.state_dict()
    fitting = {name: each for name, each in found.items() if name in own and own[name].shape == each.shape}
    if not fitting:
        raise UserError(f"No weight of {named} fits this model; give [model] the sizes of that run.")
    model.load_state_dict(fitting, strict=False)
    told = model.state_dict()
    shared = {name for name in own if any(told[name].data_ptr() == told[each].data_ptr() for each in fitting)}
    left, fresh = sorted(found.keys() - fitting.keys()), sorted(own.keys() - shared)
    if left or fresh:
        parts = [f"not taken: {', '.join(left)}"] if left else []
        parts += [f"fresh: {', '.join(fresh)}"] if fresh else []
        warnings.warn(f"Not all weights of {named} fit ({'; '.join(parts)}).", stacklevel=2)


def _place(named: str, own: Path) -> tuple[Path, int]:
    """Read `RUN` or `RUN@UPDATE`: the folder, and the checkpoint there.

    A name alone is that of a run beside this one, where there is one: a study can be moved as a whole.
    """
    head, at, tail = named.rpartition("@")
    folder = Path(head if at else named)
    if len(folder.parts) == 1 and (own.parent / folder / run_folder.RECIPE).exists():
        folder = own.parent / folder
    run_folder.read(folder)
    if at and not tail.isdigit():
        raise UserError(f"{named!r} names no update; write it as {folder}@1000.")
    update = int(tail) if at else checkpoint.newest(folder)
    known = checkpoint.updates(folder)
    if update is None or update not in known:
        raise UserError(f"{folder} has no checkpoint of update {tail or 'any'}; it has: {known or 'none'}.")
    if damage := checkpoint.inspect(folder / "checkpoints" / str(update)):
        raise UserError(damage)
    return folder, update


def restore_random(state: dict[str, Any]) -> None:
    """Set the random generators to where they were."""
    torch.set_rng_state(state["random"])
    if torch.cuda.is_available() and state["random_cuda"] is not None:
        torch.cuda.set_rng_state(state["random_cuda"])
