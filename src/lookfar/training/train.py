"""The training loop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lookfar import files
from lookfar.config import Run, TrainingConfig
from lookfar.data.corpus import Corpus, open_corpus
from lookfar.data.mixture import Mixture
from lookfar.data.packing import Lines
from lookfar.errors import UserError
from lookfar.evaluation import accuracy, protocols
from lookfar.evaluation.perplexity import Perplexity
from lookfar.model.decoder import Decoder
from lookfar.training import checkpoint, objectives, optimizers, sharding, start
from lookfar.training import folder as run_folder
from lookfar.training import log as run_log
from lookfar.training.check import check
from lookfar.training.log import Log, Watch
from lookfar.training.measure import HELD_OUT, about, numbers_of, text_of
from lookfar.training.memory import Pieces
from lookfar.training.numbering import Numbers
from lookfar.training.optimizers import Optimizer
from lookfar.training.precision import autocast
from lookfar.training.problems import Lesson, ProblemLines, inputs_of
from lookfar.training.processes import Processes, joined
from lookfar.training.processes import check as check_share
from lookfar.training.profiling import profiled
from lookfar.training.saving import Saver
from lookfar.training.schedules import budgets, rate


class Interrupted(Exception):
    """Training was asked to stop, and has saved what it did."""

    def __init__(self, update: int, number: int) -> None:
        super().__init__(f"Interrupted after {update} updates; all of them are saved.")
        self.update, self.signal = update, number


class Diverged(UserError):
    """A loss or a gradient is not finite."""


def train(run: Run, folder: Path, watch: Watch = lambda event: None, *, profile: bool = False) -> Decoder:
    """Train a run to its end, from its last checkpoint where there is one; the answer is the trained model.

    With `profile` the trace of a few updates is written into the folder. Several processes, each of which calls this,
    divide every batch; the first alone writes.

    Raises:
        UserError: a recipe that cannot work, a folder that cannot be written, a loss that is not finite (`Diverged`).
        Interrupted: SIGINT or SIGTERM came; the run is saved and the same call goes on from there.
    """
    check(run)
    with joined(run.model.device) as processes:
        check_share(run, processes)
        return _train(run, folder, watch, profile, processes)


def _train(run: Run, folder: Path, watch: Watch, profile: bool, processes: Processes) -> Decoder:
    corpus = _opened(run, watch)
    run = with_vocabulary(run, corpus)
    config = run.training
    kept = budgets(config.schedule)  # a run of several budgets is several runs: each can be branched
    lines = corpus.lines(context=run.model.context, seed=config.seed)
    if not checkpoint.updates(folder):
        start.refuse(run, corpus.label, folder)
    with _claimed(folder, processes), torch.random.fork_rng(), _asked_to_stop() as asked:
        last = processes.only_first(partial(_prepare, folder, run, corpus))
        torch.manual_seed(config.seed)
        model = Decoder(run.model).train()
        first, state = _begin(folder, run, model, last)
        model.recompute(config.checkpoint_activations)
        if config.parallel == "sharded" and processes.count > 1:
            sharding.shard(model)
        optimizer, pieces = optimizers.build(model, config), Pieces(model, run, processes)
        seconds, skipped = _go_on(state, optimizer, pieces)
        watch({"event": "start", "update": first, "updates": config.updates, "parameters": count_parameters(model)})
        started = time.monotonic() - seconds
        with (
            run_log.opened(folder, run, watch, silent=not processes.first) as log,
            profiled(folder, profile and processes.first, log.tell) as step_of_profile,
            Saver(folder, pieces) as saver,
        ):
            for update in range(first, config.updates):
                for group in optimizer.param_groups:
                    group["lr"] = config.rate * rate(update, config)
                share = partial(_accumulate, model, lines, update, run, processes)
                loss = processes.mean(pieces.compute(update, share, log.note))
                processes.average(model.parameters())
                norm = sharding.clip(model, config.clip or math.inf)
                if math.isfinite(loss) and math.isfinite(norm):
                    optimizer.step()
                else:
                    saver.wait()
                    skipped += 1
                    _pass_over(folder, update, loss, norm, config, skipped, log)
                optimizer.zero_grad()
                seconds, done = time.monotonic() - started, update + 1
                line = {
                    "update": done,
                    "loss": loss,
                    "rate": optimizer.param_groups[0]["lr"],
                    "norm": norm,
                    **_worked(done, run),
                    "seconds": round(seconds, 3),
                }
                log.write({key: _finite(value) for key, value in line.items()})
                watch({"event": "update", "updates": config.updates, **line})
                better = None
                if config.evaluate_every and done % config.evaluate_every == 0:
                    held_out = _held_out(model, corpus, run)  # by all: a sharded model needs them
                    saver.wait()  # for the best so far
                    log.write({"update": done, "valid_loss": held_out})
                    better = processes.only_first(partial(_better, folder, held_out))
                due = (
                    better is not None
                    or done == config.updates
                    or done in kept
                    or (config.checkpoint_every and done % config.checkpoint_every == 0)
                )
                stop = processes.largest(asked[0] if asked else 0)  # the signal that any of them got
                if due or stop:
                    saver.save(done, model, optimizer, {"seconds": seconds, "skipped": skipped}, better)
                step_of_profile()
                if stop and done < config.updates:
                    saver.wait()
                    raise Interrupted(done, stop)
                saver.check()
            if config.updates == 0:
                saver.save(0, model, optimizer, {"seconds": seconds, "skipped": skipped})
            saver.wait()
        whole = sharding.gathered(model)
        processes.only_first(partial(_finish, folder, run, corpus, whole, seconds))
        if stop := processes.largest(asked[0] if asked else 0):  # in the last update: nothing more is wanted
            raise Interrupted(config.updates, stop)
        return whole.eval()


def _opened(run: Run, watch: Watch) -> Corpus | Lesson:
    """What the run reads: a text, or the problems of a task."""
    if run.task.name is not None:
        return Lesson(run.task)
    return open_corpus(run.data, progress=lambda what, part: watch({"event": "data", "what": what, "part": part}))


def with_vocabulary(run: Run, corpus: Corpus | Lesson) -> Run:
    """The run with the vocabulary of its tokenizer, where it names none."""
    size, wanted = corpus.tokenizer.vocabulary, run.model.vocabulary
    if wanted is not None and wanted < size:
        raise UserError(f"model.vocabulary ({wanted}) is smaller than the tokenizer's ({size}); leave it out.")
    return run.model_copy(update={"model": run.model.model_copy(update={"vocabulary": wanted or size})})


def count_parameters(model: Decoder) -> int:
    """How many numbers are learned; shared ones count once."""
    return sum(each.numel() for each in model.parameters())


def _accumulate(
    model: Decoder,
    lines: Lines | Mixture | ProblemLines,
    update: int,
    run: Run,
    processes: Processes,
    accumulation: int,
) -> float:
    """The gradients and the mean loss of this process's share of a batch, a piece at a time."""
    config, device, total = run.training, model.embedding.weight.device, 0.0
    share = config.batch // processes.count
    size = share // accumulation
    if processes.count > 1:  # each drops others, by its place alone: the number of processes may change
        torch.manual_seed(((config.seed * 1_000_003 + update) * processes.count + processes.rank) % 2**63)
    random = torch.Generator().manual_seed((config.seed * 1_000_003 + update) % 2**63)  # of the place: none is saved
    numbers = Numbers(run, random, model.farthest)
    chances = torch.rand(config.batch, run.model.context, generator=random)
    objective = objectives.find(config.objective, run.model)
    for piece in range(accumulation):
        place = processes.rank * share + piece * size  # in the batch
        first = update * config.batch + place
        found = lines.batch(first, size)
        tokens = torch.from_numpy(found).to(device)
        documents, scored = (_on(device, each(first, size)) for each in (lines.documents, lines.scored))
        chance = chances[place : place + size].to(device)
        parts = None if documents is None else documents[:, :-1]
        parts = parts if scored is None else inputs_of(scored)
        positions = numbers.of(place, found, parts, chance)
        chance = chance[:, : tokens.shape[1] - 1]  # of problems, the longest of these
        with autocast(config.precision, run.model.dtype, device, keep=not sharding.sharded(model)):
            loss = objective(model, tokens, positions, chance, documents, scored) / accumulation
        loss.backward()
        total += float(loss.detach())
    return total


