"""The training loop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lookfar.batch import consecutive
from lookfar.config import Run
from lookfar.data.corpus import Corpus, open_corpus
from lookfar.data.mixture import Mixture
from lookfar.data.packing import Lines
from lookfar.errors import UserError
from lookfar.evaluation import protocols
from lookfar.evaluation.perplexity import Perplexity
from lookfar.model import numbering
from lookfar.model.decoder import Decoder
from lookfar.training import checkpoint, objectives, optimizers, start
from lookfar.training import folder as run_folder
from lookfar.training import log as run_log
from lookfar.training.check import check
from lookfar.training.log import Watch
from lookfar.training.measure import about, text_of
from lookfar.training.memory import Pieces
from lookfar.training.optimizers import Optimizer
from lookfar.training.precision import autocast
from lookfar.training.profiling import profiled
from lookfar.training.schedules import budgets, rate


class Interrupted(Exception):
    """Training was asked to stop, and has saved what it did."""

    def __init__(self, update: int, number: int) -> None:
        super().__init__(f"Interrupted after {update} updates; all of them are saved.")
        self.update, self.signal = update, number


def train(run: Run, folder: Path, watch: Watch = lambda event: None, *, profile: bool = False) -> Decoder:
    """Train a run to its end, from its last checkpoint where there is one; the answer is the trained model.

    With `profile` the trace of a few updates is written into the folder.

    Raises:
        UserError: a recipe that cannot work, a folder that cannot be written, a loss that is not finite.
        Interrupted: SIGINT or SIGTERM came; the run is saved and the same call goes on from there.
    """
    check(run)
    corpus = open_corpus(run.data, progress=lambda what, part: watch({"event": "data", "what": what, "part": part}))
    run = with_vocabulary(run, corpus)
    config = run.training
    kept = budgets(config.schedule)  # a run of several budgets is several runs: each can be branched
    lines = corpus.lines(context=run.model.context, seed=config.seed)
    if not checkpoint.updates(folder):
        start.refuse(run, corpus.label)
    with run_folder.claim(folder), torch.random.fork_rng(), _asked_to_stop() as asked:
        run_folder.settle(folder, run, corpus.label, done=max(checkpoint.updates(folder), default=0))
        corpus.tokenizer.save(folder)
        torch.manual_seed(config.seed)
        model = Decoder(run.model).train()
        optimizer = optimizers.build(model, config)
        pieces = Pieces(model, run)
        first, seconds = _resume(folder, run, corpus.label, model, optimizer, pieces)
        if first < config.updates:
            run_folder.forget_rows(folder)  # they were measured before what is trained now
        watch({"event": "start", "update": first, "updates": config.updates, "parameters": count_parameters(model)})
        started = time.monotonic() - seconds
        with run_log.opened(folder, run, watch) as log, profiled(folder, profile, log.tell) as step_of_profile:
            for update in range(first, config.updates):
                for group in optimizer.param_groups:
                    group["lr"] = config.rate * rate(update, config)
                loss = pieces.compute(update, partial(_accumulate, model, lines, update, run), log.note)
                norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf))
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise UserError(_not_finite(folder, update, loss, norm, config.batch))
                optimizer.step()
                optimizer.zero_grad()
                seconds, done = time.monotonic() - started, update + 1
                line = {
                    "update": done,
                    "loss": loss,
                    "rate": optimizer.param_groups[0]["lr"],
                    "norm": norm,
                    "tokens": done * config.batch * run.model.context,
                    "seconds": round(seconds, 3),
                }
                log.write(line)
                watch({"event": "update", "updates": config.updates, **line})
                better = None
                if config.evaluate_every and done % config.evaluate_every == 0:
                    held_out = _held_out(model, corpus, run)
                    log.write({"update": done, "valid_loss": held_out})
                    better = (
                        held_out if held_out < checkpoint.read_manifest(folder).get("best_loss", math.inf) else None
                    )
                due = (
                    better is not None
                    or done == config.updates
                    or done in kept
                    or (config.checkpoint_every and done % config.checkpoint_every == 0)
                )
                if due or asked:
                    _save(folder, done, model, optimizer, pieces, seconds)
                    if better is not None:
                        checkpoint.note_best(folder, done, better)
                    checkpoint.thin(folder, config.keep, config.checkpoint_every, kept)
                step_of_profile()
                if asked and done < config.updates:
                    raise Interrupted(done, asked[0])
        if config.updates == 0:
            _save(folder, 0, model, optimizer, pieces, seconds)
        checkpoint.finish(folder, config.updates)
        run_folder.add_rows(folder, _training_rows(run, folder, corpus, model, seconds))
        if asked:  # in the last update: all is done, and nothing more is wanted
            raise Interrupted(config.updates, asked[0])
        return model.eval()


def with_vocabulary(run: Run, corpus: Corpus) -> Run:
    """The run with the vocabulary of its tokenizer, where it names none."""
    size, wanted = corpus.tokenizer.vocabulary, run.model.vocabulary
    if wanted is not None and wanted < size:
        raise UserError(f"model.vocabulary ({wanted}) is smaller than the tokenizer's ({size}); leave it out.")
    return run.model_copy(update={"model": run.model.model_copy(update={"vocabulary": wanted or size})})


def count_parameters(model: Decoder) -> int:
    """How many numbers are learned; shared ones count once."""
    return sum(each.numel() for each in model.parameters())


def _accumulate(model: Decoder, lines: Lines | Mixture, update: int, run: Run, accumulation: int) -> float:
    """The gradients and the mean loss of one batch, a piece at a time."""
    config, device, total = run.training, model.embedding.weight.device, 0.0
    size = config.batch // accumulation
    random = torch.Generator().manual_seed((config.seed * 1_000_003 + update) % 2**63)  # of the place: none is saved
    numbers = numbering.find(config.numbering, run.model.context)(config.batch, run.model.context, random)
    chances = torch.rand(config.batch, run.model.context, generator=random)
    objective = objectives.find(config.objective, run.model)
    for piece in range(accumulation):
        first = update * config.batch + piece * size
        several = numbers is not None and len(numbers) > 1
        positions = numbers[piece * size : (piece + 1) * size] if several and numbers is not None else numbers
        positions = None if positions is None else positions.to(device)
        tokens = torch.from_numpy(lines.batch(first, size)).to(device)
        found = lines.documents(first, size)
        documents = None if found is None else torch.from_numpy(found).to(device)
        if positions is not None and documents is not None:  # each begins with the first numbers of the line
            positions = positions.expand(size, -1).gather(1, consecutive(documents[:, :-1]))
        chance = chances[piece * size : (piece + 1) * size].to(device)
        with autocast(config.precision, run.model.dtype, device):
            loss = objective(model, tokens, positions, chance, documents) / accumulation
        loss.backward()
        total += float(loss.detach())
    return total


def _resume(
    folder: Path, run: Run, label: str, model: Decoder, optimizer: Optimizer, pieces: Pieces
) -> tuple[int, float]:
    """Go on from the newest whole checkpoint, or begin: updates done, and seconds spent on them."""
    checkpoint.sweep(folder)
    update = checkpoint.newest(folder)
    checkpoint.drop_after(folder, update)
    run_folder.trim_log(folder, update or 0)
    if update is None:
        update, state = start.begin(run, label, model)
    else:
        state = checkpoint.restore(folder, update, model)
    if state is None:
        return update, 0.0
    if state["optimizer"] is not None:
        optimizer.load_state_dict(state["optimizer"])
    pieces.accumulation = state.get("accumulation", pieces.accumulation)
    start.restore_random(state)
    return update, float(state["seconds"])


def _save(folder: Path, update: int, model: Decoder, optimizer: Optimizer, pieces: Pieces, seconds: float) -> None:
    state = {
        "optimizer": optimizer.state_dict(),
        "accumulation": pieces.accumulation,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "seconds": seconds,
    }
    checkpoint.save(folder, update, model, state)


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


def _held_out(model: Decoder, corpus: Corpus, run: Run) -> float:
    model.eval()
    with autocast(run.training.precision, run.model.dtype, model.embedding.weight.device):
        rows = Perplexity().measure(
            model,
            text_of(corpus, "valid"),
            length=run.model.context,
            protocol=protocols.find("non_overlapping(tokens=16384)"),
            progress=lambda what, part: None,
        )
    model.train()
    return next(row["value"] for row in rows if row["metric"] == "loss")


def _training_rows(run: Run, folder: Path, corpus: Corpus, model: Decoder, seconds: float) -> list[dict[str, Any]]:
    tokens = run.training.updates * run.training.batch * run.model.context
    values = {
        "parameters": count_parameters(model),
        "training_seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
    }
    row = {**about(run, folder), "data": corpus.label, "protocol": "training", "length": run.model.context}
    return [{**row, "metric": key, "value": value, "count": run.training.updates} for key, value in values.items()]


def _not_finite(folder: Path, update: int, loss: float, norm: float, batch: int) -> str:
    last = checkpoint.newest(folder)
    saved = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {folder}/checkpoints/{last}"
    what, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
    return (
        f"The {what} of update {update + 1} is {value} (lines {update * batch} to {(update + 1) * batch - 1} of the "
        f"order of training); {saved}. Try a lower training.rate or a longer training.warmup."
    )
