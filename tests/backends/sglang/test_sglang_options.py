"""Options of the SGLang backend: what becomes of them, and which are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import BackendError
from gpa_engines.backends.sglang import create_engine
from gpa_engines.backends.sglang.engine import UNSET, server_args
from gpa_engines.lm_config import LMConfig


def settings(**options: Any) -> Any:
    from dataclasses import replace

    return replace(UNSET, **options)


@pytest.fixture(scope="module")
def arguments(tiny_checkpoint: Path) -> Any:
    config = LMConfig.from_file(tiny_checkpoint / "config.json")
    return lambda **options: server_args(tiny_checkpoint, config, settings(**options))


def test_what_the_engine_needs_is_always_set(arguments: Any, tiny_checkpoint: Path) -> None:
    made = arguments()
    assert made["model_path"] == str(tiny_checkpoint)
    assert made["skip_tokenizer_init"] is True
    assert made["enable_return_hidden_states"] is True
    assert made["disable_radix_cache"] is True
    assert made["trust_remote_code"] is False
    assert made["stream_interval"] == 1


def test_the_rule_needs_processors_and_penalties_need_every_token_in_time(arguments: Any) -> None:
    for sampling, needed in (("auto", True), ("rule", True), ("native", False)):
        made = arguments(sampling=sampling)
        assert made["enable_custom_logit_processor"] is needed
        assert made["disable_overlap_schedule"] is True


def test_a_cpu_is_not_left_to_sglangs_choices(arguments: Any) -> None:
    made = arguments(device="cpu")
    assert (made["dtype"], made["attention_backend"], made["max_total_tokens"]) == ("float32", "torch_native", 8192)
    made = arguments(device="cuda")
    assert made["dtype"] == "bfloat16"
    assert "attention_backend" not in made
    assert "max_total_tokens" not in made


def test_options_go_by_sglangs_names(arguments: Any) -> None:
    made = arguments(
        tensor_parallel=2,
        data_parallel=3,
        mem_fraction=0.5,
        max_running_requests=9,
        max_tokens_in_flight=1000,
        max_context=100,
        prefill_chunk=64,
        prefix_caching=True,
        attention_backend="triton",
        engine_args={"log_level": "info"},
    )
    expected = {
        "tp_size": 2,
        "dp_size": 3,
        "mem_fraction_static": 0.5,
        "max_running_requests": 9,
        "max_total_tokens": 1000,
        "context_length": 107,
        "chunked_prefill_size": 64,
        "disable_radix_cache": False,
        "attention_backend": "triton",
        "log_level": "info",
    }
    assert {name: made[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "mps"}, 'device is "mps"; expected one of auto, cuda, cpu'),
        ({"dtype": "int8"}, "dtype"),
        ({"sampling": "mine"}, "sampling"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0"),
        ({"max_context": True}, "max_context is true"),
        ({"mem_fraction": 1.5}, "mem_fraction is 1.5"),
        ({"prefix_caching": "yes"}, "prefix_caching"),
        ({"tp_size": 2}, "tp_size is set by the option tensor_parallel"),
        ({"model_path": "x"}, "model_path cannot be set"),
        ({"speculative_algorithm": "EAGLE"}, "speculative_algorithm cannot be set"),
        ({"trust_remote_code": True}, "no code of a checkpoint"),
        ({"url": "http://127.0.0.1:1", "tensor_parallel": 2}, "tensor_parallel cannot be set for a server"),
        ({"url": "http://127.0.0.1:1"}, "cannot be reached"),
    ],
)
def test_what_cannot_be_had_is_refused(tiny_checkpoint: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        create_engine(tiny_checkpoint, **options)
