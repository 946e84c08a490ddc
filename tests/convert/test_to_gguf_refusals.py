"""Checkpoints that llama.cpp could not run, or would run as another model, and writes that fail."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import GpaError
from tests.convert.gguf_checkpoints import (
    change_config,
    change_tokenizer,
    float16_weights,
    float32_weights,
    save_weights,
    shard,
    write_language_model,
)
from tests.convert.to_gguf_process import command, environment, to_gguf

pytest.importorskip("gguf", reason="converting to GGUF needs gguf")

from tools.convert.gguf_conversion import plan
from tools.convert.gguf_conversion.plan import Choices, make_plan
from tools.convert.gguf_conversion.source import open_source
from tools.convert.gguf_conversion.writing import write_plan

Change = Callable[[Path], object]


def refused(checkpoint: Path, out: Path, *arguments: str) -> str:
    """What the converter says; it must exit with 2 and leave nothing."""
    done = to_gguf(checkpoint, "--outfile", out, *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.iterdir())
    return done.stderr


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}, "linear"),
        ({"vocab_size": 5000}, "embed_tokens"),
        ({"num_hidden_layers": 2}, "model.layers.2."),
        ({"num_hidden_layers": 4}, "model.layers.3."),
    ],
)
def test_another_model_is_refused(tiny_checkpoint_copy: Path, out: Path, changes: dict[str, Any], words: str) -> None:
    assert words in refused(change_config(tiny_checkpoint_copy, **changes), out)


def without(name: str) -> Change:
    return lambda folder: save_weights(folder, {k: v for k, v in float16_weights(folder).items() if k != name})


def with_tensor(name: str, values: np.ndarray) -> Change:
    return lambda folder: save_weights(folder, {**float16_weights(folder), name: values})


def split_with_twin(folder: Path) -> None:
    save_weights(folder, float16_weights(folder))
    shard(folder, twice="model.norm.weight")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def name_twice(folder: Path) -> None:
    """A header that has two entries of one name: the file is as long as before."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = f'"model.norm.weight":{json.dumps(header["model.norm.weight"])},'.encode()
    text = b"{" + entry + data[9 : 8 + length]
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        (with_tensor("model.layers.0.self_attn.q_proj.bias", np.zeros(128, np.float16)), "q_proj.bias"),
        (with_tensor("visual.patch.weight", np.zeros((4, 4), np.float16)), "visual.patch.weight"),
        (with_tensor("model.norm.weight", np.zeros(64, np.int8)), "I8"),
        (with_tensor("model.norm.weight", np.zeros(65, np.float16)), "(65,)"),
        (with_tensor("model.norm.weight", np.full(64, np.nan, np.float16)), "NaN"),
        (with_tensor("lm_head.weight", np.zeros((5141, 64), np.float16)), "tie_word_embeddings"),
        (split_with_twin, "stored twice"),
        (name_twice, "model.norm.weight"),
        (truncate, "truncated"),
        (only_pickle, "safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny_checkpoint_copy: Path, out: Path, change: Change, words: str) -> None:
    change(tiny_checkpoint_copy)
    assert words in refused(tiny_checkpoint_copy, out)


def test_a_head_that_repeats_the_tied_table_is_left_out(tiny_checkpoint_copy: Path, out: Path) -> None:
    weights = float16_weights(tiny_checkpoint_copy)
    save_weights(tiny_checkpoint_copy, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    assert to_gguf(tiny_checkpoint_copy, "--outfile", out).returncode == 0


def add_token(text: str, token: int) -> Change:
    entry = {"content": text, "id": token, "special": False}
    return lambda folder: change_tokenizer(folder, lambda document: document["added_tokens"].append(entry))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add_token("beyond", 6000), "6000"),
        (add_token("<|im_end|>", 5140), "<|im_end|>"),
        (add_token("a", 5140), "`a`"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    tiny_checkpoint_copy: Path, out: Path, change: Change, words: str
) -> None:
    change(tiny_checkpoint_copy)
    assert words in refused(tiny_checkpoint_copy, out)


def test_equal_token_texts_are_refused(tiny_checkpoint: Path, tmp_path: Path, out: Path) -> None:
    """llama.cpp would stop the process; 5142 is an id without a token, which gets a text made of its number."""
    model = write_language_model(tmp_path / "model", tiny_checkpoint, vocab_size=5143)
    add_token("[PAD5142]", 5141)(model)
    words = refused(model, out)
    assert "5141, 5142" in words
    assert "[PAD5142]" in words


def test_values_beyond_float16_are_refused_for_float16(tiny_checkpoint_copy: Path, out: Path) -> None:
    weights = float32_weights(tiny_checkpoint_copy)
    large = weights["model.layers.2.mlp.up_proj.weight"].copy()
    large[3, 4] = 7e4
    save_weights(tiny_checkpoint_copy, {**weights, "model.layers.2.mlp.up_proj.weight": large})
    assert "model.layers.2.mlp.up_proj.weight" in refused(tiny_checkpoint_copy, out, "--outtype", "f16")
    assert to_gguf(tiny_checkpoint_copy, "--outfile", out, "--outtype", "bf16").returncode == 0


def test_targets_that_cannot_be_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    missing = to_gguf(tiny_checkpoint, "--outfile", tmp_path / "missing")
    several = to_gguf(tiny_checkpoint, "--outfile", tmp_path / "one.gguf", "--vocab", "all")
    nameless = to_gguf(tiny_checkpoint, "--outfile", tmp_path, "--model-name", "a/b")
    no_model = to_gguf(tmp_path / "nowhere")
    unknown = to_gguf(tiny_checkpoint, "--outtype", "q3")
    assert [each.returncode for each in (missing, several, nameless, no_model, unknown)] == [2] * 5
    assert "no such folder" in missing.stderr
    assert "name a folder" in several.stderr
    assert "'a/b'" in nameless.stderr
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_divide_are_named(tiny_checkpoint: Path, out: Path) -> None:
    pytest.importorskip("llama_cpp", reason="K-quants are made by llama-cpp-python")
    words = refused(tiny_checkpoint, out, "--quantize", "Q4_K_M")
    assert "token_embd.weight" in words
    assert "blk.*.ffn_down.weight (3)" in words
    assert "hidden_size 64" in words


def test_says_which_package_is_missing(tiny_checkpoint: Path, out: Path) -> None:
    no_llama = to_gguf(tiny_checkpoint, "--outfile", out, "--quantize", "Q6_K", without="llama_cpp")
    no_gguf = to_gguf(tiny_checkpoint, "--outfile", out, without="gguf")
    assert (no_llama.returncode, no_gguf.returncode) == (2, 2)
    assert "pip install 'gpa-engines[llama-cpp]'" in no_llama.stderr
    assert "pip install gguf" in no_gguf.stderr
    assert not list(out.iterdir())


def test_a_disk_that_is_too_small_is_told_before_writing(
    tiny_checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: usage._replace(free=1 << 20))
    with pytest.raises(GpaError, match=r"MiB are needed and 1 MiB free"):
        make_plan(open_source(tiny_checkpoint), Choices(out))


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
@pytest.mark.parametrize("vocab", ["full", "speech"])
def test_a_write_that_fails_leaves_nothing(tiny_checkpoint: Path, out: Path, vocab: str) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = to_gguf(tiny_checkpoint, "--outfile", out, "--vocab", vocab, preexec=limit)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert not list(out.iterdir())


def test_an_interruption_while_writing_leaves_nothing(tiny_checkpoint: Path, out: Path) -> None:
    source = open_source(tiny_checkpoint)
    (out / "tinyv-BF16.gguf").write_bytes(b"mine")

    def interrupt(file: str, tensor: str, done: int, total: int) -> None:
        if tensor.startswith("blk.1."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(write_plan(make_plan(source, Choices(out, overwrite=True)), interrupt, lambda *_: None, print))
    assert [file.name for file in out.iterdir()] == ["tinyv-BF16.gguf"]
    assert (out / "tinyv-BF16.gguf").read_bytes() == b"mine"


def test_ctrl_c_ends_with_130(tiny_checkpoint: Path, out: Path) -> None:
    arguments = command(tiny_checkpoint, "--outfile", out, "--vocab", "all", "--verify")
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True
    ) as run:
        assert run.stderr is not None
        assert run.stderr.readline().startswith("reading")
        run.send_signal(signal.SIGINT)
        _, words = run.communicate(timeout=60)
    assert run.returncode == 130, words
    assert "interrupted" in words
    assert not [file for file in out.iterdir() if file.name.startswith(".")]
