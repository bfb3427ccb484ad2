"""The one exception for mistakes of the user."""


class UserError(ValueError):
    """A mistake of the user, told in a sentence: what was wrong, with the values, and what would be right.

    The command line prints the sentence and exits with 2; in Python it is a `ValueError`.
    """


def nearest(word: str, known: list[str]) -> str:
    """A hint that names the known word closest to a mistyped one, or lists them all when none is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(sorted(known))}." if known else "None is known."
