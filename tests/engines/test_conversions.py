"""What lies beside a checkpoint in other formats, as doctor lists it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpa_engines.cli.run import main
from gpa_engines.conversions import find_conversions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def converted(tiny_checkpoint_copy: Path) -> Path:
    """The tiny checkpoint with GGUF files of the speech and of the full vocabulary beside it."""
    pytest.importorskip("gguf")
    command = [sys.executable, str(ROOT / "tools" / "convert" / "to_gguf.py"), str(tiny_checkpoint_copy)]
    subprocess.run([*command, "--outtype", "q8_0", "--vocab", "all"], check=True, capture_output=True)
    return tiny_checkpoint_copy


def test_a_bare_checkpoint_has_none(tiny_checkpoint: Path) -> None:
    assert find_conversions(tiny_checkpoint) == []


def test_gguf_files_are_listed_with_what_they_serve(converted: Path) -> None:
    found = {conversion.content: conversion for conversion in find_conversions(converted)}
    assert set(found) == {f"GGUF, Q8_0, {name} vocabulary" for name in ("full", "speech", "text")}
    assert found["GGUF, Q8_0, speech vocabulary"].tasks == ("tts-a", "vc")
    assert all(conversion.parts == ("lm",) and not conversion.problem for conversion in found.values())


def test_a_table_that_was_left_behind_is_a_problem(converted: Path) -> None:
    (table,) = converted.glob("*embeddings*.safetensors")
    table.unlink()
    broken = [each for each in find_conversions(converted) if each.problem]
    assert len(broken) == 2
    assert all(table.name in each.problem for each in broken)


def test_doctor_counts_a_conversion_for_what_it_stands_for(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (converted / "model.safetensors").unlink()
    assert main(["doctor", "--model", str(converted), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["tasks"]) == {"stt", "tts-a", "vc"}
    assert {each["content"] for each in document["conversions"]} >= {"GGUF, Q8_0, full vocabulary"}
    assert main(["doctor", "--model", str(converted)]) == 0
    assert "warning: " in (shown := capsys.readouterr().out)
    assert "(a conversion stands in for it)" in shown
    assert "error: " not in shown
    for path in converted.glob("*.gguf"):
        if "speech" not in path.name:
            path.unlink()
    assert main(["doctor", "--model", str(converted)]) == 1
    text = capsys.readouterr().out
    assert "stt   cannot run: see the errors about language model" in text
    assert "tts-a can run" in text


def test_doctor_says_what_is_wrong_with_a_damaged_file(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(converted.glob("*speech*.gguf"))
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["doctor", "--model", str(path)]) == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert path.name in errors[0]
