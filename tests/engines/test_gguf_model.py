"""GGUF files as a GPA model: what the metadata promises is checked before llama.cpp is asked."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import CheckpointError
from gpa_engines.backends.llama_cpp.embedding_table import open_table, table_metadata
from gpa_engines.backends.llama_cpp.gguf_file import read_header
from gpa_engines.backends.llama_cpp.gguf_model import GgufModel, GpaMetadata, model_tensors
from gpa_engines.lm_config import LMConfig

gguf = pytest.importorskip("gguf", reason="files are written with gguf")

CONFIG = LMConfig(
    vocab_size=12,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=128,
    tie_word_embeddings=True,
    dtype="F32",
)

FULL = GpaMetadata(
    converter="test",
    vocab="full",
    vocab_size=12,
    ids=(range(12),),
    glm=range(4, 6),
    global_=range(6, 8),
    semantic=range(8, 11),
    tokenizer_sha256="t" * 64,
    source_sha256="s" * 64,
)
SPEECH = replace(FULL, vocab="speech", ids=(range(3, 4), range(8, 11)), embeddings_file="m-embeddings-f32.safetensors")


def write(
    path: Path, gpa: GpaMetadata = FULL, change: Callable[[dict[str, Any], dict[str, Any]], object] | None = None
) -> Path:
    """A model of zeros. change: may alter the metadata and the tensors' shapes first."""
    metadata: dict[str, Any] = {
        "general.file_type": 0,
        "qwen3.context_length": 128,
        "qwen3.embedding_length": 32,
        "qwen3.block_count": 1,
        "qwen3.feed_forward_length": 64,
        "qwen3.attention.head_count": 2,
        "qwen3.attention.head_count_kv": 1,
        "qwen3.attention.key_length": 16,
        "qwen3.attention.value_length": 16,
        "qwen3.vocab_size": gpa.rows,
        "qwen3.rope.freq_base": 1e6,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "tokenizer.ggml.model": "none",
        **gpa.entries(),
    }
    if gpa.vocab == "full":
        tokens = [f"t{number}" for number in range(12)]
        metadata |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 12,
        }
    shapes: dict[str, Any] = dict(model_tensors(CONFIG, gpa.rows))
    if change is not None:
        change(metadata, shapes)
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "qwen3"))
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("gpa", [FULL, SPEECH])
def test_says_what_was_written(tmp_path: Path, gpa: GpaMetadata) -> None:
    model = GgufModel.open(write(tmp_path / "m.gguf", gpa))
    assert model.gpa == gpa
    assert model.file_type == "F32"
    assert replace(model.config, rms_norm_eps=1e-6) == CONFIG
    expected = None if gpa is FULL else tmp_path / "m-embeddings-f32.safetensors"
    assert model.embeddings_path == expected


def test_an_output_matrix_of_its_own_is_part_of_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", SPEECH, lambda _, shapes: shapes.update({"output.weight": (4, 32)}))
    assert not GgufModel.open(path).config.tie_word_embeddings


@pytest.mark.parametrize(
    ("gpa", "changes", "words"),
    [
        (FULL, {"general.architecture": "llama"}, "'llama'"),
        (FULL, {"gpa.format": 2}, "gpa.format is 2"),
        (FULL, {"gpa.vocab": "half"}, "'half'"),
        (FULL, {"gpa.ids.stops": [11]}, "0 to 11"),
        (FULL, {"gpa.ids.stops": [12, 13]}, "1 starts and 2 stops"),
        (SPEECH, {"gpa.ids.starts": [3, 2]}, "ascending"),
        (SPEECH, {"gpa.ids.stops": [4, 13]}, "below 12"),
        (SPEECH, {"gpa.semantic.first": 11}, "gpa.semantic"),
        (SPEECH, {"gpa.embeddings.file": "../elsewhere.safetensors"}, "plain name"),
        (SPEECH, {"gpa.embeddings.file": None}, "no gpa.embeddings.file"),
        (SPEECH, {"qwen3.vocab_size": 5}, "vocab_size is 5"),
        (FULL, {"qwen3.block_count": 2**31}, "block_count"),
        (FULL, {"qwen3.attention.head_count_kv": 0}, "head_count_kv is 0"),
        (FULL, {"qwen3.attention.value_length": 8}, "keys have 16"),
        (FULL, {"qwen3.embedding_length": 64}, "shape"),
        (FULL, {"tokenizer.ggml.tokens": ["t"] * 12}, "twice"),
        (FULL, {"tokenizer.ggml.tokens": ["t"]}, "1 token texts"),
        (FULL, {"tokenizer.ggml.token_type": [1]}, "1 token types"),
        (FULL, {"tokenizer.ggml.model": "llama"}, "'llama'"),
    ],
)
def test_metadata_that_contradicts_is_refused(
    tmp_path: Path, gpa: GpaMetadata, changes: dict[str, Any], words: str
) -> None:
    def change(metadata: dict[str, Any], shapes: dict[str, Any]) -> None:
        metadata.update(changes)
        for key in [key for key, value in metadata.items() if value is None]:
            del metadata[key]

    with pytest.raises(CheckpointError, match=words):
        GgufModel.open(write(tmp_path / "m.gguf", gpa, change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _, shapes: shapes.pop("blk.0.ffn_up.weight"), "no tensor blk.0.ffn_up.weight"),
        (lambda _, shapes: shapes.update({"blk.0.attn_q.bias": (32,)}), "blk.0.attn_q.bias is no tensor"),
        (lambda _, shapes: shapes.update({"token_embd.weight": (11, 32)}), "token_embd.weight has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: Callable[..., object], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        GgufModel.open(write(tmp_path / "m.gguf", FULL, change))


def test_every_truncation_of_a_model_is_refused(tmp_path: Path) -> None:
    content = write(tmp_path / "m.gguf").read_bytes()
    end = read_header(tmp_path / "m.gguf").data_offset
    for length in (*range(0, end, 7), *range(end, len(content) - 32, 997)):
        (tmp_path / "short.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            GgufModel.open(tmp_path / "short.gguf")


def write_table(path: Path, values: np.ndarray, metadata: dict[str, str]) -> Path:
    entry = {"dtype": {2: "F16", 4: "F32"}[values.itemsize], "shape": values.shape, "data_offsets": [0, values.nbytes]}
    text = json.dumps({"__metadata__": metadata, "embeddings": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values.tobytes())
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_table_is_mapped(tmp_path: Path, dtype: type[np.floating]) -> None:
    values = np.arange(12 * 32, dtype=dtype).reshape(12, 32)
    path = write_table(tmp_path / "t.safetensors", values, table_metadata("s", "t"))
    table = open_table(path, shape=(12, 32), source_sha256="s", tokenizer_sha256="t")
    assert isinstance(table, np.memmap)
    assert table.dtype == dtype
    np.testing.assert_array_equal(table, values)


def test_a_table_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.safetensors", np.zeros((12, 32), np.float16), table_metadata("s", "t"))
    with pytest.raises(CheckpointError, match="another conversion"):
        open_table(path, shape=(12, 32), source_sha256="x", tokenizer_sha256="t")
    with pytest.raises(CheckpointError, match=r"expected F16 or F32 \[12, 64\]"):
        open_table(path, shape=(12, 64), source_sha256="s", tokenizer_sha256="t")
    with pytest.raises(CheckpointError, match="is missing: the embedding table"):
        open_table(tmp_path / "u.safetensors", shape=(12, 32), source_sha256="s", tokenizer_sha256="t")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        open_table(path, shape=(12, 32), source_sha256="s", tokenizer_sha256="t")
