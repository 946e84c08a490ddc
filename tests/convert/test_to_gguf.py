"""What to_gguf.py writes: every value, every token, and nothing when it should not."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gpa_codecs.prompts import task_tokens
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.backends.llama_cpp.embedding_table import open_table
from gpa_engines.backends.llama_cpp.gguf_model import GgufModel
from gpa_engines.random_checkpoint import make_checkpoint
from gpa_engines.text import text_tokens
from tests.convert.gguf_checkpoints import change_config, change_tokenizer, float32_weights, shard, write_language_model
from tests.convert.to_gguf_process import to_gguf

gguf = pytest.importorskip("gguf", reason="converting to GGUF needs gguf")


def tensor(model: GgufModel, name: str) -> np.ndarray:
    """A tensor's stored bytes as an array: float32, float16, or uint8 rows."""
    info = model.header.tensors[name]
    raw = model.path.read_bytes()[info.offset : info.offset + info.nbytes]
    dtype = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}.get(info.type, np.dtype("u1"))
    return np.frombuffer(raw, dtype).reshape(*info.shape[:-1], -1)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_holds_the_weights_of_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path, outtype: str) -> None:
    done = to_gguf(tiny_checkpoint, "--outfile", tmp_path, "--outtype", outtype)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / f"tinyv-{outtype.upper()}.gguf")]
    model = GgufModel.open(tmp_path / f"tinyv-{outtype.upper()}.gguf")
    assert model.file_type == outtype.upper()
    weights = float32_weights(tiny_checkpoint)
    names = {"token_embd": "embed_tokens", "blk.1.ffn_down": "layers.1.mlp.down_proj", "output_norm": "norm"}
    names |= {"blk.2.attn_k_norm": "layers.2.self_attn.k_norm", "blk.0.attn_q": "layers.0.self_attn.q_proj"}
    for name, stored in names.items():
        expected = weights[f"model.{stored}.weight"]
        kind = gguf.GGMLQuantizationType[outtype.upper() if expected.ndim == 2 else "F32"]
        found = gguf.quants.dequantize(tensor(model, f"{name}.weight"), kind).reshape(expected.shape)
        # Half a step of the largest value of a block: 1/254 of it, and the scale itself is float16.
        tolerance = np.abs(expected).max() / 225 if kind.name == "Q8_0" else 1e-7
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert not list(tmp_path.glob(".*"))


