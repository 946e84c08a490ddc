"""`gpa-bench accuracy`: its figures against figures taken another way, its verdicts, its baselines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpa_conformance.baseline import write_baseline
from gpa_conformance.bench import cli
from gpa_conformance.bench.accuracy import accuracy_figures, judge_of, misses
from gpa_conformance.bench.prompts import report_prompts
from gpa_conformance.limits import load_limits
from gpa_conformance.metrics import LogitsComparison, LogitsMetrics
from gpa_conformance.reference_rows import FullRows
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.registry import create_engine
from tests.conformance.bench_tasks import COMMON, GpaBench, Run, bench_in, bench_process, check_common

SCHEMA = "gpa-bench-accuracy/1"
FILE = "results_accuracy.json"
FIGURES = {
    *("baseline", "limits", "prompts", "total", "verdicts"),
    *("as_in_the_report", "judged_by", "checks", "passed"),
}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> GpaBench:
    return bench_in(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def accuracy(tiny_checkpoint: Path) -> tuple[str | Path, ...]:
    return "accuracy", "--model", tiny_checkpoint, "--threads", "1"


@pytest.fixture(scope="module")
def float32(accuracy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The reference against itself."""
    return bench_process(tmp_path_factory.mktemp("float32"), *accuracy, "--dtype", "float32")


