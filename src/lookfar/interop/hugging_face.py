"""Measures any causal language model of the Hugging Face hub, by name or folder, as lookfar's own are measured."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from lookfar.data.spelling import SPACES, Spelling
from lookfar.data.text_file import read_text
from lookfar.errors import UserError
from lookfar.evaluation import protocols
from lookfar.evaluation.base import Progress, Row, Text
from lookfar.evaluation.perplexity import Perplexity
from lookfar.model.decoder import device_of
from lookfar.training import folder as run_folder

PREFIX = "hf:"


class CausalModel:
    """A causal model of transformers that answers what a measurement asks."""

    def __init__(self, model: Any, name: str) -> None:
        """Take a model of transformers, in the type that it has; `name` is for errors."""
        self.model, self.name = model.eval(), name
        settings = model.config.get_text_config()
        self.vocabulary: int = settings.vocab_size
        self.farthest = _farthest(model, getattr(settings, "max_position_embeddings", None))
        self.context: int = getattr(settings, "max_position_embeddings", None) or 0
        self.head: nn.Module | None = model.get_output_embeddings()
        if not self._head_is_all():
            self.head = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model.dtype

    def states(
        self,
        tokens: Int[Tensor, "b t"],
        *,
        positions: Num[Tensor, "#b t"] | None = None,
        last: int | None = None,
        step: int | None = None,
    ) -> Float[Tensor, "b q d"]:
        """What `logits` reads, of the last tokens: hidden states, or logits where more than a matrix makes these."""
        if positions is not None:
            raise UserError(f"{self.name} numbers its tokens itself; measure it with consecutive positions.")
        last = tokens.shape[1] if last is None else last
        if self.head is None:
            return self.model(input_ids=tokens, use_cache=False, logits_to_keep=last).logits[:, -last:]
        return self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, -last:]

    def logits(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n vocabulary"]:
        """The logits of what follows."""
        return states if self.head is None else self.head(states)

    @torch.inference_mode()
    def _head_is_all(self) -> bool:
        """Whether logits are the last hidden states times a matrix, with no scale or cap: tried out, not assumed."""
        if self.head is None:
            return False
        tokens = torch.arange(min(5, self.vocabulary), device=self.device)[None]
        whole = self.model(input_ids=tokens, use_cache=False).logits
        return torch.equal(self.logits(self.states(tokens)[0]), whole[0])


def evaluate(
    name: str,
    *,
    data: Path,
    lengths: Sequence[int],
    wanted: Sequence[str] = ("non_overlapping", "sliding"),
    tokens: int | None = None,
    by_position: bool = False,
    device: str = "auto",
    trust: bool = False,
    folder: Path | None = None,
    progress: Progress = lambda what, part: None,
) -> list[Row]:
    """Measure a causal model of transformers on a text file, by its own tokenizer.

    Args:
        name: on the hub, or a folder.
        data: a UTF-8 text file, one document.
        lengths, wanted, tokens, by_position: as of a run's own evaluation.
        device: where to run it.
        trust: allow the code that the model brings.
        folder: where rows are written, besides being the answer.

    Raises:
        UserError: `transformers` is not installed, there is no such model, or it cannot be measured so.
    """
    model, tokenizer = load(name, device=device, trust=trust)
    text = encode(tokenizer, data)
    about = {"run": name, "scheme": model.model.config.model_type, "seed": 0, "context": model.context}
    rows: list[Row] = []
    for expression in wanted:
        protocol = protocols.find(expression)
        if protocol.tokens is None:
            protocol = replace(protocol, tokens=tokens)
        for length in lengths:
            measured = Perplexity(by_position=by_position).measure(
                model, text, length=length, protocol=protocol, progress=progress
            )
            rows += [{**about, **row} for row in measured]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.add_rows(folder, rows)
    return rows


def load(name: str, *, device: str = "auto", trust: bool = False) -> tuple[CausalModel, Any]:
    """A causal model of transformers, ready to be measured, and its tokenizer."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"{PREFIX}{name} needs transformers, which is not installed: pip install lookfar[hub]"
        ) from error
    with _told(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust, dtype="auto")
    return CausalModel(model.to(device_of(device)), name), tokenizer


def encode(tokenizer: Any, file: Path) -> Text:
    """A text file as a stream to measure on. Bytes and words are those of the file, counted where each token lies."""
    content = read_text(file)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens lie; save its fast form."
        )
    found = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = np.array(found["input_ids"], np.int64)
    ends = np.array([end for _, end in found["offset_mapping"]], np.int64)
    label = f"{file.name}@{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    return Text(tokens, spell_by_place(content, ends), label, bos=tokenizer.bos_token_id)


def spell_by_place(content: str, ends: Int[np.ndarray, " n"]) -> Spelling:
    """The bytes and words of tokens that end at these characters; what lies between two belongs to the latter.

    Of tokens that share a character the first has all its bytes.
    """
    sizes = np.array([len(letter.encode()) for letter in content], np.int64)
    blank = np.array([True, *(letter in SPACES.decode() for letter in content)])
    begins = (~blank[1:] & blank[:-1]).astype(np.int64)
    cuts = np.concatenate([[0], np.maximum.accumulate(ends)])
    none = np.zeros(len(ends), bool)
    return Spelling(
        bytes=np.diff(np.concatenate([[0], np.cumsum(sizes)])[cuts]),
        within=np.diff(np.concatenate([[0], np.cumsum(begins)])[cuts]),
        opens=none,
        closes=none,
        by_place=True,
    )


def _farthest(model: Any, positions: int | None) -> int | None:
    """How many positions a learned table has; None where positions are computed."""
    if positions is None:
        return None
    own = model.get_input_embeddings()
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each is not own]
    return positions if any(each.num_embeddings in (positions, positions + 2) for each in tables) else None


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what the library raises into one sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{name!r} cannot be read as a causal model of transformers: {reason}.") from error
