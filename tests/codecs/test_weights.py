"""Weight files: headers, shards, pickles, key prefixes, weight norm, and what is said about damaged ones."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpa_codecs.errors import CheckpointError
from gpa_codecs.weights import TensorSpec, load_module, load_weights, read_header, weight_files

Tensors = dict[str, torch.Tensor]
EXPECTED = {"layer.weight": (4, 3, 5), "layer.bias": (4,)}


@pytest.fixture
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {
        "layer.weight": torch.randn(4, 3, 5, generator=generator),
        "layer.bias": torch.randn(4, generator=generator),
        "unused": torch.randn(2, generator=generator),
    }


def as_safetensors(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")


def as_sharded_safetensors(folder: Path, tensors: Tensors) -> None:
    _shard(folder, tensors, "model", ".safetensors", save_file)


def as_pickle(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def as_old_pickle(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_sharded_pickle(folder: Path, tensors: Tensors) -> None:
    _shard(folder, tensors, "pytorch_model", ".bin", torch.save)


def _shard(folder: Path, tensors: Tensors, stem: str, suffix: str, save: Callable[[Tensors, Path], None]) -> None:
    """One file per tensor, and the index that names them."""
    files = {name: f"{stem}-{number:05d}{suffix}" for number, name in enumerate(tensors)}
    for name, file in files.items():
        save({name: tensors[name]}, folder / file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": files}))


FORMATS = [as_safetensors, as_sharded_safetensors, as_pickle, as_old_pickle, as_sharded_pickle]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", FORMATS)
def test_only_what_is_expected_is_loaded_from_every_format(
    save: Callable[[Path, Tensors], None], tensors: Tensors, tmp_path: Path
) -> None:
    save(tmp_path, tensors)
    loaded = load_weights(tmp_path, EXPECTED)
    assert loaded.keys() == EXPECTED.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in EXPECTED)


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "wav2vec2.", "a.b."])
def test_keys_may_carry_any_common_prefix(prefix: str, tensors: Tensors, tmp_path: Path) -> None:
    # A tensor elsewhere in the file whose name ends alike must not lead astray.
    decoy = {"other.layer.weight": torch.zeros(1)}
    as_safetensors(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()} | decoy)
    assert torch.equal(load_weights(tmp_path, EXPECTED)["layer.weight"], tensors["layer.weight"])


@pytest.mark.parametrize("names", [("weight_g", "weight_v"), ("original0", "original1")])
@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("save", FORMATS)
def test_weight_norm_is_multiplied_out(
    save: Callable[[Path, Tensors], None], axis: int, names: tuple[str, str], tensors: Tensors, tmp_path: Path
) -> None:
    direction = tensors["layer.weight"]
    magnitude = torch.linspace(0.5, 2.0, direction.shape[axis]).view([-1 if i == axis else 1 for i in range(3)])
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(3, 4, 5, bias=False), dim=axis)
    layer.load_state_dict(dict(zip(layer.state_dict(), (magnitude, direction), strict=True)))
    expected = layer(torch.eye(15).view(15, 3, 5)).detach().view(15, 4).T.reshape(4, 3, 5)
    stem = "layer.parametrizations.weight." if names[0] == "original0" else "layer."
    save(tmp_path, {stem + names[0]: magnitude, stem + names[1]: direction, "layer.bias": tensors["layer.bias"]})
    torch.testing.assert_close(load_weights(tmp_path, EXPECTED)["layer.weight"], expected, rtol=1e-6, atol=1e-7)


def test_weight_norm_of_a_transposed_convolution_with_one_channel(tmp_path: Path) -> None:
    magnitude, direction = torch.full((1, 1, 1), 3.0), torch.tensor([[[0.0, 4.0, 0.0], [0.0, 0.0, -3.0]]])
    as_safetensors(tmp_path, {"up.weight_g": magnitude, "up.weight_v": direction})
    loaded = load_weights(tmp_path, {"up.weight": (1, 2, 3)})["up.weight"]
    torch.testing.assert_close(loaded, direction * 3 / 5)


@pytest.mark.parametrize("save", [as_safetensors, as_pickle])
def test_loading_leaves_the_file_as_it_is(
    save: Callable[[Path, Tensors], None], tensors: Tensors, tmp_path: Path
) -> None:
    save(tmp_path, {"layer.weight_g": torch.full((4, 1, 1), 2.0), "layer.weight_v": tensors["layer.weight"]})
    (file,) = weight_files(tmp_path)
    before = hashlib.sha256(file.read_bytes()).digest()
    first = load_weights(tmp_path, {"layer.weight": (4, 3, 5)})["layer.weight"]
    second = load_weights(tmp_path, {"layer.weight": (4, 3, 5)})["layer.weight"]
    assert torch.equal(first, second)
    assert hashlib.sha256(file.read_bytes()).digest() == before


def test_tensors_keep_their_dtype_unless_one_is_asked_for(tensors: Tensors, tmp_path: Path) -> None:
    as_safetensors(tmp_path, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert load_weights(tmp_path, EXPECTED)["layer.bias"].dtype == torch.bfloat16
    converted = load_weights(tmp_path, EXPECTED, dtype=torch.float32)["layer.bias"]
    assert torch.equal(converted, tensors["layer.bias"].bfloat16().float())


def test_a_module_takes_the_weights_without_initialisation(tensors: Tensors, tmp_path: Path) -> None:
    as_safetensors(tmp_path, {name: tensor.half() for name, tensor in tensors.items()})

    def build() -> torch.nn.Module:
        return torch.nn.ModuleDict({"layer": torch.nn.Conv1d(3, 4, 5)})

    module = load_module(build, tmp_path, torch.device("cpu"))
    assert not module.training
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, tensors[name].half().float())
        assert not parameter.requires_grad


def test_headers_are_read_without_torch(tiny_checkpoint: Path) -> None:
    file = tiny_checkpoint / "BiCodec" / "model.safetensors"
    assert read_header(file)["quantizer.codebook.weight"] == TensorSpec("F32", (320, 8))
    code = (
        "import sys; from gpa_codecs.weights import read_header; "
        "read_header(sys.argv[1]); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_a_folder_without_weights_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for model\.safetensors.*pytorch_model\.bin"):
        weight_files(tmp_path)


def test_a_missing_shard_is_named(tensors: Tensors, tmp_path: Path) -> None:
    as_sharded_safetensors(tmp_path, tensors)
    (tmp_path / "model-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors is missing"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_refused(kept: int, tensors: Tensors, tmp_path: Path) -> None:
    as_safetensors(tmp_path, tensors)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*download it again"):
        load_weights(tmp_path, EXPECTED)


def test_a_file_that_goes_on_after_its_end_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    as_safetensors(tmp_path, tensors)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="its header announces"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON",
        b"{not JSON",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    ],
)
def test_a_damaged_header_is_refused(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*download it again"):
        read_header(file)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file"):
        read_header(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02 not a pickle"])
def test_a_damaged_pickle_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_weights(tmp_path, EXPECTED)


def test_a_truncated_pickle_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    as_pickle(tmp_path, tensors)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_weights(tmp_path, EXPECTED)


class _Command:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("this must not run",)


def test_a_pickle_that_holds_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"layer.weight": _Command()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than tensors"):
        load_weights(tmp_path, EXPECTED)
    assert not capsys.readouterr().out


def test_a_pickle_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, found list"):
        load_weights(tmp_path, EXPECTED)


@pytest.mark.parametrize("lacking", EXPECTED)
def test_a_missing_tensor_is_named_as_it_would_be_stored(lacking: str, tensors: Tensors, tmp_path: Path) -> None:
    as_safetensors(tmp_path, {f"model.{name}": tensor for name, tensor in tensors.items() if name != lacking})
    with pytest.raises(CheckpointError, match=rf"lacks 1 of 2 tensors, first model\.{lacking}"):
        load_weights(tmp_path, EXPECTED)


def test_an_unexpected_shape_is_named_with_both_shapes_and_the_file(tensors: Tensors, tmp_path: Path) -> None:
    as_safetensors(tmp_path, tensors)
    message = r"model\.safetensors: layer\.weight has shape \(4, 3, 5\); expected \(4, 3, 7\)"
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path, EXPECTED | {"layer.weight": (4, 3, 7)})


def test_a_magnitude_that_does_not_go_with_its_direction_is_named(tmp_path: Path) -> None:
    as_safetensors(tmp_path, {"layer.weight_g": torch.ones(3, 1, 1), "layer.weight_v": torch.ones(4, 3, 5)})
    with pytest.raises(CheckpointError, match=r"layer\.weight_g has shape \(3, 1, 1\)"):
        load_weights(tmp_path, {"layer.weight": (4, 3, 5)})


def test_large_files_are_mapped_rather_than_copied(tmp_path: Path) -> None:
    as_safetensors(tmp_path, {"table": torch.from_numpy(np.zeros((1024, 64 * 1024), dtype=np.float32))})
    code = (
        "import resource, torch; from gpa_codecs.weights import load_weights\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"load_weights({str(tmp_path)!r}, {{'table': (1024, 65536)}})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64 * 1024, "256 MiB that nobody has looked at must not be in memory"
