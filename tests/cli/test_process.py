"""What only a process shows: separate streams, pipes that close, Ctrl-C, and how long the start takes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from tests.cli.conftest import command, run_process

LONG_TEXT = " ".join(f"This is sentence number {number} of a text that takes its time." for number in range(200))


@pytest.fixture
def tts(tiny_checkpoint: Path, audio_dir: Path) -> tuple[str | Path, ...]:
    reference = audio_dir / "en_female.flac"
    return "--task", "tts-a", "--model", tiny_checkpoint, "--ref-audio", reference, "--threads", "1"


def endless(tts: tuple[str | Path, ...]) -> tuple[str | Path, ...]:
    """A command that speaks for minutes."""
    return (*tts, "--text-file", "long.txt", "--max-new-tokens", "400", "--min-new-tokens", "400")


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def interrupt(process: subprocess.Popen[bytes]) -> tuple[bytes, str]:
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    return out, error.decode()


def wait_for_line(process: subprocess.Popen[bytes], word: bytes) -> None:
    assert process.stderr is not None
    lines = []
    while line := process.stderr.readline():
        if word in line:
            return
        lines.append(line)
    raise AssertionError(f"the process ended after {lines}")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_results_and_messages_go_different_ways(tts) -> None:
    outcome = run_process(*tts, "-", "-o", "-", "--max-new-tokens", "20", "-v", stdin=b"Hello.")
    assert outcome.status == 0, outcome.stderr
    pcm, rate = soundfile.read(io.BytesIO(outcome.stdout))
    assert rate == 16000
    assert len(pcm) % 320 == 0
    assert "loading the model" in outcome.stderr


def test_an_error_is_one_line_and_status_2(tts) -> None:
    outcome = run_process(*tts, "--text", "...")
    assert (outcome.status, outcome.stdout) == (2, b"")
    assert outcome.stderr == (
        "error: --text: the text '...' has nothing to speak; expected at least one letter or digit\n"
    )


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["whole", "stream"])
def test_ctrl_c_leaves_no_file(tts, stream: tuple[str, ...]) -> None:
    Path("long.txt").write_text(LONG_TEXT)
    with start(*endless(tts), "-o", "speech.wav", "-v", *stream) as process:
        wait_for_line(process, b"speaking")
        if stream:
            wait_for(lambda: list(Path.cwd().glob(".speech.wav.*")))
        started = time.monotonic()
        out, error = interrupt(process)
    assert process.returncode == 130
    assert time.monotonic() - started < 10
    assert out == b""
    assert error.splitlines()[-1] == "interrupted"
    assert "Traceback" not in error
    assert [path.name for path in Path.cwd().iterdir()] == ["long.txt"]


def test_ctrl_c_while_the_model_is_loading(tts) -> None:
    with start(*tts, "--text", "Hello.", "-v") as process:
        wait_for_line(process, b"loading")
        _, error = interrupt(process)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted"
    assert list(Path.cwd().iterdir()) == []


def test_a_reader_that_goes_away_ends_the_run_quietly(tts) -> None:
    Path("long.txt").write_text(LONG_TEXT)
    with start(*endless(tts), "-o", "-", "--stream") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(44)[:4] == b"RIFF"
        process.stdout.close()
        error = process.stderr.read().decode()
        process.wait(timeout=60)
    assert process.returncode == 141
    assert [line for line in error.splitlines() if not line.startswith("note: ")] == []


def test_a_full_disk_is_an_error_and_leaves_nothing(tts) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    for stream in ((), ("--stream",)):
        outcome = run_process(*tts, "--text", "Hello.", "--max-new-tokens", "20", "-o", "/dev/full", *stream)
        assert outcome.status == 2
        assert outcome.stderr.splitlines()[-1] == "error: /dev/full: cannot be written: No space left on device"
        with open("/dev/full", "wb") as full:
            arguments = command(*tts, "--text", "Hello.", "--max-new-tokens", "20", "-o", "-", *stream)
            done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == "error: standard output: cannot be written: No space left on device\n"


def test_a_defect_is_status_1_and_has_a_traceback_only_on_request(tts) -> None:
    script = "import sys, gpa_engines.cli.execute as e; e.resolve_model = lambda name, progress: 1 / 0; "
    script += "from gpa_engines.cli.run import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", script, *map(str, tts), "--text", "Hello."]
    short = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert short.returncode == 1
    assert short.stderr == ("error: unexpected ZeroDivisionError: division by zero (run with -v for the traceback)\n")
    long = subprocess.run([*arguments, "-v"], capture_output=True, text=True, check=False)
    assert long.returncode == 1
    assert "Traceback" in long.stderr


def test_a_text_that_the_terminal_cannot_encode_is_escaped(tiny_checkpoint: Path, audio_dir: Path) -> None:
    stt = ("--task", "stt", "--model", tiny_checkpoint, "--src-audio", audio_dir / "en_male_16k.wav")
    outcome = run_process(*stt, "--max-new-tokens", "60", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.isascii()


def test_help_is_quick_and_loads_no_model_code() -> None:
    script = "import sys; from gpa_engines.cli.run import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules = done.stdout.splitlines()[-1]
    for heavy in ("'torch'", "'numpy'", "'tokenizers'", "'soundfile'", "'gpa_engines.speech'"):
        assert heavy not in modules


def test_checking_a_command_line_needs_no_torch(tts) -> None:
    script = "import sys; from gpa_engines.cli.run import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, tts), "--text", "..."],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert done.stdout == "False\n"
