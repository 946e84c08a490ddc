"""`gpa-bench memory`: stages, figures and what stands behind them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpa_conformance.bench import cli
from gpa_conformance.bench.resident import ResidentMemory
from tests.conformance.bench_tasks import COMMON, MEMORY, GpaBench, Run, bench_in, bench_process, check_common

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> GpaBench:
    return bench_in(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def memory(tiny_checkpoint: Path) -> tuple[str | Path, ...]:
    small = ("--prefill", "64", "--prefill", "8", "--prefill", "64", "--max-new-tokens", "6", "--threads", "1")
    return "memory", "--model", tiny_checkpoint, *small


@pytest.fixture(scope="module")
def run(memory, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole run, as a process of its own."""
    return bench_process(tmp_path_factory.mktemp("memory"), *memory)


def test_every_stage_is_measured_in_order(run: Run, tiny_checkpoint: Path) -> None:
    assert run.status == 0, run.err
    assert run.files == ["results_memory.json"]
    document = run.document("results_memory.json")
    check_common(document, "gpa-bench-memory/1", tiny_checkpoint)
    assert set(document) - COMMON == {"stages"}
    stages = [(stage["stage"], stage["prompt_tokens"], stage["new_tokens"]) for stage in document["stages"]]
    assert stages == [("load", 0, 0), ("prefill", 8, 1), ("prefill", 64, 1), ("decode", 64, 6)]
    for stage in document["stages"]:
        assert set(stage) == {"stage", "prompt_tokens", "new_tokens", "seconds", "memory", "peak_since"}
        assert set(stage["memory"]) == MEMORY
        assert stage["seconds"] > 0
        assert stage["memory"]["host_peak_resident"] > 0
    for shown in ("load", "prefill, 8 + 1 tokens", "prefill, 64 + 1 tokens", "decode, 64 + 6 tokens"):
        assert shown in run.out


@LINUX
def test_peaks_are_of_their_stage_where_they_can_be_set_back(run: Run) -> None:
    stages = run.document("results_memory.json")["stages"]
    assert stages[0]["peak_since"] == "start"
    can = ResidentMemory().reset_peak()
    assert {stage["peak_since"] for stage in stages[1:]} == {"stage" if can else "start"}


@LINUX
def test_the_private_part_of_a_process_grows_with_what_it_holds() -> None:
    meter = ResidentMemory()
    before = meter.read()
    ballast = bytearray(os.urandom(1024)) * (64 * 1024)
    after = meter.read()
    assert before.allocated is not None
    assert after.allocated is not None
    assert after.reserved is not None
    assert after.allocated - before.allocated >= 0.9 * len(ballast)
    assert after.allocated < after.reserved
    assert after.peak_allocated is None


@LINUX
def test_a_peak_can_be_set_back() -> None:
    meter = ResidentMemory()
    if not meter.reset_peak():
        pytest.skip("this system does not let a process set its peak back")
    ballast = bytearray(os.urandom(1024)) * (64 * 1024)
    high = meter.read().peak_reserved
    size = len(ballast)
    del ballast
    assert meter.reset_peak()
    low = meter.read().peak_reserved
    assert high is not None
    assert low is not None
    assert high - low >= 0.9 * size


def test_a_system_that_tells_nothing_gives_no_figures(tmp_path: Path) -> None:
    meter = ResidentMemory(tmp_path / "nothing")
    assert meter.reset_peak() is False
    use = meter.read()
    assert (use.allocated, use.reserved) == (None, None)
    assert use.peak_reserved is not None


def test_an_engine_that_does_not_load_is_reported(bench: GpaBench, memory) -> None:
    run = bench(*memory, "--dtype", "float31")
    document = run.document("results_memory.json")
    assert run.status == cli.FAILED
    assert "error: memory: torch/float31: " in run.err
    assert "float31" in document["failed"]
    assert document["stages"] == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prefill", "0"], "prefill is 0; expected at least 1"),
        (["--prefill", "40000"], "the model has 32768"),
        (["--max-new-tokens", "0"], "max-new-tokens is 0"),
        (["--backend", "ascend"], "backend 'ascend' needs torch_npu: pip install"),
        (["--output", "no/such/folder/result.json"], "--output no/such/folder/result.json: "),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(bench: GpaBench, memory, arguments: list[str], named: str) -> None:
    run = bench(*memory, *arguments)
    assert run.status == cli.MISUSE
    assert named in run.err
    assert run.files == []