@pytest.fixture(scope="module")
def bfloat16(accuracy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A healthy engine that is not exact."""
    return bench_process(tmp_path_factory.mktemp("bfloat16"), *accuracy, "--dtype", "bfloat16")


@pytest.fixture(scope="module")
def baseline(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline with the eight prompts alone."""
    return make_baseline(tiny_checkpoint, tmp_path_factory.mktemp("baseline") / "b", 8)


def make_baseline(model: Path, folder: Path, prompts: int) -> Path:
    async def make() -> None:
        engine = create_engine("torch", model, dtype="float32", device="cpu", threads=1)
        try:
            cases = [prompt.case for prompt in report_prompts()[:prompts]]
            await write_baseline(Checkpoint.open(model), folder, engine, None, cases)
        finally:
            await engine.close()

    asyncio.run(make())
    return folder


def logits(model: Path, dtype: str, prompts: list[list[int]]) -> list[NDArray[np.float64]]:
    async def run() -> list[NDArray[np.float64]]:
        engine = create_engine("torch", model, dtype=dtype, device="cpu", threads=1)
        try:
            return [(await engine.logits(ids)).astype(np.float64) for ids in prompts]
        finally:
            await engine.close()

    return asyncio.run(run())


def succeeded(run: Run) -> dict[str, Any]:
    assert run.status == 0, run.err
    return run.document(FILE)


def test_the_prompts_are_those_of_the_report() -> None:
    assert [prompt.text for prompt in report_prompts()] == [
        "Hello, how are you doing today?",
        "The capital of France is Paris.",
        "Once upon a time in a land far away,",
        "Artificial intelligence is the future of",
        "The speed of light in vacuum is approx",
        "Machine learning models can be used for",
        "In recent years, deep learning has",
        "The most important thing in science is",
    ]


def test_the_reference_agrees_with_itself(float32: Run, tiny_checkpoint: Path) -> None:
    document = succeeded(float32)
    assert float32.files == [FILE]
    check_common(document, SCHEMA, tiny_checkpoint)
    assert set(document) - COMMON == FIGURES
    assert document["baseline"]["kind"] == "engine"
    assert document["baseline"]["engine"]["info"]["dtype"] == "float32"
    assert document["judged_by"] == "float32"
    assert document["passed"]
    assert document["as_in_the_report"]
    assert [each["metric"] for each in document["limits"]] == ["rel_l2", "cosine", "top1", "top5"]
    for row in document["prompts"]:
        assert set(row) == {"case", "text", "ids", "positions", "last", "all", "verdicts"}
        assert row["positions"] == len(row["ids"]) == row["all"]["positions"]
        assert (row["last"]["positions"], row["last"]["top1_matches"], row["last"]["top5"]) == (1, 1, 5)
        assert row["all"]["rel_l2"] < 1e-6
    assert document["total"]["last"]["positions"] == 8
    assert document["total"]["all"]["positions"] == sum(row["positions"] for row in document["prompts"])
    assert [verdict["scope"] for verdict in document["verdicts"]] == ["last"] * 4 + ["all"] * 4


def test_figures_are_what_arithmetic_says(bfloat16: Run, tiny_checkpoint: Path) -> None:
    document = succeeded(bfloat16)
    ids = [row["ids"] for row in document["prompts"]]
    space = Checkpoint.open(tiny_checkpoint).token_space()
    assert ids == [space.encode_text(prompt.text) for prompt in report_prompts()]
    ours, reference = (logits(tiny_checkpoint, dtype, ids) for dtype in ("bfloat16", "float32"))
    for row, x, ref in zip(document["prompts"], ours, reference, strict=True):
        error = x - ref
        assert row["all"]["rel_l2"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(ref), rel=1e-6)
        assert row["last"]["rel_l2"] == pytest.approx(np.linalg.norm(error[-1]) / np.linalg.norm(ref[-1]), rel=1e-6)
        cosine = x[-1] @ ref[-1] / np.linalg.norm(x[-1]) / np.linalg.norm(ref[-1])
        assert row["last"]["cosine"] == pytest.approx(cosine, abs=1e-9)
        assert row["all"]["top1_matches"] == (x.argmax(-1) == ref.argmax(-1)).sum()
        fives = [set(np.argsort(-values[-1], kind="stable")[:5]) for values in (x, ref)]
        assert row["last"]["top5"] == len(fives[0] & fives[1])
    joined = np.concatenate(ours), np.concatenate(reference)
    rel_l2 = np.linalg.norm(joined[0] - joined[1]) / np.linalg.norm(joined[1])
    assert document["total"]["all"]["rel_l2"] == pytest.approx(rel_l2, rel=1e-6)
    assert document["judged_by"] == "bfloat16"


def test_the_table_is_the_reports(float32: Run) -> None:
    output = float32.out
    for prompt in report_prompts():
        assert prompt.text in output
    for shown in ("rel_L2", "cosine", "top-1", "top-5", "5/5", "8/8", "as in the Ascend report:"):
        assert shown in output
    verdicts = [line for line in output.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert len(verdicts) == 9
    assert all(line.startswith("PASS") for line in verdicts)


def test_a_baseline_folder_gives_the_same_figures_and_needs_no_torch_beside_the_engine(
    bench: GpaBench, accuracy, bfloat16: Run, baseline: Path
) -> None:
    own = succeeded(bfloat16)
    run = bench(*accuracy, "--dtype", "bfloat16", "--baseline", baseline, "-v")
    document = succeeded(run)
    assert [line for line in run.err.splitlines() if "loading" in line] == ["accuracy: loading torch/bfloat16"]
    assert document["baseline"]["kind"] == "folder"
    assert document["baseline"]["document"]["schema"] == "gpa-conformance-baseline/1"
    assert document["settings"]["baseline"] == str(baseline)
    assert document["total"] == own["total"]
    assert document["prompts"] == own["prompts"]


def test_a_baseline_of_another_checkpoint_is_refused(
    bench: GpaBench, tiny_checkpoint_copy: Path, baseline: Path
) -> None:
    config = tiny_checkpoint_copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"another": True}))
    run = bench("accuracy", "--model", tiny_checkpoint_copy, "--baseline", baseline)
    assert run.status == cli.MISUSE
    assert "another checkpoint" in run.err
    assert "config.json has sha256" in run.err
    assert FILE not in run.files