def test_says_what_it_was_made_from(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert to_gguf(tiny_checkpoint, "--outfile", tmp_path / "a.gguf", "--model-name", "demo").returncode == 0
    model = GgufModel.open(tmp_path / "a.gguf")
    space = TokenSpace.from_file(tiny_checkpoint / "tokenizer.json")
    assert model.header.text("general.name") == "demo"
    assert (model.gpa.vocab, model.gpa.vocab_size, model.gpa.ids) == ("full", 5141, (range(5141),))
    assert (model.gpa.glm, model.gpa.global_) == (space.glm.range, space.global_.range)
    assert model.gpa.semantic == space.semantic.range
    assert model.gpa.embeddings_file == ""
    assert model.config.max_position_embeddings == 32768
    assert model.config.rope_theta == 1e6
    assert model.config.tie_word_embeddings
    assert "general.license" not in model.header.metadata


def test_auto_keeps_the_dtype_of_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    half = write_language_model(tmp_path / "half", tiny_checkpoint)
    assert to_gguf(half, "--outtype", "auto").returncode == 0
    assert [file.name for file in half.glob("*.gguf")] == ["half-F16.gguf"]


def test_every_token_has_its_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    wider = write_language_model(tmp_path / "wider", tiny_checkpoint, vocab_size=5144)
    assert to_gguf(wider).returncode == 0
    header = GgufModel.open(wider / "wider-F16.gguf").header
    texts = header.byte_strings("tokenizer.ggml.tokens")
    types = header.numbers("tokenizer.ggml.token_type")
    space = TokenSpace.from_file(tiny_checkpoint / "tokenizer.json")
    assert texts[space.control.im_end] == b"<|im_end|>"
    assert texts[space.semantic.offset + 7] == b"<|bicodec_semantic_7|>"
    assert texts[5141:] == [b"[PAD5141]", b"[PAD5142]", b"[PAD5143]"]
    kinds = gguf.TokenType
    assert types[5141:].tolist() == [kinds.UNUSED] * 3
    assert types[space.control.im_end] == types[space.semantic.offset] == kinds.CONTROL
    assert types[space.encode_text("a")[0]] == kinds.NORMAL


@pytest.mark.parametrize("vocab", ["speech", "text"])
def test_a_part_of_the_vocabulary_is_what_its_tasks_emit(tiny_checkpoint: Path, tmp_path: Path, vocab: str) -> None:
    done = to_gguf(tiny_checkpoint, "--outfile", tmp_path, "--outtype", "f32", "--vocab", vocab)
    assert done.returncode == 0, done.stderr
    space = TokenSpace.from_file(tiny_checkpoint / "tokenizer.json")
    tasks = {"speech": [task_tokens(space, "tts-a"), task_tokens(space, "vc")]}
    tasks["text"] = [task_tokens(space, "stt"), text_tokens(space)]
    emitted = sorted({token for stops, ranges in tasks[vocab] for ids in (stops, *ranges) for token in ids})
    model = GgufModel.open(tmp_path / f"tinyv-{vocab}-F32.gguf")
    assert [token for ids in model.gpa.ids for token in ids] == emitted
    assert model.header.text("tokenizer.ggml.model") == "none"
    embeddings = float32_weights(tiny_checkpoint)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(tensor(model, "token_embd.weight"), embeddings[emitted])
    assert model.embeddings_path is not None
    assert model.embeddings_path == tmp_path / "tinyv-embeddings-f32.safetensors"
    table = open_table(
        model.embeddings_path,
        shape=(5141, 64),
        source_sha256=model.gpa.source_sha256,
        tokenizer_sha256=model.gpa.tokenizer_sha256,
    )
    assert isinstance(table, np.memmap)
    np.testing.assert_array_equal(table, embeddings)


def test_all_vocabularies_share_one_float16_table(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert to_gguf(tiny_checkpoint, "--outfile", tmp_path, "--outtype", "q8_0", "--vocab", "all").returncode == 0
    names = {"tinyv-Q8_0.gguf", "tinyv-speech-Q8_0.gguf", "tinyv-text-Q8_0.gguf", "tinyv-embeddings-f16.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == names
    table = tmp_path / "tinyv-embeddings-f16.safetensors"
    before = table.stat().st_mtime_ns
    again = to_gguf(tiny_checkpoint, "--outfile", tmp_path, "--outtype", "f16", "--vocab", "speech", "--verify")
    assert again.returncode == 0, again.stderr
    assert "is kept" in again.stderr
    assert table.stat().st_mtime_ns == before


def test_an_untied_output_matrix_goes_along(tiny_checkpoint: Path, tmp_path: Path) -> None:
    untied = write_language_model(tmp_path / "untied", tiny_checkpoint, tied=False)
    done = to_gguf(untied, "--vocab", "all", "--verify")
    assert done.returncode == 0, done.stderr
    model = GgufModel.open(untied / "untied-speech-F16.gguf")
    assert not model.config.tie_word_embeddings
    assert model.header.tensors["output.weight"].shape == (model.gpa.rows, 64)


def test_shards_give_the_same_tensors(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole = write_language_model(tmp_path / "whole", tiny_checkpoint)
    parts = shard(Path(shutil.copytree(whole, tmp_path / "parts")))
    for folder in (whole, parts):
        assert to_gguf(folder, "--outfile", tmp_path / f"{folder.name}.gguf", "--model-name", "m").returncode == 0
    first, second = GgufModel.open(tmp_path / "whole.gguf"), GgufModel.open(tmp_path / "parts.gguf")
    assert first.gpa.source_sha256 != second.gpa.source_sha256
    assert first.header.tensors.keys() == second.header.tensors.keys()
    data = [model.path.read_bytes()[model.header.data_offset :] for model in (first, second)]
    assert data[0] == data[1]


def test_a_dry_run_shows_the_plan_and_writes_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = to_gguf(tiny_checkpoint, "--outfile", tmp_path, "--dry-run", "--vocab", "speech", "-v", "--outtype", "q8_0")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    for shown in ("blk.0.ffn_up.weight  Q8_0 [160, 64]", "gpa.vocab = speech", "tinyv-embeddings-f16.safetensors"):
        assert shown in done.stdout


def test_what_exists_is_only_replaced_on_request(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.gguf"
    target.write_bytes(b"mine")
    refused = to_gguf(tiny_checkpoint, "--outfile", target)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert target.read_bytes() == b"mine"
    assert to_gguf(tiny_checkpoint, "--outfile", target, "--overwrite").returncode == 0
    assert GgufModel.open(target).file_type == "BF16"


def test_a_table_of_another_checkpoint_is_not_taken(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = write_language_model(tmp_path / "other", tiny_checkpoint)
    out = tmp_path / "out"
    out.mkdir()
    arguments = ("--outfile", out, "--model-name", "m", "--outtype", "f16")
    assert to_gguf(other, *arguments, "--vocab", "speech").returncode == 0
    refused = to_gguf(tiny_checkpoint, *arguments, "--vocab", "text")
    assert refused.returncode == 2
    assert "m-embeddings-f16.safetensors" in refused.stderr


def test_a_qwen_tokenizer_is_named_as_llama_cpp_names_it(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "random", "tiny", 0)
    assert to_gguf(checkpoint, "--outfile", tmp_path / "a.gguf").returncode == 0
    header = GgufModel.open(tmp_path / "a.gguf").header
    assert header.text("tokenizer.ggml.pre") == "qwen2"
    assert header.count("tokenizer.ggml.merges") == 128
    assert "random weights" in header.text("general.description")


def test_an_unknown_way_to_split_text_is_noted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pattern = {"type": "Split", "pattern": {"Regex": r"\w+|\W"}, "behavior": "Isolated", "invert": False}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    splitter = {"type": "Sequence", "pretokenizers": [pattern, whole]}
    model = write_language_model(tmp_path / "other", tiny_checkpoint)
    change_tokenizer(model, lambda document: document.update(pre_tokenizer=splitter))
    done = to_gguf(model, "--verify")
    assert done.returncode == 0, done.stderr
    assert "note: tokenizer.json splits text" in done.stderr
    assert GgufModel.open(model / "other-F16.gguf").header.text("tokenizer.ggml.pre") == "default"


def test_states_a_licence_that_the_checkpoint_states(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--Owner--Name" / "snapshots" / "abc123"
    folder.parent.mkdir(parents=True)
    write_language_model(folder, tiny_checkpoint)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n", encoding="utf-8")
    done = to_gguf(folder, "--outfile", tmp_path)
    assert done.stdout.split() == [str(tmp_path / "Name-F16.gguf")]
    header = GgufModel.open(tmp_path / "Name-F16.gguf").header
    assert header.text("general.license") == "Apache-2.0"
    assert header.text("general.source.url") == "https://huggingface.co/Owner/Name"


def test_reads_what_transformers_4_and_5_wrote(tiny_checkpoint_copy: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    change_config(tiny_checkpoint_copy, rope_theta=None, rope_scaling=None, rope_parameters=rope)
    assert to_gguf(tiny_checkpoint_copy, "--outfile", tmp_path / "a.gguf").returncode == 0
    assert GgufModel.open(tmp_path / "a.gguf").config.rope_theta == 5e5
