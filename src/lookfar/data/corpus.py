"""Keeps the tokens of a text in files that are mapped into memory, built once for each text and tokenizer."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from lookfar import plugins
from lookfar.config import DataConfig
from lookfar.data.base import SPLITS, Document, Source, Split
from lookfar.data.cache import cache_folder, publish
from lookfar.data.tokenizers import BytesTokenizer, Tokenizer, Tokens, load_tokenizer, train_bpe
from lookfar.errors import UserError

Progress = Callable[[str, float | None], None]  # what is being done, and the part of it that is done where it is known

_MANIFEST = "manifest.json"
_BATCH = 4 * 2**20  # characters that are tokenized at once


@dataclass(frozen=True)
class Corpus:
    """The tokens of a text under a tokenizer: for each split one stream, its documents joined by the separator.

    Attributes:
        name: the source, and what it read: `python_library`, `text_file:valid.txt`.
        fingerprint: 16 hex digits that stand for the text and the tokenizer.
        tokenizer: what made the tokens.
        folder: the files of tokens.
    """

    name: str
    fingerprint: str
    tokenizer: Tokenizer
    folder: Path

    @property
    def label(self) -> str:
        """How rows name this corpus: `python_library@3f2a91c0`."""
        return f"{self.name}@{self.fingerprint[:8]}"

    def tokens(self, split: Split) -> Tokens:
        """The stream of a split, read-only and mapped into memory, in the narrowest unsigned type."""
        return np.memmap(self.folder / f"{split}.tokens", self.tokenizer.dtype, mode="r")

    def starts(self, split: Split) -> Int64[np.ndarray, "documents"]:
        """Where each document of a split begins in its stream, ascending, the first at 0."""
        return np.fromfile(self.folder / f"{split}.starts", np.int64)


def open_corpus(config: DataConfig, *, tokenizer: Tokenizer | None = None, progress: Progress | None = None) -> Corpus:
    """The tokens of the configured text. They are built when the cache lacks them, else only mapped.

    Args:
        config: the source, its path, the tokenizer and the cache folder.
        tokenizer: takes the place of the configured one, such as that of a trained model.
        progress: told what is being done while something is built.

    Raises:
        UserError: text that is missing or cannot be read, a split of fewer than two tokens, a cache that cannot be
            written.
    """
    tell = progress or (lambda what, part: None)
    source = plugins.find("data", config.source)(path=config.path)
    cache = cache_folder(config.cache)
    text = source.fingerprint()
    tokenizer = tokenizer or _tokenizer(config, source, cache / f"{text}-bpe-{config.vocabulary}", tell)
    folder = cache / f"{text}-{tokenizer.fingerprint}"
    name = _name(config)
    publish(folder, lambda empty: _build(empty, name, source, tokenizer, tell), _is_whole)
    fingerprint = hashlib.sha256(folder.name.encode()).hexdigest()[:16]
    return Corpus(name, fingerprint, tokenizer, folder)


def _tokenizer(config: DataConfig, source: Source, folder: Path, tell: Progress) -> Tokenizer:
    if config.tokenizer == "bytes":
        return BytesTokenizer()

    def build(empty: Path) -> None:
        tell(f"training a tokenizer of {config.vocabulary:,} tokens", None)
        train_bpe((document.text for document in source.documents("train")), config.vocabulary).save(empty)

    publish(folder, build, _has_tokenizer)
    return load_tokenizer(folder)


def _has_tokenizer(folder: Path) -> bool:
    try:
        return bool(load_tokenizer(folder))
    except UserError:
        return False


def _name(config: DataConfig) -> str:
    if config.path is None:
        return config.source
    path = Path(config.path).expanduser()
    return f"{config.source}:{path.resolve().name if path.exists() else config.path}"


def _build(folder: Path, name: str, source: Source, tokenizer: Tokenizer, tell: Progress) -> None:
    sizes = {split: _write(folder, source, split, tokenizer, tell) for split in SPLITS}
    for split, size in sizes.items():
        if size["tokens"] < 2:
            raise UserError(
                f"The {split} split of {name} has {size['tokens']} tokens; it needs two at least: give more text."
            )
    manifest = {"name": name, "dtype": tokenizer.dtype.name, "splits": sizes}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _write(folder: Path, source: Source, split: Split, tokenizer: Tokenizer, tell: Progress) -> dict[str, int]:
    starts: list[int] = []
    written = 0
    separator = np.array([tokenizer.separator], tokenizer.dtype)
    with (folder / f"{split}.tokens").open("wb") as file:
        for texts in _batches(source.documents(split)):
            for tokens in tokenizer.encode_batch(texts):
                if starts:
                    file.write(separator.data)
                    written += 1
                starts.append(written)
                file.write(tokens.data)
                written += len(tokens)
            tell(f"tokenizing {split}: {written:,} tokens", None)
    (folder / f"{split}.starts").write_bytes(np.array(starts, np.int64).data)
    return {"tokens": written, "documents": len(starts)}


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Texts in batches of a few megabytes; empty ones are left out."""
    batch: list[str] = []
    size = 0
    for document in documents:
        if document.text:
            batch.append(document.text)
            size += len(document.text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_whole(folder: Path) -> bool:
    """Whether the files of a folder have the sizes that its manifest tells."""
    try:
        manifest: Any = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        width = np.dtype(manifest["dtype"]).itemsize
        return all(
            (folder / f"{split}.tokens").stat().st_size == manifest["splits"][split]["tokens"] * width
            and (folder / f"{split}.starts").stat().st_size == manifest["splits"][split]["documents"] * 8
            for split in SPLITS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
