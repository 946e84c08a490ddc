"""The demo checkpoint: its copy in the cache, and what is said of it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import CheckpointError
from gpa_engines import demo
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.checkpoint.speech_domain import SpeechDomain
from gpa_engines.hub import resolve_model

ROOT = Path(__file__).parents[2]
PACKAGED = ROOT / "gpa_engines" / "assets" / "demo"
LARGEST = 25_000_000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GPA_ENGINES_CACHE", str(tmp_path))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("cache")
def test_it_is_a_whole_checkpoint_with_a_domain() -> None:
    folder = resolve_model("demo")
    assert contents(folder) == contents(PACKAGED)
    Checkpoint.open(folder)
    domain = SpeechDomain.open(folder)
    assert len(domain.utterances) == 240
    assert len([voice for voice in domain.voices if voice.trained]) >= 4
    for utterance in domain.utterances:
        domain.clip_file(utterance.clip)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file()) <= LARGEST


@pytest.mark.usefixtures("cache")
def test_a_copy_is_kept_mended_and_conversions_in_it_are_left_alone() -> None:
    folder = demo.demo_checkpoint()
    (folder / "mine.gguf").write_bytes(b"mine")
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert demo.demo_checkpoint() == folder
    assert weights.stat().st_mtime_ns == before
    assert contents(folder) == {**contents(PACKAGED), "mine.gguf": b"mine"}


@pytest.mark.usefixtures("cache")
def test_many_may_ask_for_it_at_once() -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: demo.demo_checkpoint(), range(4)))
    assert len(folders) == 1
    assert contents(folders.pop()) == contents(PACKAGED)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPA_ENGINES_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="demo checkpoint cannot be copied to the cache"):
        demo.demo_checkpoint()


def test_the_readme_says_what_was_measured() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for claim in demo.demo_claims():
        assert f"- {claim}" in readme


@pytest.fixture
def gates() -> dict[str, Any]:
    return json.loads((PACKAGED / demo.GATES_FILE).read_text(encoding="utf-8"))


def test_a_task_that_misses_its_gate_is_not_claimed(
    gates: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in gates["gates"]:
        missed = "vc sampled above" in line["gate"]
        line |= {"reached": not missed, "found": "9.0%" if missed else line["found"]}
    (tmp_path / demo.GATES_FILE).write_text(json.dumps(gates))
    monkeypatch.setattr(demo, "_PACKAGED", tmp_path)
    claims = {claim.partition(":")[0]: claim for claim in demo.demo_claims()}
    assert claims["vc"].startswith("vc: misses its gate (word error rate of vc sampled above natural is 9.0%, limit ")
    assert "misses" not in claims["stt"]
