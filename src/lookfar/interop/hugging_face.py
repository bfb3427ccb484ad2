"""Measures any causal language model of the Hugging Face hub, by name or folder, as lookfar's own are measured."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from lookfar import plugins
from lookfar.data.base import Document, Source
from lookfar.data.spelling import SPACES, Spelling
from lookfar.data.text_file import read_documents, read_text
from lookfar.errors import UserError
from lookfar.evaluation import protocols
from lookfar.evaluation.base import Progress, Row, Text
from lookfar.evaluation.perplexity import Perplexity
from lookfar.model.decoder import device_of
from lookfar.training import folder as run_folder

PREFIX = "hf:"
PARTS = ("bytes", "within", "opens", "closes")  # of a spelling, a number for each token


class CausalModel:
    """A causal model of transformers that answers what a measurement asks."""

    def __init__(self, model: Any, name: str) -> None:
        """Take a model of transformers, in the type that it has; `name` is for errors."""
        self.model, self.name = model.eval(), name
        settings = model.config.get_text_config()
        self.vocabulary: int = settings.vocab_size
        self.farthest = _farthest(model, getattr(settings, "max_position_embeddings", None))
        self.context: int = getattr(settings, "max_position_embeddings", None) or 0
        self.keeps = "logits_to_keep" in signature(model.forward).parameters  # can make the last logits alone
        self.head: nn.Module | None = model.get_output_embeddings()
        if model.base_model is model or not self._head_is_all():
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
            kept = {"logits_to_keep": last} if self.keeps else {}
            return self.model(input_ids=tokens, use_cache=False, **kept).logits[:, -last:]
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
    data: Path | str,
    lengths: Sequence[int],
    wanted: Sequence[str] = ("non_overlapping", "sliding"),
    tokens: int | None = None,
    by_position: bool = False,
    device: str = "auto",
    trust: bool = False,
    folder: Path | None = None,
    progress: Progress = lambda what, part: None,
) -> list[Row]:
    """Measure a causal model of transformers on a text, by its own tokenizer.

    Args:
        name: on the hub, or a folder.
        data: a UTF-8 text file, one document; a folder, of which every file of text is one; or a source such as
            `text_file(path=books)`, whose held-out split `valid` is read.
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


def encode(tokenizer: Any, data: Path | str) -> Text:
    """Documents as a stream to measure on. Bytes and words are those of the text, counted where each token lies.

    Each document is tokenized alone, and ends with the token that ends a text where the model has one: that token has
    no bytes and no words. The last document ends as it does.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens lie; save its fast form."
        )
    name, documents = _documents(data)
    digest, tokens, spelled, starts = hashlib.sha256(), [], [], []
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], np.int64)
    for number, content in enumerate(documents):
        if number:
            tokens.append(end)
            spelled.append(spell_by_place("", np.zeros(len(end), np.int64)))
            digest.update(b"\0")
        starts.append(sum(map(len, tokens)))
        found = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens.append(np.array(found["input_ids"], np.int64))
        spelled.append(spell_by_place(content, np.array([end for _, end in found["offset_mapping"]], np.int64)))
        digest.update(content.encode())
    parts = {part: np.concatenate([getattr(each, part) for each in spelled]) for part in PARTS}
    label = f"{name}@{digest.hexdigest()[:8]}"
    return Text(
        np.concatenate(tokens),
        Spelling(**parts, by_place=True),
        label,
        starts=np.array(starts, np.int64),
        bos=tokenizer.bos_token_id,
    )


def _documents(data: Path | str) -> tuple[str, Iterable[str]]:
    """The documents of a file, a folder or a source, and the name of them all."""
    path = Path(data).expanduser()
    if path.is_dir():
        return path.resolve().name, (each.text for each in read_documents(path))
    if path.exists() or not _names_source(str(data)):
        return path.name, [read_text(path)]
    terms = plugins.parse(str(data))
    if len(terms) > 1:
        raise UserError(f"{str(data)!r} names {len(terms)} sources; models are measured on one.")
    source: Source = plugins.build("data", terms[0])
    return str(terms[0]), _joined(source.documents("valid"))


def _names_source(data: str) -> bool:
    """Whether this is a source of the library: `nowhere.txt` would be a module of the user's own."""
    try:
        return all(each.name in plugins.names("data") for each in plugins.parse(data))
    except UserError:
        return False


def _joined(documents: Iterable[Document]) -> Iterator[str]:
    """The documents whole: a long one comes in parts."""
    parts: list[str] = []
    for each in documents:
        if parts and not each.continues:
            yield "".join(parts)
            parts = []
        parts.append(each.text)
    if parts:
        yield "".join(parts)


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
