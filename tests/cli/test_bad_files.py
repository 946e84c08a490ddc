"""Files that are missing or wrong, and outputs that cannot be written: said before the model is read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.cli.conftest import GpaRun, Outcome


def refused(outcome: Outcome, *fragments: str) -> None:
    """The command was refused with one line that holds all fragments, and left nothing in the current folder."""
    assert outcome.status == 2, outcome.stderr
    assert outcome.stdout == b""
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.stderr
    for fragment in fragments:
        assert fragment in errors[0]
    assert "Traceback" not in outcome.stderr
    assert list(Path.cwd().iterdir()) == []


@pytest.fixture
def no_model(tmp_path: Path) -> Path:
    """A folder without a checkpoint: if it is the one that is complained about, it was looked at too early."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def _missing(path: Path) -> None: ...


def _empty(path: Path) -> None:
    path.touch()


def _not_audio(path: Path) -> None:
    path.write_text("This is not audio at all.\n" * 40)


def _too_short(path: Path) -> None:
    soundfile.write(path, np.full(399, 0.1), 16000, format="WAV")


def _nan(path: Path) -> None:
    pcm = np.full(16000, 0.1)
    pcm[800] = np.nan
    soundfile.write(path, pcm, 16000, format="WAV", subtype="FLOAT")


def _no_samples(path: Path) -> None:
    soundfile.write(path, np.zeros(0), 16000, format="WAV")


BAD_AUDIO = {
    "missing": (_missing, "No such file"),
    "empty": (_empty, "empty"),
    "not audio": (_not_audio, "not readable as audio"),
    "too short": (_too_short, "399 samples"),
    "nan": (_nan, "sample 800"),
    "no samples": (_no_samples, "no samples"),
}


@pytest.mark.parametrize(("make", "message"), BAD_AUDIO.values(), ids=BAD_AUDIO.keys())
@pytest.mark.parametrize("option", ["--src-audio", "--ref-audio"])
def test_bad_audio(gpa_run: GpaRun, tmp_path: Path, no_model: Path, option: str, make, message: str) -> None:
    clip = tmp_path / "clip.wav"
    make(clip)
    task = ("stt",) if option == "--src-audio" else ("tts-a", "--text", "Hello.")
    refused(gpa_run("--task", *task, "--model", no_model, option, clip), f"{option}: ", "clip.wav", message)


def test_a_channel_that_is_not_there(gpa_run: GpaRun, audio_dir: Path, no_model: Path) -> None:
    stt = ("--task", "stt", "--model", no_model, "--src-audio", audio_dir / "stereo_44k1.wav", "--channel")
    refused(gpa_run(*stt, "2"), "stereo_44k1.wav", "2 channel(s)")
    refused(gpa_run(*stt, "left"), "--channel is 'left'; expected first, mean or a number")


@pytest.mark.parametrize("text", ["", "   ", "...!?", "，。！"])
def test_text_without_anything_to_say(gpa_run: GpaRun, audio_dir: Path, no_model: Path, tmp_path: Path, text: str):
    speak = ("--task", "tts-a", "--model", no_model, "--ref-audio", audio_dir / "en_male.ogg")
    refused(gpa_run(*speak, "--text", text), "--text", "nothing to speak")
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    refused(gpa_run(*speak, "--text-file", file), "text.txt", "nothing to speak")


def test_a_text_file_that_cannot_be_read(gpa_run: GpaRun, audio_dir: Path, no_model: Path, tmp_path: Path) -> None:
    speak = ("--task", "tts-a", "--model", no_model, "--ref-audio", audio_dir / "en_male.ogg", "--text-file")
    refused(gpa_run(*speak, tmp_path / "nowhere.txt"), "nowhere.txt", "No such file")
    refused(gpa_run(*speak, tmp_path), "--text-file", "Is a directory")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("schön".encode("latin-1"))
    refused(gpa_run(*speak, latin), "latin.txt", "not UTF-8", "byte 3")


def test_a_voice_file_that_is_not_one(gpa_run: GpaRun, no_model: Path, tmp_path: Path) -> None:
    speak = ("--task", "tts-a", "--model", no_model, "--text", "Hello.", "--voice")
    refused(gpa_run(*speak, tmp_path / "nobody.json"), "nobody.json", "--save-voice")
    other = tmp_path / "other.json"
    other.write_text("{}")
    refused(gpa_run(*speak, other), "other.json", "gpa-voice")


