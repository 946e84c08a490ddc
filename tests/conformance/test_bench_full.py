"""`gpa-bench full`: every task, in one file and in files of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpa_conformance.bench import cli
from gpa_conformance.bench.prompts import report_prompts
from tests.conformance.bench_tasks import GpaBench, Run, bench_in, bench_process

SMALL = (
    *("--threads", "1", "--num-iters", "2", "--warm-up", "0", "--max-new-tokens", "5"),
    *("--prefill", "8", "--dtype", "float32"),
)

PARTS = {
    "accuracy": "results_accuracy.json",
    "benchmark": "results_benchmark.json",
    "memory": "results_memory.json",
    "text": "results_text.json",
}

SCHEMAS = {
    "accuracy": "gpa-bench-accuracy/1",
    "benchmark": "gpa-bench-speed/1",
    "memory": "gpa-bench-memory/1",
    "text": "gpa-text/1",
}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> GpaBench:
    return bench_in(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whole run, as a process of its own."""
    return bench_process(tmp_path_factory.mktemp("full"), "full", "--model", tiny_checkpoint, *SMALL)


def test_everything_is_in_one_file_and_each_task_in_its_own(run: Run, tiny_checkpoint: Path) -> None:
    assert run.status == 0, run.err
    assert run.files == sorted(["eval_results.json", *PARTS.values()])
    document = run.document("eval_results.json")
    assert set(document) == {"schema", "created", "settings", "passed", "failures", *PARTS}
    assert (document["schema"], document["passed"], document["failures"]) == ("gpa-bench-full/1", True, [])
    assert document["settings"]["model"] == str(tiny_checkpoint)
    for part, name in PARTS.items():
        assert document[part] == run.document(name)
        assert document[part]["schema"] == SCHEMAS[part]
        assert document[part]["failed"] is None
    assert document["benchmark"]["settings"]["new_tokens"] == 5
    assert len(document["benchmark"]["samples"]) == 2


def test_the_texts_continue_the_reports_prompts(run: Run) -> None:
    document = run.document("results_text.json")
    assert [result["prompt"] for result in document["results"]] == [prompt.text for prompt in report_prompts()]
    assert all(result["new_tokens"] <= 5 for result in document["results"])
    assert document["sampling"]["temperature"] == 0
    assert document["versions"]["torch"]
    assert document["machine"]["packages"]["torch"]


def test_the_texts_are_those_of_gpa_run(run: Run, tiny_checkpoint: Path) -> None:
    (first, *_) = run.document("results_text.json")["results"]
    generation = ("--task", "text", "--prompt", first["prompt"], "--max-new-tokens", "5", "--dtype", "float32")
    command = [sys.executable, "-m", "gpa_engines.cli", *generation, "--model", str(tiny_checkpoint), "-o", "one.json"]
    subprocess.run(command, cwd=run.folder, check=True, capture_output=True)
    (result,) = run.document("one.json")["results"]
    drawn = {"seed", "timings"}
    assert result.keys() == first.keys()
    assert {key: value for key, value in result.items() if key not in drawn} == {
        key: value for key, value in first.items() if key not in drawn
    }
    assert set(run.document("one.json")) == set(run.document("results_text.json"))


def test_all_tables_are_printed(run: Run) -> None:
    for shown in ("as in the Ascend report:", "throughput", "prefill, 8 + 1 tokens", "continuation"):
        assert shown in run.out


def test_an_engine_that_does_not_load_fails_every_task_and_is_written_down(
    bench: GpaBench, tiny_checkpoint: Path
) -> None:
    run = bench("full", "--model", tiny_checkpoint, *SMALL, "--dtype", "float31")
    document = run.document("eval_results.json")
    assert run.status == cli.FAILED
    assert not document["passed"]
    assert [line.partition(":")[0] for line in document["failures"]] == ["accuracy", "speed", "memory", "text"]
    for part, name in PARTS.items():
        assert "float31" in run.document(name)["failed"]
        assert document[part] == run.document(name)
    assert run.err.count("error: ") == 4


def test_a_task_that_fails_leaves_the_others_running(
    bench: GpaBench, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpa_conformance.bench import footprint
    from gpa_conformance.bench.process import ChildFailed

    def fail(*_: Any) -> None:
        raise ChildFailed("the process was killed by signal 9")

    monkeypatch.setattr(footprint, "_stage", fail)
    run = bench("full", "--model", tiny_checkpoint, *SMALL)
    document = run.document("eval_results.json")
    assert run.status == cli.FAILED
    assert document["failures"] == ["memory: torch/float32: the process was killed by signal 9"]
    assert [stage["stage"] for stage in document["memory"]["stages"]] == ["load"]
    assert document["accuracy"]["passed"]
    assert len(document["text"]["results"]) == 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--num-iters", "0"], "num-iters is 0"),
        (["--prefill", "0"], "prefill is 0"),
        (["--baseline", "nowhere"], "baseline.json is missing"),
        (["--output", "no/such/folder/eval.json"], "--output no/such/folder/eval.json: "),
        (["--backend", "ascend"], "backend 'ascend' needs torch_npu: pip install"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(
    bench: GpaBench, tiny_checkpoint: Path, arguments: list[str], named: str
) -> None:
    run = bench("full", "--model", tiny_checkpoint, *SMALL, *arguments)
    assert run.status == cli.MISUSE
    assert named in run.err
    assert run.files == []


def test_a_file_that_is_in_the_way_is_found_before_the_work(bench: GpaBench, tiny_checkpoint: Path) -> None:
    Path("results_memory.json").mkdir()
    run = bench("full", "--model", tiny_checkpoint, *SMALL, "-v")
    assert run.status == cli.MISUSE
    assert "--output results_memory.json" in run.err
    assert "loading" not in run.err


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_ctrl_c_ends_the_child_and_writes_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpa_conformance.bench.cli", "full", "--model", str(tiny_checkpoint)]
    marked = os.environ | {"GPA_BENCH_TEST": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *SMALL, "--num-iters", "100000", "-v"],
        cwd=tmp_path,
        env=marked,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any(line.startswith("speed: 3 of") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert "interrupted" in errors
    assert list(tmp_path.iterdir()) == []
    assert not processes_with(str(tmp_path))


def processes_with(mark: str) -> list[str]:
    """Processes whose environment holds the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"GPA_BENCH_TEST={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder.name)
        except OSError:
            continue
    return found