def _on(device: torch.device, values: np.ndarray | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values).to(device)


@contextmanager
def _claimed(folder: Path, processes: Processes) -> Iterator[None]:
    """Hold the folder, by the first process for all."""
    with ExitStack() as held:
        processes.only_first(lambda: held.enter_context(run_folder.claim(folder)))
        yield


def _prepare(folder: Path, run: Run, corpus: Corpus | Lesson) -> int | None:
    """Make the folder ready to be worked in; the answer is the newest whole checkpoint."""
    run_folder.settle(folder, run, corpus.label, done=max(checkpoint.updates(folder), default=0))
    corpus.tokenizer.save(folder)
    checkpoint.sweep(folder)
    last = checkpoint.newest(folder)
    checkpoint.drop_after(folder, last)
    checkpoint.forget_lost_best(folder)
    run_folder.trim_log(folder, last or 0)
    if last is not None:  # it may have been killed between a checkpoint and what follows one
        checkpoint.recall_best(folder, last)
        config = run.training
        checkpoint.thin(folder, config.keep, config.checkpoint_every, budgets(config.schedule))
    if last is None or last < run.training.updates:
        run_folder.forget_rows(folder)  # they were measured before what is trained now
    return last


def _begin(folder: Path, run: Run, model: Decoder, last: int | None) -> tuple[int, dict[str, Any] | None]:
    """Bring the model to its last checkpoint, or to where the run begins: updates done, and the training state."""
    if last is None:
        return start.begin(run, model, folder)
    return last, checkpoint.restore(folder, last, model, mapped=run.training.parallel == "sharded")


