"""A folder that appears whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(target: Path) -> Generator[Path, None, None]:
    """An empty folder that takes the name `target` once the block has ended well and the disk has everything.

    It grows beside `target`, whose parents are made. Whatever ends the block early, Ctrl-C included, removes it, and
    a folder that is already there stays; else that one is replaced. Raises OSError.
    """
    made = _make_parents(target.parent)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            folder = temporary / target.name
            folder.mkdir()
            yield folder
            for path in folder.iterdir():
                _flush(path)
            _flush(folder)
            _move(folder, target, temporary / "replaced")
            _flush(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except BaseException:
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()
        raise


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were not there, the innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _move(folder: Path, target: Path, replaced: Path) -> None:
    old = target.rename(replaced) if target.exists() else None
    try:
        folder.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
        raise


def _flush(path: Path) -> None:
    """Have the disk take what was written, of a file or of a folder's names."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder cannot be opened on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