def test_an_output_that_cannot_be_written(gpa_run: GpaRun, audio_dir: Path, no_model: Path, tmp_path: Path) -> None:
    speak = ("--task", "tts-a", "--model", no_model, "--text", "Hello.", "--ref-audio", audio_dir / "en_male.ogg")
    refused(gpa_run(*speak, "-o", tmp_path / "no" / "folder.wav"), "--output", "no does not exist")
    refused(gpa_run(*speak, "-o", tmp_path), "--output", "is a folder")
    refused(gpa_run(*speak, "-o", "speech.mp3"), "--output: speech.mp3", "speech.wav")
    refused(gpa_run(*speak, "--save-voice", tmp_path / "no" / "voice.json"), "--save-voice", "does not exist")
    file = tmp_path / "file"
    file.touch()
    refused(gpa_run(*speak, "--output_dir", file / "results"), "file is not a folder")
    transcribe = ("--task", "stt", "--model", no_model, "--src-audio", audio_dir / "en_male.ogg")
    refused(gpa_run(*transcribe, "-o", tmp_path / "no" / "text.txt"), "--output", "does not exist")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission(gpa_run: GpaRun, audio_dir: Path, no_model: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    speak = ("--task", "tts-a", "--model", no_model, "--text", "Hello.", "--ref-audio", audio_dir / "en_male.ogg")
    refused(gpa_run(*speak, "-o", locked / "speech.wav"), "--output", "permission")


def transcribe(gpa_run: GpaRun, audio_dir: Path, model: Path, *more: str | Path) -> Outcome:
    return gpa_run("--task", "stt", "--model", model, "--src-audio", audio_dir / "en_male_16k.wav", *more)


def test_a_model_folder_that_is_not_there(gpa_run: GpaRun, audio_dir: Path, tmp_path: Path, no_model: Path) -> None:
    refused(transcribe(gpa_run, audio_dir, tmp_path / "nowhere"), "nowhere")
    refused(transcribe(gpa_run, audio_dir, no_model), "empty is empty", "AutoArk-AI/GPA")


def test_a_missing_file_of_the_checkpoint(gpa_run: GpaRun, audio_dir: Path, tiny_checkpoint_copy: Path) -> None:
    (tiny_checkpoint_copy / "BiCodec" / "config.yaml").unlink()
    refused(transcribe(gpa_run, audio_dir, tiny_checkpoint_copy), "BiCodec", "config.yaml")


def test_a_bicodec_of_another_size(gpa_run: GpaRun, audio_dir: Path, tiny_checkpoint_copy: Path) -> None:
    config = tiny_checkpoint_copy / "BiCodec" / "config.yaml"
    text = config.read_text()
    assert "codebook_size: 320" in text
    config.write_text(text.replace("codebook_size: 320", "codebook_size: 160"))
    refused(transcribe(gpa_run, audio_dir, tiny_checkpoint_copy), "BiCodec", "codebook", "(160, 8)")


def test_a_tokenizer_without_a_family(gpa_run: GpaRun, audio_dir: Path, tiny_checkpoint_copy: Path) -> None:
    file = tiny_checkpoint_copy / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("bicodec_semantic_", "bicodec_other_"), encoding="utf-8")
    refused(transcribe(gpa_run, audio_dir, tiny_checkpoint_copy), "tokenizer.json", "bicodec_semantic_")


@pytest.mark.parametrize("part", ["model.safetensors", "BiCodec/model.safetensors"])
def test_truncated_weights(gpa_run: GpaRun, audio_dir: Path, tiny_checkpoint_copy: Path, part: str) -> None:
    weights = tiny_checkpoint_copy / part
    os.chmod(weights, 0o600)
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(transcribe(gpa_run, audio_dir, tiny_checkpoint_copy), part)


@pytest.mark.parametrize(("option", "value"), [("--device", "tpu"), ("--device", "cuda:99"), ("--dtype", "float8")])
def test_a_device_or_dtype_that_is_not_there(
    gpa_run: GpaRun, audio_dir: Path, tiny_checkpoint: Path, option: str, value: str
) -> None:
    refused(transcribe(gpa_run, audio_dir, tiny_checkpoint, option, value), value)


def test_a_backend_whose_package_is_missing(
    gpa_run: GpaRun, audio_dir: Path, no_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpa_engines.registry.find_spec", lambda name: None)
    refused(transcribe(gpa_run, audio_dir, no_model), "backend 'torch' needs torch: pip install 'gpa-engines[torch]'")


def test_verbose_shows_the_traceback(gpa_run: GpaRun, audio_dir: Path, tmp_path: Path) -> None:
    outcome = transcribe(gpa_run, audio_dir, tmp_path / "nowhere", "-v")
    assert outcome.status == 2
    assert "Traceback" in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("error: ")
