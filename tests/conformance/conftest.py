"""A baseline of the tiny checkpoint that needs no codec, made once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpa_conformance.baseline import Baseline
from gpa_conformance.cases import load_cases, select
from gpa_conformance.preparation import make_baseline
from gpa_engines.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def text_baseline(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    """All cases of text and patterns; those of clips are left out."""
    folder = tmp_path_factory.mktemp("baseline") / "text"
    cases = [case for case in select(load_cases(), None) if case.kind != "suspect"]
    return asyncio.run(make_baseline(Checkpoint.open(tiny_checkpoint), folder, None, cases, threads=1))
