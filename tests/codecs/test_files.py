"""A failed write leaves neither a half file nor a lost one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpa_codecs import files


def test_content_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")
    files.write_atomically(path, b"new content")
    assert path.read_bytes() == b"new content"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.bin"
    path.write_bytes(b"old")

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, b"new content")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    ordinary, written = tmp_path / "a", tmp_path / "b"
    ordinary.touch()
    files.write_atomically(written, b"")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
