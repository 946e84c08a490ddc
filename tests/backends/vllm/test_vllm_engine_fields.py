"""Engine arguments of vLLM that a user gives himself: names, and text as the field's type."""

# vllm has an environment of its own, which is not that of the type checker.
# pyright: reportMissingImports=false

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

import pytest

from gpa_codecs.errors import BackendError
from gpa_engines.backends.vllm.engine_fields import OPTIONS, OURS, read_fields


class Kernel(Enum):
    FLASH = "flash.module"
    CPU = "cpu.module"


class OwnConfig:
    """Stands for a configuration class of vLLM."""


KNOWN: dict[str, Any] = {
    "block_size": int | None,
    "cpu_offload_gb": float,
    "enable_lora": bool,
    "load_format": str | Literal["auto", "dummy"],
    "scheduling_policy": Literal["fcfs", "priority"],
    "cudagraph_capture_sizes": list[int] | None,
    "offload_params": set[str],
    "hf_overrides": dict[str, Any],
    "attention_backend": Kernel | None,
    "compilation_config": OwnConfig,
    "limit": Annotated[int, "at least 1"],
    "device_ids": list[int | str] | None,
    "_api_process_rank": int,
    "tensor_parallel_size": int,
    "model": str,
}


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("block_size", 32, 32),
        ("block_size", "32", 32),
        ("block_size", None, None),
        ("block_size", "None", None),
        ("cpu_offload_gb", 2, 2.0),
        ("cpu_offload_gb", "1.5", 1.5),
        ("enable_lora", True, True),
        ("enable_lora", "False", False),
        ("load_format", "dummy", "dummy"),
        ("load_format", 7, "7"),
        ("scheduling_policy", "priority", "priority"),
        ("cudagraph_capture_sizes", "1,2, 4", [1, 2, 4]),
        ("cudagraph_capture_sizes", [1, "2"], [1, 2]),
        ("cudagraph_capture_sizes", 8, [8]),
        ("offload_params", "a,b", {"a", "b"}),
        ("hf_overrides", {"x": 1}, {"x": 1}),
        ("attention_backend", "flash", Kernel.FLASH),
        ("attention_backend", "cpu.module", Kernel.CPU),
        ("compilation_config", {"mode": 0}, {"mode": 0}),
        ("limit", "3", 3),
        ("device_ids", "0,gpu-1", [0, "gpu-1"]),
    ],
)
def test_a_value_becomes_the_fields_type(name: str, value: Any, read: Any) -> None:
    found = read_fields({name: value}, KNOWN, ("dtype",))[name]
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("block_size", "many", "a whole number or null"),
        ("block_size", True, "a whole number or null"),
        ("block_size", 1.5, "a whole number or null"),
        ("cpu_offload_gb", "much", "a number"),
        ("enable_lora", "perhaps", "true or false"),
        ("enable_lora", 1, "true or false"),
        ("scheduling_policy", "lifo", "fcfs, priority"),
        ("cudagraph_capture_sizes", "1,x", "a list or null"),
        ("hf_overrides", "x", "a JSON object"),
        ("attention_backend", "none such", "Kernel or null"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any, expected: str) -> None:
    with pytest.raises(BackendError, match=f"{name} is .*; vLLM expects {expected}"):
        read_fields({name: value}, KNOWN, ("dtype",))


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(BackendError, match=r"no option 'block_sise', .* did you mean block_size\?"):
        read_fields({"block_sise": 1}, KNOWN, ("dtype", "threads"))
    with pytest.raises(BackendError, match=r"did you mean threads\? Its options: dtype, threads"):
        read_fields({"thread": 1}, KNOWN, ("dtype", "threads"))
    with pytest.raises(BackendError, match="no option '_api_process_rank'"):
        read_fields({"_api_process_rank": 1}, KNOWN, ())


@pytest.mark.parametrize("name", OPTIONS)
def test_a_field_that_an_option_sets_names_the_option(name: str) -> None:
    with pytest.raises(BackendError, match=f"{name} is set by the option {OPTIONS[name]} "):
        read_fields({name: 1}, KNOWN, ())


@pytest.mark.parametrize("name", OURS)
def test_a_field_that_the_engine_sets_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(BackendError, match=f"{name} cannot be set for backend 'vllm': {OURS[name]}"):
        read_fields({name: 1}, KNOWN, ())


def test_the_names_are_vllms(vllm_installed: None) -> None:
    """Every field of ours that is refused exists, and every one that we set is refused or an option."""
    import dataclasses
    from pathlib import Path

    from vllm.engine.arg_utils import AsyncEngineArgs

    from gpa_engines.backends.vllm.llm import option_names
    from gpa_engines.lm_config import LMConfig
    from tests.backends.vllm.test_vllm_settings import CONFIG, settings

    known = {each.name for each in dataclasses.fields(AsyncEngineArgs)}
    assert {*OPTIONS, *OURS} <= known
    everything = settings(gpu_memory_utilization=0.5, prefill_chunk=64, kv_cache_gib=1.0)
    set_by_us = everything.engine_fields(
        Path("m"), LMConfig.from_dict(CONFIG), device="cpu", dtype="float32", generation_config=Path("g")
    )
    assert set(set_by_us) <= known
    assert set(set_by_us) <= {*OPTIONS, *OURS, *option_names()}
