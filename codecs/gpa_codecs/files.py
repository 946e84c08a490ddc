"""Writing files so that a failure leaves no half file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file by one with `content`, or leave it as it is. Devices and pipes are written into.

    Raises OSError.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        with path.open("wb", buffering=0) as file:
            write_all(file, content)
    else:
        with replacing(path) as file:
            file.write(content)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[BinaryIO, None, None]:
    """A new file that takes the name `path` once the block has ended well and the disk has everything.

    It grows beside `path`. Whatever ends the block early, Ctrl-C included, removes it, and an existing file keeps its
    content. A symbolic link is followed: what it points to is replaced. Raises OSError.
    """
    with replacing_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def replacing_path(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """As `replacing`, for what writes files by name: the block is given the name of an empty file to write into."""
    target = Path(os.path.realpath(path))
    # A name may have 255 bytes; the temporary one needs some of them.
    handle, name = tempfile.mkstemp(prefix=f".{target.name[:32]}.", dir=target.parent)
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, _default_mode())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write everything; an unbuffered file may take less than it is given at once."""
    rest = memoryview(content)
    while rest:
        written = file.write(rest)
        rest = rest[len(rest) if written is None else written :]


def why_not_writable(path: str | os.PathLike[str]) -> str | None:
    """The reason why `write_atomically` would fail, or None; creates and touches nothing."""
    try:
        return _problem_with(Path(path))
    except OSError as error:
        return error.strerror or str(error)


def _problem_with(path: Path) -> str | None:
    if "\0" in str(path):
        return "the name holds a null character"
    if path.is_dir():
        return "it is a folder; name a file in it"
    if path.exists():
        if not os.access(path, os.W_OK):
            return "permission denied"
        if not path.is_file():
            return None
        path = Path(os.path.realpath(path))
    elif path.is_symlink():
        path = Path(os.path.realpath(path))
    if not path.parent.exists():
        return f"the folder {path.parent} does not exist; create it first"
    if not path.parent.is_dir():
        return f"{path.parent} is not a folder"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"no permission to create files in {path.parent}"
    return None


def _default_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
