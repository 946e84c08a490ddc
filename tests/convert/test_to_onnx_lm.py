"""The export of the language model: what it writes, that it is the same model, and that it leaves nothing half done."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpa_codecs.errors import CheckpointError, GpaError
from gpa_engines.backends.torch import create_engine as create_torch_engine
from gpa_engines.engine import Engine
from tests.engines.generating import relative_l2

pytest.importorskip("onnx", reason="the export needs onnx")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

import onnx

from gpa_engines.backends.onnx import create_engine
from tools.convert.onnx_conversion.lm import COMPANIONS, export_lm
from tools.convert.onnx_conversion.lm_weights import quantize

PROMPT = [3, 1, 4, 1, 5, 926, 5, 3, 5, 4000]


def export(checkpoint: Path, out: Path, *precisions: str) -> Path:
    export_lm(checkpoint, out, precisions, lambda what, done, total: None)
    return out


def read_logits(engine: Engine) -> np.ndarray:
    async def main() -> np.ndarray:
        logits = await engine.logits(PROMPT)
        await engine.close()
        return logits

    return asyncio.run(main())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_checkpoint, tmp_path_factory.mktemp("onnx") / "new" / "folder", "int8", "fp32", "fp16")


def test_the_manifest_describes_source_and_files(exported: Path, tiny_checkpoint: Path) -> None:
    manifest = json.loads((exported / "lm" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["opset"]) == ("gpa-onnx-lm", 1, 21)
    assert manifest["converter"].startswith("gpa-engines ")
    assert manifest["source"] == {
        "weights": {"model.safetensors": sha256(tiny_checkpoint / "model.safetensors")},
        "tokenizer_sha256": sha256(tiny_checkpoint / "tokenizer.json"),
    }
    assert list(manifest["precisions"]) == ["fp32", "fp16", "int8"]
    described = {"manifest.json"}
    for precision in manifest["precisions"].values():
        for name, entry in precision["files"].items():
            path = exported / "lm" / name
            assert entry == {"bytes": path.stat().st_size, "sha256": sha256(path)}
            described.add(name)
    assert {path.name for path in (exported / "lm").iterdir()} == described


def test_the_output_is_a_model_folder(exported: Path, tiny_checkpoint: Path) -> None:
    copied = [name for name in COMPANIONS if (tiny_checkpoint / name).exists()]
    assert {"config.json", "tokenizer.json", "generation_config.json"} < set(copied)
    assert {path.name for path in exported.iterdir()} == {"lm", *copied}
    assert all((exported / name).read_bytes() == (tiny_checkpoint / name).read_bytes() for name in copied)


@pytest.mark.parametrize("name", ["model.fp32", "model.fp16", "model.int8", "head", "head.int8"])
def test_graphs_are_valid_and_of_standard_operators(exported: Path, name: str) -> None:
    path = exported / "lm" / f"{name}.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}


def test_smaller_precisions_are_smaller(exported: Path) -> None:
    sizes = [
        (exported / "lm" / f"model.{precision}.onnx.data").stat().st_size for precision in ("fp32", "fp16", "int8")
    ]
    assert sizes[1] == sizes[0] / 2
    assert sizes[2] < sizes[0] / 3


def test_progress_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    export_lm(tiny_checkpoint, tmp_path, ["fp16", "fp32"], lambda *report: told.append(report))
    assert told == [(f"lm {name}", done, 13) for name in ("fp32", "fp16") for done in range(1, 14)]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_head_of_its_own_is_used(tiny_checkpoint_copy: Path, tmp_path: Path, precision: str) -> None:
    change_config(tiny_checkpoint_copy, tie_word_embeddings=False)
    weights = load_file(tiny_checkpoint_copy / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(5141, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file(weights, tiny_checkpoint_copy / "model.safetensors")
    out = export(tiny_checkpoint_copy, tmp_path / "onnx", precision)
    expected = read_logits(create_torch_engine(tiny_checkpoint_copy))
    assert relative_l2(read_logits(create_engine(out, threads=1)), expected) < (1e-5 if precision == "fp32" else 0.06)


def test_an_interrupted_export_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_lm(tiny_checkpoint, tmp_path / "a" / "b", ["fp32"], interrupt)
    assert list(tmp_path.iterdir()) == []

    out = export(tiny_checkpoint, tmp_path / "out", "int8")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        export_lm(tiny_checkpoint, out, ["fp32"], interrupt)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_earlier_export_is_replaced_and_nothing_else_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = export(tiny_checkpoint, tmp_path / "out", "int8")
    export(tiny_checkpoint, out, "fp16")
    assert "embedding.fp16.npy" in {path.name for path in (out / "lm").iterdir()}
    assert not list((out / "lm").glob("*int8*"))
    assert not list(out.glob(".*"))
    other = tmp_path / "other"
    (other / "lm").mkdir(parents=True)
    (other / "lm" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"lm exists and is not an earlier export"):
        export(tiny_checkpoint, other, "fp16")
    assert (other / "lm" / "thesis.txt").read_text() == "mine"


def test_a_checkpoint_can_be_exported_into_itself(tiny_checkpoint_copy: Path) -> None:
    before = sha256(tiny_checkpoint_copy / "tokenizer.json")
    export(tiny_checkpoint_copy, tiny_checkpoint_copy, "int8")
    assert sha256(tiny_checkpoint_copy / "tokenizer.json") == before
    read_logits(create_engine(tiny_checkpoint_copy, threads=1))


@pytest.mark.parametrize("precisions", [(), ("fp32", "q4")])
def test_unknown_precisions_are_refused(tiny_checkpoint: Path, tmp_path: Path, precisions: tuple[str, ...]) -> None:
    with pytest.raises(GpaError, match="expected one or more of fp32, fp16, int8"):
        export(tiny_checkpoint, tmp_path, *precisions)


def test_an_output_that_cannot_be_written_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GpaError, match=r"file/out: cannot write the ONNX files"):
        export(tiny_checkpoint, tmp_path / "file" / "out", "fp16")


def test_missing_weights_are_named(tiny_checkpoint_copy: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_checkpoint_copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tiny_checkpoint_copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 1 of .* model\.layers\.1\.mlp\.up_proj\.weight"):
        export(tiny_checkpoint_copy, tmp_path, "fp32")


def test_weights_beyond_half_precision_are_refused(tiny_checkpoint_copy: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_checkpoint_copy / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = 1e6
    save_file(weights, tiny_checkpoint_copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj has weights beyond float16's 65504"):
        export(tiny_checkpoint_copy, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_quantised_weights_are_within_half_a_step() -> None:
    matrix = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    matrix[3] = 0
    quantized, scales = quantize(matrix, "weight")
    assert (quantized.shape, quantized.dtype, scales.shape) == ((96, 70), np.int8, (3, 70))
    steps = np.repeat(scales, 32, axis=0)
    assert (np.abs(quantized * steps - matrix.numpy().T) <= steps * 0.5001).all()
    assert np.abs(quantized).max() == 127


def test_rows_that_do_not_divide_into_blocks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="weight has rows of 40 weights; int8 needs a multiple of 32"):
        quantize(torch.zeros(8, 40), "weight")


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
