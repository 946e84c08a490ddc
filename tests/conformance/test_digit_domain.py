"""tools/speech_domain.py: which texts of digits are held out, and the folder that it writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpa_engines.checkpoint.speech_domain import FILE_NAME, find_speech_domain
from tools.speech_domain import held_out_texts, is_held_out

TOOL = Path(__file__).parents[2] / "tools" / "speech_domain.py"


def test_held_out_texts_are_distinct_and_of_every_length() -> None:
    texts = [text for text, _ in zip(held_out_texts(), range(200), strict=False)]
    assert len(set(texts)) == 200
    assert all(map(is_held_out, texts))
    assert {len(text.split()) for text in texts} == {3, 4, 5, 6}
    assert not is_held_out("one two")


def test_the_tool_writes_the_same_domain_twice(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="speech is synthesised with espeak-ng: pip install espeakng-loader")
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(tiny_checkpoint / "config.json", folder)
        command = [sys.executable, str(TOOL), str(folder), "--utterances", "5"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(folder / FILE_NAME)
        contents.append({path.name: path.read_bytes() for path in folder.rglob("*.*")})
    assert contents[0] == contents[1]
    domain = find_speech_domain(tmp_path / "a")
    assert domain is not None
    assert len(domain.utterances) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nowhere",), "no checkpoint: it has no config.json"), ((".", "--utterances", "0"), "expected 1 to 10000")],
)
def test_the_tool_refuses_what_it_cannot_do(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, str(TOOL), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
