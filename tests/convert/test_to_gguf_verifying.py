"""Converted files compared with the checkpoint, and with llama.cpp's own converter where it is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from gpa_engines.backends.llama_cpp.gguf_file import read_header
from gpa_engines.backends.llama_cpp.gguf_model import GgufModel
from tests.convert.gguf_checkpoints import float32_weights, save_weights, write_language_model
from tests.convert.to_gguf_process import to_gguf

pytest.importorskip("gguf", reason="converting to GGUF needs gguf")

from tools.convert.gguf_conversion import session, verifying, writing
from tools.convert.gguf_conversion.forward import reference_logits
from tools.convert.gguf_conversion.plan import Choices, SimpleFile, make_plan
from tools.convert.gguf_conversion.source import open_source
from tools.convert.gguf_conversion.verifying import verify
from tools.convert.gguf_conversion.writing import write_plan

LLAMA_CPP_SOURCE = "GPA_LLAMA_CPP_SOURCE"
"""Environment variable that names llama.cpp's source folder, as it is inside llama-cpp-python's source package."""

# llama.cpp's converter with the name of the tiny tokenizer's pre-tokenizer, which it knows for published models only.
_ORACLE = """
import runpy, sys
folder = sys.argv[1]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
del sys.argv[:1]
sys.argv[0] = folder + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def outcomes(folder: Path, choices: Choices, damage: Callable[[Path], None] | None = None) -> dict[str, bool | None]:
    """Check -> whether it passed, of one written and then perhaps damaged file."""
    source = open_source(folder)
    plan = make_plan(source, choices)
    (path,) = write_plan(plan, lambda *_: None, lambda *_: None, print)
    if damage:
        damage(path)
    return {check.what: check.passed for check in verify(source, plan.files[0], path)}


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifying, "has_llama_cpp", lambda: False)


@pytest.mark.parametrize("place", [0, 2])
def test_the_reference_logits_are_the_models(
    tiny_checkpoint: Path, golden_arrays: Callable[[str], dict[str, np.ndarray]], place: int
) -> None:
    expected = golden_arrays(f"prompt{place}_logits")
    columns = (range(514, 515), range(4816, 5136))
    logits = reference_logits(open_source(tiny_checkpoint), expected["input_ids"].tolist(), columns)
    last = expected["last_logits"][[514, *range(4816, 5136)]]
    assert np.linalg.norm(logits[-1] - last) / np.linalg.norm(last) < 1e-5


@pytest.mark.parametrize("vocab", ["full", "speech", "text"])
@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
def test_a_right_file_passes_with_llama_cpps_logits(
    tiny_checkpoint: Path, tmp_path: Path, outtype: str, vocab: str
) -> None:
    pytest.importorskip("llama_cpp", reason="logits come from llama-cpp-python")
    done = to_gguf(tiny_checkpoint, "--outfile", tmp_path, "--outtype", outtype, "--vocab", vocab, "--verify")
    assert done.returncode == 0, done.stderr
    assert "ok      logits: " in done.stderr
    assert "FAILED" not in done.stderr
    assert ("all 5141 texts" in done.stderr) == (vocab == "full")


