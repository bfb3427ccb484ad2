"""Measures any causal language model of the Hugging Face hub, by name or folder, as lookfar's own are measured."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from lookfar.evaluation.protocols import Protocol
from lookfar.model.decoder import device_of
from lookfar.training import folder as run_folder
from lookfar.training.memory import TEXTS

PREFIX = "hf:"
PARTS = ("bytes", "within", "opens", "closes")  # of a spelling, a number for each token


class CausalModel:
    """A causal model of transformers that answers what a measurement asks."""

    def __init__(self, model: Any, name: str) -> None:
        """Take a model of transformers, in the type that it has; `name` is for errors.

        Raises:
            UserError: the model sees what follows a token, so that its loss is no perplexity.
        """
        self.model, self.name = model.eval(), name
        settings = model.config.get_text_config()
        self.vocabulary: int = settings.vocab_size
        self.farthest = _farthest(model, getattr(settings, "max_position_embeddings", None))
        self.context: int = getattr(settings, "max_position_embeddings", None) or 0
        self.keeps = "logits_to_keep" in signature(model.forward).parameters  # can make the last logits alone
        self.rotations = _rotations(model)
        self.head: nn.Module | None = model.get_output_embeddings()
        self._try_out()

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
        self._forget_lengths()
        if self.head is None:
            kept = {"logits_to_keep": last} if self.keeps else {}
            return self.model(input_ids=tokens, use_cache=False, **kept).logits[:, -last:]
        return self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, -last:]

    def logits(self, states: Float[Tensor, "n d"]) -> Float[Tensor, "n vocabulary"]:
        """The logits of what follows."""
        return states if self.head is None else self.head(states)

    @torch.inference_mode()
    def _try_out(self) -> None:
        """Read a few tokens: refuse a model that looks ahead; keep the head where logits are states times it alone."""
        tokens = torch.arange(min(5, self.vocabulary, self.context or 5), device=self.device)[None]
        whole = self.model(input_ids=tokens, use_cache=False).logits
        changed = tokens.clone()
        changed[:, -1] = 0
        other = self.model(input_ids=changed, use_cache=False).logits
        rounding = torch.finfo(whole.dtype).eps ** 0.5 * whole.abs().max()  # experts may read tokens in another order
        if ((whole - other)[:, :-1].abs() > rounding).any():
            raise UserError(
                f"{self.name} sees what follows: its outputs change with a later token, so its loss is no perplexity; "
                "measure a causal model."
            )
        if self.model.base_model is self.model or not torch.equal(self.logits(self.states(tokens)[0]), whole[0]):
            self.head = None  # no part gives states, or logits are scaled or capped

    def _forget_lengths(self) -> None:
        """Give rotations their first frequencies again: dynamic ones keep those of the longest length that was read."""
        for rotation, kind in self.rotations:
            first = rotation.original_max_seq_len
            if getattr(rotation, f"{kind}max_seq_len_cached", first) > first:
                frequencies = getattr(rotation, f"{kind}original_inv_freq")
                setattr(rotation, f"{kind}inv_freq", frequencies.to(self.device))
                setattr(rotation, f"{kind}max_seq_len_cached", first)


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
        folder: where the rows of each length are written once they are known, besides being the answer.

    Raises:
        UserError: `transformers` is not installed, there is no such model, it cannot be measured so, or another process
            works in the folder.
    """
    found = _protocols(wanted, lengths, tokens)
    with nullcontext() if folder is None else run_folder.claim(folder):
        model, tokenizer = load(name, device=device, trust=trust)
        _refuse(model, tokenizer, found, lengths)
        text = encode(tokenizer, data)
        about = {"run": name, "scheme": model.model.config.model_type, "seed": 0, "context": model.context}
        measurement = Perplexity(by_position=by_position)
        rows: list[Row] = []
        for protocol in found:
            for length in lengths:
                with _beyond_context(model, length + protocol.bos):
                    measured = measurement.measure(model, text, length=length, protocol=protocol, progress=progress)
                measured = [{**about, **row} for row in measured]
                if folder is not None:
                    run_folder.add_rows(folder, measured)
                rows += measured
    return rows


def _protocols(wanted: Sequence[str], lengths: Sequence[int], tokens: int | None) -> list[Protocol]:
    """The protocols, each of which can cut windows of each length."""
    found = [protocols.find(expression) for expression in wanted]
    for length in lengths:
        if length < 1:
            raise UserError(f"A length of {length} tokens cannot be evaluated; it must be at least 1.")
        for protocol in found:
            protocol.windows(1, length)
    return [replace(each, tokens=tokens) if each.tokens is None else each for each in found]


def _refuse(model: CausalModel, tokenizer: Any, found: Sequence[Protocol], lengths: Sequence[int]) -> None:
    """Raise a `UserError` for the first protocol or length that the model is not made for."""
    for protocol in found:
        if protocol.bos and tokenizer.bos_token_id is None:
            raise UserError(f"{model.name} has no token that begins a text; measure without bos=true.")
        for length in lengths:
            if model.farthest is not None and length + protocol.bos > model.farthest:
                raise UserError(
                    f"Length {length} lies beyond the learned table of {model.farthest} positions of {model.name}; "
                    f"evaluate at most {model.farthest - protocol.bos}."
                )


def load(name: str, *, device: str = "auto", trust: bool = False) -> tuple[CausalModel, Any]:
    """A causal model of transformers, ready to be measured, and its tokenizer.

    Raises:
        UserError: `transformers` is not installed, or the model cannot be read, whatever the reason, or is not causal.
    """
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


def _rotations(model: nn.Module) -> list[tuple[Any, str]]:
    """Modules that keep the frequencies they began with, and what the names of these begin with: a kind of layers."""
    end = "original_inv_freq"
    return [
        (each, name.removesuffix(end))
        for each in model.modules()
        if hasattr(each, "original_max_seq_len")
        for name in dir(each)
        if name.endswith(end)
    ]


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn whatever the library raises into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name!r} cannot be read as a causal model of transformers: {_reason(error)}.") from error


@contextmanager
def _beyond_context(model: CausalModel, length: int) -> Iterator[None]:
    """Turn a failure to read more tokens than the context into one sentence; want of memory is no such failure."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        of_memory = isinstance(error, torch.OutOfMemoryError) or any(each in str(error) for each in TEXTS)
        if of_memory or not 0 < model.context < length:
            raise
        raise UserError(
            f"{model.name} cannot read {length} tokens at once, more than its context of {model.context}: "
            f"{_reason(error)}."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what an error says, and the next where that ends in a colon."""
    told = str(error).strip()
    if " " not in told:  # nothing, or the bare key of a KeyError
        return f"{type(error).__name__} {told}".strip()
    first, *others = told.splitlines()
    return " ".join([first, *(each.strip() for each in others[: first.endswith(":")])]).rstrip(".")
