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
from lookfar.analysis.inputs import inputs_of
from lookfar.analysis.traces import trace
from lookfar.attention.trace import Trace
from lookfar.config import Run
from lookfar.errors import UserError
from lookfar.evaluation.base import Progress
from lookfar.model.attention import Attention
from lookfar.model.decoder import Decoder
from lookfar.model.numbering import find
from lookfar.tasks.numbering import DigitPositions
from lookfar.training import folder as run_folder
from lookfar.training.checkpoint import load
from lookfar.training.measure import about, numbers_of
from lookfar.training.problems import most_tokens, problems_of, tokenizer_of

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
    """Look into a run on held-out text or problems; rows and arrays go into `analysis/` of its folder, older ones go.

    Args:
        folder: of the run; its last whole checkpoint is looked into.
        against: another run of the same tokens, layers and heads, to be compared on the same input.
        lengths: tokens of each input; by default the trained length, and twice that where the model can number it.
            Of a task, lengths of problems; by default the longest that is trained on, and the longest measured.
        inputs: windows of the text at each length, evenly apart, or problems with their right solutions.
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
    if len(subjects) == 2:
        _refuse_unlike(*subjects)
    first = subjects[0]
    foreign = any("." in term.name for term in plugins.parse(first.run.data.source))
    if foreign and text is None and not trust:
        raise UserError(f"{folder} would execute the code of {first.run.data.source!r}; allow it with trust=True.")
    farthest = min((each for each in map(_farthest, subjects) if each is not None), default=None)
    found = inputs_of(folder, first.run, lengths=lengths, count=inputs, text=text, farthest=farthest)
    for each in subjects:
        _refuse_length(each, max(some.length for some in found))
    rows: list[Row] = []
    arrays: list[dict[str, np.ndarray]] = [{} for _ in subjects]
    for some in found:
        length, count = some.length, len(some.tokens)
        seen = _look(subjects, terms, some.tokens, lambda part, length=length: progress(f"analysis at {length}", part))
        place = {"data": some.label, "protocol": PROTOCOL, "length": length, **some.about}
        taken = {"metric": "inputs", "layer": None, "head": None, "value": count, "count": length * count}
        for subject, kept, analyses in zip(subjects, arrays, seen, strict=True):
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
        walks = [_traced(each, window) for each in subjects]
        for found in zip(*walks, strict=True):
            for place, of_run in enumerate(analyses):
                (layer, own), others = found[place], found[place + 1 :]
                for each in of_run:
                    each.look(layer, own, others[0][1] if others else None)
        progress(done / len(windows))
    return analyses


def _traced(subject: Subject, tokens: Int[Tensor, "1 t"]) -> Iterator[tuple[int, Trace]]:
    """Every layer's attention on an input, numbered as the run numbers what it is measured on."""
    device, numbers = subject.model.device, _numbers(subject)
    if numbers is not None:
        positions = torch.from_numpy(numbers.measured(tokens[0].tolist()))[None]
    else:
        number = find(subject.run.evaluation.numbering, subject.run.model.context)
        positions = number(1, tokens.shape[1], torch.Generator().manual_seed(0))
    return trace(subject.model, tokens.to(device), positions=None if positions is None else positions.to(device))


def _open(folders: Sequence[Path], trust: bool) -> list[Subject]:
    """The runs in these folders; a row of the first names the other as `against`."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):  # of two studies
        names = [f"{folder.resolve().parent.name}/{name}" for folder, name in zip(folders, names, strict=True)]
    subjects = []
    for folder, name, other in zip(folders, names, [*names[1:], None], strict=True):
        run, _ = run_folder.read(folder)
        model = load(folder, trust=trust)  # or a refusal to, before a task of the user's own is asked
        trained = {} if run.task.name is None else {"context": _trained(run)}
        told = {**about(run, folder), **trained, "run": name, **({} if other is None else {"against": other})}
        subjects.append(Subject(folder, run, model, told))
    return subjects


def _trained(run: Run) -> int:
    """The inputs of the longest problems that a run is trained on: what its context holds may be more."""
    problems = problems_of(run.task)
    return min(run.model.context, most_tokens(problems, [problems.longest_trained]) - 1)


def _refuse_unlike(one: Subject, other: Subject) -> None:
    """Raise a `UserError` where two runs have no common input, or no heads that could be paired."""
    tasks = [each.run.task.model_dump(include={"name", "scratchpad", "bos"}) for each in (one, other)]
    if tasks[0] != tasks[1]:
        raise UserError(
            f"{one.folder} and {other.folder} are of different tasks ({tasks[0]}, {tasks[1]}), so they have no input "
            "in common; compare runs of one task."
        )
    prints = [tokenizer_of(each.folder).fingerprint for each in (one, other)]
    if prints[0] != prints[1]:
        sizes = [tokenizer_of(each.folder).vocabulary for each in (one, other)]
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


def _farthest(subject: Subject) -> int | None:
    """How many tokens a run can number; None: any number of them, and where their digits are numbered."""
    return None if _numbers(subject) is not None else subject.model.farthest


def _numbers(subject: Subject) -> DigitPositions | None:
    return None if subject.run.task.name is None else numbers_of(subject.run, subject.model)


def _refuse_length(subject: Subject, length: int) -> None:
    farthest = _farthest(subject)
    if farthest is not None and length > farthest:
        raise UserError(
            f"{length} tokens are more than the {farthest} positions of the learned table of "
            f"{subject.folder}; ask for fewer."
        )


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
