"""`gpa-bench engine` from its command line to its JSON and its exit status, on the tiny checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpa_conformance.bench import cli, console

SMALL = (
    *("--threads", "1", "--prompt-tokens", "12", "--new-tokens", "6", "--repeats", "2"),
    *("--batch", "1", "--batch", "2", "--logit-positions", "20"),
)


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """One whole run: two dtypes, the yardstick, the codec; its JSON and its table."""
    target = tmp_path_factory.mktemp("bench") / "result.json"
    command = [sys.executable, "-m", "gpa_conformance.bench.cli", "engine", "--model", str(tiny_checkpoint), *SMALL]
    chosen = ["--dtype", "float32", "--dtype", "bfloat16", "--vs", "transformers", "--json", str(target)]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text(encoding="utf-8")), done.stdout


def contender(values: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in values["contenders"] if each["name"] == name)


def test_the_document_names_its_format_and_what_the_figures_depend_on(run: tuple[dict[str, Any], str]) -> None:
    values, _ = run
    assert (values["format"], values["version"]) == ("gpa-bench-engine", 1)
    assert values["machine"]["cores"] >= 1
    assert values["machine"]["packages"]["torch"]
    assert values["checkpoint"]["lm_bytes"] > 0
    assert all(len(digest) == 64 for digest in values["checkpoint"]["sha256"].values())
    assert values["settings"]["workload"]["batches"] == [1, 2]


def test_every_contender_has_every_sample_of_every_round(run: tuple[dict[str, Any], str]) -> None:
    values, _ = run
    names = [each["name"] for each in values["contenders"]]
    assert names == ["transformers/float32", "transformers/bfloat16", "torch/float32", "torch/bfloat16"]
    taken = [(s["round"], s["kind"], s["batch"], s["head"]) for s in contender(values, "torch/float32")["samples"]]
    one_round = [("prefill", 1, "full"), *(("decode", b, h) for b in (1, 2) for h in ("full", "restricted"))]
    assert taken == [(number, *each) for number in range(2) for each in one_round]
    yardstick = [(s["kind"], s["batch"], s["head"]) for s in contender(values, "transformers/float32")["samples"]]
    assert yardstick == [("prefill", 1, "full"), ("decode", 1, "full")] * 2


def test_figures_follow_from_the_samples(run: tuple[dict[str, Any], str]) -> None:
    values, _ = run
    ours, theirs = contender(values, "torch/bfloat16"), contender(values, "transformers/bfloat16")

    def rates(each: dict[str, Any], head: str) -> list[float]:
        wanted = ("decode", 1, head)
        return [s["tokens_per_s"] for s in each["samples"] if (s["kind"], s["batch"], s["head"]) == wanted]

    (measured,) = [m for m in ours["measurements"] if (m["kind"], m["batch"], m["head"]) == ("decode", 1, "restricted")]
    by_round = [a / b for a, b in zip(rates(ours, "restricted"), rates(theirs, "full"), strict=True)]
    assert measured["against"] == "transformers/bfloat16"
    assert measured["ratio"]["median"] == pytest.approx(sum(by_round) / 2)
    assert measured["tokens_per_s"]["max"] == max(rates(ours, "restricted"))
    assert all(
        sample["tokens"] == 5 for sample in ours["samples"] if sample["kind"] == "decode" and sample["batch"] == 1
    )


def test_memory_grows_from_loading_to_the_end_of_the_race(run: tuple[dict[str, Any], str]) -> None:
    values, _ = run
    for each in values["contenders"]:
        peak = each["peak_rss"]
        assert 0 < peak["loaded"] <= peak["batch_1"] <= peak["race"]


def test_logits_are_compared_with_torch_float32(run: tuple[dict[str, Any], str]) -> None:
    values, _ = run
    assert contender(values, "torch/float32")["logits"]["rel_l2"] < 1e-6
    assert contender(values, "transformers/float32")["logits"]["rel_l2"] < 1e-5
    bfloat16 = contender(values, "torch/bfloat16")["logits"]
    assert 1e-4 < bfloat16["rel_l2"] < 0.1
    assert bfloat16["positions"] == 20


def test_every_stage_of_the_codec_is_measured(run: tuple[dict[str, Any], str]) -> None:
    values, _ = run
    assert [stage["stage"] for stage in values["codec"]] == ["semantic", "glm", "voice", "decode"]
    for stage in values["codec"]:
        assert stage["failed"] is None
        assert stage["wall_s"]["count"] == 2
        assert stage["cpu_s_per_audio_s"] > 0


def test_the_tables_show_contenders_figures_and_codec(run: tuple[dict[str, Any], str]) -> None:
    _, table = run
    for shown in ("transformers/float32", "torch/bfloat16", "batch 2, restricted", "semantic", "rel-L2"):
        assert shown in table


def test_a_contender_that_fails_leaves_the_others_and_their_jobs_running(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "result.json"
    chosen = (
        "--dtype",
        "float31",
        "--dtype",
        "float32",
        "--no-codec",
        "--jobs",
        "--head",
        "full",
        "--json",
        str(target),
    )
    status = cli.main(["engine", "--model", str(tiny_checkpoint), *SMALL, *chosen])
    output = capsys.readouterr()
    values = json.loads(target.read_text(encoding="utf-8"))
    assert status == cli.FAILED
    assert "float31" in contender(values, "torch/float31")["failed"]
    assert "torch/float31 failed: " in output.out
    assert "torch/float31" in output.err
    assert contender(values, "torch/float32")["failed"] is None
    assert len(contender(values, "torch/float32")["samples"]) == 2 * 3
    assert [(job["job"], job["name"]) for job in values["jobs"]] == [
        (name, "torch/float32") for name in ("tts-a", "stt")
    ]
    for job in values["jobs"]:
        assert job["failed"] is None
        assert job["new_tokens"] == 100
        assert 0 < job["peak_rss_loaded"] <= job["peak_rss"]


def test_the_language_model_alone_can_be_measured(tiny_checkpoint_copy: Path) -> None:
    shutil.rmtree(tiny_checkpoint_copy / "BiCodec")
    shutil.rmtree(tiny_checkpoint_copy / "glm-4-voice-tokenizer")
    alone = ["engine", "--model", str(tiny_checkpoint_copy), *SMALL, "--head", "restricted"]
    assert cli.main([*alone, "--no-codec", "--logit-positions", "0"]) == 0
    assert cli.main(alone) == cli.MISUSE


def test_a_child_that_takes_too_long_is_ended_and_reported(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["engine", "--model", str(tiny_checkpoint), *SMALL, "--no-codec", "--timeout", "0.001"])
    assert status == cli.FAILED
    assert "no answer within 0.001 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--backend", "nonsense"], "unknown backend 'nonsense'"),
        (["--vs", "llama"], "unknown yardstick 'llama'"),
        (["--vs", "transformers", "--vs-batch", "3"], "vs-batch 3"),
        (["--prompt-tokens", "40000"], "40000"),
        (["--new-tokens", "0"], "new-tokens is 0"),
        (["--batch", "0"], "batch is 0"),
        (["--repeats", "0"], "repeats is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--timeout", "0"], "timeout is 0"),
        (["--head", "half"], "head is 'half'"),
        (["--json", "no/such/folder/result.json"], "does not exist"),
        (["--repeats", "many"], "--repeats"),
        (["--option", "max_batch"], "expected key=value"),
        (["--option", "nonsense=1"], "backend 'torch' has no option 'nonsense'; its options: device"),
        (["--option", "mlx:max_batch=1"], "an option is for backend 'mlx', which is not among those to measure: torch"),
        (["--option", "torch:threads=2"], "--threads is the option for it"),
    ],
)
def test_bad_input_exits_with_2_before_anything_is_loaded(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert cli.main(["engine", "--model", str(tiny_checkpoint), *arguments]) == cli.MISUSE
    output = capsys.readouterr()
    assert named in output.err
    assert "Traceback" not in output.err
    assert output.out == ""


def test_a_model_folder_that_is_not_there_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["engine", "--model", str(tmp_path / "nothing")]) == cli.MISUSE
    assert "nothing" in capsys.readouterr().err


def test_a_missing_yardstick_says_how_to_install_it(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpa_conformance.bench.yardstick.PACKAGES", ("torch", "transformers_that_is_missing"))
    assert cli.main(["engine", "--model", str(tiny_checkpoint), "--vs", "transformers"]) == cli.MISUSE
    assert "pip install 'gpa-engines[dev]'" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, cli.INTERRUPTED), (signal.SIGTERM, console.TERMINATED)])
def test_signals_end_the_children_and_nothing_is_written(
    tiny_checkpoint: Path, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    target = tmp_path / "result.json"
    command = [sys.executable, "-m", "gpa_conformance.bench.cli", "engine", "--model", str(tiny_checkpoint), *SMALL]
    marked = os.environ | {"GPA_BENCH_TEST": str(tmp_path), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*command, "-v", "--no-codec", "--repeats", "100000", "--json", str(target)],
        env=marked,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any(line.startswith("round 2") for line in process.stderr)
    assert len(processes_with(str(tmp_path))) == 2
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert processes_with(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


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


def test_a_backend_may_be_named_with_a_dtype_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    chosen = ["--backend", "torch:bfloat16", "--backend", "torch", "--no-codec", "--json", str(target)]
    assert cli.main(["engine", "--model", str(tiny_checkpoint), *SMALL, *chosen]) == 0
    values = json.loads(target.read_text(encoding="utf-8"))
    assert [each["name"] for each in values["contenders"]] == ["torch/bfloat16", "torch/float32"]


def test_options_go_to_every_backend_and_to_the_named_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    chosen = ["--option", "prefill_chunk=7", "--option", "torch:max_batch=3", "--no-codec", "--json", str(target)]
    assert cli.main(["engine", "--model", str(tiny_checkpoint), *SMALL, *chosen]) == 0
    values = json.loads(target.read_text(encoding="utf-8"))
    assert values["settings"]["options"] == {"": {"prefill_chunk": 7}, "torch": {"max_batch": 3}}
    options = contender(values, "torch/float32")["options"]
    assert (options["prefill_chunk"], options["max_batch"]) == (7, 3)


def test_the_codec_is_measured_in_torch_and_onnx_side_by_side(
    tiny_checkpoint_copy: Path, onnx_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(onnx_folder, tiny_checkpoint_copy / "onnx")
    target = tmp_path / "result.json"
    chosen = ["--codec-in", "torch", "--codec-in", "onnx", "--json", str(target)]
    assert cli.main(["engine", "--model", str(tiny_checkpoint_copy), *SMALL, *chosen]) == 0
    stages = json.loads(target.read_text(encoding="utf-8"))["codec"]
    assert [(each["stage"], each["kind"]) for each in stages] == [
        (stage, kind) for stage in ("semantic", "glm", "voice", "decode") for kind in ("torch", "onnx")
    ]
    for torch, onnx in zip(stages[::2], stages[1::2], strict=True):
        assert torch["speed_up"] is None
        ratios = [a["wall_s"] / b["wall_s"] for a, b in zip(torch["warm"], onnx["warm"], strict=True)]
        assert min(ratios) <= onnx["speed_up"]["median"] <= max(ratios)


def test_a_codec_that_was_not_exported_fails_its_stages(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["engine", "--model", str(tiny_checkpoint), *SMALL, "--codec-in", "onnx"]) == cli.FAILED
    assert "to_onnx.py" in capsys.readouterr().err
