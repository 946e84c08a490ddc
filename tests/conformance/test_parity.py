"""Parity per hardware, as tox runs it."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
import yaml

from gpa_conformance.parity import CONVERTERS, HARDWARE, linked_model, main
from gpa_conformance.results import RunReport
from gpa_engines.registry import BACKENDS, Backend

ROOT = Path(__file__).parents[2]


def test_every_hardware_has_a_tox_environment_and_a_job() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    environments = {name for section in tox.sections() for name in section.partition(":")[2].strip("{}").split(",")}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    jobs = [workflow["jobs"][job]["strategy"]["matrix"]["include"] for job in ("parity", "parity-own-runner")]
    assert sorted(entry["hardware"] for job in jobs for entry in job) == sorted(HARDWARE)
    for name, hardware in HARDWARE.items():
        assert name in environments
        assert hardware.backend in BACKENDS
        for script, *_ in hardware.conversions:
            assert (ROOT / CONVERTERS / script).is_file()


def test_a_missing_package_is_skipped_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = Backend("mlx", "Apple silicon", "gpa_engines.backends.torch", ("no_such_package",), "mlx")
    monkeypatch.setitem(BACKENDS, "mlx", missing)
    assert main(["mlx", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "skipped: backend 'mlx' needs no_such_package: pip install 'gpa-engines[mlx]'\n"
    assert not (tmp_path / "out").exists()


def test_cuda_without_a_device_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["cuda", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "skipped: torch sees no CUDA device\n"


def test_a_run_writes_the_reports_of_every_dtype_and_the_matrix(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["cpu", "--out", str(out), "--model", str(tiny_checkpoint), "--cases", "logits/ascend-1"]) == 0
    for dtype in ("float32", "bfloat16", "int8"):
        report = RunReport.from_json(out / f"cpu-{dtype}.json")
        assert report.engine["dtype"] == dtype
        assert report.passed == 1
        assert (out / f"cpu-{dtype}.html").stat().st_size > 10_000
        assert (out / f"cpu-{dtype}.markdown").is_file()
    assert (out / "cpu.html").is_file()


def test_a_failed_run_fails(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["cpu", "--out", str(tmp_path), "--model", str(tiny_checkpoint), "--cases", "logits/no-such-case"]
    assert main(arguments) == 2


def test_conversions_that_a_user_has_are_out_of_a_converters_reach(tmp_path: Path) -> None:
    model = tmp_path / "user"
    (model / "onnx" / "lm").mkdir(parents=True)
    for name in ("config.json", "model-F32.gguf", "model-embeddings-f32.safetensors", "model.safetensors"):
        (model / name).write_text("the user's")
    folder = linked_model(str(model), tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "onnx"}
    (folder / "model-F32.gguf").write_text("converted")
    (folder / "onnx" / "codec").mkdir()
    assert (model / "model-F32.gguf").read_text() == "the user's"
    assert [path.name for path in (model / "onnx").iterdir()] == ["lm"]
