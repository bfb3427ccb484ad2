"""Cuts documents into portions of a few megabytes that can be tokenized each alone, as no word spans a cut."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lookfar.data.base import Document

_PIECE = 64 * 1024  # characters
_PORTION = 4 * 2**20  # characters
_CUT = re.compile(r"(?<=\S)[ \t\n\r\f\v]")  # space for every tokenizer; Python's \s knows some that others do not


@dataclass(frozen=True)
class Portion:
    """Some pieces of text in their order.

    Attributes:
        texts: the pieces, none of them empty.
        begins: whether each begins a document; else it goes on where the piece before it ends.
        leads: whether the first of them is the first of all, which no separator precedes.
    """

    texts: tuple[str, ...]
    begins: tuple[bool, ...]
    leads: bool


def portions(documents: Iterable[Document]) -> Iterator[Portion]:
    """The portions of documents, a function of their text alone; empty documents are left out."""
    texts: list[str] = []
    begins: list[bool] = []
    size, leads = 0, True
    for text, begin in pieces(documents):
        texts.append(text)
        begins.append(begin)
        size += len(text)
        if size >= _PORTION:
            yield Portion(tuple(texts), tuple(begins), leads)
            texts, begins, size, leads = [], [], 0, False
    if texts:
        yield Portion(tuple(texts), tuple(begins), leads)


def pieces(documents: Iterable[Document]) -> Iterator[tuple[str, bool]]:
    """Every piece of every document, and whether it begins one."""
    held, searched, begin = "", 0, True  # what is not given out yet, and how far no cut is in it
    for document in documents:
        if not document.continues:
            if held:
                yield held, begin
            held, searched, begin = "", 0, True
        held += document.text
        start = 0
        while cut := _CUT.search(held, max(start + _PIECE, searched)):
            yield held[start : cut.start()], begin
            start, searched, begin = cut.start(), 0, False
        held = held[start:]
        searched = len(held)
    if held:
        yield held, begin


def cut(text: str) -> list[str]:
    """The pieces of one text."""
    return [piece for piece, _ in pieces([Document("", text)])]
