"""Turns tokens into text as they come, and sees when a stop text is reached."""

from collections.abc import Sequence

from lookfar.data.tokenizers import Tokenizer
from lookfar.errors import UserError


class Writer:
    """Decodes one sequence piece by piece; half a character, or what may become a stop text, waits for what follows."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise UserError("A stop text is empty; it would stop before the first token.")
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self._shown = 0  # characters that were given out

    def stops(self, tokens: list[int]) -> bool:
        """Whether what has been written holds a stop text or ends with the end of a document."""
        if tokens[-1] == self._tokenizer.separator:
            return True
        text = self._tokenizer.decode(tokens)
        return any(stop in text for stop in self._stops)

    def add(self, token: int | None) -> str:
        """The text that is now certain."""
        if token is not None and token != self._tokenizer.separator:
            self._tokens.append(token)
        return self._give(self._certain())

    def rest(self) -> str:
        """What is left when nothing follows."""
        return self._give(self._text())

    def _text(self) -> str:
        text = self._tokenizer.decode(self._tokens)
        cuts = [text.find(stop) for stop in self._stops if stop in text]
        return text[: min(cuts)] if cuts else text

    def _certain(self) -> str:
        text = self._text().rstrip("\ufffd")  # the beginning of a character
        unsure = max((_overlap(text, stop) for stop in self._stops), default=0)
        return text[: len(text) - unsure]

    def _give(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
