"""tools/convert/to_onnx.py --what codec: what it writes, what it refuses, and what is left of a run that failed."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from gpa_engines.checkpoint import Checkpoint

onnx = pytest.importorskip("onnx", reason="conversion needs onnx")
torch = pytest.importorskip("torch", reason="conversion needs torch")
pytest.importorskip("onnxruntime", reason="--verify needs onnxruntime")

SCRIPT = Path(__file__).parents[2] / "tools" / "convert" / "to_onnx.py"
GRAPHS = ("wav2vec2", "semantic", "voice", "decoder-prenet", "decoder-generator", "glm")


@pytest.fixture(scope="module")
def to_onnx() -> Iterator[ModuleType]:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield import_module("to_onnx")
    sys.path.remove(str(SCRIPT.parent))


def convert(to_onnx: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(to_onnx.app, [*map(str, arguments), "--what", "codec"])


def test_every_graph_has_its_weights_beside_it_and_is_valid(onnx_folder: Path) -> None:
    smaller = ("decoder-prenet-fp16", "decoder-generator-fp16", "decoder-prenet-int8")
    expected = {f"{name}.onnx{suffix}" for name in (*GRAPHS, *smaller) for suffix in ("", ".data")}
    files = list((onnx_folder / "codec").iterdir())
    assert {path.name for path in files} == expected | {"manifest.json"}
    for path in files:
        assert path.stat().st_mode & stat.S_IROTH, f"{path.name} can be read as any new file"
    for path in (path for path in files if path.suffix == ".onnx"):
        onnx.checker.check_model(str(path))


def test_graphs_hold_no_paths_of_the_machine_that_made_them(onnx_folder: Path, tiny_checkpoint: Path) -> None:
    for path in (onnx_folder / "codec").glob("*.onnx"):
        content = path.read_bytes()
        for place in (str(Path(torch.__file__).parent), str(SCRIPT.parents[2]), str(tiny_checkpoint)):
            assert place.encode() not in content


def test_the_tokenizer_comes_with_it(onnx_folder: Path, tiny_checkpoint: Path) -> None:
    assert (onnx_folder / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in onnx_folder.iterdir()) == ["codec", "tokenizer.json"]


def test_the_manifest_says_which_checkpoint_it_was_made_from(onnx_folder: Path, tiny_checkpoint: Path) -> None:
    sources = json.loads((onnx_folder / "codec" / "manifest.json").read_text())["sources"]
    files = {
        "bicodec/model.safetensors": "BiCodec/model.safetensors",
        "wav2vec2/pytorch_model.bin": "BiCodec/wav2vec2-large-xlsr-53/pytorch_model.bin",
        "glm/config.json": "glm-4-voice-tokenizer/config.json",
    }
    for name, path in files.items():
        assert sources[name] == hashlib.sha256((tiny_checkpoint / path).read_bytes()).hexdigest()
    assert not any(name.startswith("lm/") for name in sources)


def test_verbose_tells_each_graph_and_what_was_compared(onnx_folder: Path) -> None:
    lines = (onnx_folder.parent / "stderr.txt").read_text().splitlines()
    assert [line for line in lines if line in GRAPHS] == list(GRAPHS)
    assert sum("codes equal" in line for line in lines) == 9
    assert sum(line.startswith(("decoder fp", "decoder int8")) for line in lines) == 3


def test_fewer_bits_make_smaller_files(onnx_folder: Path) -> None:
    def size(name: str) -> int:
        return (onnx_folder / "codec" / f"{name}.onnx.data").stat().st_size

    assert size("decoder-generator-fp16") < 0.6 * size("decoder-generator")
    assert size("decoder-prenet-fp16") < size("decoder-prenet")
    assert size("decoder-prenet-int8") < size("decoder-prenet")


def test_the_language_model_is_written_and_compared_beside_it(
    to_onnx: ModuleType, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--what", "all", "--precision", "fp32", "--precision", "int8", "--verify", "--verbose")
    result = CliRunner().invoke(to_onnx.app, [str(tiny_checkpoint), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.stderr
    assert {"codec", "lm", "config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    for subject in ("decoder fp32", "decoder int8", "language model fp32", "language model int8"):
        assert f"\n{subject}: " in result.stderr


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_there_is_replaced_only_when_asked_and_only_if_it_is_ours(
    to_onnx: ModuleType, tiny_checkpoint: Path, onnx_folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(onnx_folder, tmp_path / "out"))
    before = (out / "codec" / "manifest.json").read_bytes()
    result = convert(to_onnx, tiny_checkpoint, "--out", out)
    assert result.exit_code == 2
    assert "is there already; give another --out, or --overwrite" in result.stderr
    assert (out / "codec" / "manifest.json").read_bytes() == before
    (out / "codec" / "manifest.json").write_text("{}")
    result = convert(to_onnx, tiny_checkpoint, "--out", out, "--overwrite")
    assert result.exit_code == 2
    assert "was not made by this tool; choose another --out" in result.stderr
    assert (out / "codec" / "voice.onnx").exists()


def test_overwriting_replaces_the_folder_as_a_whole(
    to_onnx: ModuleType, tiny_checkpoint: Path, onnx_folder: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(onnx_folder, tmp_path / "out"))
    result = convert(to_onnx, tiny_checkpoint, "--out", out, "--overwrite")
    assert result.exit_code == 0, result.stderr
    manifest = json.loads((out / "codec" / "manifest.json").read_text())
    assert list(manifest["parts"]["decoder"]) == ["fp32"]
    assert not list((out / "codec").glob("*int8*"))
    assert sorted(path.name for path in out.iterdir()) == ["codec", "tokenizer.json"]


def test_a_damaged_checkpoint_leaves_nothing(to_onnx: ModuleType, tiny_checkpoint_copy: Path, tmp_path: Path) -> None:
    path = tiny_checkpoint_copy / "glm-4-voice-tokenizer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_ffn_dim": 999}))
    result = convert(to_onnx, tiny_checkpoint_copy, "--out", tmp_path / "new" / "out")
    assert result.exit_code == 2
    assert "which the configuration beside it asks for" in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_without_a_part_is_refused(
    to_onnx: ModuleType, tiny_checkpoint_copy: Path, tmp_path: Path
) -> None:
    shutil.rmtree(tiny_checkpoint_copy / "glm-4-voice-tokenizer")
    result = convert(to_onnx, tiny_checkpoint_copy, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "glm-4-voice-tokenizer is missing" in result.stderr


def test_missing_packages_are_named(
    to_onnx: ModuleType, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = convert(to_onnx, tiny_checkpoint, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "needs onnx, not installed: pip install 'gpa-engines[convert]'" in result.stderr


def test_a_fault_keeps_the_folder_from_being_there(
    to_onnx: ModuleType, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("onnx_conversion.verification"), "LARGEST_ERROR", 0.0)
    result = convert(to_onnx, tiny_checkpoint, "--out", tmp_path / "out", "--verify")
    assert result.exit_code == 1, result.stderr
    assert "fault: decoder fp32: largest error" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("to_onnx")
def test_another_checkpoint_is_found_out(onnx_folder: Path, tiny_checkpoint_copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    verification, codec = import_module("onnx_conversion.verification"), import_module("onnx_conversion.codec")
    path = tiny_checkpoint_copy / "BiCodec" / "model.safetensors"
    tensors = load_file(path)
    tensors["quantizer.codebook.weight"] = tensors["quantizer.codebook.weight"].flip(0).contiguous()
    save_file(tensors, path)
    checkpoint = Checkpoint.open(tiny_checkpoint_copy, require=codec.CODEC_PARTS)
    failed = {each.subject for each in verification.compare_codecs(checkpoint, onnx_folder) if not each.passed}
    assert failed == {
        *(f"{clip}: semantic" for clip in ("example:speech", "example:voice", "a cut clip")),
        *(f"decoder {precision}" for precision in ("fp32", "fp16", "int8")),
    }


def test_an_interruption_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(tiny_checkpoint), "--what", "codec", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(out.glob(".codec.*/codec/wav2vec2.onnx")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "interrupted; nothing is left of the folder that was being written" in said
    assert not out.exists()


# --- fast convolutions ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("to_onnx")
@pytest.mark.parametrize("dilation", [1, 3, 9])
@pytest.mark.parametrize("length", [1, 7, 36, 37, 400])
def test_the_fast_form_of_a_convolution_is_the_convolution(length: int, dilation: int) -> None:
    fast = import_module("onnx_conversion.fast_convolution")
    torch.manual_seed(length)
    conv = torch.nn.Conv1d(20, 20, 7, padding=3 * dilation, dilation=dilation).double().requires_grad_(False)
    x = torch.randn(1, 20, length, dtype=torch.float64)
    torch.testing.assert_close(fast.FastConv1d(conv)(x), conv(x), rtol=0, atol=1e-11)


@pytest.mark.usefixtures("to_onnx")
def test_a_generator_of_fast_convolutions_is_the_generator_at_every_length(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    from gpa_codecs.bicodec.config import BiCodecConfig
    from gpa_codecs.bicodec.model import WaveDecoder
    from gpa_codecs.weights import load_module

    fast, graphs = import_module("onnx_conversion.fast_convolution"), import_module("onnx_conversion.graphs")
    # The tiny checkpoint has no convolution that is wide enough.
    monkeypatch.setattr(fast, "LEAST_CHANNELS", 1)
    folder = tiny_checkpoint / "BiCodec"
    config = BiCodecConfig.from_file(folder / "config.yaml")
    generator = load_module(lambda: WaveDecoder(config), folder, torch.device("cpu")).decoder
    inputs = {length: torch.randn(1, config.generator.input_channel, length) for length in (1, 2, 7, 20, 33)}
    expected = {length: generator(latents).numpy() for length, latents in inputs.items()}
    fast.speed_up(generator)
    assert sum(isinstance(each, fast.FastConv1d) for each in generator.modules()) == 12
    model = graphs.trace(generator, {"latents": inputs[20]}, "pcm", {"latents": {2: "T"}, "pcm": {2: "N"}}, tmp_path)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for length, latents in inputs.items():
        (found,) = session.run(None, {"latents": latents.numpy()})
        np.testing.assert_allclose(np.asarray(found), expected[length], atol=2e-5)


# --- rewriting --------------------------------------------------------------------------------------------------------


def product(*matrices: np.ndarray, share: bool = False) -> Any:
    """x @ A, then @ B, or @ A again."""
    names = ["A", "A"] if share else ["A", "B"]
    nodes = [
        onnx.helper.make_node("MatMul", ["x", names[0]], ["y"]),
        onnx.helper.make_node("MatMul", ["y", names[1]], ["z"]),
    ]
    width = matrices[0].shape[0]
    graph = onnx.helper.make_graph(
        nodes,
        "products",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, width])],
        [onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [None, width])],
        [onnx.numpy_helper.from_array(matrix, name) for matrix, name in zip(matrices, "AB", strict=False)],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def run(model: Any, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.usefixtures("to_onnx")
def test_values_that_float16_cannot_hold_stay_in_float32() -> None:
    precision = import_module("onnx_conversion.precision")
    rng = np.random.default_rng(0)
    small, large = (rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    large[3, 4] = 70000.0
    model = precision.to_fp16(product(small, large))
    assert {each.name: each.data_type for each in model.graph.initializer} == {
        "A.fp16": onnx.TensorProto.FLOAT16,
        "B": onnx.TensorProto.FLOAT,
    }
    x = rng.normal(size=(5, 64)).astype(np.float32)
    np.testing.assert_allclose(run(model, x), x @ small.astype(np.float16).astype(np.float32) @ large, rtol=1e-3)


@pytest.mark.usefixtures("to_onnx")
def test_matrices_in_8_bits_are_near_and_a_shared_one_is_left_alone() -> None:
    precision = import_module("onnx_conversion.precision")
    rng = np.random.default_rng(1)
    first, second = (rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    first[:, 7] = 0.0
    x = rng.normal(size=(5, 64)).astype(np.float32)
    model = precision.to_int8(product(first, second))
    assert [node.op_type for node in model.graph.node].count("MatMulInteger") == 2
    expected, found = x @ first @ second, run(model, x)
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)
    model = precision.to_int8(product(first, share=True))
    assert [node.op_type for node in model.graph.node] == ["MatMul", "MatMul"]
