"""Opens what a run reads: the tokens of one text or of several that are mixed, prepared once, mapped into memory."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Int64
from numpy import ndarray

from lookfar import plugins
from lookfar.config import DataConfig
from lookfar.data.base import Source, Split
from lookfar.data.cache import publish
from lookfar.data.mixture import Ingredient, Mixture, ingredients, shares
from lookfar.data.packing import Lines
from lookfar.data.portions import pieces
from lookfar.data.shards import Progress, Shards
from lookfar.data.stream import Stream
from lookfar.data.tokenizers import BytesTokenizer, Tokenizer, load_tokenizer, train_bpe
from lookfar.errors import UserError
from lookfar.files import cache_folder


@dataclass(frozen=True)
class Text:
    """The tokens of a text: for each split one stream, its documents joined by the separator.

    Attributes:
        name: the source, and what it read: `python_library`, `text_file:valid.txt`.
        fingerprint: 16 hex digits that stand for the text and the tokenizer.
        shards: where its tokens are.
    """

    name: str
    fingerprint: str
    shards: Shards

    @property
    def label(self) -> str:
        """How rows name this text: `python_library@3f2a91c0`."""
        return f"{self.name}@{self.fingerprint[:8]}"


@dataclass(frozen=True)
class Corpus:
    """What a run reads: one text, or several that lines are drawn from by weight.

    Attributes:
        texts: all under one tokenizer. Models are measured on the held-out splits of the first, whose label is theirs.
        weights: of the texts, as they were given.
        tokenizer: what made the tokens.
        isolated: whether attention stops at the borders of documents.
    """

    texts: tuple[Text, ...]
    weights: tuple[float, ...]
    tokenizer: Tokenizer
    isolated: bool = False

    @property
    def fingerprint(self) -> str:
        """16 hex digits that stand for the texts, their weights and the tokenizer."""
        if len(self.texts) == 1:
            return self.texts[0].fingerprint
        return _hash(
            f"{share} {text.fingerprint}" for share, text in zip(shares(self.weights), self.texts, strict=True)
        )

    @property
    def label(self) -> str:
        """How rows name this corpus: `python_library@3f2a91c0`, `2 text_file:a.txt + 1 text_file:b.txt@7be1f0d3`."""
        if len(self.texts) == 1:
            return self.texts[0].label
        mixed = " + ".join(f"{weight:g} {text.name}" for weight, text in zip(self.weights, self.texts, strict=True))
        return f"{mixed}@{self.fingerprint[:8]}"

    def tokens(self, split: Split) -> Stream:
        """The stream of a split of the first text, mapped into memory, in the narrowest unsigned type."""
        return self.texts[0].shards.stream(split)

    def starts(self, split: Split) -> Int64[ndarray, "documents"]:
        """Where each document begins in that stream, ascending, the first at 0."""
        return self.tokens(split).starts()

    def lines(self, *, context: int, seed: int) -> Lines | Mixture:
        """The training lines, in an order that any update can be looked up in."""
        each = [
            Lines(text.shards.stream("train"), context=context, seed=seed, isolated=self.isolated)
            for text in self.texts
        ]
        return each[0] if len(each) == 1 else Mixture(each, self.weights)


def open_corpus(config: DataConfig, *, tokenizer: Tokenizer | None = None, progress: Progress | None = None) -> Corpus:
    """The tokens of the configured text. What the cache lacks is prepared, the rest only mapped.

    Args:
        config: the sources, the tokenizer and the cache folder.
        tokenizer: takes the place of the configured one, such as that of a trained model.
        progress: told what is being done while something is prepared.

    Raises:
        UserError: text that is missing or cannot be read, a split of fewer than two tokens, a cache that cannot be
            written, sources or weights that cannot be.
    """
    tell = progress or (lambda what, part: None)
    mixed = ingredients(config)
    sources = [_source(each) for each in mixed]
    prints = [each.fingerprint() for each in sources]
    cache = cache_folder(config.cache)
    tokenizer = tokenizer or _tokenizer(config, sources, prints, cache, tell)
    texts = []
    for each, source, text in zip(mixed, sources, prints, strict=True):
        shards = Shards(cache / f"{text}-{tokenizer.fingerprint}", tokenizer)
        shards.prepare(name := _name(each), source, tell)
        texts.append(Text(name, _hash([shards.folder.name]), shards))
    return Corpus(tuple(texts), tuple(each.weight for each in mixed), tokenizer, config.documents == "isolated")


def sources_of(config: DataConfig) -> list[tuple[str, Source]]:
    """The configured sources of text and how they are named."""
    return [(_name(each), _source(each)) for each in ingredients(config)]


def _source(ingredient: Ingredient) -> Source:
    return plugins.find("data", ingredient.source)(path=ingredient.path)


def _tokenizer(config: DataConfig, sources: list[Source], prints: list[str], cache: Path, tell: Progress) -> Tokenizer:
    if config.tokenizer == "bytes":
        return BytesTokenizer()

    def build(empty: Path) -> None:
        tell(f"training a tokenizer of {config.vocabulary:,} tokens", None)
        documents = (document for source in sources for document in source.documents("train"))
        train_bpe((text for text, _ in pieces(documents)), config.vocabulary).save(empty)

    text = prints[0] if len(prints) == 1 else _hash(prints)
    folder = cache / f"{text}-bpe-{config.vocabulary}"
    publish(folder, build, _has_tokenizer)
    return load_tokenizer(folder)


def _has_tokenizer(folder: Path) -> bool:
    try:
        return bool(load_tokenizer(folder))
    except UserError:
        return False


def _name(ingredient: Ingredient) -> str:
    if ingredient.path is None:
        return ingredient.source
    path = Path(ingredient.path).expanduser()
    return f"{ingredient.source}:{path.resolve().name if path.exists() else ingredient.path}"


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
