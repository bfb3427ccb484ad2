"""Writes the weights of a checkpoint for others to read: one plain file, whichever way they were saved."""

from pathlib import Path

from safetensors.torch import save_file

from lookfar import files
from lookfar.errors import UserError
from lookfar.training import checkpoint
from lookfar.training import folder as run_folder


def export(folder: Path, to: Path, *, which: str | int = "last", overwrite: bool = False) -> Path:
    """Write a file `*.safetensors`, or weights, recipe and tokenizer into a folder; the answer is the file of weights.

    Each file is written whole or not at all, and the weights last.

    Raises:
        UserError: no such checkpoint, or something would be overwritten.
    """
    run_folder.read(folder)
    place = folder / "checkpoints" / str(checkpoint.find(folder, which))
    alone = to.suffix == ".safetensors"
    weights, recipe = to if alone else to / checkpoint.WEIGHTS, to / run_folder.RECIPE
    there = [each for each in (weights, *(() if alone else (recipe, to / "tokenizer.json"))) if each.exists()]
    if there and not overwrite:
        raise UserError(f"{there[0]} exists already; name another place, or add --overwrite.")
    weights.parent.mkdir(parents=True, exist_ok=True)
    if not alone:
        files.write(to / "tokenizer.json", (folder / "tokenizer.json").read_bytes())
        files.write(recipe, (folder / run_folder.RECIPE).read_bytes())
    with files.replacing(weights) as aside:
        save_file(checkpoint.read_weights(place), aside, metadata={"format": "pt"})
    files.sync_folder(weights.parent)
    return weights