def _go_on(state: dict[str, Any] | None, optimizer: Optimizer, pieces: Pieces) -> tuple[float, int]:
    """Take up the training state, where there is one: the seconds spent before, and the updates passed over."""
    if state is None:
        return 0.0, 0
    if state["optimizer"] is not None:
        optimizers.go_on(optimizer, state["optimizer"])
    pieces.go_on_with(state.get("accumulation", pieces.accumulation))
    start.restore_random(state)
    return float(state["seconds"]), int(state.get("skipped", 0))


def _finite(value: int | float) -> int | float | None:
    """The value for a log: JSON has no other numbers."""
    return value if math.isfinite(value) else None


def _worked(updates: int, run: Run) -> dict[str, int]:
    """How much was read in so many updates: tokens of a text; problems, whose tokens differ."""
    lines = updates * run.training.batch
    return {"tokens": lines * run.model.context} if run.task.name is None else {"problems": lines}


def _finish(folder: Path, run: Run, corpus: Corpus | Lesson, model: Decoder, seconds: float) -> None:
    checkpoint.finish(folder, run.training.updates)
    run_folder.add_rows(folder, _training_rows(run, folder, corpus, model, seconds))


def _better(folder: Path, held_out: float) -> float | None:
    """The held-out loss, where it is the lowest so far."""
    return held_out if held_out < checkpoint.read_manifest(folder).get("best_loss", math.inf) else None


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Collects the signals that ask to stop: the update is finished and saved first; a second signal acts at once."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # only the main thread hears signals
        before.clear()
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _held_out(model: Decoder, corpus: Corpus | Lesson, run: Run) -> float:
    model.eval()
    sharding.gather_ends(model)
    with autocast(run.training.precision, run.model.dtype, model.embedding.weight.device):
        if isinstance(corpus, Lesson):
            found, _ = accuracy.loss(model, corpus.problems, count=HELD_OUT, numbers=numbers_of(run, model))
        else:
            found = _loss_of_text(model, corpus, run.model.context)
    sharding.divide_again(model)
    model.train()
    return found


def _loss_of_text(model: Decoder, corpus: Corpus, length: int) -> float:
    rows = Perplexity().measure(
        model,
        text_of(corpus, "valid"),
        length=length,
        protocol=protocols.find("non_overlapping(tokens=16384)"),
        progress=lambda what, part: None,
    )
    return next(row["value"] for row in rows if row["metric"] == "loss")


def _training_rows(
    run: Run, folder: Path, corpus: Corpus | Lesson, model: Decoder, seconds: float
) -> list[dict[str, Any]]:
    logged = [line["update"] for line in files.read_lines(folder / run_folder.LOG) if "norm" in line]
    ((unit, amount),) = _worked(len(logged), run).items()  # a branch has not done what its trunk did
    values = {
        "parameters": count_parameters(model),
        "training_seconds": seconds,
        f"{unit}_per_second": amount / max(seconds, 1e-9),
    }
    row = {**about(run, folder), "data": corpus.label, "protocol": "training", "length": run.model.context}
    return [{**row, "metric": key, "value": value, "count": run.training.updates} for key, value in values.items()]


def _pass_over(
    folder: Path, update: int, loss: float, norm: float, config: TrainingConfig, skipped: int, log: Log
) -> None:
    """Note an update that is not learned from, or raise a `UserError` where that is one too many."""
    told = _not_finite(folder, update, loss, norm, config.batch)
    if skipped > config.skip_not_finite:
        allowed = f" {config.skip_not_finite} such updates were passed over before." if config.skip_not_finite else ""
        raise Diverged(told + allowed)
    log.note({"update": update + 1, "skipped": skipped, "note": f"{told} It is passed over."})


def _not_finite(folder: Path, update: int, loss: float, norm: float, batch: int) -> str:
    last = checkpoint.newest(folder)
    saved = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {folder}/checkpoints/{last}"
    what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
    return (
        f"The {what} of update {update + 1} is {value} (lines {update * batch} to {(update + 1) * batch - 1} of the "
        f"order of training); {saved}. Try a lower training.rate or a longer training.warmup."
    )
