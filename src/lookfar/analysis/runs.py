"""Analyses a finished run, alone or against another: the rows, and arrays beside them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lookfar import files, plugins
from lookfar.analysis.base import Analysis, Row
from lookfar.analysis.traces import trace
from lookfar.config import Run
from lookfar.data.tokenizers import load_tokenizer
from lookfar.errors import UserError
from lookfar.evaluation.base import Progress, Text
from lookfar.model.attention import Attention
from lookfar.model.decoder import Decoder
from lookfar.training import folder as run_folder
from lookfar.training.checkpoint import load
from lookfar.training.evaluate import from_file, held_out
from lookfar.training.measure import about

ROWS, ARRAYS, ARRAYS_OF_OTHER = "rows.jsonl", "arrays.npz", "arrays_of_other.npz"
PROTOCOL = "analysis"


@dataclass(frozen=True)
class Subject:
    """A run to look into."""

    folder: Path
    run: Run
    model: Decoder
    about: Row  # what its rows say of it


def analyze_run(
    folder: Path,
    *,
    against: Path | None = None,
    lengths: Sequence[int] | None = None,
    inputs: int = 4,
    text: Path | None = None,
    wanted: Sequence[str] | None = None,
    output: Path | None = None,
    trust: bool = False,
    progress: Progress = lambda what, part: None,
) -> list[Row]:
    """Look into a run on held-out text; the rows and arrays go into `analysis/` in its folder, those of before go.

    Args:
        folder: of the run; its last whole checkpoint is looked into.
        against: another run of the same tokens, layers and heads, to be compared on the same input.
        lengths: tokens of each input; by default the trained length, and twice that where the model can number it.
        inputs: windows of the text at each length, evenly apart.
        text: a UTF-8 file; by default the held-out split of the run's corpus.
        wanted: analyses, such as `entropy` or `attended_distance(bins=40)`; by default all.
        output: a folder for what is found.
        trust: allow code of the user's own modules.

    Raises:
        UserError: no run, two runs that cannot be compared, a text that is too short, an unknown analysis.
    """
    terms = [term for each in wanted or plugins.names("analysis") for term in plugins.parse(each)]
    for term in terms:  # a mistake is told before a model is loaded
        plugins.check(plugins.find("analysis", term.name), term)
    subjects = _open([each for each in (folder, against) if each is not None], trust)
    if any(each.run.task.name is not None for each in subjects):
        raise UserError(
            f"{folder} was trained on a task, and analyses read text; choose a run that was trained on text."
        )
    if len(subjects) == 2:
        _refuse_unlike(*subjects)
    first = subjects[0]
    foreign = any("." in term.name for term in plugins.parse(first.run.data.source))
    if foreign and text is None and not trust:
        raise UserError(f"{folder} would execute the code of {first.run.data.source!r}; allow it with trust=True.")
    data = first.run.data, first.run.evaluation.split
    stream = held_out(folder, *data) if text is None else from_file(folder, text)
    lengths = lengths or _lengths(subjects, len(stream.tokens))
    for each in subjects:
        _refuse_length(each, max(lengths))
    rows: list[Row] = []
    arrays: list[dict[str, np.ndarray]] = [{} for _ in subjects]
    for length in lengths:
        windows = list(_windows(stream, length, inputs))
        found = _look(subjects, terms, windows, lambda part, length=length: progress(f"analysis at {length}", part))
        place = {"data": stream.label, "protocol": PROTOCOL, "length": length}
        taken = {"metric": "inputs", "layer": None, "head": None, "value": len(windows), "count": length * len(windows)}
        for subject, kept, analyses in zip(subjects, arrays, found, strict=True):
            rows.append({**subject.about, **place, **taken})
            for findings in (each.conclude() for each in analyses):
                rows += [{**subject.about, **place, **row} for row in findings.rows]
                kept |= {f"{length}/{name}": values for name, values in findings.arrays.items()}
    _publish(output or folder / "analysis", rows, arrays)
    return rows


def _look(
    subjects: Sequence[Subject],
    terms: Sequence[plugins.Term],
    windows: Sequence[Int[Tensor, "1 t"]],
    progress: Callable[[float], None],
) -> list[list[Analysis]]:
    """The analyses of each run after they have seen all windows; those of the first have seen both, side by side."""
    analyses = [[plugins.build("analysis", term, windows[0].shape[1]) for term in terms] for _ in subjects]
    for done, window in enumerate(windows, start=1):
        walks = [trace(each.model, window.to(each.model.embedding.weight.device)) for each in subjects]
        for found in zip(*walks, strict=True):
            for place, of_run in enumerate(analyses):
                (layer, own), others = found[place], found[place + 1 :]
                for each in of_run:
                    each.look(layer, own, others[0][1] if others else None)
        progress(done / len(windows))
    return analyses


def _open(folders: Sequence[Path], trust: bool) -> list[Subject]:
    """The runs in these folders; a row of the first names the other as `against`."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):  # of two studies
        names = [f"{folder.resolve().parent.name}/{name}" for folder, name in zip(folders, names, strict=True)]
    subjects = []
    for folder, name, other in zip(folders, names, [*names[1:], None], strict=True):
        run, _ = run_folder.read(folder)
        told = {**about(run, folder), "run": name, **({} if other is None else {"against": other})}
        subjects.append(Subject(folder, run, load(folder, trust=trust), told))
    return subjects


