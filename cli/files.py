"""The files that a command writes: refused before the work, and written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import click

from .environment import Unavailable


def refuse(option: str, paths: Iterable[Path], inputs: Iterable[str | Path] = ()) -> None:
    """Refuse files that cannot be written, or that must not be, before time is spent on them.

    Parameters
    ----------
    option : str
        Of the command line, which the user gave the paths for.
    paths : iterable of path
    inputs : iterable of path
        Files that the command reads.

    Raises
    ------
    click.UsageError
        If a folder does not exist, or if a path is an input or another path's file.
    Unavailable
        If a folder or a file is not writable.
    """
    taken = {_identity(Path(path)): "is an input" for path in inputs}
    for path in paths:
        folder = path.parent
        if not folder.is_dir():
            raise click.UsageError(f"{option} {path}: there is no folder {folder}")
        if path.exists() and not _is_plain(path):
            continue
        # A file is replaced, so what counts is its folder; one that is protected is left alone.
        if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise Unavailable(f"{option} {path}: is not writable")
        identity = _identity(path)
        if identity in taken:
            raise click.UsageError(f"{option} {path}: {taken[identity]}")
        taken[identity] = "is given twice"


def write(path: Path, content: bytes) -> None:
    """Write a file whole, in place of an older one, or leave everything as it was.

    Raises
    ------
    Unavailable
        If it cannot be written.
    """
    try:
        if path.exists() and not _is_plain(path):
            path.write_bytes(content)
            return
        target = path.resolve()  # what a link leads to is replaced, and not the link
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        handle, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(beside, mode)
            os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror or error}") from None


def _is_plain(path: Path) -> bool:
    """Tell whether a path that exists leads to a file, and not to a device or a pipe."""
    return path.is_file()


def _identity(path: Path) -> object:
    """Return what is equal for two names of one file: links have the file's own."""
    try:
        status = path.stat()
    except OSError:
        return path.resolve()
    return status.st_dev, status.st_ino


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
