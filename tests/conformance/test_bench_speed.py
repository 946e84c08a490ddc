"""`gpa-bench speed`: the arithmetic of its figures, its document, and what it says when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_conformance.bench import cli
from gpa_conformance.bench.prompts import report_prompts
from gpa_conformance.bench.speed import speed_figures
from gpa_conformance.bench.subject import Subject
from gpa_conformance.bench.summary import Summary, percentile
from gpa_conformance.bench.workload import ContenderSpec
from gpa_engines.memory import MemoryUse
from tests.conformance.bench_tasks import COMMON, MEMORY, GpaBench, Run, bench_in, bench_process, check_common

SCHEMA = "gpa-bench-speed/1"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> GpaBench:
    return bench_in(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def speed(tiny_checkpoint: Path) -> tuple[str | Path, ...]:
    small = ("--num-iters", "3", "--max-new-tokens", "8", "--warm-up", "1", "--threads", "1")
    small += ("--option", "prefill_chunk=5")
    return "speed", "--model", tiny_checkpoint, *small


@pytest.fixture(scope="module")
def run(speed, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole run, as a process of its own."""
    return bench_process(tmp_path_factory.mktemp("speed"), *speed)


@pytest.mark.parametrize(
    ("samples", "percent", "expected"),
    [
        ([5.0], 99, 5.0),
        ([1.0, 2.0], 50, 1.5),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([1.0, 2.0], 99, 1.99),
        ([10.0, 0.0, 5.0], 99, 9.9),
        ([4.0, 4.0, 4.0], 99, 4.0),
        ([float(n) for n in range(101)], 99, 99.0),
        ([0.0, 1.0], 0, 0.0),
        ([0.0, 1.0], 100, 1.0),
    ],
)
def test_a_percentile_lies_between_its_neighbours(samples: list[float], percent: float, expected: float) -> None:
    assert percentile(samples, percent) == pytest.approx(expected)


def test_percentiles_are_those_of_numpy() -> None:
    for count in (1, 2, 3, 10, 99, 100, 101, 250):
        samples = np.random.default_rng(count).exponential(size=count).tolist()
        for percent in (0, 1, 50, 90, 99, 100):
            assert percentile(samples, percent) == pytest.approx(np.percentile(samples, percent))


def test_the_reports_own_p99_is_below_its_maximum_so_it_was_interpolated() -> None:
    # 4.874 median, 5.287 p99, 5.314 max: with the nearest rank, the p99 of fewer than 100 samples is the maximum.
    summary = Summary.of([4.638, 4.7, 4.874, 5.0, 5.314])
    assert summary is not None
    assert summary.median < summary.p99 < summary.max


def test_a_summary_of_nothing_is_nothing() -> None:
    assert Summary.of([]) is None


def test_a_summary_of_some_samples() -> None:
    assert Summary.of([1.0, 2.0, 6.0]) == Summary(mean=3.0, median=2.0, p99=5.92, min=1.0, max=6.0, count=3)


def test_throughput_counts_prefill_and_the_decode_rate_does_not() -> None:
    samples: list[dict[str, Any]] = [
        {"new_tokens": 5, "latency_s": 2.0, "first_token_s": 1.0, "decode_s": 1.0, "cpu_s": 2.0},
        {"new_tokens": 5, "latency_s": 3.0, "first_token_s": 2.0, "decode_s": 1.0, "cpu_s": 2.0},
    ]
    figures = speed_figures(samples)
    assert figures["throughput_tokens_per_s"] == 10 / 5
    assert figures["decode_tokens_per_s"] == 8 / 2
    assert figures["latency_s"]["mean"] == 2.5
    assert figures["first_token_s"]["max"] == 2.0


def test_one_token_has_no_decode_rate() -> None:
    samples = [{"new_tokens": 1, "latency_s": 2.0, "first_token_s": 2.0, "decode_s": 0.0, "cpu_s": 2.0}]
    assert speed_figures(samples)["decode_tokens_per_s"] is None
    assert speed_figures(samples)["throughput_tokens_per_s"] == 0.5


