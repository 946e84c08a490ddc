"""`gpa-conformance` from its command line to its files and its exit status, on the tiny checkpoint."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpa_conformance import cli
from gpa_conformance.baseline import Baseline
from gpa_conformance.preparation import find_codec, open_checkpoint
from gpa_conformance.report import matrix
from gpa_conformance.report.facts import verdict
from gpa_conformance.results import RunReport
from gpa_engines.random_checkpoint import make_checkpoint

CROOKED = "tests.conformance.crooked_engines"
FEW = "logits/ascend-1,logits/spread,contract/vocabulary,contract/max-new-tokens"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(model: Path, baseline: Baseline | None, *more: str) -> int:
    given = [] if baseline is None else ["--baseline", str(baseline.path)]
    return cli.main(["run", "--model", str(model), *given, *more])


@pytest.fixture(scope="module")
def reports(text_baseline: Baseline, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two runs wrote: float32.json with .md and .html, bfloat16.json."""
    folder = tmp_path_factory.mktemp("reports")
    more = ("--markdown", str(folder / "float32.md"), "--html", str(folder / "float32.html"))
    for dtype, files in (("float32", more), ("bfloat16", ())):
        chosen = ("--backend", "torch", "--dtype", dtype, "--threads", "1", "--cases", f"{FEW},contract/usage")
        assert run(tiny_checkpoint, text_baseline, *chosen, "--json", str(folder / f"{dtype}.json"), *files) == 0
    return folder


def test_a_run_that_passes_writes_its_reports_and_exits_with_0(reports: Path) -> None:
    report = RunReport.from_json(reports / "float32.json")
    assert report.exit_code == 0
    assert report.passed == 5
    assert report.engine["options"] == {"dtype": "float32", "threads": 1}
    assert "logits/ascend-1" in (reports / "float32.md").read_text(encoding="utf-8")
    assert "<html" in (reports / "float32.html").read_text(encoding="utf-8")


