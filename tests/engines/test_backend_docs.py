"""docs/backends.md has a section for every backend, which names each of its options."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from gpa_engines.registry import BACKENDS

PAGE = (Path(__file__).parents[2] / "docs" / "backends.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}


@pytest.mark.parametrize("name", BACKENDS)
def test_every_option_of_a_backend_is_described(name: str) -> None:
    module = BACKENDS[name].module
    assert module is not None
    parameters = inspect.signature(import_module(module).create_engine).parameters.values()
    options = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    assert options, name
    described = set(re.findall(r"`([\w-]+)(?:=[^`]*)?`", SECTIONS[name]))
    assert [option for option in options if option not in described] == []


@pytest.mark.parametrize("name", BACKENDS)
def test_every_section_says_how_to_install_and_to_start(name: str) -> None:
    section = SECTIONS[name]
    assert f"gpa-engines[{BACKENDS[name].extra}]" in section
    assert f"--backend {name}" in section
    for subject in ("Parity", "Traps"):
        assert subject in section or name == "ascend", f"{name}: {subject} (ascend has a page of its own)"
