"""The MLX converter writes what mlx-lm would, says where it comes from, and leaves nothing where it fails."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gpa_codecs.errors import CheckpointError, GpaError
from gpa_codecs.vocabulary import TokenSpace
from gpa_codecs.weights import read_header
from gpa_engines.registry import create_engine

mx = pytest.importorskip("mlx.core", reason="needs mlx")

from tools.convert.mlx_conversion.faults import ConversionFault  # noqa: E402
from tools.convert.mlx_conversion.plan import Plan, make_plan  # noqa: E402
from tools.convert.mlx_conversion.verification import verify  # noqa: E402
from tools.convert.mlx_conversion.writing import write_plan  # noqa: E402

SCRIPT = Path(__file__).parents[2] / "tools" / "convert" / "to_mlx.py"
WEIGHTS = "model.safetensors"


def quiet(what: str, done: int, total: int) -> None:
    """No progress is shown."""


def convert(source: Path, out: Path, bits: int | None = None, dtype: str | None = None) -> Plan:
    plan = make_plan(source, bits, None if bits is None else 32, dtype)
    write_plan(plan, out, quiet, lambda folder: None)
    return plan


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def change_config(folder: Path, **changes: Any) -> None:
    values = {key: value for key, value in (read(folder) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = mx.load(str(folder / WEIGHTS))
    mx.eval(list(tensors.values()))
    change(tensors)
    mx.save_safetensors(str(folder / WEIGHTS), tensors)


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def eight_bits(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command, with --verify."""
    out = tmp_path_factory.mktemp("eight") / "folder"
    outcome = run_script(tiny_checkpoint, "--out", out, "--bits", 8, "--group-size", 32, "--verify")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == f"{out}\n"
    assert "79 tensors, 8 bits in groups of 32, 0.6 MiB" in outcome.stderr
    assert "verified: 79 tensors" in outcome.stderr
    return out


def test_a_quantised_folder_holds_every_matrix_in_groups(eight_bits: Path) -> None:
    header = read_header(eight_bits / WEIGHTS)
    assert len(header) == 79
    table, norm = header["model.embed_tokens.weight"], header["model.layers.0.self_attn.q_norm.weight"]
    down = [header[f"model.layers.2.mlp.down_proj.{part}"] for part in ("weight", "scales", "biases")]
    assert (table.dtype, table.shape) == ("U32", (5141, 16))
    assert (norm.dtype, norm.shape) == ("F32", (32,))
    assert [each.shape for each in down] == [(64, 40), (64, 5), (64, 5)]
    assert [each.dtype for each in down] == ["U32", "F32", "F32"]


