"""The baseline of the tiny checkpoint, made once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpa_conformance.cases import load_cases
from gpa_conformance.preparation import find_codec, make_baseline
from gpa_engines.checkpoint import Checkpoint
from tests.conformance.faults.suite import Suite


@pytest.fixture(scope="session")
def suite(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    make_codec, reason = find_codec(checkpoint, "", None)
    assert make_codec is not None, reason
    folder = tmp_path_factory.mktemp("baseline") / "tiny"
    baseline = asyncio.run(make_baseline(checkpoint, folder, make_codec, load_cases(), threads=1))
    return Suite(checkpoint, baseline, make_codec)
