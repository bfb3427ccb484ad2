"""Runs a study: every scheme with every seed, one after another, what is finished skipped."""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lookfar import config, files
from lookfar.attention.scheme import parse, spell
from lookfar.config import Run, Study
from lookfar.errors import UserError
from lookfar.training import checkpoint
from lookfar.training import folder as run_folder
from lookfar.training.check import check
from lookfar.training.run import run_whole
from lookfar.training.train import Interrupted, Watch

Watching = Callable[[str], AbstractContextManager[Watch]]


def run_study(study: Study, folder: Path, watching: Watching) -> dict[str, str]:
    """Train and measure all runs of a study into sub-folders; the answer names those that failed, with the reason.

    The whole study is looked over before the first run starts, so that a mistake costs no time.
    """
    planned: dict[str, Run] = {}
    for name, run in plan(study):
        if name in planned:
            raise UserError(f"The study has {name} twice; leave one of the schemes or seeds out.")
        check(run)
        planned[name] = run
    with run_folder.claim(folder):
        for name, run in planned.items():
            run_folder.refuse_another(folder / name, run, done=max(checkpoint.updates(folder / name), default=0))
        files.write(folder / "study.toml", config.write_toml(study.model_dump()).encode())
        failed: dict[str, str] = {}
        for number, (name, run) in enumerate(planned.items(), start=1):
            try:
                with watching(f"[{number}/{len(planned)}] {name}: ") as watch:
                    run_whole(run, folder / name, watch)
                (folder / name / "error.txt").unlink(missing_ok=True)  # of an earlier try
            except (Interrupted, KeyboardInterrupt):
                raise
            except UserError as error:
                failed[name] = str(error)
            except Exception as error:  # one run that fails must not cost the others
                (folder / name).mkdir(exist_ok=True)
                (folder / name / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
                failed[name] = f"{type(error).__name__}: {error} (see {name}/error.txt)"
        rows = [row for name in planned for row in files.read_lines(folder / name / run_folder.ROWS)]
        files.write_lines(folder / run_folder.ROWS, rows)
    return failed


def plan(study: Study) -> Iterator[tuple[str, Run]]:
    """The runs of a study with the names of their folders, seeds innermost."""
    for scheme in study.study.schemes:
        parse(scheme)
        for seed in study.study.seeds:
            model = study.model.model_copy(update={"scheme": spell(scheme)})
            training = study.training.model_copy(update={"seed": seed})
            parts: dict[str, Any] = {"model": model, "training": training}
            yield f"{slug(scheme)}-s{seed}", Run(data=study.data, evaluation=study.evaluation, **parts)


def slug(scheme: str) -> str:
    """A scheme as the name of a folder: `kerple + dape_v2(kernel=3)` -> `kerple+dape_v2-kernel=3`."""
    return re.sub(r"[^a-z0-9_.+=]+", "-", spell(scheme).lower().replace(" ", "")).strip("-")
