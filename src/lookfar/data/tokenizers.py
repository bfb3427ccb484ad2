"""Turns text into tokens and back: the bytes of UTF-8, or byte-level BPE trained on a corpus."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int64, Integer, UInt
from tokenizers import decoders, models, pre_tokenizers, trainers

from lookfar.data.portions import cut
from lookfar.data.spelling import spell
from lookfar.errors import UserError
from lookfar.files import write

Tokens = UInt[np.ndarray, "_"]  # of the narrowest unsigned type that holds the vocabulary

_FILE = "tokenizer.json"
_END = "<|endoftext|>"
_BYTES = {"type": "bytes"}
_GROUP = 2**20  # characters
_PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that byte-level BPE writes as they are
_OTHER = [byte for byte in range(256) if byte not in _PLAIN]  # and those that it writes as the characters from 256 on
_BYTE = {chr(byte): bytes([byte]) for byte in _PLAIN} | {chr(256 + n): bytes([b]) for n, b in enumerate(_OTHER)}


class Tokenizer(ABC):
    """Text to tokens and back. Decoding what was encoded gives the same text.

    Attributes:
        vocabulary: how many tokens there are.
        separator: the token between two documents. No text contains it, but for a NUL character under bytes.
        spelling: how many bytes of text each token stands for, 0 for a separator that is no text, and how many words.
        dtype: the narrowest unsigned type that holds a token.
        content: all that makes the tokenizer, as JSON.
    """

    def __init__(self, *, separator: int, spelled: Sequence[bytes], content: str) -> None:
        self.vocabulary = len(spelled)
        self.separator = separator
        self.spelling = spell(spelled, separator)
        self.dtype = np.min_scalar_type(self.vocabulary - 1)
        self.content = content

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of several texts."""

    @abstractmethod
    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "_"]) -> str:
        """The text of tokens; bytes that are not UTF-8, such as half a character, become U+FFFD."""

    def encode(self, text: str) -> Tokens:
        """The tokens of a text. Nothing in it is taken for the separator of BPE, not even that string."""
        return self.encode_batch([text])[0]

    @property
    def lengths(self) -> Int64[np.ndarray, "v"]:
        """How many bytes of text each token stands for."""
        return self.spelling.bytes

    @property
    def fingerprint(self) -> str:
        """16 hex digits that stand for the tokenizer."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into a folder, which is made when missing. `load_tokenizer` reads it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / _FILE, self.content.encode())
        except OSError as error:
            raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error


class BytesTokenizer(Tokenizer):
    """The bytes of UTF-8: 256 tokens, one byte each. The separator is the byte NUL, and counts as one byte of text."""

    def __init__(self) -> None:
        super().__init__(separator=0, spelled=[bytes([each]) for each in range(256)], content=json.dumps(_BYTES))

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of several texts, each `uint8`."""
        return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "_"]) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(token) for token in tokens).decode("utf-8", "replace")


class BpeTokenizer(Tokenizer):
    """Byte-level BPE: words of bytes, merged where they are frequent (Sennrich et al. 2016; Radford et al. 2019).

    Every text has tokens, as every byte is one. The separator is `<|endoftext|>`, which stands for no bytes.
    """

    def __init__(self, content: str) -> None:
        self._model = tokenizers.Tokenizer.from_str(content)
        self._model.encode_special_tokens = True  # the separator's name in a text is text
        separator = self._model.token_to_id(_END)
        if separator is None:
            raise UserError(f"The tokenizer has no token {_END!r} to stand between documents; add it to its {_FILE}.")
        words = [self._model.id_to_token(token) or "" for token in range(self._model.get_vocab_size())]
        spelled = [b"" if token == separator else _bytes(word) for token, word in enumerate(words)]
        super().__init__(separator=separator, spelled=spelled, content=content)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of several texts, on all processors."""
        parts = [[np.empty(0, self.dtype)] for _ in texts]
        for group in _groups(texts):
            encoded = self._model.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (number, _), each in zip(group, encoded, strict=True):
                parts[number].append(np.array(each.ids, self.dtype))
        return [np.concatenate(part) for part in parts]

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "_"]) -> str:
        """The text of tokens, the separator written as `<|endoftext|>`."""
        return self._model.decode([int(token) for token in tokens], skip_special_tokens=False)


def train_bpe(texts: Iterable[str], vocabulary: int) -> BpeTokenizer:
    """Byte-level BPE of this many tokens, or fewer where the text holds no more pairs; the same for the same text."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return BpeTokenizer(model.to_str())


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that was saved in a folder; a `UserError` when it is missing or damaged."""
    file = folder / _FILE
    try:
        return from_content(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no tokenizer in {folder}: {_FILE} is missing.") from error
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{file} is damaged and cannot be read as a tokenizer: {error}.") from error


def from_content(content: str) -> Tokenizer:
    """The tokenizer of a `content`."""
    kind: Any = json.loads(content)
    return BytesTokenizer() if kind == _BYTES else BpeTokenizer(content)


def _groups(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Pieces, each with the number of its text, about a megabyte together: what the library makes of them is large."""
    group: list[tuple[int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        for piece in _pieces(text):
            group.append((number, piece))
            size += len(piece)
            if size >= _GROUP:
                yield group
                group, size = [], 0
    if group:
        yield group


def _bytes(word: str) -> bytes:
    """The bytes of a token, which the alphabet of the library writes as one character each."""
    return b"".join(_BYTE.get(letter, letter.encode()) for letter in word)


def _pieces(text: str) -> list[str]:
    return cut(text.encode("utf-8", "replace").decode())
