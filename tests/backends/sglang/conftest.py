"""The fake package `sglang`, found by this process and by the worker's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FAKES = Path(__file__).parents[2] / "servers" / "fakes"


@pytest.fixture(scope="module")
def fake_sglang() -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(FAKES))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(FAKES), os.environ.get("PYTHONPATH")])))
        yield FAKES
