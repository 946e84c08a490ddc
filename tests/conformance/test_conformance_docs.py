"""docs/conformance.md: the example engine is whole and right, and what is named there exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpa_conformance.cases import FAMILIES, load_cases
from gpa_conformance.limits import METRICS
from gpa_conformance.results import RunReport

TEXT = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_engine_passes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert example is not None
    (tmp_path / "my_engine.py").write_text(example[1], encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "gpa_conformance.cli",
        "run",
        "--model",
        str(tiny_checkpoint),
        "--dtype",
        "float32",
    ]
    command += ["--engine", "my_engine:create", "--cases", "logits,generate,contract", "--json", "report.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = RunReport.from_json(tmp_path / "report.json")
    assert report.engine["backend"] == "my-engine"
    assert report.failed == 0
    assert report.passed > 30


def test_every_family_is_described() -> None:
    described = re.findall(
        r"^\| (\w+) \| .*\|$", TEXT.partition("## What is tested")[2].partition("## ")[0], re.MULTILINE
    )
    assert tuple(described[1:]) == FAMILIES


def test_named_cases_and_figures_exist() -> None:
    cases = {case.id for case in load_cases()}
    named = set(re.findall(rf"\b((?:{'|'.join(FAMILIES)})/[a-z0-9-]+)\b", TEXT))
    assert named
    assert named <= cases
    figures = re.findall(r"^\| (`[^|]+`) \|", TEXT.partition("| figure |")[2].partition("\n\n")[0], re.MULTILINE)
    for figure in re.findall(r"`(\w+)`", " ".join(figures)):
        assert figure in METRICS, figure
