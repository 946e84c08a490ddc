"""A folder as a machine has it that only talks to servers, and fakes of servers that have its model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs httpx")

from gpa_engines.servers.environment import KEY_VARIABLE, URL_VARIABLE
from tests.servers.fake_vllm import VOCABULARY, FakeVllm

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "dtype": "bfloat16",
    "eos_token_id": 50,
}


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.delenv(URL_VARIABLE, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """config.json and a tokenizer that names every id as the fakes do; no weights."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [50, 51]}))
    (place / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|52|>"}}))
    added = [{"id": token, "content": f"<|{token}|>"} for token in range(40, VOCABULARY)]
    (place / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    return place


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeVllm]]:
    """Start a fake; all of them end with the test."""
    with ExitStack() as stack:

        def start(**options: Any) -> FakeVllm:
            fake = FakeVllm(**options)
            stack.enter_context(fake)
            return fake

        yield start