def _refuse_unlike(one: Subject, other: Subject) -> None:
    """Raise a `UserError` where two runs have no common input, or no heads that could be paired."""
    prints = [load_tokenizer(each.folder).fingerprint for each in (one, other)]
    if prints[0] != prints[1]:
        sizes = [load_tokenizer(each.folder).vocabulary for each in (one, other)]
        raise UserError(
            f"{one.folder} and {other.folder} read different tokens (vocabularies of {sizes[0]} and {sizes[1]}, "
            f"tokenizers {prints[0]} and {prints[1]}), so they have no input in common; compare runs of one tokenizer."
        )
    layers = [each.run.model.layers for each in (one, other)]
    if layers[0] != layers[1]:
        raise UserError(
            f"{one.folder} has {layers[0]} layers and {other.folder} has {layers[1]}; "
            "divergence is measured layer by layer, so compare runs with as many."
        )
    heads = [[each.scheme.heads.score_heads for each in _attentions(subject.model)] for subject in (one, other)]
    for layer, (ours, theirs) in enumerate(zip(*heads, strict=True)):
        if ours != theirs:
            raise UserError(
                f"Layer {layer} has {ours} score heads in {one.folder} and {theirs} in {other.folder}; "
                "heads are paired one to one, so compare runs with as many."
            )


def _attentions(model: Decoder) -> list[Attention]:
    return [each for each in model.modules() if isinstance(each, Attention)]


def _lengths(subjects: Sequence[Subject], tokens: int) -> list[int]:
    """The trained length, and twice that where the models can number it and the text is that long."""
    context = subjects[0].run.model.context
    farthest = min(each.model.farthest or tokens for each in subjects)
    return [context, 2 * context] if 2 * context <= min(farthest, tokens) else [context]


def _refuse_length(subject: Subject, length: int) -> None:
    if subject.model.farthest is not None and length > subject.model.farthest:
        raise UserError(
            f"{length} tokens are more than the {subject.model.farthest} positions of the learned table of "
            f"{subject.folder}; ask for fewer."
        )


def _windows(text: Text, length: int, count: int) -> Iterator[Int[Tensor, "1 t"]]:
    """At most `count` windows of the text, evenly apart, none overlapping another."""
    room = len(text.tokens) // length
    if not room:
        raise UserError(
            f"{text.label} has {len(text.tokens):,} tokens, fewer than one input of {length:,}; ask for a shorter one."
        )
    for start in np.linspace(0, len(text.tokens) - length, min(count, room)).astype(int):
        places = np.arange(start, start + length)
        yield torch.from_numpy(text.tokens[places].astype(np.int64))[None]


def _publish(folder: Path, rows: Sequence[Row], arrays: Sequence[dict[str, np.ndarray]]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, kept in zip((ARRAYS, ARRAYS_OF_OTHER), [*arrays, {}], strict=False):
            if kept:
                packed = BytesIO()
                np.savez_compressed(packed, allow_pickle=False, **kept)
                files.write(folder / name, packed.getvalue())
            else:
                (folder / name).unlink(missing_ok=True)
        files.write_lines(folder / ROWS, rows)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another with --folder.") from error