def test_a_baseline_without_the_prompts_is_refused(
    bench: GpaBench, accuracy, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    short = make_baseline(tiny_checkpoint, tmp_path_factory.mktemp("short") / "b", 1)
    run = bench(*accuracy, "--baseline", short)
    assert run.status == cli.MISUSE
    assert "cannot serve logits/ascend-2" in run.err


def compared(model: Path, change: Any) -> list[LogitsMetrics | None]:
    """The reference held against itself, changed: change(prompt's number, logits)."""
    space = Checkpoint.open(model).token_space()
    found: list[LogitsMetrics | None] = []
    ids = [space.encode_text(prompt.text) for prompt in report_prompts()]
    for number, ref in enumerate(logits(model, "float32", ids)):
        comparison = LogitsComparison(None)
        comparison.add(FullRows(np.arange(len(ref)), ref.astype(np.float32)), change(number, ref.copy()))
        found.append(comparison.result())
    return found


def figures(found: list[LogitsMetrics | None]) -> dict[str, Any]:
    limits = load_limits()
    return accuracy_figures(report_prompts(), [[0]] * 8, found, limits.ascend, limits.for_dtype("float32"))


def test_one_nan_fails_and_is_no_number(tiny_checkpoint: Path) -> None:
    def spoil(number: int, x: NDArray[np.float64]) -> NDArray[np.float64]:
        if number == 3:
            x[0, 7] = np.nan
        return x

    values = figures(compared(tiny_checkpoint, spoil))
    assert not values["passed"]
    assert not values["as_in_the_report"]
    assert values["total"]["all"]["non_finite"] == 1
    assert values["total"]["all"]["rel_l2"] is None
    assert values["total"]["last"]["non_finite"] == 0
    failed = [(each["scope"], each["metric"]) for each in values["verdicts"] if not each["passed"]]
    assert set(failed) >= {("all", "rel_l2"), ("all", "cosine")}
    assert all(scope == "all" for scope, _ in failed)
    assert any("non_finite is 1" in line for line in misses(values))
    assert any("rel_l2 is not a number" in line for line in misses(values))
    json.dumps(values, allow_nan=False)


def test_logits_that_keep_their_order_but_not_their_size_fail(tiny_checkpoint: Path) -> None:
    values = figures(compared(tiny_checkpoint, lambda number, x: 1.5 * x))
    verdicts = {each["metric"]: each["passed"] for each in values["verdicts"] if each["scope"] == "all"}
    assert verdicts == {"rel_l2": False, "cosine": True, "top1": True, "top5": True}
    assert not values["passed"]


def test_a_prompt_without_logits_fails_and_leaves_the_others(tiny_checkpoint: Path) -> None:
    found = compared(tiny_checkpoint, lambda number, x: x)
    found[5] = None
    values = figures(found)
    assert not values["passed"]
    assert values["total"] == {"last": None, "all": None}
    assert values["prompts"][5]["all"] is None
    assert values["prompts"][4]["all"]["rel_l2"] == 0


def test_a_dtype_without_limits_is_judged_by_the_reports() -> None:
    limits = load_limits()
    assert judge_of(limits, "bf16") is limits.for_dtype("bfloat16")
    assert judge_of(limits, "a quantisation of the future") is limits.ascend


def test_a_miss_fails_the_command_and_says_what(bench: GpaBench, accuracy, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = load_limits()
    monkeypatch.setattr("gpa_conformance.bench.accuracy.judge_of", lambda _, dtype: limits.for_dtype("float32"))
    run = bench(*accuracy, "--dtype", "bfloat16")
    assert run.status == cli.FAILED
    assert not run.document(FILE)["passed"]
    assert run.document(FILE)["failed"] is None
    assert "error: accuracy: torch/bfloat16: rel_l2 is 0.0" in run.err
    assert "expected <= " in run.err


def test_an_engine_that_does_not_load_is_reported(bench: GpaBench, accuracy) -> None:
    run = bench(*accuracy, "--dtype", "float31")
    document = run.document(FILE)
    assert run.status == cli.FAILED
    assert "error: accuracy: torch/float31: dtype 'float31' is unknown" in run.err
    assert "float31" in document["failed"]
    assert document["engine"] is None
    assert document["baseline"]["kind"] == "engine"
    assert not document["passed"]
    assert "the engine did not load" in run.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--baseline", "nowhere"], "baseline.json is missing"),
        (["--backend", "nonsense"], "unknown backend 'nonsense'"),
        (["--backend", "ascend"], "backend 'ascend' needs torch_npu: pip install"),
        (["--threads", "0"], "threads is 0"),
        (["--output", "no/such/folder/result.json"], "--output no/such/folder/result.json: "),
        (["--unknown"], "No such option: --unknown"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(bench: GpaBench, accuracy, arguments: list[str], named: str) -> None:
    run = bench(*accuracy, *arguments)
    assert run.status == cli.MISUSE
    assert named in run.err
    assert run.files == []
