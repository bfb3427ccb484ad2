"""A whole run: trained to its end, then measured."""

from functools import cache, partial
from pathlib import Path

from lookfar import files
from lookfar.config import Run
from lookfar.data.corpus import open_corpus
from lookfar.evaluation.base import Progress, Row
from lookfar.model.decoder import Decoder
from lookfar.training import folder as run_folder
from lookfar.training.checkpoint import load
from lookfar.training.log import Watch
from lookfar.training.measure import measure, measure_problems, text_of
from lookfar.training.processes import is_first
from lookfar.training.schedules import ends
from lookfar.training.train import train


def run_whole(run: Run, folder: Path, watch: Watch = lambda event: None, *, profile: bool = False) -> list[Row]:
    """Train and measure; what is done already is not done again. The answer is all rows of the folder.

    A run whose schedule has budgets is measured at each of them.

    Of several processes the first measures, alone.
    """
    model = train(run, folder, watch, profile=profile)
    if not is_first():
        return []

    def progress(what: str, part: float) -> None:
        watch({"event": "evaluation", "what": what, "part": part})

    with run_folder.claim(folder):
        _measure(run, folder, model, progress)
        return files.read_lines(folder / run_folder.ROWS)


def _measure(run: Run, folder: Path, model: Decoder, progress: Progress) -> None:
    if run.task.name is not None:
        measure_problems(model, run, folder, update=run.training.updates, progress=progress)
        return
    text = text_of(open_corpus(run.data), run.evaluation.split)
    *budgets, end = ends(run.training)
    for update in (*budgets, end):  # a run of several budgets is several models
        measure(
            (lambda: model) if update == end else cache(partial(load, folder, which=update, trust=True)),
            text,
            run,
            folder,
            update=update,
            lengths=run.lengths,
            wanted=run.evaluation.protocols,
            progress=progress,
        )