def test_says_that_logits_were_not_compared_without_llama_cpp(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = to_gguf(tiny_checkpoint, "--outfile", tmp_path, "--vocab", "speech", "--verify", without="llama_cpp")
    assert done.returncode == 0, done.stderr
    assert "skipped logits: not compared: llama-cpp-python is not installed" in done.stderr


def overwrite(old: bytes, new: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = path.read_bytes()
        assert content.count(old) >= 1
        assert len(old) == len(new)
        path.write_bytes(content.replace(old, new, 1))

    return damage


def change_last_tensor(path: Path) -> None:
    last = max(read_header(path).tensors.values(), key=lambda each: each.offset)
    with path.open("r+b") as file:
        file.seek(last.offset)
        file.write(np.full(last.nbytes // 2, 0x3C00, "<u2").tobytes())


@pytest.mark.usefixtures("without_llama_cpp")
@pytest.mark.parametrize(
    ("damage", "failing"),
    [
        (None, []),
        (overwrite(b"<|bicodec_semantic_7|>", b"<|bicodec_semantic_X|>"), ["tokens"]),
        (overwrite(b"tinyv", b"tinyw"), ["metadata"]),
        (change_last_tensor, ["values F16"]),
    ],
)
def test_finds_what_is_wrong(
    tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None] | None, failing: list[str]
) -> None:
    found = outcomes(tiny_checkpoint, Choices(tmp_path, "f16"), damage)
    assert found.pop("logits") is None
    assert [what for what, passed in found.items() if not passed] == failing
    assert found.keys() == {"metadata", "tensors", "values F16", "values F32", "tokens"}


def test_logits_tell_a_model_with_other_metadata(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="logits come from llama-cpp-python")
    theta, other = (np.float32(value).tobytes() for value in (1e6, 1e4))
    found = outcomes(tiny_checkpoint, Choices(tmp_path, "f32"), overwrite(theta, other))
    assert found["metadata"] is False
    assert found["logits"] is False


def test_a_file_that_fails_is_not_left(tiny_checkpoint_copy: Path, tmp_path: Path) -> None:
    """Values around 1e-7 are on float16's last steps: rounding changes them by a quarter."""
    weights = float32_weights(tiny_checkpoint_copy)
    name = "model.layers.0.mlp.up_proj.weight"
    save_weights(tiny_checkpoint_copy, {**weights, name: weights[name] * np.float32(1e-6)})
    done = to_gguf(tiny_checkpoint_copy, "--outfile", tmp_path / "a.gguf", "--outtype", "f16", "--verify")
    assert done.returncode == 1, done.stderr
    assert "verification failed" in done.stderr
    assert "blk.0.ffn_up.weight" in done.stderr
    assert not (tmp_path / "a.gguf").exists()
    assert done.stdout == ""


def test_a_file_that_cannot_be_read_again_fails_too(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_simple = writing.write_simple

    def write_half(file: SimpleFile, path: Path, progress: Callable[[str, int], None]) -> None:
        write_simple(file, path, progress)
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(writing, "write_simple", write_half)
    console = Console(stderr=True)
    assert session.convert(tiny_checkpoint, Choices(tmp_path), console, check=True, verbose=False) is True
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantize", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_k_quants_of_rows_that_divide(tiny_checkpoint: Path, tmp_path: Path, quantize: str) -> None:
    pytest.importorskip("llama_cpp", reason="K-quants are made by llama-cpp-python")
    model = write_language_model(
        tmp_path / "wide", tiny_checkpoint, hidden_size=256, intermediate_size=512, head_dim=64
    )
    before = {file.name for file in model.iterdir()}
    vocab = "all" if quantize == "Q4_K_M" else "full"
    done = to_gguf(model, "--quantize", quantize, "--vocab", vocab, "--verify")
    assert done.returncode == 0, done.stderr
    assert "no multiple" not in done.stderr
    new = {f"wide-{quantize}.gguf"}
    if vocab == "all":
        new |= {f"wide-speech-{quantize}.gguf", f"wide-text-{quantize}.gguf", "wide-embeddings-f16.safetensors"}
    assert {file.name for file in model.iterdir()} - before == new
    opened = GgufModel.open(model / f"wide-{quantize}.gguf")
    assert opened.file_type == quantize
    assert {each.type for each in opened.header.tensors.values() if len(each.shape) > 1} <= {"Q4_K", "Q5_K", "Q6_K"}


def test_a_k_quant_names_the_tensors_that_fell_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="K-quants are made by llama-cpp-python")
    model = write_language_model(tmp_path / "odd", tiny_checkpoint, hidden_size=256, intermediate_size=320, head_dim=64)
    done = to_gguf(model, "--quantize", "Q4_K_M", "--outtype", "f16", "--outfile", tmp_path, "--verify")
    assert done.returncode == 0, done.stderr
    assert "the rows of 3 tensors are no multiple of 256" in done.stderr
    assert "blk.*.ffn_down.weight (3)" in done.stderr
    stored = GgufModel.open(tmp_path / "odd-Q4_K_M.gguf").header.tensors
    assert stored["blk.0.ffn_down.weight"].type not in ("Q4_K", "Q5_K", "Q6_K")
    assert (tmp_path / "odd-F16.gguf").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_tensors_and_tokens_are_those_of_llama_cpps_converter(
    tiny_checkpoint: Path, tmp_path: Path, outtype: str
) -> None:
    folder = os.environ.get(LLAMA_CPP_SOURCE)
    if not folder:
        pytest.skip(f"{LLAMA_CPP_SOURCE} does not name a source folder of llama.cpp")
    pytest.importorskip("transformers", reason="llama.cpp's converter needs transformers and torch")
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    arguments = [folder, str(tiny_checkpoint), "--outfile", str(theirs), "--outtype", outtype]
    oracle = subprocess.run([sys.executable, "-c", _ORACLE, *arguments], capture_output=True, text=True, check=False)
    assert oracle.returncode == 0, oracle.stderr
    assert to_gguf(tiny_checkpoint, "--outfile", ours, "--outtype", outtype).returncode == 0
    first, second = read_header(ours), read_header(theirs)
    assert {each.name: (each.shape, each.type) for each in first.tensors.values()} == {
        each.name: (each.shape, each.type) for each in second.tensors.values()
    }
    contents = [(header.tensors, header.path.read_bytes()) for header in (first, second)]
    for name in first.tensors:
        one, other = (data[each[name].offset :][: each[name].nbytes] for each, data in contents)
        assert one == other, name
    assert first.byte_strings("tokenizer.ggml.tokens") == second.byte_strings("tokenizer.ggml.tokens")
    assert (first.numbers("tokenizer.ggml.token_type") == second.numbers("tokenizer.ggml.token_type")).all()
    keys = [key for key in second.metadata if key.startswith(("qwen3.", "tokenizer.ggml."))]
    scalars = [key for key in keys if isinstance(second.metadata[key], int | float | str)]
    assert {key: first.metadata.get(key) for key in scalars} == {key: second.metadata[key] for key in scalars}
