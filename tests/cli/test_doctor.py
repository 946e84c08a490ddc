"""`gpa-run doctor` explains a checkpoint and says what is wrong with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpa_engines.demo import demo_checkpoint
from tests.cli.conftest import GpaRun


def test_a_whole_checkpoint(gpa_run: GpaRun, tiny_checkpoint: Path) -> None:
    outcome = gpa_run("doctor", "--model", tiny_checkpoint)
    assert (outcome.status, outcome.stderr) == (0, "")
    text = outcome.text
    assert str(tiny_checkpoint) in text
    for part in ("language model", "text tokenizer", "BiCodec", "wav2vec2", "GLM tokenizer"):
        assert part in text
    rows = {tuple(line.split()) for line in text.splitlines()}
    assert ("<|glm_semantic_N|>", "160", "560", "719") in rows
    assert ("<|bicodec_global_N|>", "4096", "720", "4815") in rows
    assert ("<|bicodec_semantic_N|>", "320", "4816", "5135") in rows
    assert {("stt", "can", "run"), ("tts-a", "can", "run"), ("vc", "can", "run")} <= rows
    assert "error" not in text


def test_a_missing_part_is_said_once_with_the_tasks_that_it_stops(gpa_run: GpaRun, tiny_checkpoint_copy: Path) -> None:
    shutil.rmtree(tiny_checkpoint_copy / "glm-4-voice-tokenizer")
    outcome = gpa_run("doctor", "--model", tiny_checkpoint_copy)
    assert outcome.status == 1
    lines = outcome.text.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert "glm-4-voice-tokenizer is missing" in errors[0]
    assert lines[-3:] == ["stt   cannot run: see the errors about GLM tokenizer", "tts-a can run", "vc    can run"]


def test_every_damage_is_found_in_one_go(gpa_run: GpaRun, tiny_checkpoint_copy: Path) -> None:
    weights = tiny_checkpoint_copy / "BiCodec" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:4000])
    (tiny_checkpoint_copy / "config.json").unlink()
    outcome = gpa_run("doctor", "--model", tiny_checkpoint_copy)
    assert outcome.status == 1
    errors = "\n".join(line for line in outcome.text.splitlines() if line.startswith("error: "))
    assert "BiCodec/model.safetensors" in errors
    assert "config.json is missing" in errors


def test_a_part_from_elsewhere(gpa_run: GpaRun, tiny_checkpoint: Path, tiny_checkpoint_copy: Path) -> None:
    shutil.rmtree(tiny_checkpoint_copy / "BiCodec")
    doctor = ("doctor", "--model", tiny_checkpoint_copy)
    assert gpa_run(*doctor).status == 1
    assert gpa_run(*doctor, "--bicodec", tiny_checkpoint / "BiCodec").status == 0


def test_verbose_lists_every_check(gpa_run: GpaRun, tiny_checkpoint: Path) -> None:
    text = gpa_run("doctor", "--model", tiny_checkpoint, "-v").text
    assert "ok: language model: weights (model.safetensors)" in text
    assert "weight_g" in text
    assert "im_end 514" in text


def test_the_findings_as_json(gpa_run: GpaRun, tiny_checkpoint: Path) -> None:
    document = json.loads(gpa_run("doctor", "--model", tiny_checkpoint, "--json").stdout)
    assert document["schema"] == "gpa-doctor/1"
    assert document["ok"] is True
    assert document["tasks"] == ["stt", "tts-a", "vc"]
    assert {family["name"]: family["offset"] for family in document["families"]} == {
        "glm_semantic": 560,
        "bicodec_global": 720,
        "bicodec_semantic": 4816,
    }


def test_the_model_from_the_environment(
    gpa_run: GpaRun, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPA_MODEL", str(tiny_checkpoint))
    assert gpa_run("doctor").status == 0


def test_without_a_model_the_demo_is_examined(gpa_run: GpaRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_ENGINES_CACHE", str(tmp_path))
    outcome = gpa_run("doctor")
    assert outcome.status == 0
    assert str(demo_checkpoint()) in outcome.text


def test_nothing_to_examine_is_wrong_usage(gpa_run: GpaRun, tmp_path: Path) -> None:
    outcome = gpa_run("doctor", "--model", tmp_path / "nowhere")
    assert (outcome.status, outcome.stdout) == (2, b"")
    assert "nowhere" in outcome.stderr


def test_doctor_loads_no_framework(tiny_checkpoint: Path) -> None:
    script = "import sys; from gpa_engines.cli.run import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    arguments = [sys.executable, "-c", script, "doctor", "--model", str(tiny_checkpoint)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
