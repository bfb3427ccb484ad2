"""Publishes folders whole: built aside, made visible by one rename; whoever comes second takes what is there."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from lookfar.errors import UserError
from lookfar.files import sync

_PREFIX = ".building-"
_STALE = 24 * 3600  # seconds without a write, after which a build is taken for dead


def publish(folder: Path, build: Callable[[Path], None], whole: Callable[[Path], bool]) -> None:
    """Make sure that a folder is there and whole: `build` fills an empty one, which then takes its name.

    Any number of processes may do this at once. One that is killed leaves nothing that another could mistake for
    the folder; one that finds it damaged replaces it.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    if whole(folder):
        return
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        with TemporaryDirectory(prefix=_PREFIX, dir=folder.parent, ignore_cleanup_errors=True) as aside:
            built = Path(aside, folder.name)  # a plain folder, with the rights that the user's umask gives
            built.mkdir()
            build(built)
            for file in built.iterdir():
                sync(file)
            _move(built, folder, whole)


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Tell in a sentence why a cache folder cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"The cache folder {cache} cannot be written ({reason}); "
            "set data.cache or $LOOKFAR_CACHE to a folder with room for it."
        ) from error


def _move(built: Path, folder: Path, whole: Callable[[Path], bool]) -> None:
    damaged = 0
    while True:
        try:
            built.rename(folder)
            return
        except OSError:  # a folder can only be renamed to a name that is free
            if whole(folder):  # another process was faster
                return
            if not folder.exists():
                raise
        with suppress(FileNotFoundError):  # another process has moved it aside
            folder.rename(built.with_name(f"damaged-{damaged}"))
        damaged += 1


def _sweep(parent: Path) -> None:
    """Remove what killed builds have left."""
    for aside in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            newest = max(each.stat().st_mtime for each in (aside, *aside.rglob("*")))
            if time.time() - newest > _STALE:
                shutil.rmtree(aside, ignore_errors=True)
