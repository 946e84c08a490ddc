"""A folder of the codec in ONNX that is damaged, of another version, or lacks what is asked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_codecs.onnx_folder import CodecFolder
from tests.codecs.test_torch_codec import VOICE, tone

pytest.importorskip("onnxruntime", reason="the codec in ONNX needs onnxruntime")

from gpa_codecs.onnx_codec import OnnxCodec


@pytest.fixture
def folder(onnx_folder: Path, tmp_path: Path) -> Path:
    """A copy of the converted codec that a test may damage."""
    return Path(shutil.copytree(onnx_folder / "codec", tmp_path / "codec"))


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("inside", [".", "codec", "onnx/codec"])
def test_it_is_found_where_the_converter_puts_it(inside: str, onnx_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(onnx_folder / "codec", tmp_path / "model" / inside, dirs_exist_ok=True)
    assert CodecFolder.open(tmp_path / "model").root == tmp_path / "model" / inside


def test_the_manifest_is_self_sufficient_and_true(onnx_folder: Path) -> None:
    codec = CodecFolder.open(onnx_folder)
    assert codec.precisions == ("fp32", "fp16", "int8")
    assert codec.opset == 17
    assert (codec.bicodec.codebook_size, codec.bicodec.ref_segment_length, codec.glm.codebook_size) == (320, 96000, 160)
    assert codec.geometry["generator"]["rates"] == [8, 5, 4, 2]
    assert codec.generator_context == 11
    assert {"bicodec/model.safetensors", "tokenizer/tokenizer.json"} <= codec.sources.keys()
    codec.check(hashes=True)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for manifest\.json, codec/manifest\.json, onnx/codec/manif"):
        OnnxCodec(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder; expected a codec in ONNX"):
        OnnxCodec(tmp_path / "nothing")


def test_a_missing_graph_is_named_when_it_is_needed_or_asked_about(folder: Path) -> None:
    (folder / "voice.onnx").unlink()
    codec = OnnxCodec(folder, threads=1)
    assert len(codec.decode(np.arange(3), VOICE).pcm) == 960
    with pytest.raises(CheckpointError, match=r"voice\.onnx is missing, but manifest\.json names it; copy it again"):
        codec.voice(tone(16000))
    CodecFolder.open(folder).check(["decoder"])
    with pytest.raises(CheckpointError, match=r"voice\.onnx is missing"):
        CodecFolder.open(folder).check()


def test_missing_weights_of_a_graph_are_named(folder: Path) -> None:
    (folder / "decoder-generator.onnx.data").unlink()
    with pytest.raises(CheckpointError, match=r"decoder-generator\.onnx\.data is missing"):
        OnnxCodec(folder).decode(np.arange(3), VOICE)


def test_a_truncated_file_is_refused_at_once(folder: Path) -> None:
    path = folder / "glm.onnx.data"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"glm\.onnx\.data has {size - 1} bytes, but manifest\.json says {size}"):
        OnnxCodec(folder)


def test_changed_bytes_are_found_by_their_hash(folder: Path) -> None:
    path = folder / "voice.onnx.data"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    CodecFolder.open(folder).check()
    with pytest.raises(CheckpointError, match=r"voice\.onnx\.data is damaged: its sha256 is not the one"):
        CodecFolder.open(folder).check(hashes=True)


def test_a_damaged_graph_of_the_right_size_is_refused(folder: Path) -> None:
    path = folder / "voice.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"voice\.onnx cannot be loaded .*convert the checkpoint again"):
        OnnxCodec(folder).voice(tone(16000))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda manifest: manifest.update(version=2), "has version 2; this program reads version 1"),
        (lambda manifest: manifest.update(format="other"), "has no 'format': 'gpa-onnx-codec'"),
        (lambda manifest: manifest.pop("parts"), "parts is missing"),
        (lambda manifest: manifest["parts"].pop("glm"), "glm is missing"),
        (lambda manifest: manifest["parts"]["voice"].pop("fp32"), "parts: voice: fp32 is missing"),
        (lambda manifest: manifest["parts"].update(voice={"fp32": [[{"name": "x"}]]}), "voice is damaged"),
        (lambda manifest: manifest["parts"].update(voice={"fp32": [[]]}), "voice has not the 1 graph"),
        (lambda manifest: manifest["parts"]["decoder"]["int8"].pop(), "decoder has not the 2 graph"),
        (lambda manifest: manifest["parts"]["voice"]["fp32"][0][0].update(name="../x"), "is no name of a file"),
        (lambda manifest: manifest["bicodec"]["mel"].update(n_fft="wide"), "n_fft is 'wide'; expected a positive"),
    ],
)
def test_a_damaged_manifest_is_refused_by_what_is_wrong(
    change: Callable[[dict[str, Any]], object], complaint: str, folder: Path
) -> None:
    change_manifest(folder, change)
    with pytest.raises(CheckpointError, match=complaint):
        OnnxCodec(folder)


def test_a_manifest_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be parsed"):
        OnnxCodec(folder)


def test_a_precision_that_was_not_exported_is_refused_with_the_command(folder: Path) -> None:
    change_manifest(folder, lambda manifest: manifest["parts"]["decoder"].pop("int8"))
    expected = (
        r"no decoder in int8: it was exported in fp32, fp16; python tools/convert/to_onnx\.py MODEL_DIR --what codec "
        r"--precision fp32 --precision fp16 --precision int8 --overwrite"
    )
    with pytest.raises(BackendError, match=expected):
        OnnxCodec(folder, precision="int8")
    with pytest.raises(BackendError, match="codec precision 'fp8' is unknown; expected auto, fp32, fp16, int8"):
        OnnxCodec(folder, precision="fp8")


def test_a_provider_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"has no provider 'Abacus' here; it has .*CPUExecutionProvider"):
        OnnxCodec(folder, providers=["Abacus"])
    with pytest.raises(BackendError, match="there is no provider"):
        OnnxCodec(folder, providers=[])
    with pytest.raises(BackendError, match="threads is 0; expected 1 or more"):
        OnnxCodec(folder, threads=0)


def test_without_onnxruntime_the_message_says_how_to_get_it(folder: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from gpa_codecs.onnx_codec import OnnxCodec\n"
        "from gpa_codecs.errors import BackendError\n"
        "try: OnnxCodec(sys.argv[1])\n"
        "except BackendError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "the ONNX codec needs onnxruntime: pip install 'gpa-engines[onnx]'"