def test_the_folder_says_what_it_was_made_of(tiny_checkpoint: Path, eight_bits: Path) -> None:
    from gpa_engines.backends.mlx.weights import file_sha256

    config, source = read(eight_bits), read(tiny_checkpoint)
    assert config["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert {key: config[key] for key in source} == source
    space = TokenSpace.from_file(tiny_checkpoint / "tokenizer.json")
    families = {
        each.name: {"offset": each.offset, "size": each.size} for each in (space.glm, space.global_, space.semantic)
    }
    assert config["gpa"]["format"] == 1
    assert config["gpa"]["tokenizer_sha256"] == file_sha256(tiny_checkpoint / "tokenizer.json")
    assert config["gpa"]["weights_sha256"] == {WEIGHTS: file_sha256(tiny_checkpoint / WEIGHTS)}
    assert config["gpa"]["families"] == families


def test_the_tokenizers_files_go_along_and_the_codec_does_not(tiny_checkpoint: Path, eight_bits: Path) -> None:
    copied = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    assert {path.name for path in eight_bits.iterdir()} == {*copied, "config.json", WEIGHTS}
    for name in copied:
        assert (eight_bits / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


def test_a_conversion_gives_the_same_bytes_again(tiny_checkpoint: Path, eight_bits: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "again", bits=8)
    for path in eight_bits.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floating_point_weights_are_rounded_once(tiny_checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    plan = convert(tiny_checkpoint, tmp_path / "out", dtype=dtype)
    found = verify(plan, tmp_path / "out", quiet)
    assert found.tensors == 35
    assert found.weight_error < (1e-8 if dtype == "float16" else 1e-30)
    assert read(tmp_path / "out")["dtype"] == dtype
    stored = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert {spec.dtype for spec in read_header(tmp_path / "out" / WEIGHTS).values()} == {stored}
    engine = create_engine("mlx", tmp_path / "out", device="cpu")
    assert np.isfinite(asyncio.run(engine.logits([1, 2, 3]))).all()
    asyncio.run(engine.close())


def test_without_a_choice_the_weights_stay_as_they_are(tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "out")
    before, after = (mx.load(str(folder / WEIGHTS)) for folder in (tiny_checkpoint, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(
        mx.array_equal(before[name], after[name]).item() and before[name].dtype == after[name].dtype for name in before
    )


def test_verification_measures_the_rounding(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for bits in (8, 4):
        plan = convert(tiny_checkpoint, tmp_path / str(bits), bits)
        found[bits] = verify(plan, tmp_path / str(bits), quiet)
    assert found[8].tensors == found[4].tensors == 79
    assert 0.002 < found[8].weight_error < 0.006
    assert 0.04 < found[4].weight_error < 0.1
    assert 0.4 < found[8].steps <= 1.01
    assert 0 < found[8].logits < 0.04 < found[4].logits < 0.6
    assert found[8].positions - 4 <= found[8].agreed <= found[8].positions


def swap_scales(folder: Path) -> None:
    one, other = "model.layers.0.mlp.up_proj.scales", "model.layers.1.mlp.up_proj.scales"
    change_tensors(folder, lambda tensors: tensors.update({one: tensors[other], other: tensors[one]}))


def drop_biases(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.biases"))


def narrow_scales(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.scales"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].astype(mx.float16)}))


def change_theta(folder: Path) -> None:
    change_config(folder, rope_theta=3.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_scales, r"model\.layers\.0\.mlp\.up_proj\.weight was not stored as it was converted"),
        (drop_biases, r"up_proj\.biases is None; expected TensorSpec\(dtype='F32'"),
        (narrow_scales, r"up_proj\.scales is TensorSpec\(dtype='F16'.*expected TensorSpec\(dtype='F32'"),
        (change_theta, r"the logits are .* from the checkpoint's; at most 0\.15 is right"),
    ],
)
def test_verification_finds_a_fault_and_nothing_is_left(
    tiny_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    plan = make_plan(tiny_checkpoint, 8, 32, None)

    def inspect(folder: Path) -> None:
        damage(folder)
        verify(plan, folder, quiet)

    with pytest.raises(ConversionFault, match=message):
        write_plan(plan, tmp_path / "out", quiet, inspect)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [8, 4])
def test_the_engine_computes_with_the_converted_weights(tiny_checkpoint: Path, tmp_path: Path, bits: int) -> None:
    convert(tiny_checkpoint, tmp_path / "out", bits)
    ours, theirs = create_engine("mlx", tmp_path / "out"), create_engine("mlx", tiny_checkpoint)
    rounded, exact = (asyncio.run(each.logits(range(60))).astype(np.float64) for each in (ours, theirs))
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0.001 < error < (0.04 if bits == 8 else 0.6)
    for engine in (ours, theirs):
        asyncio.run(engine.close())


ORACLE = """
    import sys
    from pathlib import Path
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    source, *folders = map(Path, sys.argv[1:])
    for folder in folders:
        model, config = load_model(folder)
        np.save(folder / "logits.npy", np.array(model(mx.array(list(range(60)))[None])[0]))
        theirs, _ = load_model(source)
        theirs.set_dtype(mx.float32)
        if "quantization" in config:
            nn.quantize(theirs, 32, config["quantization"]["bits"])
        expected, ours = dict(tree_flatten(theirs.parameters())), mx.load(str(folder / "model.safetensors"))
        print(expected.keys() == ours.keys() and all(mx.array_equal(expected[name], ours[name]) for name in expected))
"""


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="needs mlx-lm, the oracle")
def test_mlx_lm_quantises_alike_and_reads_the_folders(tiny_checkpoint_copy: Path, tmp_path: Path) -> None:
    """In a process of its own: importing mlx_lm lowers the limit of open files. One config is by transformers 5."""
    folders = [tmp_path / name for name in ("8bit", "4bit", "float32")]
    convert(tiny_checkpoint_copy, folders[0], bits=8)
    convert(tiny_checkpoint_copy, folders[2], dtype="float32")
    parameters = {"rope_theta": 1000000.0, "rope_type": "default"}
    change_config(tiny_checkpoint_copy, rope_theta=None, rope_scaling=None, rope_parameters=parameters)
    convert(tiny_checkpoint_copy, folders[1], bits=4)
    command = [sys.executable, "-c", textwrap.dedent(ORACLE), str(tiny_checkpoint_copy), *map(str, folders)]
    oracle = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert oracle.returncode == 0, oracle.stderr
    assert oracle.stdout == "True\n" * 3
    for folder in folders:
        engine = create_engine("mlx", folder, device="cpu")
        ours, theirs = asyncio.run(engine.logits(range(60))), np.load(folder / "logits.npy")
        asyncio.run(engine.close())
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 5e-6


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            (8, None, None),
            r"--group-size 64 does not divide the rows of 3 tensors: model\.layers\.\*\.mlp\.down_proj\.weight "
            r"\(160 values in a row\); --group-size 32 fits",
        ),
        ((8, 128, None), r"the rows of 19 tensors: .*embed_tokens\.weight \(64 values.*; --group-size 32 fits"),
        ((8, 32, "float16"), "--dtype float16 is for weights that stay floating point, --bits 8 for quantised ones"),
        ((None, 32, None), "--group-size 32 says how --bits rounds; give --bits 8 or 4 too"),
        ((5, 32, None), "--bits is 5; expected one of 4, 8"),
        ((8, 16, None), "--group-size is 16; expected one of 32, 64, 128"),
        ((None, None, "int8"), "--dtype is 'int8'; expected one of float32, bfloat16, float16"),
    ],
)
def test_choices_that_cannot_be_are_named(
    tiny_checkpoint: Path, choice: tuple[int | None, int | None, str | None], message: str
) -> None:
    with pytest.raises(GpaError, match=message):
        make_plan(tiny_checkpoint, *choice)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type is 'yarn'"),
        ({"quantization": {"bits": 8, "group_size": 32}}, "has a section 'quantization': this folder was converted"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has a section 'quantization_config'"),
        ({"vocab_size": 5140}, r"embed_tokens\.weight has shape \(5141, 64\); expected \(5140, 64\)"),
    ],
)
def test_other_models_are_refused(tiny_checkpoint_copy: Path, changes: dict[str, Any], message: str) -> None:
    change_config(tiny_checkpoint_copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        make_plan(tiny_checkpoint_copy, 8, 32, None)


def test_a_converted_folder_is_not_converted_again(eight_bits: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert(tiny_checkpoint, tmp_path / "float", dtype="float32")
    for folder, section in ((eight_bits, "quantization"), (tmp_path / "float", "gpa")):
        with pytest.raises(CheckpointError, match=f"has a section '{section}': this folder was converted already"):
            make_plan(folder, 8, 32, None)


def test_weights_that_are_not_whole_or_not_alone_are_named(tiny_checkpoint_copy: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(tiny_checkpoint_copy, lambda tensors: tensors.update({"model.layers.0.mlp.bias": tensors[name]}))
    with pytest.raises(CheckpointError, match=r"hold model\.layers\.0\.mlp\.bias, which GPA's Qwen3 has no place for"):
        make_plan(tiny_checkpoint_copy, 8, 32, None)
    change_tensors(tiny_checkpoint_copy, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"has no tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        make_plan(tiny_checkpoint_copy, 8, 32, None)
    (tiny_checkpoint_copy / WEIGHTS).rename(tiny_checkpoint_copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, which only torch can read"):
        make_plan(tiny_checkpoint_copy, 8, 32, None)


def test_a_tokenizer_is_needed(tiny_checkpoint_copy: Path) -> None:
    (tiny_checkpoint_copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        make_plan(tiny_checkpoint_copy, 8, 32, None)


@pytest.mark.parametrize(
    ("value", "bits", "dtype", "message"),
    [
        (float("nan"), 8, None, r"model\.norm\.weight holds values that are no numbers; download it again"),
        (
            1e6,
            None,
            "float16",
            r"model\.norm\.weight holds values up to 1e\+06, too large for --dtype float16; use bfloat16",
        ),
    ],
)
def test_values_that_cannot_be_stored_are_named_and_nothing_is_left(
    tiny_checkpoint_copy: Path, tmp_path: Path, value: float, bits: int | None, dtype: str | None, message: str
) -> None:
    change_tensors(
        tiny_checkpoint_copy, lambda tensors: tensors.update({"model.norm.weight": mx.full((64,), value, mx.float32)})
    )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(GpaError, match=message):
        convert(tiny_checkpoint_copy, tmp_path / "out", bits, dtype)
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == total // 2:
            os.kill(os.getpid(), signal.SIGINT)

    plan = make_plan(tiny_checkpoint, 8, 32, None)
    with pytest.raises(KeyboardInterrupt):
        write_plan(plan, tmp_path / "out", interrupt, lambda folder: None)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(GpaError, match=r"could not be written: 6\d\d,\d\d\d bytes needed, 1,000 free; nothing is left"):
        convert(tiny_checkpoint, tmp_path / "out", 8)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_where_an_empty_one_was(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(tiny_checkpoint, tmp_path / "out", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_an_existing_target_is_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, message in (
        (full, "full exists and is not empty; name a new folder"),
        (tmp_path / "file", "file exists and is not a folder; name a new folder"),
        (tmp_path / "no" / "out", f"there is no folder {tmp_path / 'no'}; create it first"),
    ):
        with pytest.raises(GpaError, match=message):
            convert(tiny_checkpoint, out, 8)
    assert (full / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_an_error_is_one_line_and_status_2(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    outcome = run_script(tiny_checkpoint, "--out", tmp_path, "--bits", 8)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr == f"error: --out {tmp_path} exists and is not empty; name a new folder\n"


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (ConversionFault("the logits are wrong"), 1, "error: the logits are wrong"),
        (GpaError("no such choice"), 2, "error: no such choice"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_how_it_ends_is_the_exit_status(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int, message: str
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = import_module("to_mlx")
    if isinstance(raised, ConversionFault):
        raised = import_module("mlx_conversion.faults").ConversionFault(str(raised))

    def fail(*arguments: object) -> None:
        raise raised

    monkeypatch.setattr(script, "_convert", fail)
    outcome = CliRunner().invoke(script.app, [str(tiny_checkpoint), "--out", "out"])
    assert outcome.exit_code == status
    assert outcome.stderr.strip() == message
    assert outcome.stdout == ""


def test_misuse_of_the_command_line_is_status_2(tiny_checkpoint: Path) -> None:
    outcome = run_script(tiny_checkpoint, "--bits", 8)
    assert outcome.returncode == 2
    assert "--out" in outcome.stderr


def test_neither_torch_nor_mlx_lm_is_needed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    code = f"""
        import runpy, sys
        for name in ("torch", "transformers", "mlx_lm"):
            sys.modules[name] = None
        sys.argv = ["to_mlx.py", {str(tiny_checkpoint)!r}, "--out", {str(tmp_path / "out")!r}, "--bits", "8",
                    "--group-size", "32", "--verify"]
        sys.path.insert(0, {str(SCRIPT.parent)!r})
        runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "out" / WEIGHTS).is_file()
