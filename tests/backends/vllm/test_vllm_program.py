"""Programs that use the vLLM engine: the command line, processes that are killed, and starts that fail."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_engines.registry import create_engine
from tests.backends.vllm.asking import PROMPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("vllm_installed")]

ROOT = Path(__file__).parents[3]

TASKS = {
    "stt": ("--task", "stt", "--src-audio", "en_male_16k.wav", "--max-new-tokens", "24"),
    "tts-a": (
        *("--task", "tts-a", "--ref-audio", "en_female.flac", "--text", "Hello there."),
        *("--temperature", "0", "--max-new-tokens", "60"),
    ),
    "vc": (
        *("--task", "vc", "--src-audio", "en_male_16k.wav", "--ref-audio", "zh_female_16k.wav"),
        *("--seed", "3", "--max-new-tokens", "60"),
    ),
}
"""Greedy, but for the last, which samples as speech does, with a penalty and a seed."""


def environment() -> dict[str, str]:
    paths = [str(path) for path in (ROOT, ROOT / "codecs", ROOT / "conformance")]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def console_script(tmp_path: Path) -> Path:
    """As pip writes it for an entry point: a program without the ending .py."""
    script = tmp_path / "gpa-run"
    script.write_text(
        f"#!{sys.executable}\nimport re\nimport sys\nfrom gpa_engines.cli.run import main\n"
        "if __name__ == '__main__':\n"
        "    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])\n"
        "    sys.exit(main())\n"
    )
    script.chmod(0o700)
    return script


@pytest.mark.parametrize("task", TASKS)
def test_a_task_through_gpa_run_is_token_equal_to_torch(
    task: str, tiny_checkpoint: Path, audio_dir: Path, console_script: Path, tmp_path: Path
) -> None:
    arguments = [str(audio_dir / each) if (audio_dir / each).is_file() else each for each in TASKS[task]]
    program = [str(console_script)] if task != "vc" else [sys.executable, "-m", "gpa_engines.cli"]
    found = {}
    for backend in ("torch", "vllm"):
        output = tmp_path / f"{backend}.out"
        options = ("--model", str(tiny_checkpoint), "--backend", backend, "--dtype", "float32", "-o", str(output))
        done = subprocess.run(
            [*program, *arguments, *options, "--json"], capture_output=True, env=environment(), check=False, text=True
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)  # nothing else may be on standard output
        assert [line for line in done.stderr.splitlines() if not line.startswith("warning: ")] == []
        assert (told["backend"], told["dtype"]) == (backend, "float32")
        found[backend] = (output.read_bytes(), told["new_tokens"], [each["new_tokens"] for each in told["pieces"]])
    assert found["vllm"] == found["torch"]
    assert found["vllm"][1] > 5


@contextmanager
def serving(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The program of serving.py when its requests run, and what it has said."""
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.backends.vllm.serving", str(checkpoint)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    told: dict[str, Any] = {}
    try:
        assert program.stdout is not None
        while "running" not in told:
            line = program.stdout.readline()
            assert line, program.stderr and program.stderr.read()
            told |= json.loads(line)
        yield program, told
    finally:
        program.kill()
        program.communicate()


def alive(pids: list[int]) -> list[int]:
    import psutil

    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while left := alive(pids):
        assert time.monotonic() < deadline, f"processes {left} are still there"
        time.sleep(0.1)


@pytest.mark.parametrize("victim", ["VLLM::Worker", "VLLM::EngineCore"])
def test_a_killed_process_of_vllm_ends_every_request_with_words(victim: str, tiny_checkpoint: Path) -> None:
    with serving(tiny_checkpoint) as (program, told):
        (pid,) = [int(pid) for pid, command in told["processes"].items() if command.startswith(victim)]
        os.kill(pid, signal.SIGKILL)
        out, error = program.communicate(timeout=120)
        for line in out.splitlines():
            told |= json.loads(line)
        assert program.returncode == 0, error
        assert error == ""
        assert len(told["outcomes"]) == 4
        for outcome in (*told["outcomes"], told["next"]):
            assert outcome.startswith("RequestError: vLLM's processes ended, and every request with them")
            assert outcome.endswith("create a new engine")
        wait_until_gone([int(pid) for pid in told["processes"]])


def test_a_killed_program_leaves_no_process_behind(tiny_checkpoint: Path) -> None:
    with serving(tiny_checkpoint) as (program, told):
        pids = [int(pid) for pid in told["processes"]]
        assert len(alive(pids)) >= 2
        program.kill()
        program.wait()
        wait_until_gone(pids)


def test_closing_ends_the_requests_and_the_processes(tiny_checkpoint: Path) -> None:
    import psutil

    from gpa_codecs.errors import RequestError
    from gpa_engines.engine import GenerationRequest, SamplingParams

    before = {each.pid for each in psutil.Process().children(recursive=True)}
    engine = create_engine("vllm", tiny_checkpoint, dtype="float32", max_context=4096, max_num_seqs=4)
    started = [each.pid for each in psutil.Process().children(recursive=True) if each.pid not in before]
    request = GenerationRequest(PROMPT, SamplingParams(max_new_tokens=4000))

    async def close_meanwhile() -> None:
        streams = [engine.generate(request) for _ in range(6)]
        firsts = [await anext(stream) for stream in streams[:4]]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0.1)
        await asyncio.gather(*(engine.close() for _ in range(3)))
        for stream, first in zip(streams, [*waiting], strict=True):
            deltas = [await first, *[delta async for delta in stream]]
            assert deltas[-1].finish_reason == "cancelled"
            assert deltas[-1].usage is not None
        assert all(first.ids for first in firsts)
        for call in (anext(engine.generate(request)), engine.logits((1,))):
            with pytest.raises(RequestError, match="the engine is closed"):
                await call
        await engine.close()

    asyncio.run(close_meanwhile())
    # The tracker of shared memory serves the whole program.
    wait_until_gone([pid for pid in started if "resource_tracker" not in _command(pid)])


def _command(pid: int) -> str:
    import psutil

    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""


def test_no_room_for_the_cache_is_told_with_what_to_do(tiny_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match=r"vLLM does not start: ValueError: .*memory.* give it less .* kv_cache_gib"):
        create_engine("vllm", tiny_checkpoint, dtype="float32", max_context=512, kv_cache_gib=0.0001)


def test_what_can_be_known_before_is_told_before(tiny_checkpoint: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    for options, message in (
        ({"block_sise": "32"}, "did you mean block_size"),
        ({"block_size": "many"}, "block_size is 'many'; vLLM expects a whole number or null"),
        ({"tensor_parallel_size": 2}, "set by the option tensor_parallel"),
        ({"trust_remote_code": True}, "no code of a checkpoint is ever run"),
        ({"max_context": 99999}, "the checkpoint has 32768 positions"),
        ({"dtype": "int4"}, "dtype 'int4' is unknown"),
    ):
        with pytest.raises(BackendError, match=message):
            create_engine("vllm", tiny_checkpoint, **options)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        create_engine("vllm", tmp_path)
    assert time.monotonic() - started < 120


def test_a_program_without_a_main_guard_is_told_of_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    program = tmp_path / "careless.py"
    program.write_text(
        "from gpa_engines.registry import create_engine\n"
        f"create_engine('vllm', {str(tiny_checkpoint)!r}, dtype='float32', max_context=512)\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, env=environment(), check=False, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("gpa_codecs.errors.BackendError: vLLM does not start: the program starts an engine while")
    assert 'if __name__ == "__main__":' in last
