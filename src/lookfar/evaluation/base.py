"""What a measurement is: something that looks at a model and answers in flat rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lookfar.data.spelling import Spelling
from lookfar.data.stream import Stream
from lookfar.evaluation import protocols

Row = dict[str, Any]
Progress = Callable[[str, float], None]  # what is being done, and the part of it that is done


@runtime_checkable
class Model(Protocol):
    """What a measurement asks of a language model: `Decoder` answers it, and `interop` makes others answer it."""

    @property
    def device(self) -> torch.device:
        """Where tokens are to be put."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type in which `logits` wants states."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        ...

    @property
    def context(self) -> int:
        """The trained length."""
        ...

    @property
    def farthest(self) -> int | None:
        """How many positions the model can number; None: any number."""
        ...

    def states(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        positions: Num[Tensor, "#b t"] | None = None,
        last: int | None = None,
        step: int | None = None,
    ) -> Float[Tensor, "b q d"]:
        """What `logits` reads, of the `last` tokens; with a `step`, each line is the one before, moved on by it."""
        ...

    def logits(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n vocabulary"]:
        """The logits of what follows."""
        ...


@dataclass(frozen=True)
class Text:
    """A held-out stream of tokens."""

    tokens: np.ndarray | Stream  # of any integer type, one axis
    spelling: Spelling  # how many bytes and words are in each token
    label: str  # name and fingerprint, for the rows
    unit: str = "token"  # what a perplexity counts: byte or token
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # of the documents, ascending from 0
    bos: int | None = None  # the token that begins a text


class Measurement(ABC):
    """Measures a model on a text."""

    @abstractmethod
    def measure(
        self, model: Model, text: Text, *, length: int, protocol: protocols.Protocol, progress: Progress
    ) -> list[Row]:
        """Flat rows `{data, protocol, length, metric, value, count, …}`, one for each metric."""
