"""What a measurement is: something that looks at a model and answers in flat rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lookfar.data.stream import Stream
from lookfar.evaluation.protocols import Protocol
from lookfar.model.decoder import Decoder

Row = dict[str, Any]
Progress = Callable[[str, float], None]  # what is being done, and the part of it that is done


@dataclass(frozen=True)
class Text:
    """A held-out stream of tokens."""

    tokens: np.ndarray | Stream  # of any integer type, one axis
    lengths: np.ndarray  # bytes of each token of the vocabulary
    label: str  # name and fingerprint, for the rows
    unit: str = "token"  # what a perplexity counts: byte or token


class Measurement(ABC):
    """Measures a model on a text."""

    @abstractmethod
    def measure(self, model: Decoder, text: Text, *, length: int, protocol: Protocol, progress: Progress) -> list[Row]:
        """Flat rows `{data, protocol, length, metric, value, count, …}`, one for each metric."""
