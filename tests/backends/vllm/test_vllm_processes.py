"""The processes around vLLM: tied to this one, quiet, and their last words kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpa_engines.backends.vllm import launch
from gpa_engines.backends.vllm.processes import LEVEL, Workspace, environment, explain, process_environment
from tests.backends.vllm.test_vllm_settings import settings

PRINTED = """\
(EngineCore pid=29860) ERROR 11-27 08:22:54 [multiproc_executor.py:968] WorkerProc failed to start.
(EngineCore pid=29860) ERROR 11-27 08:22:54 [multiproc_executor.py:968] Traceback (most recent call last):
(EngineCore pid=29860) ERROR 11-27 08:22:54 [multiproc_executor.py:968]   File "x.py", line 943, in worker_main
(EngineCore pid=29860) ERROR 11-27 08:22:54 [multiproc_executor.py:968] torch.OutOfMemoryError: CUDA out of memory.
ERROR 11-27 08:22:55 [core.py:1101] Exception: WorkerProc initialization failed due to an exception
Process EngineCore:
RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LEVEL, raising=False)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_innermost_cause_is_told() -> None:
    assert explain(PRINTED) == "torch.OutOfMemoryError: CUDA out of memory."


def test_what_outer_processes_say_is_better_than_nothing() -> None:
    assert explain("RuntimeError: Engine core initialization failed. x\n") == (
        "RuntimeError: Engine core initialization failed. x"
    )
    assert explain("Loading safetensors: 100%\nall is well\n") == ""


def test_a_native_death_is_told() -> None:
    assert explain("terminate called after throwing an instance of 'std::bad_alloc'\n").startswith("terminate called")


def test_only_the_last_errors_are_told_each_once() -> None:
    lines = [f"ValueError: number {number}" for number in range(9)] + ["ValueError: number 8"]
    assert explain("\n".join(lines)) == "ValueError: number 6 | ValueError: number 7 | ValueError: number 8"


def test_variables_are_set_meanwhile_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_TEST_SET", "before")
    monkeypatch.setenv("GPA_TEST_GONE", "before")
    monkeypatch.delenv("GPA_TEST_NEW", raising=False)
    with environment({"GPA_TEST_SET": "now", "GPA_TEST_GONE": None, "GPA_TEST_NEW": "now"}):
        assert (os.environ["GPA_TEST_SET"], os.environ["GPA_TEST_NEW"]) == ("now", "now")
        assert "GPA_TEST_GONE" not in os.environ
    assert (os.environ["GPA_TEST_SET"], os.environ["GPA_TEST_GONE"]) == ("before", "before")
    assert "GPA_TEST_NEW" not in os.environ


def test_vllms_second_runner_is_off_and_nothing_is_fetched(quiet: None) -> None:
    for device in ("cpu", "cuda"):
        values = process_environment(settings(), device, sized=True)
        assert (values["VLLM_USE_V2_MODEL_RUNNER"], values["HF_HUB_OFFLINE"]) == ("0", "1")
        assert (values[LEVEL], values["VLLM_WORKER_MULTIPROC_METHOD"]) == ("ERROR", "spawn")
    assert "OMP_NUM_THREADS" not in process_environment(settings(), "cuda", sized=False)


def test_threads_and_cache_on_a_cpu_are_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    given = process_environment(settings(threads=3), "cpu", sized=True)
    assert (given["OMP_NUM_THREADS"], given["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "nobind")
    assert given["VLLM_CPU_KVCACHE_SPACE"] is None
    own = process_environment(settings(), "cpu", sized=False)
    assert own["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
    assert "VLLM_CPU_KVCACHE_SPACE" not in own
    assert given["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in process_environment(settings(enforce_eager=False), "cpu", sized=True)


def test_the_users_level_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL, "DEBUG")
    assert process_environment(settings(), "cuda", sized=False)[LEVEL] == "DEBUG"
    assert Workspace().explanation() == "the cause is in what vLLM printed above"


def test_what_a_process_prints_is_kept_and_standard_output_stays_clean(
    quiet: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through Python's own multiprocessing, as vLLM starts its processes."""
    workspace = Workspace()
    with workspace.launching():
        process = multiprocessing.get_context("spawn").Process(target=print, args=("hello",))
        process.start()
        failing = multiprocessing.get_context("spawn").Process(target=int, args=("seven",))
        failing.start()
    for each in (process, failing):
        each.join(60)
    assert (process.exitcode, failing.exitcode) == (0, 1)
    assert workspace.explanation() == "ValueError: invalid literal for int() with base 10: 'seven'"
    assert capfd.readouterr() == ("", "")
    workspace.close()
    workspace.close()


def test_a_workspace_says_so_where_nothing_was_printed(quiet: None) -> None:
    workspace = Workspace()
    assert workspace.explanation() == "its processes printed nothing"
    assert (workspace.generation_config / "generation_config.json").read_text(encoding="utf-8") == "{}"
    workspace.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a process to its parent")
def test_a_launched_process_dies_with_its_parent(tmp_path: Path) -> None:
    sleep = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    command = [sys.executable, "-I", "-S", launch.__file__, "-", sys.executable, "-c", sleep]
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"])
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        pid = int((tmp_path / "pid").read_text())
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until(lambda: not is_alive(pid))
    finally:
        parent.kill()
        parent.wait()
