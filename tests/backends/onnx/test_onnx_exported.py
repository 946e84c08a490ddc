"""What is wrong with an exported folder is said before anything is loaded, with the command that mends it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_engines.backends.onnx import create_engine
from gpa_engines.backends.onnx.exported import ExportedLM
from gpa_engines.backends.onnx.tables import Table

pytest.importorskip("onnxruntime", reason="needs onnxruntime")


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "lm" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_the_most_exact_precision_is_chosen(exported_copy: Path) -> None:
    assert ExportedLM.open(exported_copy).dtype == "float32"
    change_manifest(exported_copy, lambda manifest: manifest["precisions"].pop("fp32"))
    assert ExportedLM.open(exported_copy).dtype == "float16"


def test_a_checkpoint_may_hold_the_export_in_its_onnx_folder(exported_dir: Path, tiny_checkpoint_copy: Path) -> None:
    shutil.copytree(exported_dir / "lm", tiny_checkpoint_copy / "onnx" / "lm")
    assert ExportedLM.open(tiny_checkpoint_copy).folder == tiny_checkpoint_copy / "onnx" / "lm"


def test_a_checkpoint_that_was_not_exported_names_the_command(tiny_checkpoint: Path) -> None:
    command = re.escape(f"python tools/convert/to_onnx.py {tiny_checkpoint} --what lm")
    with pytest.raises(CheckpointError, match=rf"looked for lm/manifest\.json and onnx/lm/manifest\.json.*{command}$"):
        create_engine(tiny_checkpoint)


def test_a_precision_that_was_not_exported_names_those_that_were(exported_copy: Path) -> None:
    change_manifest(exported_copy, lambda manifest: manifest["precisions"].pop("int8"))
    expected = r"int8 was not exported; .* has float32, float16\. To export it: .*--what lm --precision int8"
    with pytest.raises(BackendError, match=expected):
        create_engine(exported_copy, dtype="int8")


@pytest.mark.parametrize("name", ["model.fp32.onnx", "model.fp32.onnx.data", "embedding.fp32.npy", "head.onnx"])
def test_a_missing_or_truncated_file_is_named(exported_copy: Path, name: str) -> None:
    path = exported_copy / "lm" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=rf"{name} has {len(content) - 1} bytes; manifest\.json says {len(content)}"
    ):
        create_engine(exported_copy)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing, .*--what lm --precision fp32"):
        create_engine(exported_copy)


def test_a_file_of_another_precision_may_be_missing(exported_copy: Path) -> None:
    (exported_copy / "lm" / "model.int8.onnx.data").unlink()
    assert ExportedLM.open(exported_copy, "float32").precision == "fp32"


def test_a_damaged_graph_is_noticed(exported_copy: Path) -> None:
    path = exported_copy / "lm" / "model.fp32.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.fp32\.onnx is not the file that manifest\.json describes"):
        create_engine(exported_copy)


def test_a_graph_that_onnx_runtime_refuses_is_named(exported_copy: Path) -> None:
    from gpa_engines.backends.onnx.runtime import CPU, Session

    path = exported_copy / "lm" / "model.fp32.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"model\.fp32\.onnx cannot be loaded by onnxruntime"):
        Session(path, CPU, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(version=2), "format and version are 'gpa-onnx-lm' and 2; .*convert again"),
        (lambda manifest: manifest.update(format="other"), "'other' and 1"),
        (lambda manifest: manifest.pop("precisions"), "precisions is missing"),
        (lambda manifest: manifest["precisions"].clear(), "names none of fp32, fp16, int8"),
        (lambda manifest: manifest["geometry"].pop("head_dim"), "head_dim is 16, but .* has 32"),
        (lambda manifest: manifest["geometry"].update(vocab_size="many"), "vocab_size is 'many'"),
        (lambda manifest: manifest["geometry"].update(num_hidden_layers=4), "num_hidden_layers is 4, but .* has 3"),
        (
            lambda manifest: manifest["precisions"]["fp32"]["files"].update({"../x": {"bytes": 1}}),
            "'../x' is not the name of a file",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    exported_copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_manifest(exported_copy, change)
    with pytest.raises(CheckpointError, match=message):
        create_engine(exported_copy)


def test_a_manifest_that_is_no_json_is_refused(exported_copy: Path) -> None:
    (exported_copy / "lm" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be parsed"):
        create_engine(exported_copy)


def test_an_export_beside_another_checkpoint_is_refused(exported_dir: Path, tiny_checkpoint_copy: Path) -> None:
    shutil.copytree(exported_dir / "lm", tiny_checkpoint_copy / "onnx" / "lm")
    config = json.loads((tiny_checkpoint_copy / "config.json").read_text())
    (tiny_checkpoint_copy / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
    with pytest.raises(
        CheckpointError, match=r"rope_theta is 1000000\.0, but .* has 10000\.0: this export is of another"
    ):
        create_engine(tiny_checkpoint_copy)


def test_rows_of_an_8_bit_table_are_expanded(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.integers(-127, 128, (64, 50), np.int8)
    scales = random.random((2, 50), np.float32)
    np.save(tmp_path / "values.npy", values)
    np.save(tmp_path / "scales.npy", scales)
    table = Table(tmp_path / "values.npy", tmp_path / "scales.npy", 50, 64)
    expected = (values * np.repeat(scales, 32, axis=0)).T
    np.testing.assert_array_equal(table.whole(), expected)
    for ids in ([3], [9, 2, 2, 40], list(range(10, 20)), [4, 6, 6, 7], [5, 3, 4]):
        np.testing.assert_array_equal(table.rows(np.array(ids)), expected[ids])


def test_tables_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.zeros((50, 64), np.float32))
    with pytest.raises(CheckpointError, match=r"table\.npy is float32\[50, 64\]; expected .*\[51, 64\]"):
        Table(tmp_path / "table.npy", None, 51, 64)
    (tmp_path / "table.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CheckpointError, match=r"table\.npy cannot be read"):
        Table(tmp_path / "table.npy", None, 50, 64)
