"""What a user's options come to in vLLM's engine arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import BackendError
from gpa_engines.backends.vllm.settings import RULE_CLASS, Settings, default_threads
from gpa_engines.lm_config import LMConfig

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 180445,
    "hidden_size": 512,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}


def settings(**values: Any) -> Settings:
    defaults: dict[str, Any] = {
        "dtype": "auto",
        "tensor_parallel": 1,
        "data_parallel": 1,
        "gpu_memory_utilization": None,
        "max_num_seqs": 64,
        "max_context": None,
        "prefill_chunk": None,
        "prefix_caching": False,
        "enforce_eager": None,
        "threads": None,
        "kv_cache_gib": None,
        "engine_args": {},
    }
    return Settings(**(defaults | values))


def engine_fields(device: str, dtype: str = "bfloat16", **values: Any) -> dict[str, Any]:
    return settings(**values).engine_fields(
        Path("model"), LMConfig.from_dict(CONFIG), device=device, dtype=dtype, generation_config=Path("empty")
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is unknown to backend 'vllm'; expected auto, float32"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0; expected a whole number of at least 1"),
        ({"max_num_seqs": True}, "max_num_seqs is True"),
        ({"max_context": "many"}, "max_context is 'many'"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"prefill_chunk": -1}, "prefill_chunk is -1"),
        ({"gpu_memory_utilization": 90}, "gpu_memory_utilization is 90; expected above 0 and at most 1"),
        ({"gpu_memory_utilization": "half"}, "gpu_memory_utilization is 'half'"),
        ({"kv_cache_gib": 0}, "kv_cache_gib is 0; expected GiB above 0"),
        ({"enforce_eager": "yes"}, "enforce_eager is 'yes'; expected true or false"),
        ({"prefix_caching": None}, "prefix_caching is None; expected true or false"),
    ],
)
def test_a_value_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        settings(**values).check()


def test_defaults_can_be() -> None:
    settings().check()


def test_dtypes_are_chosen_by_the_device() -> None:
    assert settings().resolved_dtype("cpu", has_bfloat16=True) == "float32"
    assert settings().resolved_dtype("cuda", has_bfloat16=True) == "bfloat16"
    assert settings().resolved_dtype("cuda", has_bfloat16=False) == "float16"
    with pytest.raises(BackendError, match="'bfloat16' is not available on this device"):
        settings(dtype="bfloat16").resolved_dtype("cuda", has_bfloat16=False)


def test_a_gpu_serves_the_whole_context_and_a_cpu_a_part() -> None:
    config = LMConfig.from_dict(CONFIG)
    assert settings().context(config, "cuda") == 32768
    assert settings().context(config, "cpu") == 8192
    assert settings(max_context=100).context(config, "cpu") == 100
    with pytest.raises(BackendError, match="max_context is 40000; the checkpoint has 32768 positions"):
        settings(max_context=40000).context(config, "cpu")


def test_logits_of_a_whole_context_need_a_position_more() -> None:
    assert engine_fields("cpu", max_context=100)["max_model_len"] == 101
    assert engine_fields("cuda")["max_model_len"] == 32768


def test_a_cpu_has_room_for_two_longest_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    position = 2 * 28 * 8 * 128 * 2  # bytes
    assert engine_fields("cpu", max_context=1024)["kv_cache_memory_bytes"] == position * 128 * 17
    assert engine_fields("cpu", "float32", max_context=1024)["kv_cache_memory_bytes"] == 2 * position * 128 * 17
    assert engine_fields("cpu", kv_cache_gib=1.5)["kv_cache_memory_bytes"] == 3 * 2**29
    assert "kv_cache_memory_bytes" not in engine_fields("cuda")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert "kv_cache_memory_bytes" not in engine_fields("cpu")
    assert engine_fields("cpu", kv_cache_gib=1.5)["kv_cache_memory_bytes"] == 3 * 2**29


def test_steps_are_short_on_a_cpu_and_no_shorter_than_a_batch() -> None:
    assert engine_fields("cpu")["max_num_batched_tokens"] == 512
    assert engine_fields("cpu", prefill_chunk=32, max_num_seqs=48)["max_num_batched_tokens"] == 48
    assert "max_num_batched_tokens" not in engine_fields("cuda")


def test_a_cpu_does_not_wait_for_a_compiler() -> None:
    assert engine_fields("cpu")["enforce_eager"] is True
    assert engine_fields("cuda")["enforce_eager"] is False
    assert engine_fields("cpu", enforce_eager=False)["enforce_eager"] is False


def test_what_decides_over_answers_is_always_set() -> None:
    fields = engine_fields("cuda", gpu_memory_utilization=0.4, tensor_parallel=2, data_parallel=3)
    assert fields["logits_processors"] == [RULE_CLASS]
    assert (fields["generation_config"], fields["skip_tokenizer_init"]) == ("empty", True)
    assert (fields["logprobs_mode"], fields["max_logprobs"]) == ("raw_logits", -1)
    assert (fields["enable_prefix_caching"], fields["trust_remote_code"]) == (False, False)
    assert (fields["tensor_parallel_size"], fields["data_parallel_size"]) == (2, 3)
    assert fields["gpu_memory_utilization"] == 0.4


def test_threads_are_those_of_the_environment_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert default_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads() >= 1
