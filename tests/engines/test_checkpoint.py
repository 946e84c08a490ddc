"""A checkpoint folder is accepted, or refused with the file, what was expected and what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpa_codecs.errors import CheckpointError
from gpa_engines.checkpoint import PARTS, TASK_PARTS, Checkpoint, inspect_checkpoint
from gpa_engines.random_checkpoint import make_checkpoint

BICODEC = "BiCodec"
WAV2VEC2 = "BiCodec/wav2vec2-large-xlsr-53"
GLM = "glm-4-voice-tokenizer"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "tiny", "tiny", 0)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A tiny checkpoint that a test may damage; all of its weights are safetensors."""
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def rename_tensor(path: Path, old: str, new: str) -> None:
    """Rename in the header alone; both names have the same length, so that no offset moves."""
    assert len(old) == len(new)
    content = path.read_bytes()
    assert content.count(f'"{old}"'.encode()) == 1
    path.write_bytes(content.replace(f'"{old}"'.encode(), f'"{new}"'.encode()))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path, **options).token_space()
    return str(caught.value)


def test_the_recorded_checkpoint_is_accepted(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    space = checkpoint.token_space()
    assert (space.glm.offset, space.global_.offset, space.semantic.offset) == (560, 720, 4816)
    assert checkpoint.config.num_hidden_layers == 3
    assert checkpoint.root == tiny_checkpoint
    assert checkpoint.config_file == tiny_checkpoint / "config.json"
    assert checkpoint.tokenizer_file == tiny_checkpoint / "tokenizer.json"
    assert checkpoint.bicodec_dir == tiny_checkpoint / BICODEC
    assert checkpoint.wav2vec2_dir == tiny_checkpoint / WAV2VEC2
    assert checkpoint.glm_dir == tiny_checkpoint / GLM


def test_a_made_checkpoint_is_accepted(made: Path) -> None:
    assert Checkpoint.open(made).token_space().semantic.size == 256


MISSING = {
    "config.json": "the language model's configuration",
    "model.safetensors": "weights",
    "tokenizer.json": "the text tokenizer",
    f"{BICODEC}/config.yaml": "BiCodec's configuration",
    f"{BICODEC}/model.safetensors": "weights",
    f"{WAV2VEC2}/config.json": "wav2vec2's configuration",
    f"{WAV2VEC2}/preprocessor_config.json": "wav2vec2's audio settings",
    f"{WAV2VEC2}/model.safetensors": "weights",
    f"{GLM}/config.json": "the GLM tokenizer's configuration",
    f"{GLM}/preprocessor_config.json": "the GLM tokenizer's audio settings",
    f"{GLM}/model.safetensors": "weights",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_named_with_its_purpose_and_a_remedy(copy: Path, name: str) -> None:
    (copy / name).unlink()
    message = refusal(copy)
    assert message.startswith(f"{copy / name} is missing: expected {MISSING[name]}")
    assert "gpa-run --model AutoArk-AI/GPA" in message


@pytest.mark.parametrize(
    ("name", "option"), [(BICODEC, "--bicodec"), (WAV2VEC2, "--bicodec"), (GLM, "--glm-tokenizer")]
)
def test_a_missing_folder_is_named_with_the_option_that_replaces_it(copy: Path, name: str, option: str) -> None:
    shutil.rmtree(copy / name)
    message = refusal(copy)
    assert message.startswith(f"{copy / name} is missing: expected the folder")
    assert option in message


@pytest.mark.parametrize("name", ["model.safetensors", f"{BICODEC}/model.safetensors", f"{GLM}/model.safetensors"])
@pytest.mark.parametrize("kept", ["nothing", "the length", "half of the header", "half of the data", "all but a byte"])
def test_truncated_weights_are_found_without_reading_them(copy: Path, name: str, kept: str) -> None:
    path = copy / name
    size = path.stat().st_size
    header = int.from_bytes(path.open("rb").read(8), "little")
    ends = {
        "nothing": 0,
        "the length": 8,
        "half of the header": 8 + header // 2,
        "half of the data": (8 + header + size) // 2,
        "all but a byte": size - 1,
    }
    with path.open("r+b") as file:
        file.truncate(ends[kept])
    message = refusal(copy)
    assert message.startswith(f"{path} ")
    assert "download it again" in message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", f"{WAV2VEC2}/config.json", f"{GLM}/config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null"])
def test_a_file_that_is_not_a_json_object_is_named(copy: Path, name: str, content: str) -> None:
    (copy / name).write_text(content)
    assert str(copy / name) in refusal(copy)


def test_a_bicodec_of_another_codebook_size_does_not_belong(copy: Path, tiny_checkpoint: Path) -> None:
    message = refusal(copy, bicodec=tiny_checkpoint / BICODEC)
    assert "codebook_size 320" in message
    assert "256 `<|bicodec_semantic_N|>`" in message
    assert "does not belong to this checkpoint" in message


def test_a_glm_tokenizer_of_another_codebook_size_does_not_belong(copy: Path, tiny_checkpoint: Path) -> None:
    message = refusal(copy, glm_tokenizer=tiny_checkpoint / GLM)
    assert "quantize_vocab_size 160" in message
    assert "128 `<|glm_semantic_N|>`" in message


def test_a_tokenizer_of_a_larger_vocabulary_does_not_belong(copy: Path, tiny_checkpoint: Path) -> None:
    message = refusal(copy, tokenizer=tiny_checkpoint / "tokenizer.json", require=("lm", "tokenizer"))
    assert "vocab_size 4920, but the tokenizer has ids up to 5140" in message


def test_embedding_rows_other_than_the_vocabulary_are_refused(copy: Path) -> None:
    change_json(copy / "config.json", lambda values: values.update(vocab_size=5000))
    message = refusal(copy)
    assert "model.embed_tokens.weight has shape (4920, 64); expected (5000, 64)" in message


def test_a_configuration_whose_codebook_is_not_the_stored_one_is_refused(copy: Path) -> None:
    path = copy / BICODEC / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["audio_tokenizer"]["quantizer"]["codebook_size"] = 257
    path.write_text(yaml.safe_dump(values))
    message = refusal(copy)
    assert "quantizer.codebook.weight has shape (256, 8); expected (257, 8)" in message


@pytest.mark.parametrize("family", ["glm_semantic", "bicodec_global", "bicodec_semantic"])
def test_a_tokenizer_without_a_family_is_refused(copy: Path, family: str) -> None:
    def drop(values: dict[str, Any]) -> None:
        values["added_tokens"] = [token for token in values["added_tokens"] if family not in token["content"]]

    change_json(copy / "tokenizer.json", drop)
    message = refusal(copy)
    assert f"no token `<|{family}_0|>`" in message


def test_a_layer_without_its_tensor_is_refused(copy: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    rename_tensor(copy / "model.safetensors", name, name.replace("down", "dawn"))
    assert f"has no tensor {name}" in refusal(copy)


def test_fewer_layers_than_configured_are_refused(copy: Path) -> None:
    change_json(copy / "config.json", lambda values: values.update(num_hidden_layers=3))
    assert "has no tensor model.layers.2." in refusal(copy)


def test_another_width_than_configured_is_refused(copy: Path) -> None:
    change_json(copy / "config.json", lambda values: values.update(intermediate_size=256))
    message = refusal(copy)
    assert "mlp.gate_proj.weight has shape (128, 64); expected (256, 64)" in message


def test_an_untied_head_must_be_stored(copy: Path) -> None:
    change_json(copy / "config.json", lambda values: values.update(tie_word_embeddings=False))
    assert "has no tensor lm_head.weight" in refusal(copy)


def test_a_wav2vec2_cut_below_the_layers_in_use_is_refused(copy: Path) -> None:
    change_json(copy / WAV2VEC2 / "config.json", lambda values: values.update(num_hidden_layers=15))
    message = refusal(copy)
    assert "num_hidden_layers is 15" in message
    assert "16" in message


def test_a_wav2vec2_of_another_width_is_refused(copy: Path) -> None:
    change_json(copy / WAV2VEC2 / "config.json", lambda values: values.update(hidden_size=128))
    assert "this wav2vec2 does not belong to this BiCodec" in refusal(copy)


def shard(folder: Path, *, keep_second: bool = True) -> None:
    """Split model.safetensors of `folder` into two shards with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in halves.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    if not keep_second:
        (folder / "model-00002-of-00002.safetensors").unlink()


def test_sharded_weights_are_accepted(copy: Path) -> None:
    shard(copy)
    shard(copy / GLM)
    Checkpoint.open(copy).token_space()


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard(copy, keep_second=False)
    assert "model-00002-of-00002.safetensors is missing" in refusal(copy)


def test_an_empty_folder_a_file_and_nothing_at_all_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert "is empty" in refusal(tmp_path / "empty")
    assert "is a file; expected the folder" in refusal(tmp_path / "file")
    assert "no such folder" in refusal(tmp_path / "nothing")


def test_a_file_where_a_folder_belongs_is_said(copy: Path) -> None:
    shutil.rmtree(copy / GLM)
    (copy / GLM).write_text("git-lfs pointer")
    assert refusal(copy).startswith(f"{copy / GLM} is a file; expected the folder of the GLM tokenizer")


@pytest.mark.parametrize("task", TASK_PARTS)
def test_a_task_asks_only_for_what_it_reads(copy: Path, task: str) -> None:
    for part, folder in (("wav2vec2", copy / WAV2VEC2), ("glm", copy / GLM)):
        if part not in TASK_PARTS[task]:
            shutil.rmtree(folder)
    checkpoint = Checkpoint.open(copy, require=TASK_PARTS[task])
    assert checkpoint.token_space().semantic.size == 256
    if task != "stt":
        assert "is missing" in refusal(copy)


def test_an_unknown_part_is_a_programming_error(made: Path) -> None:
    with pytest.raises(ValueError, match="decoder"):
        Checkpoint.open(made, require=("decoder",))  # pyright: ignore


def test_parts_elsewhere_replace_the_checkpoints_own(copy: Path, tmp_path: Path) -> None:
    for name in (BICODEC, GLM, "tokenizer.json"):
        (copy / name).rename(tmp_path / Path(name).name)
    options: dict[str, Any] = {"bicodec": tmp_path / BICODEC, "glm_tokenizer": tmp_path / GLM}
    for tokenizer in (tmp_path / "tokenizer.json", tmp_path):
        checkpoint = Checkpoint.open(copy, tokenizer=tokenizer, **options)
        assert checkpoint.tokenizer_file == tmp_path / "tokenizer.json"
        assert checkpoint.wav2vec2_dir == tmp_path / WAV2VEC2
        assert checkpoint.token_space().glm.size == 128


def test_fingerprint_names_every_file_that_matters(copy: Path) -> None:
    before = Checkpoint.open(copy).fingerprint()
    assert set(before) == {
        *("lm/config.json", "lm/model.safetensors", "tokenizer/tokenizer.json"),
        *("bicodec/config.yaml", "bicodec/model.safetensors"),
        *("wav2vec2/config.json", "wav2vec2/preprocessor_config.json", "wav2vec2/model.safetensors"),
        *("glm/config.json", "glm/preprocessor_config.json", "glm/model.safetensors"),
    }
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00")
    after = Checkpoint.open(copy).fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"lm/model.safetensors"}
    assert len(Checkpoint.open(copy, require=("tokenizer", "bicodec")).fingerprint()) == 3


def test_opening_imports_no_framework(made: Path) -> None:
    code = (
        "import sys; from gpa_engines.checkpoint import Checkpoint, inspect_checkpoint;"
        f"Checkpoint.open({str(made)!r}).token_space(); inspect_checkpoint({str(made)!r});"
        "print({'torch', 'transformers', 'safetensors.torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_report_of_a_good_checkpoint(made: Path, tiny_checkpoint: Path) -> None:
    report = inspect_checkpoint(tiny_checkpoint)
    assert report.ok
    assert report.tasks == ("stt", "tts-a", "vc")
    assert report.random_weights is None
    assert report.context == 32_768
    assert {family.name: (family.offset, family.size) for family in report.families} == {
        "glm_semantic": (560, 160),
        "bicodec_global": (720, 4096),
        "bicodec_semantic": (4816, 320),
    }
    assert report.control["im_end"] == 514
    parts = {component.part: component for component in report.components}
    assert set(parts) == set(PARTS)
    assert parts["lm"].parameters == 495_552
    assert parts["lm"].dtypes == {"BF16": 495_552}
    assert parts["lm"].size == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert parts["lm"].details["layers"] == 3
    assert parts["lm"].key_style == "no prefix"
    assert parts["bicodec"].key_style == "no prefix, weight norm as weight_g, weight_v"
    assert parts["wav2vec2"].parameters is None  # pytorch_model.bin
    assert parts["wav2vec2"].size == (tiny_checkpoint / WAV2VEC2 / "pytorch_model.bin").stat().st_size
    random = inspect_checkpoint(made)
    assert random.ok
    styles = {component.part: component.key_style for component in random.components}
    assert styles["wav2vec2"] == "prefix 'wav2vec2.', weight norm as weight_g, weight_v"
    assert random.random_weights == {"size": "tiny", "seed": 0}
    assert any("weights are random" in finding.text for finding in random.findings if finding.level == "warning")
    json.dumps(random.as_dict())


def test_report_goes_on_after_errors(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    (copy / BICODEC / "config.yaml").unlink()
    with (copy / BICODEC / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    shutil.rmtree(copy / GLM)
    report = inspect_checkpoint(copy)
    errors = [(finding.part, finding.file) for finding in report.findings if finding.level == "error"]
    assert not report.ok
    assert errors == [
        ("lm", "config.json"),
        ("bicodec", "BiCodec/config.yaml"),
        ("bicodec", "BiCodec/model.safetensors"),
        ("glm", f"{GLM}/config.json"),
        ("glm", f"{GLM}/preprocessor_config.json"),
        ("glm", f"{GLM}/model.safetensors"),
    ]
    assert report.tasks == ()
    assert report.missing["tts-a"] == ("language model", "BiCodec")
    assert report.families  # the tokenizer is readable without the rest
    assert [component.part for component in report.components] == ["lm", "tokenizer", "bicodec", "wav2vec2"]
    json.dumps(report.as_dict())


def test_report_says_which_tasks_a_partial_checkpoint_can_run(copy: Path) -> None:
    shutil.rmtree(copy / GLM)
    assert inspect_checkpoint(copy).tasks == ("tts-a", "vc")
    shutil.rmtree(copy / WAV2VEC2)
    report = inspect_checkpoint(copy)
    assert report.tasks == ("tts-a",)
    assert report.missing["vc"] == ("wav2vec2",)


def test_report_attributes_sizes_to_the_part_that_differs(copy: Path, tiny_checkpoint: Path) -> None:
    report = inspect_checkpoint(copy, bicodec=tiny_checkpoint / BICODEC)
    errors = [finding for finding in report.findings if finding.level == "error"]
    assert [finding.part for finding in errors] == ["bicodec"]
    assert "does not belong to this checkpoint" in errors[0].text


def test_report_notes_what_other_engines_would_miss(copy: Path) -> None:
    (copy / "tokenizer_config.json").unlink()
    change_json(copy / "config.json", lambda values: values.update(dtype="float32", torch_dtype="float32"))
    report = inspect_checkpoint(copy)
    warnings = [finding.text for finding in report.findings if finding.level == "warning"]
    assert report.ok
    assert any("tokenizer_config.json is missing" in text for text in warnings)
    assert any("says float32, but the weights are stored as bfloat16" in text for text in warnings)


def test_report_of_no_folder_is_one_error(tmp_path: Path) -> None:
    report = inspect_checkpoint(tmp_path / "nothing")
    assert [finding.level for finding in report.findings] == ["error"]
    assert not report.ok
    assert report.tasks == ()
    assert report.components == ()
