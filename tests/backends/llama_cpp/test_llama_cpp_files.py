"""Which GGUF files are loaded from where, and what is said when none is right."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
pytest.importorskip("gguf", reason="needs gguf to write files")

import gguf

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_engines.backends.llama_cpp import create_engine
from gpa_engines.backends.llama_cpp.engine import LlamaStepModel
from gpa_engines.backends.llama_cpp.gguf_file import read_header
from tests.backends.llama_cpp.asking import allocate, last_logits, load


def names(model: LlamaStepModel) -> list[str]:
    return [lane.model.path.name for lane in model.lanes]


def copy(gguf_folder: Path, to: Path, *patterns: str) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    for pattern in (*patterns, "*.safetensors"):
        for path in gguf_folder.glob(pattern):
            shutil.copy(path, to)
    return to


def rewrite(source: Path, target: Path, **changes: str | int | None) -> Path:
    """The same file with other metadata; keys have __ for a dot, None leaves the key out."""
    wanted = {key.replace("__", "."): value for key, value in changes.items()}
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(wanted.get("general.architecture", "qwen3")))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = wanted.get(field.name, field.contents())
        if value is not None and not (isinstance(value, list) and not value):
            kind = field.types[0]
            writer.add_key_value(field.name, value, kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("place", [".", "gguf"])
def test_files_are_found_in_the_folder_and_its_gguf_folder(gguf_folder: Path, tmp_path: Path, place: str) -> None:
    copy(gguf_folder, tmp_path / place, "*-F16.gguf")
    assert names(load(tmp_path)) == ["tiny-speech-F16.gguf", "tiny-text-F16.gguf", "tiny-F16.gguf"]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("auto", "Q8_0"),
        ("q8_0", "Q8_0"),
        ("Q8_0", "Q8_0"),
        ("q8-0", "Q8_0"),
        ("f16", "F16"),
        ("float16", "F16"),
        ("F32", "F32"),
        ("float32", "F32"),
    ],
)
def test_the_dtype_chooses(gguf_folder: Path, dtype: str, kind: str) -> None:
    assert names(load(gguf_folder, dtype=dtype)) == [
        f"tiny-speech-{kind}.gguf",
        f"tiny-text-{kind}.gguf",
        f"tiny-{kind}.gguf",
    ]


def test_auto_prefers_files_that_serve_every_task(gguf_folder: Path, tmp_path: Path) -> None:
    copy(gguf_folder, tmp_path, "tiny-speech-Q8_0.gguf", "tiny-F16.gguf")
    assert names(load(tmp_path)) == ["tiny-F16.gguf"]
    assert names(load(tmp_path, dtype="q8_0")) == ["tiny-speech-Q8_0.gguf"]


def test_a_file_alone_is_loaded_alone(gguf_folder: Path) -> None:
    assert names(load(gguf_folder / "tiny-F16.gguf")) == ["tiny-F16.gguf"]
    with pytest.raises(BackendError, match=r"tiny-F16.gguf is float16; expected dtype 'auto' or that, not 'q8_0'"):
        create_engine(gguf_folder / "tiny-F16.gguf", dtype="q8_0")


def test_a_folder_without_files_says_how_to_make_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no GGUF file.*python tools/convert/to_gguf.py MODEL_DIR"):
        create_engine(tiny_checkpoint)
    with pytest.raises(CheckpointError, match="No such file"):
        create_engine(tmp_path / "nothing.gguf")


def test_a_dtype_that_is_not_there_lists_those_that_are(gguf_folder: Path) -> None:
    with pytest.raises(BackendError, match=r"dtype 'q4_k_m'; there are float16, float32, q8_0; more: .*--outtype"):
        create_engine(gguf_folder, dtype="q4_k_m")


def test_equal_files_are_listed(gguf_folder: Path, tmp_path: Path) -> None:
    copy(gguf_folder, tmp_path, "tiny-F16.gguf")
    shutil.copy(tmp_path / "tiny-F16.gguf", tmp_path / "other-F16.gguf")
    with pytest.raises(
        CheckpointError, match=r"2 full files of dtype float16: .*other-F16.gguf, .*tiny-F16.gguf; give one"
    ):
        create_engine(tmp_path)


def test_files_of_two_checkpoints_are_not_mixed(gguf_folder: Path, tmp_path: Path) -> None:
    copy(gguf_folder, tmp_path, "tiny-speech-F32.gguf")
    rewrite(gguf_folder / "tiny-F32.gguf", tmp_path / "tiny-F32.gguf", gpa__source__sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"gpa.source.sha256 is .*0000.*different checkpoints"):
        create_engine(tmp_path)


def test_the_tokenizers_digest_is_passed_on(gguf_folder: Path) -> None:
    stored = read_header(gguf_folder / "tiny-F32.gguf").text("gpa.tokenizer.sha256")
    engine = create_engine(gguf_folder / "tiny-F32.gguf", threads=1)
    assert engine.info.tokenizer_sha256 == stored
    assert len(stored) == 64


def test_a_file_of_llama_cpps_own_converter_is_taken_as_full(gguf_folder: Path, tmp_path: Path) -> None:
    source = gguf_folder / "tiny-F32.gguf"
    keys = [key for key in read_header(source).metadata if key.startswith("gpa.")]
    foreign = rewrite(source, tmp_path / "foreign.gguf", **{key.replace(".", "__"): None for key in keys})
    engine = create_engine(tmp_path, threads=1)
    assert (engine.info.vocab_size, engine.info.logit_ids, engine.info.tokenizer_sha256) == (5141, None, "")
    assert "foreign.gguf was not made by to_gguf.py" in engine.info.note
    ids = [1, 600, 5000]
    logits = [last_logits(model, allocate(model, ids), ids) for model in (load(foreign), load(source))]
    assert (logits[0] == logits[1]).all()


def test_a_table_of_another_checkpoint_is_refused(gguf_folder: Path, tmp_path: Path) -> None:
    copy(gguf_folder, tmp_path, "tiny-speech-F32.gguf")
    (tmp_path / "tiny-embeddings-f32.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tiny-embeddings-f32.safetensors is missing"):
        create_engine(tmp_path)
    copy(gguf_folder, tmp_path / "b")
    changed = rewrite(
        gguf_folder / "tiny-speech-F32.gguf", tmp_path / "b" / "tiny-speech-F32.gguf", gpa__tokenizer__sha256="1" * 64
    )
    with pytest.raises(CheckpointError, match="the table belongs to another conversion"):
        create_engine(changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"max_batch": 0}, "max_batch is 0; expected at least 1"),
        ({"max_batch": 257}, "max_batch is 257; llama.cpp has at most 256"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"max_tokens_in_flight": 0}, "max_tokens_in_flight is 0"),
        ({"mode": "quick"}, "mode is 'quick'; expected 'auto', 'exact' or 'fast'"),
        ({"mode": "exact", "flash_attention": True}, "flash_attention sums in float16"),
        ({"n_gpu_layers": -2}, "n_gpu_layers is -2"),
    ],
)
def test_options_that_cannot_be_had_are_refused(gguf_folder: Path, options: dict, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        create_engine(gguf_folder / "tiny-F32.gguf", **options)


def test_layers_on_a_gpu_need_a_build_for_one(gguf_folder: Path) -> None:
    from gpa_engines.backends.llama_cpp import native

    native.start()
    if native.supports_gpu():
        pytest.skip("this llama-cpp-python has a GPU")
    with pytest.raises(BackendError, match="n_gpu_layers is 4, but the installed llama-cpp-python has no GPU"):
        create_engine(gguf_folder / "tiny-F32.gguf", n_gpu_layers=4)


BAD_FILES = """
import sys
from pathlib import Path
from gpa_codecs.errors import CheckpointError
from gpa_engines.backends.llama_cpp import create_engine

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
content = source.read_bytes()
damaged = folder / source.name
size = len(content)
for cut in [*range(0, 400, 13), *range(400, size, size // 60), size - 1]:
    damaged.write_bytes(content[:cut])
    try:
        create_engine(damaged, threads=1)
    except CheckpointError as error:
        assert str(damaged) in str(error), error
    else:
        raise AssertionError(f"a file cut to {cut} of {size} bytes was loaded")
print("all refused")
"""


@pytest.mark.parametrize("name", ["tiny-F32.gguf", "tiny-speech-Q8_0.gguf"])
def test_a_truncated_file_is_an_error_and_no_crash(gguf_folder: Path, tmp_path: Path, name: str) -> None:
    for table in gguf_folder.glob("*.safetensors"):
        shutil.copy(table, tmp_path)
    command = [sys.executable, "-c", BAD_FILES, str(gguf_folder / name), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all refused\n"), done.stderr


FOREIGN = """
import asyncio, random, sys
from pathlib import Path
from gpa_codecs.errors import GpaError
from gpa_engines.backends.llama_cpp import create_engine
from gpa_engines.backends.llama_cpp.gguf_file import read_header

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
content, end = source.read_bytes(), read_header(source).data_offset
damaged = folder / "damaged.gguf"

async def use():
    engine = create_engine(damaged, threads=1, max_tokens_in_flight=256, max_batch=1)
    await engine.logits([1, 2, 3])
    await engine.close()

refused = 0
for seed in range(60):
    chosen = random.Random(seed)
    changed = bytearray(content)
    for _ in range(chosen.choice((1, 2, 4))):
        changed[chosen.randrange(4, min(3000, end) if seed % 2 else end)] = chosen.randrange(256)
    damaged.write_bytes(changed)
    try:
        asyncio.run(use())
    except GpaError:
        refused += 1
print("refused", refused)
"""


def test_damaged_metadata_never_ends_the_process(gguf_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FOREIGN, str(gguf_folder / "tiny-F32.gguf"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 10


def test_other_architectures_are_passed_over_in_a_folder_and_refused_by_name(gguf_folder: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "vision.gguf", "clip")
    writer.add_name("a vision tower")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="the architecture is 'clip'; GPA is a 'qwen3' model"):
        create_engine(tmp_path / "vision.gguf")
    with pytest.raises(CheckpointError, match="no GGUF file of a GPA model"):
        create_engine(tmp_path)
    copy(gguf_folder, tmp_path, "tiny-F32.gguf")
    assert names(load(tmp_path)) == ["tiny-F32.gguf"]


def test_a_damaged_file_in_a_folder_is_named_not_hidden(gguf_folder: Path, tmp_path: Path) -> None:
    copy(gguf_folder, tmp_path, "tiny-F32.gguf", "tiny-Q8_0.gguf")
    damaged = tmp_path / "tiny-Q8_0.gguf"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"tiny-Q8_0.gguf is truncated"):
        create_engine(tmp_path)
