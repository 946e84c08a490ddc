"""Command lines that cannot mean anything are refused before any file is read."""

from __future__ import annotations

import pytest

from gpa_engines.cli.options import expand_dash
from tests.cli.conftest import GpaRun

STT = ("--task", "stt", "--model", "m", "--src-audio", "a.wav")
TTS = ("--task", "tts-a", "--model", "m", "--text", "Hello", "--ref-audio", "r.wav")
VC = ("--task", "vc", "--model", "m", "--src-audio", "a.wav", "--ref-audio", "r.wav")

REFUSED = {
    "unknown task": (("--task", "asr"), "unknown task 'asr'; expected stt"),
    "no task": (("--model", "m"), "--task is missing; expected stt"),
    "empty model": ((*STT[:2], "--model", "", *STT[4:]), "--model is empty; expected"),
    "stt without audio": (STT[:4], "--task stt needs --src-audio"),
    "stt with text": ((*STT, "--text", "x"), "--text means nothing with --task stt"),
    "stt with ref audio": ((*STT, "--ref-audio", "r.wav"), "--ref-audio means nothing with --task stt"),
    "stt keeps no voice": ((*STT, "--save-voice", "v"), "--save-voice means nothing with --task stt"),
    "tts without text": ((*TTS[:4], *TTS[6:]), "needs a text"),
    "tts with two texts": ((*TTS, "--text-file", "t.txt"), "both --text and --text-file"),
    "tts without voice": (TTS[:6], "--task tts-a needs a voice: --ref-audio CLIP or --voice FILE"),
    "tts with two voices": ((*TTS, "--voice", "v.json"), "both --ref-audio and --voice were given"),
    "tts with a source": ((*TTS, "--src-audio", "a.wav"), "--src-audio means nothing with --task tts-a"),
    "vc without source": ((*VC[:4], *VC[6:]), "--task vc needs --src-audio"),
    "vc without voice": (VC[:6], "--task vc needs a voice"),
    "vc with text": ((*VC, "--text", "x"), "--text means nothing with --task vc"),
    "two outputs": ((*TTS, "--output", "o.wav", "--output_dir", "d"), "both --output and --output-dir"),
    "json and audio on stdout": ((*TTS, "--json", "--output", "-"), "both --json and --output -"),
    "voice and audio in one file": ((*TTS, "-o", "x", "--save-voice", "x"), "name the same file"),
    "stdin twice": (("--task", "vc", "--model", "m", "--src-audio", "-", "--ref-audio", "-"), "standard input"),
    "voice of nothing": (("--save-voice", "v.json", "--model", "m"), "--save-voice keeps the voice of a clip"),
    "voice kept from a voice": ((*TTS[:6], "--voice", "v", "--save-voice", "w"), "give --ref-audio CLIP"),
    "keeping a voice has no seed": (("--save-voice", "v", "--ref-audio", "r", "--seed", "1"), "--seed needs --task"),
    "reference transcript": ((*TTS, "--ref_transcript", "x"), "--ref_transcript is not supported"),
    "automatic transcript": ((*TTS, "--auto_ref_transcript"), "--auto_ref_transcript is not supported"),
    "unknown backend": ((*STT, "--backend", "tpu"), "unknown backend 'tpu'; known backends: torch"),
    "missing backend": ((*STT, "--backend", "ascend"), "backend 'ascend' needs torch_npu: pip install"),
    "temperature": ((*TTS, "--temperature", "-1"), "temperature is -1.0; expected"),
    "top_p": ((*TTS, "--top-p", "0"), "top_p is 0.0; expected"),
    "min_p": ((*TTS, "--min-p", "1"), "min_p is 1.0; expected"),
    "top_k": ((*TTS, "--top-k", "-1"), "top_k is -1; expected"),
    "repetition penalty": ((*TTS, "--repetition-penalty", "0"), "repetition_penalty is 0.0; expected"),
    "not a number": ((*TTS, "--temperature", "nan"), "temperature is nan; expected"),
    "not an integer": ((*TTS, "--top-k", "many"), "'--top-k'"),
    "max new tokens": ((*TTS, "--max-new-tokens", "0"), "max_new_tokens is 0; expected"),
    "min new tokens": ((*TTS, "--min-new-tokens", "600"), "min_new_tokens is 600; expected"),
    "seed": ((*TTS, "--seed", "-5"), "seed is -5; expected"),
    "threads": ((*TTS, "--threads", "0"), "--threads is 0; expected at least 1"),
    "cache": ((*TTS, "--max-tokens-in-flight", "0"), "--max-tokens-in-flight is 0; expected at least 1"),
    "missing component": ((*TTS, "--bicodec", "nowhere"), "--bicodec: nowhere: there is no such file or folder"),
    "unknown option": ((*TTS, "--loud"), "No such option: --loud"),
    "option without value": ((*TTS, "--seed"), "--seed"),
    "unknown command": (("docter",), "No such command 'docter'"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(gpa_run: GpaRun, arguments: tuple[str, ...], message: str) -> None:
    outcome = gpa_run(*arguments)
    assert outcome.status == 2
    assert outcome.stdout == b""
    assert outcome.stderr.startswith("error: ")
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1, "one message, on one line"


def test_the_three_kinds_of_model_are_named(gpa_run: GpaRun) -> None:
    stderr = gpa_run(*STT[:2], "--model", "", *STT[4:]).stderr
    assert "checkpoint folder" in stderr
    assert "AutoArk-AI/GPA" in stderr
    assert "demo (spoken digits" in stderr


def test_a_bare_dash_reads_the_text_from_standard_input() -> None:
    valued = {"--output", "-o", "--text"}
    assert expand_dash(["--task", "tts-a", "-"], valued) == ["--task", "tts-a", "--text-file", "-"]
    assert expand_dash(["-", "--stream"], valued) == ["--text-file", "-", "--stream"]


def test_a_dash_after_an_option_is_its_value() -> None:
    valued = {"--output", "-o", "--src-audio"}
    for option in ("--output", "-o", "--src_audio_path"):
        assert expand_dash([option, "-"], valued) == [option, "-"]


def test_no_arguments_print_the_help(gpa_run: GpaRun) -> None:
    outcome = gpa_run()
    assert outcome.status == 0
    assert "Usage: gpa-run" in outcome.text


def test_help_shows_the_options_and_hides_the_reference_names(gpa_run: GpaRun) -> None:
    text = gpa_run("--help").text
    for option in ("--task", "--src-audio", "--save-voice", "--temperature", "--json", "--list-backends", "doctor"):
        assert option in text
    for hidden in ("src_audio_path", "output-dir", "ref-transcript"):
        assert hidden not in text


def test_version(gpa_run: GpaRun) -> None:
    import gpa_engines

    assert gpa_run("--version").text == f"gpa-engines {gpa_engines.__version__}\n"
