"""Asks the Hugging Face hub which commit of a data set is the newest, and remembers it for days without a network."""

from contextlib import suppress
from pathlib import Path

from lookfar.errors import UserError

_CARD = "README.md"
_TIMEOUT = 10  # seconds


class UnreachableError(UserError):
    """The hub does not answer."""


def latest_commit(repository: str) -> str:
    """The newest commit of a data set on the hub, in hexadecimal.

    Raises:
        UnreachableError: no answer within ten seconds.
        UserError: the hub has no such data set, or does not open it to this user.
    """
    from huggingface_hub import HfApi, constants, errors, hf_hub_download

    try:
        commit = HfApi().dataset_info(repository, timeout=_TIMEOUT).sha
    except errors.GatedRepoError as error:
        raise UserError(f"{repository!r} is open to members only; ask on its page and set HF_TOKEN.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"The hub {constants.ENDPOINT} has no data set {repository!r}; write it as 'owner/name', "
            "or set HF_TOKEN if it is private."
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{repository!r} is not a name on the hub; write it as 'owner/name'.") from error
    except Exception as error:  # the network fails in many types, which differ between versions of the library
        raise UnreachableError(
            f"The hub {constants.ENDPOINT} cannot be reached to read {repository!r} ({first_line(error)}); "
            "check the network, set HF_ENDPOINT to a mirror, or use text_file."
        ) from error
    with suppress(Exception):  # a file that is downloaded stays on this computer, under its commit
        hf_hub_download(repository, _CARD, repo_type="dataset")
    return str(commit)


def remembered_commit(repository: str) -> str | None:
    """The commit that was last seen, where the hub cannot be reached."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(repository, _CARD, repo_type="dataset")
    return Path(card).parent.name if isinstance(card, str) else None


def first_line(error: Exception) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
