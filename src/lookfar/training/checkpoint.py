"""Checkpoints: published whole by one rename, checked by their hashes, damaged ones passed over."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from lookfar import files, plugins
from lookfar.config import Run
from lookfar.errors import UserError
from lookfar.model.decoder import Decoder
from lookfar.training import distributed_checkpoint
from lookfar.training import folder as run_folder

WEIGHTS, STATE, HASHES = "model.safetensors", "state.pt", "hashes.json"


def once(model: nn.Module) -> dict[str, Tensor]:
    """All that a model has learned; what is shared comes once."""
    found = {id(each): (name, each) for name, each in reversed(model.state_dict(keep_vars=True).items())}
    return dict(reversed(found.values()))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a model has learned, in the memory of the processor."""
    return {name: each.detach().to("cpu", copy=True).contiguous() for name, each in once(model).items()}


def save(folder: Path, update: int, weights: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Publish `checkpoints/<update>`: the weights, and the state that training goes on from.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    aside = begin(folder, update)
    with telling(aside, update):
        save_file(weights, aside / WEIGHTS, metadata={"format": "pt"})
        hashes = {WEIGHTS: files.digest(aside / WEIGHTS)}
    return publish(aside, update, state, hashes)


def begin(folder: Path, update: int) -> Path:
    """Make an empty folder beside the checkpoints, for the files of this one."""
    aside = folder / "checkpoints" / f".{update}-{os.getpid()}"
    with telling(aside, update):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    return aside


def publish(aside: Path, update: int, state: dict[str, Any], hashes: dict[str, str]) -> Path:
    """Add the state to the files that lie aside with these hashes, and make them the checkpoint by one rename."""
    final, folder = aside.with_name(str(update)), aside.parents[1]
    with telling(aside, update):
        torch.save(state, aside / STATE)
        hashes = {**hashes, STATE: files.digest(aside / STATE)}
        (aside / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
        for each in aside.iterdir():
            files.sync(each)
        if final.exists():  # a damaged one, or one that is written again
            shutil.rmtree(final)
        aside.rename(final)
        files.sync_folder(final.parent)
        manifest = read_manifest(folder)
        files.write(folder / run_folder.MANIFEST, _spell({**manifest, "last": update}))
    return final


@contextmanager
def telling(aside: Path, update: int) -> Iterator[None]:
    """Where a checkpoint cannot be written, remove what lies aside and say so in a `UserError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"The checkpoint of update {update} could not be written to {aside.parent} ({error}); "
            f"earlier checkpoints are untouched. Make room and run the same command again."
        ) from error


def finish(folder: Path, update: int) -> None:
    """Note in the manifest that training is done."""
    files.write(folder / run_folder.MANIFEST, _spell({**read_manifest(folder), "finished": update}))


def note_best(folder: Path, update: int, loss: float) -> None:
    """Note in the manifest which checkpoint has the lowest held-out loss."""
    files.write(folder / run_folder.MANIFEST, _spell({**read_manifest(folder), "best": update, "best_loss": loss}))


def recall_best(folder: Path, update: int) -> None:
    """Note this checkpoint as the best where the log says so: a run may be killed between its save and its note."""
    found = [
        line["valid_loss"]
        for line in files.read_lines(folder / run_folder.LOG)
        if line.get("update") == update and "valid_loss" in line
    ]
    if found and found[-1] < read_manifest(folder).get("best_loss", math.inf):
        note_best(folder, update, found[-1])


def thin(folder: Path, keep: int, every: int | None, always: Collection[int] = ()) -> None:
    """Remove all checkpoints but the newest, the best, the last `keep` of those that were due, and `always`."""
    found, best = updates(folder), read_manifest(folder).get("best")
    due = [update for update in found if every is None or update % every == 0 or update == found[-1]]
    for update in set(found) - {found[-1], best, *due[-keep:], *always}:
        shutil.rmtree(folder / "checkpoints" / str(update), ignore_errors=True)


def drop_after(folder: Path, update: int | None) -> None:
    """Remove the checkpoints after this update, damaged as they are: they will be made again."""
    for later in updates(folder):
        if update is None or later > update:
            shutil.rmtree(folder / "checkpoints" / str(later), ignore_errors=True)


def forget_lost_best(folder: Path) -> None:
    """Take the best out of the manifest where its checkpoint is gone: another will be found."""
    manifest = read_manifest(folder)
    if "best" in manifest and manifest["best"] not in updates(folder):
        kept = {key: value for key, value in manifest.items() if key not in ("best", "best_loss")}
        files.write(folder / run_folder.MANIFEST, _spell(kept))


def sweep(folder: Path) -> None:
    """Remove what killed saves have left half-written."""
    files.sweep(folder)
    for aside in (folder / "checkpoints").glob(".*"):
        shutil.rmtree(aside, ignore_errors=True)


def updates(folder: Path) -> list[int]:
    """The updates after which there is a checkpoint, whole or not, in order."""
    found = (folder / "checkpoints").glob("[0-9]*")
    return sorted(int(each.name) for each in found if each.name.isdigit())


def newest(folder: Path) -> int | None:
    """The last update with a whole checkpoint; damaged ones are named in a warning and passed over."""
    for update in reversed(updates(folder)):
        damage = inspect(folder / "checkpoints" / str(update))
        if damage is None:
            return update
        warnings.warn(f"{damage} It is passed over.", stacklevel=2)
    return None


def inspect(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a sentence; None: it is whole."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
        names = {STATE, *hashes.keys()}
        if len(names) == 1:  # without one of weights, or any of their shards
            names.add(WEIGHTS)
        wrong = [name for name in sorted(names) if files.digest(checkpoint / name) != hashes.get(name)]
    except (OSError, ValueError, AttributeError) as error:
        return f"The checkpoint {checkpoint} is damaged: {error}."
    return f"The checkpoint {checkpoint} is damaged: {', '.join(wrong)} is not what was written." if wrong else None


def restore(folder: Path, update: int, model: Decoder, *, mapped: bool = False) -> dict[str, Any]:
    """Load the weights of a checkpoint into the model; the answer is its training state.

    A mapped state is read as it is used: processes that each take a part need not all hold the whole.
    """
    checkpoint = folder / "checkpoints" / str(update)
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=mapped)
    if (checkpoint / WEIGHTS).exists():
        load_model(model, str(checkpoint / WEIGHTS), device=str(model.embedding.weight.device))
        return state
    distributed_checkpoint.fill(once(model), checkpoint)
    stored = distributed_checkpoint.StoredOptimizer(checkpoint, state["optimizer"]["param_groups"])
    return {**state, "optimizer": stored}


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, whole, whichever way it was written."""
    if (checkpoint / WEIGHTS).exists():
        return load_file(checkpoint / WEIGHTS)
    return distributed_checkpoint.read_weights(checkpoint)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What is known of the run: `last` and `best` checkpoint, and `finished` once training is done."""
    try:
        manifest = json.loads((folder / run_folder.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def find(folder: Path, which: str | int) -> int:
    """The update of the checkpoint `"last"`, `"best"`, or of a number of updates.

    Raises:
        UserError: there is no such checkpoint, or it is damaged.
    """
    if which in ("last", "best"):
        update = newest(folder) if which == "last" else read_manifest(folder).get("best")
    elif str(which).isdigit():
        update = int(which)
    else:
        raise UserError(f"No checkpoint is called {which!r}; name 'last', 'best' or a number of updates.")
    if update is None or update not in updates(folder):
        raise UserError(f"{folder} has no whole checkpoint {which!r}; it has: {updates(folder) or 'none'}.")
    if damage := inspect(folder / "checkpoints" / str(update)):
        raise UserError(damage)
    return update


def load(folder: str | Path, *, which: str | int = "last", scheme: str | None = None, trust: bool = False) -> Decoder:
    """The trained model of a run's folder, ready for use: `lookfar.load("runs/demo/alibi-s0")`.

    Args:
        folder: of the run.
        which: `"last"`, `"best"`, or the number of updates of a checkpoint.
        scheme: another scheme to run the same weights under; its parameters must have the same names and shapes.
        trust: allow schemes of the user's own modules, which are imported and so executed.

    Raises:
        UserError: no run, no whole checkpoint, or code that is not trusted.
    """
    folder = Path(folder)
    run, _ = run_folder.read(folder)
    check_trust(run, trust)
    if scheme is not None:
        run = run.model_copy(update={"model": run.model.model_copy(update={"scheme": scheme})})
    update = find(folder, which)
    model = Decoder(run.model)
    try:
        restore(folder, update, model)
    except RuntimeError as error:
        raise UserError(f"The weights of {folder} do not fit the scheme {run.model.scheme!r}: {error}") from error
    return model.eval()


def check_trust(run: Run, trust: bool) -> None:
    """Refuse a scheme that would import the user's own modules, unless that is allowed."""
    schemes = (run.model.scheme,) if isinstance(run.model.scheme, str) else run.model.scheme
    foreign = [term.name for each in schemes for term in plugins.parse(each) if "." in term.name]
    if foreign and not trust:
        raise UserError(f"This run would execute the code of {foreign[0]!r}; allow it with trust=True (--trust).")


def _spell(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
