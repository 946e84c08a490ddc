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


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 251 + ".wav")
    files.write_atomically(path, b"content")
    assert path.read_bytes() == b"content"


def test_a_growing_file_has_no_name_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "stream.bin"
    with files.replacing(path) as file:
        file.write(b"first")
        assert not path.exists()
        file.write(b", second")
    assert path.read_bytes() == b"first, second"


def test_a_growing_file_that_fails_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "stream.bin"

    def fail() -> None:
        with files.replacing(path) as file:
            file.write(b"first")
            raise ValueError("the source failed")

    with pytest.raises(ValueError, match="the source failed"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    files.write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_the_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    ordinary, written = tmp_path / "a", tmp_path / "b"
    ordinary.touch()
    files.write_atomically(written, b"")
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
