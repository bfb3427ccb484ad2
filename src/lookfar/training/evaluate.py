"""Measures a finished run again."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lookfar import plugins
from lookfar.config import DataConfig
from lookfar.data.base import Split
from lookfar.data.corpus import open_corpus
from lookfar.data.text_file import read_text
from lookfar.data.tokenizers import load_tokenizer
from lookfar.errors import UserError
from lookfar.evaluation.base import Progress, Row, Text
from lookfar.training import checkpoint
from lookfar.training import folder as run_folder
from lookfar.training.check import check
from lookfar.training.measure import as_text, measure, measure_problems, text_of


def evaluate_run(
    folder: Path,
    *,
    lengths: Sequence[int] | None = None,
    wanted: Sequence[str] | None = None,
    data: Path | None = None,
    tokens: int | None = None,
    by_position: bool = False,
    scheme: str | None = None,
    trust: bool = False,
    progress: Progress = lambda what, part: None,
) -> list[Row]:
    """Measure a run at `lengths` in the `wanted` protocols and write the rows into its folder.

    Args:
        folder: of the run; its last whole checkpoint is measured.
        lengths, wanted: by default the run's own.
        data: a UTF-8 text file to measure on; by default the held-out split of the run's corpus.
        tokens: most tokens to score per length, by default the run's.
        by_position: also tell the loss by place in the window, as the run may.
        scheme: run the same weights under another scheme.
        trust: allow schemes of the user's own modules.
    """
    run, _ = run_folder.read(folder)
    changes = {
        "lengths": lengths and tuple(lengths),
        "protocols": wanted and tuple(wanted),
        "tokens": tokens,
        "by_position": by_position,
    }
    given = {key: value for key, value in changes.items() if value}
    evaluation = type(run.evaluation)(**{**run.evaluation.model_dump(), **given})
    model = run.model if scheme is None else run.model.model_copy(update={"scheme": scheme})
    run = run.model_copy(update={"evaluation": evaluation, "model": model})
    foreign = any("." in term.name for term in plugins.parse(run.data.source))
    if foreign and data is None and not trust:
        raise UserError(f"This run would execute the code of {run.data.source!r}; allow it with trust=True (--trust).")
    if run.task.name is not None and (wanted or data or tokens or by_position or scheme):
        raise UserError(f"{folder} was trained on a task; only the lengths at which it is measured can be chosen.")
    checkpoint.check_trust(run, trust)  # before anything imports it
    check(run)
    with run_folder.claim(folder):
        update = checkpoint.find(folder, "last")
        decoder = checkpoint.load(folder, which=update, scheme=scheme, trust=trust)
        if run.task.name is not None:
            return measure_problems(decoder, run, folder, update=update, progress=progress)
        text = held_out(folder, run.data, run.evaluation.split) if data is None else from_file(folder, data)
        return measure(
            lambda: decoder,
            text,
            run,
            folder,
            update=update,
            lengths=run.lengths,
            wanted=run.evaluation.protocols,
            progress=progress,
        )


def held_out(folder: Path, data: DataConfig, split: Split) -> Text:
    """A split of the run's own corpus, in the run's tokens."""
    return text_of(open_corpus(data, tokenizer=load_tokenizer(folder)), split)


def from_file(folder: Path, file: Path) -> Text:
    """A UTF-8 text file, in the run's tokens."""
    tokenizer = load_tokenizer(folder)
    content = read_text(file)
    label = f"{file.name}@{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    return as_text(tokenizer.encode(content), tokenizer, label)
