"""Runs a study: every run when what it needs has ended, here, in workers or on Ray; what is finished is skipped."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lookfar import config, files
from lookfar.config import Run, Study
from lookfar.data.corpus import open_corpus
from lookfar.errors import UserError
from lookfar.study import on_ray
from lookfar.study.grid import expand, rate_of
from lookfar.study.planned import Planned
from lookfar.study.work import Job, Pool, leave_reason
from lookfar.study.workers import Here, Watching, working
from lookfar.training import checkpoint, problems
from lookfar.training import folder as run_folder
from lookfar.training.schedules import ends


def run_study(
    study: Study, folder: Path, watching: Watching, *, workers: int | None = None, on: Literal["ray"] | None = None
) -> dict[str, str]:
    """Train and measure all runs of a study into sub-folders; the answer names those that failed, with the reason.

    The whole study is looked over before the first run starts, so that a mistake costs no time. What the runs are
    called, and how they go on, does not depend on who does them.

    Args:
        study: what is run.
        folder: of the study.
        watching: for the title of each run, who is told what happens in it.
        workers: how many runs at a time, each in a process of its own; None: one after another in this process, or on
            Ray as many as the cluster has room for.
        on: "ray": on the Ray cluster that RAY_ADDRESS names, or a local one.

    Raises:
        UserError: a study that cannot work, or a folder that holds a run or was begun with other settings.
        Interrupted: a signal came; the same call goes on from there.
    """
    if on == "ray":
        on_ray.imported()
    planned = {each.name: each for each in expand(study)}
    if (folder / run_folder.RECIPE).exists():
        raise UserError(f"{folder} holds a run, whose rows a study would replace; choose another folder.")
    with run_folder.claim(folder):
        for each in planned.values():
            _refuse_another(each, folder)
        _tell_of_others(planned, folder, watching)
        files.write(folder / run_folder.STUDY, config.write_toml(study.model_dump()).encode())
        if workers is not None or on is not None:
            _prepare_texts(planned, watching)
        with _pool(workers, on, watching) as pool:
            failed = _do_all(planned, folder, pool, Here(watching))
        rows = [row for name in planned for row in files.read_lines(folder / name / run_folder.ROWS)]
        files.write_lines(folder / run_folder.ROWS, rows)
    return {name: failed[name] for name in planned if name in failed}


@contextmanager
def _pool(workers: int | None, on: str | None, watching: Watching) -> Iterator[Pool]:
    if on == "ray":
        with on_ray.connected(workers, watching) as pool:
            yield pool
    elif workers is None:
        yield Here(watching)
    else:
        with working(workers, watching) as pool:
            yield pool


def _do_all(planned: Mapping[str, Planned], folder: Path, pool: Pool, here: Here) -> dict[str, str]:
    """Do each run when what it needs has ended and a place is free; the answer says why runs failed."""
    failed: dict[str, str] = {}
    waiting, running, ended = dict(planned), set[str](), set[str]()
    while waiting or running:
        for each in [each for each in waiting.values() if each.needs <= ended]:
            if len(running) == pool.places:
                break
            del waiting[each.name]
            try:
                run = _ready(each, folder, failed)
            except UserError as error:
                place = folder / each.name
                failed[each.name] = leave_reason(place, str(error)) if place.exists() else str(error)
                ended.add(each.name)
                continue
            title = f"[{list(planned).index(each.name) + 1}/{len(planned)}] {each.name}: "
            running.add(each.name)
            by = here if _is_done(folder / each.name, run.run) else pool  # to see that, no process need be started
            by.start(Job(title, folder / each.name, run.run, run.notes))
            if by is here:
                break
        if running:
            name, reason = (here if here.job else pool).ended()
            running.remove(name)
            ended.add(name)
            if reason is not None:
                failed[name] = reason
    return failed


def _is_done(place: Path, run: Run) -> bool:
    """Whether a run is trained and, by the number of its rows, measured."""
    rows = files.read_lines(place / run_folder.ROWS)
    trained = checkpoint.read_manifest(place).get("finished") == run.training.updates
    if run.task.name is not None:
        answered = {row["length"] for row in rows if row["metric"] == "accuracy"}
        return trained and answered >= set(problems.lengths(run, problems.problems_of(run.task)))
    found = [(row["length"], row.get("update")) for row in rows if row["metric"] == "perplexity"]
    wanted = [(length, update) for length in run.lengths for update in ends(run.training)]
    return trained and all(found.count(each) >= len(run.evaluation.protocols) for each in wanted)


def _ready(planned: Planned, folder: Path, failed: Mapping[str, str]) -> Planned:
    """The run with the rate that its trials chose."""
    if planned.after in failed:
        raise UserError(f"{planned.after}, which it branches off, failed.")
    for name in planned.candidates:
        if name in failed:  # whether its rate is the best is not known; a trial that diverged has not failed
            raise UserError(f"{name}, its trial of a rate, failed.")
    if not planned.candidates:
        return planned
    rows = {name: files.read_lines(folder / name / run_folder.ROWS) for name in planned.candidates}
    rate = rate_of(planned, rows)
    training = planned.run.training.model_copy(update={"rate": rate})
    chosen = {**planned.notes, "chosen_rate": rate}
    return replace(planned, run=planned.run.model_copy(update={"training": training}), notes=chosen)


def _refuse_another(planned: Planned, folder: Path) -> None:
    """Refuse a folder that holds another run; a rate that is still to be chosen is not compared."""
    place = folder / planned.name
    run = planned.run
    if (place / run_folder.RECIPE).exists():
        before = run_folder.read(place)[0].training
        if "candidate" in planned.notes and before.seed != run.training.seed:
            raise UserError(
                f"{place} tried its rate with seed {before.seed}, not {run.training.seed}; "
                f"set study.choose_seed={before.seed}, or choose another folder."
            )
        if planned.candidates:
            run = run.model_copy(update={"training": run.training.model_copy(update={"rate": before.rate})})
    run_folder.refuse_another(place, run, done=max(checkpoint.updates(place), default=0))


def _tell_of_others(planned: Mapping[str, Planned], folder: Path, watching: Watching) -> None:
    """Say which runs in the folder are none of the study: its report shows them too."""
    others = sorted(
        each.parent.name for each in folder.glob(f"*/{run_folder.RECIPE}") if each.parent.name not in planned
    )
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        told = (
            f"{folder} holds runs that are not of this study, and its report shows them: {', '.join(others[:5])}{more}"
        )
        with watching(f"[0/{len(planned)}] folder: ") as watch:
            watch({"event": "note", "text": told})


def _prepare_texts(planned: Mapping[str, Planned], watching: Watching) -> None:
    """Make every text ready before several processes ask for it at once."""
    with watching(f"[0/{len(planned)}] text: ") as watch:
        texts = [each.run.data for each in planned.values() if each.run.task.name is None]
        for data in {each.model_dump_json(): each for each in texts}.values():
            open_corpus(data, progress=lambda what, part: watch({"event": "data", "what": what, "part": part}))
