"""Tokenizes portions of text in their order: a few in this process, many in processes of their own."""

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import IO, cast

import numpy as np
from jaxtyping import Int64

from lookfar.data.portions import Portion
from lookfar.data.tokenizers import BytesTokenizer, Tokenizer, Tokens, from_content
from lookfar.errors import UserError

Encoded = tuple[Tokens, Int64[np.ndarray, "documents"]]  # tokens, and where documents begin in them

_FEW = 4  # portions that are not worth a process
_START = "import sys; sys.path[:] = {path!r}; from lookfar.data.encoders import serve; serve()"


def encode(tokenizer: Tokenizer, portion: Portion) -> Encoded:
    """The tokens of a portion, a separator before each document but the first of all."""
    separator = np.array([tokenizer.separator], tokenizer.dtype)
    parts: list[Tokens] = []
    starts, place, precede = [], 0, not portion.leads
    for tokens, begins in zip(tokenizer.encode_batch(portion.texts), portion.begins, strict=True):
        if begins:
            if precede:
                parts.append(separator)
                place += 1
            starts.append(place)
        parts.append(tokens)
        place += len(tokens)
        precede = True
    return np.concatenate(parts), np.array(starts, np.int64)


class Encoders:
    """As many processes as there are processors, each of which tokenizes a portion at a time.

    They are started when a text turns out to be long, and never for bytes, which take longer to send than to make.
    A process of its own imports nothing of the program that runs: any script may prepare a text. Use it in a `with`.

    Args:
        tokenizer: that all of them use.
        workers: how many processes; by default one for each processor that this one may use. 1: this process alone.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._workers = 1 if isinstance(tokenizer, BytesTokenizer) else workers or _processors()
        self._few = _FEW if workers is None else 0
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(self._workers)  # each waits for one process

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with suppress(BrokenPipeError), process:  # closes its pipes and waits
                pass

    def encode_all(self, portions: Iterator[Portion]) -> Iterator[Encoded]:
        """What each portion becomes, in their order; only a few portions more than there are workers are held.

        Raises:
            UserError: a process ended, such as for want of memory.
        """
        for portion in portions:
            if self._workers > 1 and self._few <= 0:
                yield from self._in_processes(portion, portions)
                return
            self._few -= 1
            yield encode(self._tokenizer, portion)

    def _in_processes(self, first: Portion, others: Iterator[Portion]) -> Iterator[Encoded]:
        if not self._processes:
            self._start()
        waiting: deque[Future[Encoded]] = deque([self._threads.submit(self._ask, first)])
        for portion in others:
            waiting.append(self._threads.submit(self._ask, portion))
            if len(waiting) > self._workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _start(self) -> None:
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # the processes are the parallelism
        for _ in range(self._workers):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._processes.append(process)
            _send(process.stdin, self._tokenizer.content)
            self._idle.put(process)

    def _ask(self, portion: Portion) -> Encoded:
        process = self._idle.get()
        try:
            _send(process.stdin, portion)
            return pickle.load(cast("IO[bytes]", process.stdout))
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"A process that tokenizes text ended with code {process.wait()}; is there enough memory? "
                "What is done is kept: start again to go on."
            ) from error
        finally:
            self._idle.put(process)


def serve() -> None:
    """The work of a process: answer each portion that comes in until no more come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    tokenizer = from_content(pickle.load(asked))
    while True:
        try:
            portion = pickle.load(asked)
        except EOFError:
            return
        try:
            _send(answers, encode(tokenizer, portion))
        except BrokenPipeError:
            os._exit(1)  # whoever asked is gone, and what is buffered with it


def _send(file: "IO[bytes] | None", what: object) -> None:
    assert file is not None
    pickle.dump(what, file, pickle.HIGHEST_PROTOCOL)
    file.flush()


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