def test_without_a_baseline_one_is_made_and_removed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert run(tiny_checkpoint, None, "--backend", "torch", "--cases", "logits/ascend-1,logits/ascend-2") == 0
    assert "baseline" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_serves_a_machine_without_torch(
    text_baseline: Baseline, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n", encoding="utf-8"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    command = [sys.executable, "-m", "gpa_conformance.cli", "run", "--model", str(tiny_checkpoint)]
    command += ["--engine", "tests.conformance.numpy_engine:create", "--cases", f"{FEW},codec"]

    def carry_out(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False, cwd=root)

    done = carry_out("--baseline", str(text_baseline.path), "--json", str(tmp_path / "report.json"))
    assert done.returncode == 0, done.stderr
    report = RunReport.from_json(tmp_path / "report.json")
    assert report.passed == 4
    (reason,) = {case.reason for case in report.cases if case.status == "skipped"}
    assert "needs torch: pip install 'gpa-engines[torch]'; or export it" in reason
    without = carry_out()
    assert without.returncode == cli.MISUSE
    assert "needs torch: pip install 'gpa-engines[torch]'" in without.stderr
    assert "give --baseline" in without.stderr


def test_anyones_codec_is_tested(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    chosen = ("--backend", "torch", "--codec", "gpa_codecs.torch_codec:TorchCodec", "--json", str(report))
    assert run(tiny_checkpoint, None, *chosen, "--cases", "codec/decode-short,codec/encode-short") == 0
    assert RunReport.from_json(report).passed == 2
    wrong = ("--backend", "torch", "--codec", f"{CROOKED}:no_codec", "--json", str(report))
    assert run(tiny_checkpoint, None, *wrong, "--cases", "codec/decode-short") == cli.FAILED
    assert "not a gpa_codecs.codec.SpeechCodec" in RunReport.from_json(report).cases[0].reason


def test_failed_cases_exit_with_1_and_known_ones_do_not(
    text_baseline: Baseline, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--engine", f"{CROOKED}:raising_at_one_id", "--cases", "logits/one-id,logits/ascend-1")
    assert run(tiny_checkpoint, text_baseline, *chosen) == cli.FAILED
    assert "the trigger was pulled" in capsys.readouterr().err
    known = tmp_path / "known.txt"
    known.write_text("logits/one-id  it cannot do one id\n", encoding="utf-8")
    assert run(tiny_checkpoint, text_baseline, *chosen, "--known-failures", str(known)) == 0
    assert "known-failure" in capsys.readouterr().err


def test_a_run_in_which_nothing_could_run_exits_with_1(text_baseline: Baseline, tiny_checkpoint: Path) -> None:
    assert run(tiny_checkpoint, text_baseline, "--engine", f"{CROOKED}:bare", "--cases", "cache") == cli.FAILED


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "either --backend NAME or --engine"),
        (["--backend", "nonsense"], "unknown backend 'nonsense'"),
        (["--backend", "torch", "--engine", "a:b"], "either --backend NAME or --engine"),
        (["--engine", "no_such_module:make"], "there is no module 'no_such_module'"),
        (["--engine", f"{CROOKED}:padded"], "5152 ids, the checkpoint's 5141"),
        (["--backend", "torch", "--cases", "logic"], "there is no case or family 'logic'"),
        (["--backend", "torch", "--option", "speed=3"], "'torch' has no option 'speed'"),
        (["--backend", "torch", "--dtype", "float31"], "float31"),
        (["--backend", "torch", "--limits-as", "float31"], "no limits for dtype 'float31'"),
        (["--backend", "torch", "--limits", "nothing.yaml"], "nothing.yaml"),
        (["--backend", "torch", "--case-timeout", "0"], "--case-timeout is 0"),
        (["--backend", "torch", "--utterances", "0"], "--utterances is 0"),
        (["--backend", "torch", "--json", "no/such/folder/report.json"], "--json"),
        (["--backend", "torch", "--json", "same.json", "--html", "same.json"], "name the same file"),
        (["--backend", "torch", "--known-failures", "nothing.txt"], "nothing.txt"),
        (["--backend", "torch", "--codec", "nothing"], "--codec 'nothing'"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_misuse_exits_with_2_and_one_clear_line(
    text_baseline: Baseline,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tiny_checkpoint, text_baseline, *arguments) == cli.MISUSE
    output = capsys.readouterr()
    assert named in output.err
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == []


def test_a_known_failure_that_does_not_exist_is_refused(
    text_baseline: Baseline, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "known.txt").write_text("contract/sed  typo\n", encoding="utf-8")
    chosen = ("--backend", "torch", "--known-failures", str(tmp_path / "known.txt"))
    assert run(tiny_checkpoint, text_baseline, *chosen) == cli.MISUSE
    assert "line 1: there is no case 'contract/sed'" in capsys.readouterr().err


def test_a_foreign_baseline_is_refused_with_both_hashes(
    text_baseline: Baseline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_checkpoint(tmp_path / "other", "tiny", 1)
    assert run(other, text_baseline, "--backend", "torch", "--cases", FEW) == cli.MISUSE
    message = capsys.readouterr().err
    assert "of another checkpoint" in message
    assert len(set(re.findall(r"\b[0-9a-f]{64}\b", message))) == 2


def test_a_damaged_baseline_is_refused_with_the_files_name(
    text_baseline: Baseline, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(text_baseline.path, tmp_path / "damaged"))
    logits = folder / "cases/logits/ascend-1/logits.npy"
    logits.write_bytes(logits.read_bytes()[:-1] + b"\x7f")
    command = ["run", "--model", str(tiny_checkpoint), "--backend", "torch", "--baseline", str(folder)]
    assert cli.main(command) == cli.MISUSE
    assert "cases/logits/ascend-1/logits.npy" in capsys.readouterr().err


def test_a_full_disk_at_the_end_is_told_and_the_other_files_are_written(
    text_baseline: Baseline,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = cli.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(cli, "write_atomically", full)
    files = ("--json", str(tmp_path / "report.json"), "--markdown", str(tmp_path / "report.md"))
    chosen = ("--backend", "torch", "--cases", "logits/ascend-1", *files)
    assert run(tiny_checkpoint, text_baseline, *chosen) == cli.MISUSE
    assert "report.json: cannot be written: No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("files", [True, False])
def test_ctrl_c_ends_the_engines_process_and_keeps_what_had_ended(
    text_baseline: Baseline, tiny_checkpoint: Path, tmp_path: Path, files: bool
) -> None:
    command = [sys.executable, "-m", "gpa_conformance.cli", "run", "--model", str(tiny_checkpoint)]
    command += ["--baseline", str(text_baseline.path), "--engine", f"{CROOKED}:hanging_at_one_id"]
    command += ["--cases", "logits/ascend-1,logits/one-id,logits/spread"]
    if files:
        command += ["--json", str(tmp_path / "report.json"), "--markdown", str(tmp_path / "report.md")]
    marked = os.environ | {"GPA_CONFORMANCE_TEST": str(tmp_path)}
    process = subprocess.Popen(command, env=marked, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stderr is not None
    assert any("logits/ascend-1 passed" in line for line in process.stderr)
    assert len(processes_with(str(tmp_path))) == 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert processes_with(str(tmp_path)) == []
    if not files:
        assert "interrupted; nothing was written" in errors
        assert list(tmp_path.iterdir()) == []
        return
    assert "interrupted; reported are the cases that had ended, 2 of 3 had not" in errors
    report = RunReport.from_json(tmp_path / "report.json")
    assert [(case.case, case.status) for case in report.cases] == [("logits/ascend-1", "passed")]
    assert (report.exit_code, report.outcome) == (1, "interrupted")
    assert "interrupted" in matrix.markdown([report])
    assert ">interrupted<" in matrix.html([report])
    assert "nothing is proven, the run was interrupted after 1 case (1 passed)" in verdict(report).sentence
    assert "2 cases had not ended when the run was interrupted" in (tmp_path / "report.md").read_text(encoding="utf-8")


def processes_with(mark: str) -> list[str]:
    """Processes whose environment holds the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"GPA_CONFORMANCE_TEST={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder.name)
        except OSError:
            continue
    return found


def test_reports_are_put_side_by_side(reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(reports / "float32.json"), str(reports / "bfloat16.json")]
    written = ("--markdown", str(tmp_path / "matrix.md"), "--html", str(tmp_path / "matrix.html"))
    assert cli.main(["compare", *files, *written]) == 0
    assert "bfloat16" in capsys.readouterr().out
    for name in ("matrix.md", "matrix.html"):
        assert "float32" in (tmp_path / name).read_text(encoding="utf-8")


def test_a_file_that_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}), encoding="utf-8")
    assert cli.main(["compare", str(tmp_path / "other.json")]) == cli.MISUSE
    assert "is not a report of gpa-conformance" in capsys.readouterr().err


def test_cases_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cases"]) == 0
    listed = capsys.readouterr().out
    assert "contract/stop " in listed
    assert len(listed.splitlines()) > 70
    assert cli.main(["cases", "contract/stop"]) == 0
    explained = capsys.readouterr().out
    assert "the answer must end before it" in " ".join(explained.split())
    assert "contract/seed" not in explained
    assert cli.main(["cases", "nonsense"]) == cli.MISUSE


def test_a_baseline_is_made_and_an_existing_folder_is_kept(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["baseline", "--model", str(tiny_checkpoint), "--out", str(tmp_path / "base"), "--no-codec"]
    command += ["--cases", "logits/ascend-1,logits/stt-speech"]
    assert cli.main(command) == 0
    assert "1 case of" in capsys.readouterr().out
    assert Baseline.open(tmp_path / "base").logits("logits/ascend-1").kind == "full"
    assert cli.main(command) == cli.MISUSE
    assert "exists already" in capsys.readouterr().err


def test_an_exported_codec_serves_where_the_checkpoints_own_is_missing(
    tiny_checkpoint_copy: Path, onnx_folder: Path
) -> None:
    shutil.rmtree(tiny_checkpoint_copy / "BiCodec")
    checkpoint, problem = open_checkpoint(str(tiny_checkpoint_copy))
    assert find_codec(checkpoint, problem, None) == (None, problem)
    shutil.copytree(onnx_folder, tiny_checkpoint_copy / "onnx")
    make, reason = find_codec(checkpoint, problem, None)
    assert make is not None
    assert reason == ""
    assert make().semantic_cardinality == checkpoint.token_space().semantic.size
