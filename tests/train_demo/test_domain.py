"""tools/train_demo/speech_domain.py: the folder that it writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpa_engines.checkpoint.speech_domain import FILE_NAME, find_speech_domain
from tests.train_demo.environment import RECIPE, environment

TOOL = RECIPE / "speech_domain.py"


def test_the_tool_writes_the_same_domain_twice(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="speech is synthesised with espeak-ng: pip install espeakng-loader")
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(tiny_checkpoint / "config.json", folder)
        command = [sys.executable, str(TOOL), str(folder), "--utterances", "5", "--unseen"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
        assert done.stdout.strip() == str(folder / FILE_NAME)
        contents.append({path.name: path.read_bytes() for path in folder.rglob("*.*")})
    assert contents[0] == contents[1]
    domain = find_speech_domain(tmp_path / "a")
    assert domain is not None
    assert len(domain.utterances) == 6
    assert [voice.trained for voice in domain.voices] == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nowhere",), "no checkpoint: it has no config.json"), ((".", "--utterances", "0"), "--utterances")],
)
def test_the_tool_refuses_what_it_cannot_do(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, str(TOOL), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment())
    assert done.returncode == 2
    assert message in done.stderr
