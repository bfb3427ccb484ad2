"""Cuts the text of tasks into symbols and numbers them: a vocabulary of a few hundred, without loss."""

import re
from collections.abc import Iterable, Sequence
from string import ascii_lowercase, ascii_uppercase, digits

import numpy as np
from jaxtyping import Int64, Integer

from lookfar.errors import UserError, nearest

_LETTERS = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi"
)
GREEK = tuple(_LETTERS.split())
SYMBOLS = (*digits, *ascii_lowercase, *ascii_uppercase, *"!$%&()*+,-./:;<=>", *GREEK)  # 100, each a single piece

PADDING, BOS, EOS = 0, 1, 2
SPECIAL = ("<padding>", "<bos>", "<eos>")

_PIECE = re.compile(r" ?(?:\[[A-Z]+\]|[A-Za-z_]+\d*|\d|[^\sA-Za-z\d])| ")


def pieces(text: str) -> list[str]:
    """Cut a text into words, single digits and single marks, each with the one space before it, if there is one.

    Joined they are the text again: `The answer is 6 2.` is `The`, ` answer`, ` is`, ` 6`, ` 2` and `.`.
    """
    found = _PIECE.findall(text)
    if sum(map(len, found)) != len(text):
        lost = next(each for each in text if each.isspace() and each != " ")
        raise UserError(f"{lost!r} cannot be a symbol; separate the symbols of a task by spaces.")
    return found


def words(*texts: str) -> tuple[str, ...]:
    """The different pieces of texts, without spaces, in the order in which they occur first."""
    return tuple(dict.fromkeys(found for text in texts for each in pieces(text) if (found := each.strip())))


class Vocabulary:
    """Numbers for the pieces of a text: padding, BOS and EOS first, then each symbol, without and with a space.

    Attributes:
        pieces: what each token stands for, `[vocabulary]`.
    """

    def __init__(self, symbols: Iterable[str]) -> None:
        symbols = words(*symbols)
        self.pieces = (*SPECIAL, " ", *symbols, *(f" {each}" for each in symbols))
        self._numbers = {piece: token for token, piece in enumerate(self.pieces) if token >= len(SPECIAL)}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> Int64[np.ndarray, "t"]:
        """The tokens of a text.

        Raises:
            UserError: a piece of the text is not in the vocabulary.
        """
        found = pieces(text)
        try:
            return np.array([self._numbers[each] for each in found], np.int64)
        except KeyError:
            unknown = next(each.strip() for each in found if each not in self._numbers)
            hint = nearest(unknown, [each for each in self.pieces[len(SPECIAL) :] if not each.startswith(" ")])
            raise UserError(f"The vocabulary has no symbol {unknown!r}. {hint}") from None

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "_"]) -> str:
        """The text of tokens; padding, BOS and EOS are no text."""
        return "".join(self.pieces[int(each)] for each in tokens if int(each) >= len(SPECIAL))
