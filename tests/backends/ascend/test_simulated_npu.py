"""Every test of on_simulated_npu.py, which runs once, in its own process: a simulated device cannot be undone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FILE = Path(__file__).with_name("on_simulated_npu.py")
TESTS = [
    node.name
    for node in ast.parse(FILE.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]

Outcomes = dict[str, list[ElementTree.Element]]


def require_simulation() -> None:
    """Skip where this torch lacks the private means of the simulation."""
    pytest.importorskip("torch", reason="needs torch")
    registration = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot register a device that is written in Python")


def in_own_process(*arguments: str | Path, threads: int = 1) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The results of the other process: for every test function, those of all its parameters."""
    require_simulation()
    report = tmp_path_factory.mktemp("simulated") / "report.xml"
    run = in_own_process("-m", "pytest", FILE, "-q", "-p", "no:cacheprovider", f"--junit-xml={report}")
    assert report.is_file(), run.stdout + run.stderr
    found: Outcomes = defaultdict(list)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found[case.get("name", "").partition("[")[0]].append(case)
    return found


@pytest.mark.parametrize("name", TESTS)
def test_on_the_simulated_device(outcomes: Outcomes, name: str) -> None:
    assert outcomes[name], "it was not run"
    for case in outcomes[name]:
        for kind in ("failure", "error", "skipped"):
            for problem in case.iter(kind):
                pytest.fail(f"{case.get('name')}, on the simulated device: {kind}\n{problem.text}", pytrace=False)


def test_the_conformance_suite_passes_on_the_simulated_device(tiny_checkpoint: Path, tmp_path: Path) -> None:
    require_simulation()
    report = tmp_path / "report.json"
    cases = "logits/ascend-1,cache/greedy,batch/eight,contract/stop"
    run = in_own_process(
        *("-m", "gpa_conformance.cli", "run", "--model", tiny_checkpoint, "--cases", cases, "--json", report),
        *("--engine", "tests.backends.ascend.simulated_engine:create", "--dtype", "float32"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    from gpa_conformance.results import RunReport

    found = RunReport.from_json(report)
    assert (found.passed, len(found.cases)) == (4, 4)
    assert found.engine["backend"] == "ascend"
    assert found.engine["note"].startswith("simulated device, torch_npu ")
