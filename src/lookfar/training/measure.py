"""Measures a run and writes the rows into its folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lookfar import files
from lookfar.attention.scheme import spell
from lookfar.config import Run
from lookfar.data.base import Split
from lookfar.data.corpus import Corpus
from lookfar.data.stream import Stream
from lookfar.data.tokenizers import Tokenizer
from lookfar.evaluation import accuracy, protocols
from lookfar.evaluation.base import Progress, Row, Text
from lookfar.evaluation.perplexity import Perplexity
from lookfar.model.decoder import Decoder
from lookfar.tasks import numbering
from lookfar.tasks.numbering import DigitPositions
from lookfar.tasks.problems import Problems
from lookfar.training import checkpoint
from lookfar.training import folder as run_folder
from lookfar.training.precision import autocast
from lookfar.training.problems import lengths as lengths_of
from lookfar.training.problems import problems_of

HELD_OUT = 32  # problems of each trained length whose loss is measured


def measure(
    model: Callable[[], Decoder],
    text: Text,
    run: Run,
    folder: Path,
    *,
    update: int,
    lengths: Sequence[int],
    wanted: Sequence[str],
    progress: Progress,
) -> list[Row]:
    """Perplexity at every length in every protocol of the model after an update.

    Rows that the folder has already are not measured again; the model is asked for only where some are missing.
    """
    known = files.read_lines(folder / run_folder.ROWS)
    rows: list[Row] = []
    for expression in wanted:
        protocol = protocols.find(expression)
        if protocol.tokens is None and run.evaluation.tokens is not None:
            protocol = replace(protocol, tokens=run.evaluation.tokens)
        for length in lengths:
            windows = protocol.windows(len(text.tokens) - 1, length, text.starts.tolist())
            same = {
                "scheme": about(run, folder)["scheme"],
                "numbering": None if run.evaluation.numbering == "consecutive" else run.evaluation.numbering,
                "data": text.label,
                "protocol": protocol.name,
                "length": length,
                "update": update,
            }
            count = sum(window.scored for window in windows)
            found = [
                row
                for row in known
                if row.get("of", row["count"]) == count and all(row.get(key) == value for key, value in same.items())
            ]
            by_position = run.evaluation.by_position
            if not found or (by_position and all(row["metric"] != "loss_at" for row in found)):
                measurement = Perplexity(numbering=run.evaluation.numbering, by_position=by_position)
                decoder = model()
                with autocast(run.training.precision, run.model.dtype, decoder.device):
                    found = measurement.measure(decoder, text, length=length, protocol=protocol, progress=progress)
                found = [{**about(run, folder), "update": update, **row} for row in found]
                run_folder.add_rows(folder, found)
            rows += found
    return rows


def measure_problems(model: Decoder, run: Run, folder: Path, *, update: int, progress: Progress) -> list[Row]:
    """Exact answers at every length, and the held-out loss, of the model after an update and of the best known one.

    Rows that the folder has already are not measured again.
    """
    problems = problems_of(run.task)
    known = files.read_lines(folder / run_folder.ROWS)
    best = checkpoint.read_manifest(folder).get("best")
    models = {"last": (update, model)}
    if best is not None:
        models["best"] = (best, model if best == update else checkpoint.load(folder, which=best, trust=True))
    rows: list[Row] = []
    fresh: dict[tuple[int, int], list[Row]] = {}  # the last may be the best
    for which, (done, each) in models.items():
        said = {**about(run, folder), "checkpoint": which, "update": done}
        rows += _held_out(each, problems, run, folder, said, known)
        for length in lengths_of(run, problems):
            same = {**said, "data": problems.name, "protocol": "greedy", "length": length}
            found = [row for row in known if all(row.get(key) == value for key, value in same.items())]
            if not found:
                if (id(each), length) not in fresh:
                    with autocast(run.training.precision, run.model.dtype, each.embedding.weight.device):
                        fresh[id(each), length] = accuracy.measure(
                            each,
                            problems,
                            length=length,
                            count=run.task.examples,
                            numbers=numbers_of(run, each),
                            progress=progress,
                        )
                found = [{**said, **row} for row in fresh[id(each), length]]
                run_folder.add_rows(folder, found)
            rows += found
    return rows


def _held_out(model: Decoder, problems: Problems, run: Run, folder: Path, said: Row, known: Sequence[Row]) -> list[Row]:
    """The row of the loss on held-out problems of the trained lengths."""
    same = {**said, "data": problems.name, "protocol": "held_out", "length": problems.longest_trained, "metric": "loss"}
    found = [row for row in known if all(row.get(key) == value for key, value in same.items())]
    if not found:
        with autocast(run.training.precision, run.model.dtype, model.device):
            value, count = accuracy.loss(model, problems, count=HELD_OUT, numbers=numbers_of(run, model))
        found = [{**same, "value": value, "count": count}]
        run_folder.add_rows(folder, found)
    return found


def numbers_of(run: Run, model: Decoder) -> DigitPositions | None:
    """How the tokens of the run's problems are numbered where digits decide it; None: consecutively."""
    return numbering.find(run.training.numbering, problems_of(run.task), model.farthest)


def about(run: Run, folder: Path) -> Row:
    """What every row of a run says of it."""
    schemes = (run.model.scheme,) if isinstance(run.model.scheme, str) else run.model.scheme
    scheme = " | ".join(spell(each) for each in schemes)
    return {"run": folder.name, "scheme": scheme, "seed": run.training.seed, "context": run.model.context}


def text_of(corpus: Corpus, split: Split) -> Text:
    """A split of the first text of a corpus as a stream to measure on; its label names a split other than `valid`."""
    label = corpus.texts[0].label
    return as_text(corpus.tokens(split), corpus.tokenizer, label if split == "valid" else f"{label}, {split}")


def as_text(tokens: np.ndarray | Stream, tokenizer: Tokenizer, label: str) -> Text:
    """Tokens as a stream to measure on; what begins a text is the separator that ends the one before."""
    unit = "byte" if tokenizer.vocabulary == 256 else "token"
    starts = tokens.starts() if isinstance(tokens, Stream) else np.zeros(1, np.int64)
    return Text(tokens, tokenizer.spelling, label, unit, starts, tokenizer.separator)
