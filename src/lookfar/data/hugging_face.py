"""Reads a text corpus of the Hugging Face hub through `datasets`, as a stream, so that memory stays constant."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lookfar.data.base import SPLITS, Document, Source, Split, split_of
from lookfar.data.hub import UnreachableError, first_line, latest_commit, remembered_commit
from lookfar.errors import UserError

_SHORT_NAMES = {
    "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
}
_ROWS_ARE_LINES = ("Salesforce/wikitext",)
_TITLE = re.compile(r" = (?!= ).* = \n")
_HUB_NAMES: dict[Split, str] = {"train": "train", "valid": "validation", "test": "test"}


class HuggingFace(Source):
    """A data set of the hub: `path` is `owner/name`, `owner/name:configuration`, `wikitext-2` or `wikitext-103`.

    A local folder that `datasets` can load works too. Each row is a document; of wikitext, where a row is a line, each
    article. The text is the column `text`, or else the only one that holds strings. Where the data set has no
    `validation` or no `test`, the train rows whose text hashes into it (about 5% each) are held out for it.

    The environment variables of `huggingface_hub` are honoured by that library: `HF_ENDPOINT` names another hub,
    `HF_TOKEN` opens private data sets, `HF_HUB_OFFLINE=1` forbids the network. What was opened once opens again without
    a network, as long as its tokens are in lookfar's cache.

    Raises:
        UserError: `datasets` is not installed, the hub cannot be reached, it has no such data set, or no text is in it.
    """

    def __init__(self, *, path: str | None = None) -> None:
        if not path:
            raise UserError("hugging_face needs a path: set data.path to a name on the hub, such as 'wikitext-103'.")
        _require_datasets()
        self.path = path
        self.unreachable: UserError | None = None
        if path not in _SHORT_NAMES and Path(path).expanduser().is_dir():
            self.repository, self.configuration, self.commit = str(Path(path).expanduser()), None, None
            return
        self.repository, _, configuration = _SHORT_NAMES.get(path, path).partition(":")
        self.configuration = configuration or None
        try:
            self.commit = latest_commit(self.repository)
        except UnreachableError as error:  # what is in lookfar's cache can be used all the same
            self.commit, self.unreachable = remembered_commit(self.repository), error
            if self.commit is None:
                raise
        self.revision = f"{self.repository}:{configuration}@{self.commit}"

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, numbered, each read when it is asked for."""
        if self.unreachable:
            raise self.unreachable
        with _told(self.path):
            for number, text in enumerate(self._texts(split)):
                yield Document(f"{split}/{number}", text)

    def _texts(self, split: Split) -> Iterator[str]:
        from datasets import load_dataset

        found: Any = load_dataset(self.repository, self.configuration, revision=self.commit, streaming=True)
        if "train" not in found:
            raise UserError(f"{self.path!r} has no train split, only {', '.join(found)}; choose another data set.")
        lacking: set[Split] = {each for each in SPLITS if _HUB_NAMES[each] not in found}
        texts = self._join(_column(found["train" if split in lacking else _HUB_NAMES[split]], self.path))
        if split not in lacking and (split != "train" or not lacking):
            return texts
        return (text for text in texts if _held_out(text, lacking) == split)

    def _join(self, rows: Iterator[str]) -> Iterator[str]:
        return _articles(rows) if self.repository in _ROWS_ARE_LINES else rows


def _held_out(text: str, lacking: set[Split]) -> Split:
    split = split_of(text)
    return split if split in lacking else "train"


def _column(rows: Iterable[dict[str, Any]], path: str) -> Iterator[str]:
    """The text of each row."""
    column = None
    for row in rows:
        column = column or _text_column(row, path)
        yield row[column] or ""


def _text_column(row: dict[str, Any], path: str) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return "text"
    if len(strings) != 1:
        raise UserError(
            f"{path!r} has no column 'text' and {len(strings)} columns of strings, so it is unclear which is the text; "
            f"its columns are {', '.join(row)}."
        )
    return strings[0]


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """Join lines to articles, each from its title ` = Title = ` to the next; the empty lines get their space back."""
    article: list[str] = []
    for line in lines:
        if _TITLE.fullmatch(line) and "".join(article).strip():
            yield "".join(article)
            article = []
        article.append(line or " \n")
    yield "".join(article)


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UserError(
            'hugging_face needs the library datasets, which is not installed; pip install "lookfar[hub]".'
        ) from error


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Tell in a sentence what `datasets` raises in many types."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The data set {path!r} cannot be read: {first_line(error)}.") from error