def test_the_document_has_every_sample_and_follows_from_them(run: Run, tiny_checkpoint: Path) -> None:
    assert run.status == 0, run.err
    assert run.files == ["results_benchmark.json"]
    document = run.document("results_benchmark.json")
    check_common(document, SCHEMA, tiny_checkpoint)
    assert set(document) - COMMON == {
        *("prompt_tokens", "throughput_tokens_per_s", "decode_tokens_per_s"),
        *("latency_s", "first_token_s", "memory", "samples"),
    }
    samples = document["samples"]
    assert [sample["new_tokens"] for sample in samples] == [8, 8, 8]
    assert all(s["first_token_s"] + s["decode_s"] == pytest.approx(s["latency_s"]) for s in samples)
    latencies = [sample["latency_s"] for sample in samples]
    assert document["throughput_tokens_per_s"] == pytest.approx(24 / sum(latencies))
    assert document["latency_s"]["max"] == max(latencies)
    assert document["latency_s"]["count"] == 3
    assert document["settings"]["options"] == {"prefill_chunk": 5}
    assert document["engine"]["options"]["prefill_chunk"] == 5
    assert document["settings"]["prompt"] == report_prompts()[0].text == "Hello, how are you doing today?"
    for memory in document["memory"].values():
        assert set(memory) == MEMORY
    assert document["memory"]["after"]["host_peak_resident"] >= document["memory"]["loaded"]["host_resident"] > 0


def test_the_table_has_the_reports_figures(run: Run) -> None:
    output = run.out
    for shown in ("throughput", "mean", "median", "p99", "min", "max", "memory allocated", "reserved", "load time"):
        assert shown in output
    assert "8 new tokens after 31, 3 iterations, 1 to warm up" in output
    assert "resident set of the process" in output


def test_on_a_cpu_the_memory_is_the_process(run: Run) -> None:
    memory = run.document("results_benchmark.json")["memory"]["after"]
    if memory["allocated"] is None:
        pytest.skip("this system does not tell a process's memory")
    assert memory["source"].startswith("resident set of the process")
    assert 0 < memory["allocated"] < memory["reserved"] == memory["host_resident"]


class Meter:
    """A device that counts."""

    source = "torch.npu allocator"

    def read(self) -> MemoryUse:
        return MemoryUse(10, 20, 30, 40)

    def reset_peak(self) -> bool:
        return True


def test_the_engines_own_meter_is_asked_where_it_has_one(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpa_engines.backends.torch.engine.device_memory", lambda device: Meter())
    subject = Subject(ContenderSpec("engine", "torch", "float32", "cpu", 1), tiny_checkpoint, 4, 4)
    try:
        memory = subject.load()["memory"]
    finally:
        subject.close()
    figures = [memory[name] for name in ("allocated", "reserved", "peak_allocated", "peak_reserved")]
    assert (memory["source"], figures) == ("torch.npu allocator", [10, 20, 30, 40])
    assert memory["host_peak_resident"] > 40


def test_an_engine_that_does_not_load_is_reported(bench: GpaBench, speed) -> None:
    run = bench(*speed, "--dtype", "float31")
    document = run.document("results_benchmark.json")
    assert run.status == cli.FAILED
    assert "error: speed: torch/float31: dtype 'float31' is unknown" in run.err
    assert "float31" in document["failed"]
    assert (document["engine"], document["latency_s"], document["samples"]) == (None, None, [])


def test_an_engine_that_hangs_is_ended_and_reported(bench: GpaBench, speed) -> None:
    run = bench(*speed, "--timeout", "0.001")
    assert run.status == cli.FAILED
    assert "no answer within 0.001 s" in run.document("results_benchmark.json")["failed"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--num-iters", "0"], "num-iters is 0; expected at least 1"),
        (["--max-new-tokens", "0"], "max-new-tokens is 0; expected at least 1"),
        (["--warm-up", "-1"], "warm-up is -1; expected at least 0"),
        (["--max-new-tokens", "40000"], "the model has 32768"),
        (["--prompt", ""], "the prompt is empty"),
        (["--backend", "nonsense"], "unknown backend 'nonsense'"),
        (["--threads", "0"], "threads is 0"),
        (["--timeout", "0"], "timeout is 0"),
        (["--output", "no/such/folder/result.json"], "--output no/such/folder/result.json: "),
        (["--output", "."], "is a folder; name a file"),
        (["--num-iters", "many"], "--num-iters"),
        (["--option", "nonsense=1"], "backend 'torch' has no option 'nonsense'"),
        (["--option", "device=cuda"], "--device is the option for it"),
        (["--backend", "remote", "--option", "key=secret"], "use --option key_file=FILE"),
        (["--model", "./nothing-here"], "nothing-here"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(bench: GpaBench, speed, arguments: list[str], named: str) -> None:
    run = bench(*speed, *arguments)
    assert run.status == cli.MISUSE
    assert named in run.err
    assert "Traceback" not in run.err
    assert run.out == ""
    assert run.files == []


def test_a_full_disk_keeps_the_old_report(
    bench: GpaBench, speed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results_benchmark.json").write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    run = bench(*speed)
    assert run.status == cli.MISUSE
    assert "--output results_benchmark.json: cannot be written: No space left on device" in run.err
    assert (tmp_path / "results_benchmark.json").read_text() == "old"
    assert run.files == ["results_benchmark.json"]
