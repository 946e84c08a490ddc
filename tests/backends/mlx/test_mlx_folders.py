"""Folders that MLX cannot load, or that are not what they say, are refused before a tensor is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import CheckpointError
from gpa_engines.backends.mlx import create_engine
from gpa_engines.checkpoint import Checkpoint, inspect_checkpoint
from tests.backends.mlx.conftest import change_config

mx = pytest.importorskip("mlx.core", reason="needs mlx")

WEIGHTS = "model.safetensors"


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = mx.load(str(folder / WEIGHTS))
    mx.eval(list(tensors.values()))
    change(tensors)
    mx.save_safetensors(str(folder / WEIGHTS), tensors)


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message):
        create_engine(folder, **options)


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"nowhere/config\.json: No such file")


def test_a_folder_without_weights(tiny_checkpoint_copy: Path) -> None:
    (tiny_checkpoint_copy / WEIGHTS).unlink()
    refused(tiny_checkpoint_copy, "has no weights")


def test_pickled_weights(tiny_checkpoint_copy: Path) -> None:
    (tiny_checkpoint_copy / WEIGHTS).rename(tiny_checkpoint_copy / "pytorch_model.bin")
    refused(tiny_checkpoint_copy, "pytorch_model.bin, which only torch can read; MLX needs model.safetensors")


def test_a_truncated_file(tiny_checkpoint_copy: Path) -> None:
    path = tiny_checkpoint_copy / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    refused(tiny_checkpoint_copy, "truncated or damaged")


def test_a_missing_tensor(tiny_checkpoint_copy: Path) -> None:
    change_tensors(tiny_checkpoint_copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(tiny_checkpoint_copy, r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight")


def test_a_tensor_of_another_shape(tiny_checkpoint_copy: Path) -> None:
    change_config(tiny_checkpoint_copy, intermediate_size=192)
    refused(tiny_checkpoint_copy, r"mlp\.gate_proj\.weight has shape \(160, 64\); expected \(192, 64\)")


def test_a_tensor_of_integers(tiny_checkpoint_copy: Path) -> None:
    name = "model.norm.weight"
    change_tensors(tiny_checkpoint_copy, lambda tensors: tensors.update({name: tensors[name].astype(mx.int32)}))
    refused(tiny_checkpoint_copy, r"model\.norm\.weight is stored as I32; expected F32, BF16, F16")


def test_another_architecture(tiny_checkpoint_copy: Path) -> None:
    change_config(tiny_checkpoint_copy, model_type="llama")
    refused(tiny_checkpoint_copy, "model_type is 'llama'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "mxfp4"}, "mode is 'mxfp4'; expected \"affine\""),
        ({"bits": 6}, "bits is 6; this version reads 4, 8"),
        ({"bits": 4}, r"has shape \(5141, 16\); expected \(5141, 8\)"),
        ({"group_size": 48}, "group_size is 48; this version reads 32, 64, 128"),
        ({"group_size": 64}, r"scales has shape \(5141, 2\); expected \(5141, 1\)"),
        ({"lm_head": {"bits": 4}}, "has settings of its own for lm_head"),
    ],
)
def test_a_quantisation_that_is_not_there(quantized_copy: Path, changes: dict[str, Any], message: str) -> None:
    section = {"mode": "affine", "bits": 8, "group_size": 32} | changes
    change_config(quantized_copy, quantization=section)
    refused(quantized_copy, message)


def test_a_quantisation_of_a_folder_that_has_none(tiny_checkpoint_copy: Path) -> None:
    change_config(tiny_checkpoint_copy, quantization={"bits": 8, "group_size": 32})
    refused(tiny_checkpoint_copy, "quantization is given, but no weight has scales")


def test_missing_biases(quantized_copy: Path) -> None:
    change_tensors(quantized_copy, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.biases"))
    refused(quantized_copy, r"has no tensor model\.layers\.0\.mlp\.up_proj\.biases")


def test_scales_of_several_types(quantized_copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.scales"
    change_tensors(quantized_copy, lambda tensors: tensors.update({name: tensors[name].astype(mx.float16)}))
    refused(quantized_copy, "the scales are stored as F16, F32; expected one type")


def test_another_tokenizer_than_it_was_converted_with(quantized_copy: Path) -> None:
    path = quantized_copy / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    refused(quantized_copy, r"tokenizer\.json is not the tokenizer\.json that this model was converted with")


def test_a_folder_without_a_tokenizer_is_loaded(quantized_copy: Path) -> None:
    (quantized_copy / "tokenizer.json").unlink()
    create_engine(quantized_copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format is 2; this version reads 1: convert the checkpoint again"),
        ({"tokenizer_sha256": None}, "tokenizer_sha256 is None; expected text"),
        ({"families": {"glm_semantic": {"offset": 5000, "size": 300}}}, "glm_semantic ends at id 5299, but vocab_size"),
        ({"families": 3}, "families is 3; expected a section"),
    ],
)
def test_a_record_that_cannot_be_right(quantized_copy: Path, changes: dict[str, Any], message: str) -> None:
    record = json.loads((quantized_copy / "config.json").read_text(encoding="utf-8"))["gpa"]
    change_config(quantized_copy, gpa=record | changes)
    refused(quantized_copy, message)


def test_weights_of_another_checkpoint(tiny_checkpoint_copy: Path, quantized: Callable[[int], Path]) -> None:
    create_engine(tiny_checkpoint_copy, weights=quantized(8))
    change_tensors(tiny_checkpoint_copy, lambda tensors: None)
    refused(tiny_checkpoint_copy, r"was not made of .*model\.safetensors as it is now", weights=quantized(8))


def test_weights_that_do_not_say_what_they_are_of(tiny_checkpoint: Path) -> None:
    refused(tiny_checkpoint, "does not say what it was made of; expected a folder of", weights=tiny_checkpoint)


def test_a_folder_that_mlx_lm_made_is_loaded(quantized_copy: Path) -> None:
    """No record, half-precision scales, and a matrix that could not be divided left as it was."""

    def change(tensors: dict[str, Any]) -> None:
        name = "model.layers.0.mlp.down_proj"
        scales, biases = tensors.pop(f"{name}.scales"), tensors.pop(f"{name}.biases")
        weight = mx.dequantize(tensors[f"{name}.weight"], scales, biases, group_size=32, bits=8)
        tensors[f"{name}.weight"] = weight.astype(mx.bfloat16)
        for each in list(tensors):
            if each.endswith((".scales", ".biases")):
                tensors[each] = tensors[each].astype(mx.bfloat16)

    change_tensors(quantized_copy, change)
    change_config(quantized_copy, gpa=None)
    info = create_engine(quantized_copy).info
    assert (info.dtype, info.tokenizer_sha256) == ("mlx-8bit", "")


def test_the_checkpoint_report_says_what_the_weights_are_for(quantized: Callable[[int], Path]) -> None:
    findings = [each for each in inspect_checkpoint(quantized(8)).findings if each.part == "lm"]
    assert [each.text for each in findings if each.level == "warning"] == [
        "the weights are quantised for MLX; no other backend reads them"
    ]
    assert {each.level for each in findings} == {"ok", "warning"}


def test_the_checkpoint_checks_know_quantised_weights(quantized_copy: Path) -> None:
    Checkpoint.open(quantized_copy, require=("lm", "tokenizer")).token_space()
    change_tensors(quantized_copy, lambda tensors: tensors.pop("model.layers.2.self_attn.q_proj.scales"))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has shape \(128, 16\); expected \(128, 64\)"):
        Checkpoint.open(quantized_copy, require=("lm", "tokenizer"))
