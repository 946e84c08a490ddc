"""The reports that programs read: their layout is a promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gpa_engines
from gpa_codecs.codec import Voice
from tests.cli.conftest import GpaRun

SHORT = ("--max-new-tokens", "20", "--min-new-tokens", "20", "--seed", "7", "--json")

COMMON = {
    "schema": str,
    "task": str,
    "model": str,
    "model_dir": str,
    "random_weights": bool,
    "backend": str,
    "backend_choice": str,
    "codec": str,
    "device": str,
    "dtype": str,
    "output": (str, type(None)),
    "duration": float,
    "prompt_tokens": int,
    "new_tokens": int,
    "seed": int,
    "sampling": dict,
    "pieces": list,
    "timings": dict,
    "rtf": float,
    "warnings": list,
    "versions": dict,
}
SPEECH = COMMON | {"sample_rate": int, "voice": dict, "saved_voice": (str, type(None))}
TRANSCRIPTION = COMMON | {"text": str}


def matches(document: dict[str, Any], layout: dict[str, Any]) -> None:
    assert set(document) == set(layout)
    for key, kind in layout.items():
        assert isinstance(document[key], kind), key
    assert document["schema"] == "gpa-run/1"
    assert set(document["timings"]) == {"load", "encode", "prefill", "first_token", "decode", "codec", "total"}
    assert all(seconds >= 0 for seconds in document["timings"].values())
    assert document["rtf"] == pytest.approx(document["timings"]["total"] / document["duration"])
    assert document["versions"]["gpa-engines"] == gpa_engines.__version__
    assert {"python", "numpy", "torch"} <= set(document["versions"])
    for piece in document["pieces"]:
        usage = {"prompt_tokens", "new_tokens", "seed", "queue", "prefill", "decode"}
        assert set(piece) == {"source", "finish_reason"} | usage


@pytest.fixture
def stt(tiny_checkpoint: Path, audio_dir: Path) -> tuple[str | Path, ...]:
    return "--task", "stt", "--model", tiny_checkpoint, "--src-audio", audio_dir / "en_male_16k.wav", *SHORT


@pytest.fixture
def tts(tiny_checkpoint: Path, audio_dir: Path) -> tuple[str | Path, ...]:
    reference = audio_dir / "en_female.flac"
    return "--task", "tts-a", "--model", tiny_checkpoint, "--ref-audio", reference, "--text", "Hello world.", *SHORT


def test_a_transcription(gpa_run: GpaRun, stt) -> None:
    outcome = gpa_run(*stt, "-o", "text.txt")
    document = json.loads(outcome.stdout)
    matches(document, TRANSCRIPTION)
    assert document["text"] + "\n" == Path("text.txt").read_text(encoding="utf-8")
    assert (document["task"], document["backend"], document["device"]) == ("stt", "torch", "cpu")
    assert (document["duration"], document["new_tokens"], document["seed"]) == (1.9928125, 20, 7)
    assert document["pieces"][0]["finish_reason"] == "length"
    assert document["warnings"] == [line.removeprefix("warning: ") for line in outcome.stderr.splitlines()]


def test_speech(gpa_run: GpaRun, tts) -> None:
    document = json.loads(gpa_run(*tts, "-o", "speech.wav", "--save-voice", "voice.json").stdout)
    matches(document, SPEECH)
    assert (document["output"], document["saved_voice"]) == ("speech.wav", "voice.json")
    assert (document["sample_rate"], document["duration"]) == (16000, 0.4)
    assert document["voice"]["global_codes"] == list(Voice.load("voice.json").codes)
    assert document["voice"]["origin"] == "en_female.flac"
    assert document["sampling"] == {
        "temperature": 0.2,
        "top_k": 50,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.2,
        "max_new_tokens": 20,
        "min_new_tokens": 20,
    }


def test_the_reported_seed_repeats_the_run(gpa_run: GpaRun, tts) -> None:
    at = tts.index("--seed")
    fresh = (*tts[:at], *tts[at + 2 :], "--temperature", "1")
    document = json.loads(gpa_run(*fresh, "-o", "first.wav").stdout)
    gpa_run(*fresh, "--seed", str(document["seed"]), "-o", "again.wav")
    assert Path("first.wav").read_bytes() == Path("again.wav").read_bytes()


def events(stdout: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a stream and its result."""
    *parts, result = [json.loads(line) for line in stdout.splitlines()]
    assert result.pop("event") == "result"
    return parts, result


def test_a_streamed_transcription(gpa_run: GpaRun, stt) -> None:
    deltas, result = events(gpa_run(*stt, "--stream").stdout)
    matches(result, TRANSCRIPTION)
    assert all(set(delta) == {"event", "piece", "text"} and delta["event"] == "text" for delta in deltas)
    assert "".join(delta["text"] for delta in deltas) == result["text"]


def test_streamed_speech(gpa_run: GpaRun, tts) -> None:
    sentence = "Here is a sentence that is long enough to fill a piece of its own, for it takes five seconds."
    outcome = gpa_run(*tts, "--text", f"{sentence} {sentence}", "--max-new-tokens", "100", "--stream")
    pieces, result = events(outcome.stdout)
    matches(result, SPEECH)
    assert len(pieces) == len(result["pieces"]) > 1
    end = 0.0
    for index, piece in enumerate(pieces):
        assert set(piece) == {"event", "piece", "source", "start", "duration", "new_tokens"}
        assert (piece["event"], piece["piece"], piece["source"]) == ("audio", index, result["pieces"][index]["source"])
        assert piece["start"] == pytest.approx(end)
        end += piece["duration"]
    assert end == pytest.approx(result["duration"])


def test_keeping_a_voice(gpa_run: GpaRun, tiny_checkpoint: Path, audio_dir: Path) -> None:
    keep = ("--ref-audio", audio_dir / "en_male.ogg", "--save-voice", "voice.json", "--model", tiny_checkpoint)
    document = json.loads(gpa_run(*keep, "--json").stdout)
    assert set(document) == {"schema", "task", "model", "model_dir", "voice", "saved_voice", "warnings", "versions"}
    assert (document["task"], document["saved_voice"]) == (None, "voice.json")
    assert document["voice"]["global_codes"] == list(Voice.load("voice.json").codes)


def test_backends(gpa_run: GpaRun) -> None:
    document = json.loads(gpa_run("--list-backends", "--json").stdout)
    assert document["schema"] == "gpa-backends/1"
    by_name = {entry["name"]: entry for entry in document["backends"]}
    assert by_name["torch"]["state"] == "ready"
    assert all(set(entry) == {"name", "state", "runs_on", "detail", "install"} for entry in by_name.values())


def test_backends_for_people(gpa_run: GpaRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ready" in gpa_run("--list-backends").text
    monkeypatch.setattr("gpa_engines.registry.find_spec", lambda name: None)
    lines = gpa_run("--list-backends").text.splitlines()
    torch = next(line for line in lines if line.startswith("torch"))
    assert "missing" in torch
    assert "pip install 'gpa-engines[torch]'" in torch
