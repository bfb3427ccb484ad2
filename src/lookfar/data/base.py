"""What a source of text is, and how names are divided into train, valid and test."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Document:
    """A text that belongs together, such as one file or one article.

    A long one may come in parts, one after the other, of which all but the first continue it.
    """

    name: str
    text: str
    continues: bool = False


class Source(ABC):
    """A source of text. Its constructor takes one setting, the keyword `path`, and refuses one that it cannot use.

    A source that knows the version of its text without reading it sets `revision` in its constructor.
    """

    revision: str | None = None

    @abstractmethod
    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, one by one, in an order that never changes."""

    def fingerprint(self) -> str:
        """16 hex digits that stand for the text: of its revision where there is one, else of every document."""
        digest = hashlib.sha256(f"revision {self.revision}".encode() if self.revision else b"text")
        for split in () if self.revision else SPLITS:
            for document in self.documents(split):
                text = document.text.encode("utf-8", "surrogatepass")
                digest.update(b"continued\0" if document.continues else b"")
                digest.update(f"{split}\0{document.name}\0{len(text)}\0".encode("utf-8", "surrogatepass"))
                digest.update(text)
        return digest.hexdigest()[:16]


def split_of(name: str) -> Split:
    """The split that a name falls into by its hash, alone and for ever: about 90% train, 5% valid, 5% test."""
    place = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return "train" if place < 0.9 else "valid" if place < 0.95 else "test"
