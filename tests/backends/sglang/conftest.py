"""The fake package `sglang`, found by this process and by the worker's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

FAKES = Path(__file__).parents[2] / "servers" / "fakes"


@pytest.fixture
def fake_sglang(monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("transformers", reason="the fake computes its answers with transformers")
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(FAKES), os.environ.get("PYTHONPATH")])))
    return FAKES
