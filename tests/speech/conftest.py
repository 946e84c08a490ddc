"""One speech model on the reference's tiny checkpoint for all tests of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpa_engines.speech import SpeechModel


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Path) -> Iterator[SpeechModel]:
    with SpeechModel.load(tiny_checkpoint, dtype="float32") as model:
        yield model
