"""What can be wrong with the engine that a command line names, and what is said about it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpa_codecs.errors import BackendError, CheckpointError, GpaError
from gpa_conformance.target import make_target
from gpa_engines.engine import Engine
from gpa_engines.engine_options import parse_options

CROOKED = "tests.conformance.crooked_engines"


def opened(target: str, model_dir: Path, **options: object) -> Engine:
    return asyncio.run(make_target(model_dir, engine=target, options=options).open())


@pytest.mark.parametrize("factory", ["healthy", "healthy_later"])
def test_a_factory_may_be_a_function_or_a_coroutine_function(tiny_checkpoint: Path, factory: str) -> None:
    engine = opened(f"{CROOKED}:{factory}", tiny_checkpoint)
    assert isinstance(engine, Engine)
    asyncio.run(engine.close())


def test_options_reach_the_factory(tiny_checkpoint: Path) -> None:
    engine = opened(f"{CROOKED}:healthy", tiny_checkpoint, dtype="bfloat16")
    assert engine.info.dtype == "bfloat16"
    asyncio.run(engine.close())


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("no_such_package.module:make", "there is no module 'no_such_package'"),
        (f"{CROOKED}:nothing", "has no 'nothing'; it has: "),
        (f"{CROOKED}:not_callable", "expected something to call"),
        (f"{CROOKED}:no_engine", "is not an Engine: it has no logits, close"),
        (f"{CROOKED}:padded", "the engine's vocabulary has 5152 ids, the checkpoint's 5141"),
        (f"{CROOKED}:failing", "failed for .*OSError: the device is busy"),
        (f"{CROOKED}:takes_nothing", "takes no argument"),
        ("no-colon", "expected package.module:factory"),
        ("a b:c", "expected package.module:factory"),
    ],
)
def test_what_is_wrong_with_a_factory_is_named(tiny_checkpoint: Path, target: str, named: str) -> None:
    with pytest.raises(BackendError, match=named):
        opened(target, tiny_checkpoint)


def test_a_module_that_needs_another_one_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_engine.py").write_text("import package_that_is_missing\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match="importing needy_engine needs 'package_that_is_missing'"):
        opened("needy_engine:make", tmp_path)


def test_an_option_that_a_factory_does_not_have_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match="has no option 'speed'; its options: dtype"):
        opened(f"{CROOKED}:healthy", tiny_checkpoint, speed=3)


def test_an_option_that_a_backend_does_not_have_is_refused(tiny_checkpoint: Path) -> None:
    target = make_target(tiny_checkpoint, backend="torch", options={"speed": 3})
    with pytest.raises(BackendError, match="'torch' has no option 'speed'; its options: "):
        asyncio.run(target.open())


def test_an_unknown_backend_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'nonsense'"):
        make_target(tmp_path, backend="nonsense", options={})


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        asyncio.run(make_target(tmp_path, backend="torch", options={}).open())


@pytest.mark.parametrize(("backend", "engine"), [(None, None), ("torch", "a:b")])
def test_exactly_one_target_is_expected(tmp_path: Path, backend: str | None, engine: str | None) -> None:
    with pytest.raises(BackendError, match="either --backend NAME or --engine"):
        make_target(tmp_path, backend=backend, engine=engine, options={})


def test_option_values_are_read_as_json_where_they_are() -> None:
    options = parse_options(["max_batch=8", "top=0.5", "fast=true", "device=cuda:1", "path=a=b", "none=null"])
    assert options == {"max_batch": 8, "top": 0.5, "fast": True, "device": "cuda:1", "path": "a=b", "none": None}


@pytest.mark.parametrize("pairs", [["no_value"], ["=3"], ["two words=3"], ["a=1", "a=2"], ["key=secret"]])
def test_bad_options_are_refused(pairs: list[str]) -> None:
    with pytest.raises(GpaError, match="--option"):
        parse_options(pairs)


def test_an_option_with_a_flag_of_its_own_is_refused() -> None:
    with pytest.raises(GpaError, match="--dtype is the option for it"):
        parse_options(["dtype=float32"], {"dtype": "--dtype"})
