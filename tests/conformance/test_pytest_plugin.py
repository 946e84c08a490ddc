"""The suite as tests: `pytest --gpa-backend NAME --gpa-model DIR`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunPytest = Callable[..., subprocess.CompletedProcess[str]]

SCALED_ENGINE = """
from gpa_engines.registry import create_engine


def create(model_dir, **options):
    return ScaledEngine(create_engine("torch", model_dir, **options))


class ScaledEngine:
    def __init__(self, engine):
        self.engine, self.info = engine, engine.info
        self.generate, self.close = engine.generate, engine.close

    async def logits(self, ids):
        return 1.5 * await self.engine.logits(ids)
"""


@pytest.fixture
def run_pytest(tmp_path: Path) -> RunPytest:
    """Run pytest in a folder of its own, in another process."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        (tmp_path / "scaled_engine.py").write_text(SCALED_ENGINE)
        command = [sys.executable, "-m", "pytest", "-rA", "--rootdir", ".", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)

    return run


@pytest.fixture(scope="module")
def baseline(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baseline") / "tiny"
    command = [sys.executable, "-m", "gpa_conformance.cli", "baseline", "--model", str(tiny_checkpoint)]
    subprocess.run([*command, "--out", str(folder), "--cases", "logits/ascend-1,contract", "--no-codec"], check=True)
    return folder


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Outcome by case, from pytest's summary."""
    return {case: outcome for outcome, case in re.findall(r"^(\w+) gpa-conformance::(\S+)", done.stdout, re.MULTILINE)}


def test_every_chosen_case_is_a_test_of_its_name(run_pytest: RunPytest, tiny_checkpoint: Path, baseline: Path) -> None:
    target = ("--gpa-backend", "torch", "--gpa-model", tiny_checkpoint, "--gpa-baseline", baseline)
    done = run_pytest(
        *target, "--gpa-cases", "logits/ascend-1,contract/max-new-tokens,codec/stream", "--pyargs", "gpa_conformance"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(done) == {"logits/ascend-1": "PASSED", "contract/max-new-tokens": "PASSED"}
    assert re.search(r"^SKIPPED .*codec", done.stdout, re.MULTILINE), done.stdout


def test_a_failure_shows_the_checks_and_what_moved(
    run_pytest: RunPytest, tiny_checkpoint: Path, baseline: Path
) -> None:
    target = ("--gpa-engine", "scaled_engine:create", "--gpa-model", tiny_checkpoint, "--gpa-baseline", baseline)
    done = run_pytest(*target, "--gpa-option", "dtype=float32", "--gpa-cases", "logits/ascend-1,contract/usage")
    assert done.returncode == 1
    assert outcomes(done) == {"logits/ascend-1": "FAILED", "contract/usage": "PASSED"}
    assert "scale: the logits are the reference's times 1.5" in done.stdout
    assert re.search(r"FAIL rel_l2 50 % > ", done.stdout), done.stdout
    assert "Traceback" not in done.stdout


def test_known_failures_are_expected_failures(
    run_pytest: RunPytest, tiny_checkpoint: Path, baseline: Path, tmp_path: Path
) -> None:
    known = tmp_path / "known.txt"
    known.write_text("logits/ascend-1  scaled on purpose\ncontract/usage  thought to be wrong\n")
    target = ("--gpa-engine", "scaled_engine:create", "--gpa-model", tiny_checkpoint, "--gpa-baseline", baseline)
    done = run_pytest(*target, "--gpa-cases", "logits/ascend-1,contract/usage", "--gpa-known-failures", known)
    assert done.returncode == 0, done.stdout
    assert outcomes(done) == {"logits/ascend-1": "XFAIL", "contract/usage": "XPASS"}
    assert "scaled on purpose" in done.stdout


def test_expressions_of_pytest_select_cases(run_pytest: RunPytest, tiny_checkpoint: Path, baseline: Path) -> None:
    target = ("--gpa-backend", "torch", "--gpa-model", tiny_checkpoint, "--gpa-baseline", baseline)
    done = run_pytest(*target, "--collect-only", "-q", "-k", "seed or allowed")
    assert done.returncode == 0
    assert "contract/seed" in done.stdout
    assert "logits/ascend-1" not in done.stdout


def test_an_engine_that_does_not_open_is_an_error_of_its_cases(
    run_pytest: RunPytest, tiny_checkpoint: Path, baseline: Path
) -> None:
    target = ("--gpa-backend", "torch", "--gpa-model", tiny_checkpoint, "--gpa-baseline", baseline)
    done = run_pytest(*target, "--gpa-device", "toaster", "--gpa-cases", "contract/usage")
    assert done.returncode == 1
    assert outcomes(done) == {"contract/usage": "ERROR"}
    assert "toaster" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpa-model", "MODEL"), "not what to test: --gpa-backend or --gpa-engine"),
        (("--gpa-backend", "torch"), "--gpa-model is missing"),
        (("--gpa-backend", "torch", "--gpa-model", "MODEL", "--gpa-cases", "logitz"), "logitz"),
        (("--gpa-backend", "tpu", "--gpa-model", "MODEL"), "unknown backend 'tpu'"),
        (("--gpa-backend", "torch", "--gpa-model", "MODEL", "--gpa-case-timeout", "0"), "--gpa-case-timeout is 0"),
        (("--gpa-backend", "torch", "--gpa-model", "MODEL", "--gpa-utterances", "0"), "--gpa-utterances is 0"),
        (("--gpa-backend", "torch", "--gpa-model", "MODEL", "--gpa-known-failures", "none.txt"), "none.txt"),
    ],
)
def test_misuse_is_said_before_anything_is_loaded(
    run_pytest: RunPytest, tiny_checkpoint: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run_pytest(*(tiny_checkpoint if word == "MODEL" else word for word in arguments))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_other_runs_of_pytest_import_nothing_of_the_suite(run_pytest: RunPytest, tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import sys\n\n\ndef test_own():\n"
        "    ours = {name for name in sys.modules if name.startswith(('gpa_', 'torch'))}\n"
        "    assert ours == {'gpa_conformance', 'gpa_conformance.pytest'}\n"
    )
    done = run_pytest("test_own.py")
    assert done.returncode == 0, done.stdout
