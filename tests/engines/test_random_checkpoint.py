"""Random-weight checkpoints: the same bytes everywhere, whole or absent, and readable by what reads released ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from gpa_codecs.errors import CheckpointError
from gpa_engines.random_checkpoint import configs, make_checkpoint, parameters, tiny_random_checkpoint
from gpa_engines.random_checkpoint.values import Tensor, to_bfloat16, uniform_chunks
from gpa_engines.random_checkpoint.vocabulary import tokenizer_files

SCRIPT = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"

WAV2VEC2 = "BiCodec/wav2vec2-large-xlsr-53"
GLM = "glm-4-voice-tokenizer"

# sha256 of each file of (tiny, seed 0). When a change here is meant, raise RECIPE in folder.py: caches go by it.
HASHES = {
    "BiCodec/config.yaml": "fe9dfbce6d26d322c032b5741a71a312b461f68357c325bc22c6f083e3ec5880",
    "BiCodec/model.safetensors": "e0f84aada32b0bc019b11a611b548363794a2aa090a000f2e9282ee9128b3ae2",
    WAV2VEC2 + "/config.json": "ffdcbfb9ac1fa348ae4466e26ed5cb0c2e230e006da87ea7283f318d72835c92",
    WAV2VEC2 + "/model.safetensors": "51d40670bb83d272d6185e731752640130093517eafce1bba4aa605a40d8fa91",
    WAV2VEC2 + "/preprocessor_config.json": "a2254a5b58f72cd4de3632f8eee64f3f098b7c1402128d2f419e7d00ae13e335",
    "README.md": "19332679d69412c9b643e80e6003807ce7c10c7371955c3913b04bb1c5d0a5fa",
    "added_tokens.json": "e81146c47ab800dcd59ed1a946f14327c1acb691de718eb8926a1f1be51c4881",
    "chat_template.jinja": "ebfbae1fa21d082eec599a0f24ef3225b8a24fd2875d98f2a2e4931274d4a729",
    "config.json": "fc6d9374339886f84b67d96c052349e0ba095a9b788c5eb4d2c93dfc3827b566",
    "generation_config.json": "981c1b9b0d3b3b2950fffb7f0966efb0792b80ad6ffdd4db9c38161f8e1e6797",
    GLM + "/config.json": "0e235e1a2ea7ac5a05d855470b846e13f02c1201140b4788b2e33861da91487b",
    GLM + "/model.safetensors": "517ee089c52225ba2d13f71e0b6cf68525e33833315c4c5d505388e4ee0e0cc4",
    GLM + "/preprocessor_config.json": "1cd71b94e9102d2f18d5aec201de21ca81b4d5d762ac410ac806426ec09863cf",
    "merges.txt": "500f0d7876109b8301ef3b7bd214a8b6869a980b7ec1f7b2fedbfd81752b030d",
    "model.safetensors": "6f4ef4594f4b59bf532f84275c10e21f2bd3bb07e4fdda1eb472f6a579c237d7",
    "special_tokens_map.json": "903b2e6d39d7eebaf193b2051bcbd9fec59c43880be0bcf620dffb623d63ff45",
    "tokenizer.json": "6a18b9a30f401c242ba88bafff3d6ae910720edc6b457de4f69024d3cb0dcf66",
    "tokenizer_config.json": "1e81d4c30b93af33735e05e7e6349fc29a51ac424261b648cbe88a6565378769",
    "vocab.json": "5f21cb28c929fb128e26af4e97a95298fe9190c92c9ab7289ee43f793ac2409f",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "tiny", "tiny", 0)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_the_same_seed_gives_the_pinned_bytes(tiny: Path) -> None:
    assert files(tiny) == HASHES


def test_another_seed_gives_other_weights_and_the_same_vocabulary(tiny: Path, tmp_path: Path) -> None:
    other = files(make_checkpoint(tmp_path / "other", "tiny", 1))
    changed = {name for name, digest in files(tiny).items() if other[name] != digest}
    assert changed == {"README.md", "config.json"} | {name for name in other if name.endswith(".safetensors")}


def test_values_are_exact_multiples_and_fill_the_interval() -> None:
    tensor = Tensor("w", (300_000,), 0.5, 1.5)
    values = np.concatenate(list(uniform_chunks(tensor, "key")))
    assert values.dtype == np.float32
    assert 0.5 <= values.min() < 0.501
    assert 1.499 < values.max() <= 1.5
    assert abs(values.mean() - 1) < 0.002
    # The whole pipeline again in rational arithmetic for one known draw: 16 bits, one float32 rounding per step.
    digest = hashlib.sha256(b"key:w").digest()
    raw = int(np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw()) & 0xFFFF
    step = np.float32(1 / 65535)
    assert values[0] == np.float32(np.float32((raw - 32767.5) * float(step)) + 1.0)


def test_a_tensor_larger_than_a_chunk_continues_its_own_stream() -> None:
    size = (1 << 20) + 5
    chunks = list(uniform_chunks(Tensor("w", (size,), -1, 1), "key"))
    assert [len(chunk) for chunk in chunks] == [1 << 20, 5]
    assert not np.array_equal(chunks[0][:5], chunks[1])
    alone = next(uniform_chunks(Tensor("w", (1 << 20,), -1, 1), "key"))
    assert np.array_equal(alone, chunks[0])


def test_bfloat16_rounds_to_nearest_even_as_torch_does() -> None:
    import torch

    values = np.concatenate(
        [
            next(uniform_chunks(Tensor("w", (100_000,), -3, 3), "key")),
            np.array([0, 1.00390625, 1.01171875, -0.5], np.float32),
        ]
    )
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(values), expected)


def test_every_tensor_has_the_name_and_rank_of_the_recorded_checkpoint(tiny: Path, tiny_checkpoint: Path) -> None:
    import torch

    def styles(tensors: dict[str, tuple[int, ...]]) -> set[tuple[str, int]]:
        """Names without layer numbers, as the two checkpoints differ in depth."""
        return {
            (".".join("N" if part.isdigit() else part for part in name.split(".")), len(shape))
            for name, shape in tensors.items()
        }

    for name in ("model.safetensors", "BiCodec/model.safetensors", "glm-4-voice-tokenizer/model.safetensors"):
        assert styles(shapes(tiny / name)) == styles(shapes(tiny_checkpoint / name))
    recorded = torch.load(tiny_checkpoint / WAV2VEC2 / "pytorch_model.bin", weights_only=True)
    assert styles(shapes(tiny / WAV2VEC2 / "model.safetensors")) == styles(
        {name: tuple(tensor.shape) for name, tensor in recorded.items()}
    )


def test_no_tensor_is_at_a_neutral_value(tiny: Path) -> None:
    import torch

    for path in tiny.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                values = file.get_tensor(name)
                if name.endswith("num_batches_tracked"):
                    continue
                assert bool(torch.isfinite(values).all()), name
                assert values.numel() == 1 or float(values.float().std()) > 0, name
                positive = name.endswith(("alpha", "running_var", "weight_g", "gamma"))
                assert not positive or float(values.min()) > 0, name


def test_transformers_reads_model_and_tokenizer(tiny: Path) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for text in ("Hello, world! The quick brown fox: 3.14\n", "你好，世界 🎉", "déjà vu"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("the then")["input_ids"][0] != tokenizer("t")["input_ids"][0]  # merges take part
    layout = configs.vocabulary_layout("tiny")
    assert tokenizer.convert_tokens_to_ids("<|glm_semantic_0|>") == layout.glm
    assert tokenizer.convert_tokens_to_ids("<|bicodec_global_4095|>") == layout.global_ + 4095
    assert tokenizer.convert_tokens_to_ids("<|bicodec_semantic_0|>") == layout.semantic

    model: Any = Qwen3ForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert model.config.rope_parameters["rope_theta"] == 1e6
    ids = torch.arange(layout.semantic, layout.semantic + 60)[None]
    with torch.inference_mode():
        logits = model(ids).logits[0]
        generated = model.generate(ids[:, :20], max_new_tokens=40, do_sample=False)[0, 20:]
    assert bool(torch.isfinite(logits).all())
    assert 0.3 < float(logits.std()) < 5
    assert len(set(logits.argmax(-1).tolist())) > 30
    assert len(set(generated.tolist())) > 10


def test_codec_hears_differences_and_decodes_audible_noise(tiny: Path, audio_dir: Path) -> None:
    from gpa_codecs.torch_codec import TorchCodec

    codec = TorchCodec(tiny / "BiCodec", tiny / "glm-4-voice-tokenizer")
    tokens = codec.encode(audio_dir / "en_female_16k.wav")
    assert len(set(tokens.semantic.tolist())) > 20
    assert len(set(tokens.glm.tolist())) > 5
    female, male = (codec.voice(audio_dir / name) for name in ("en_female_16k.wav", "en_male_16k.wav"))
    assert female.codes != male.codes
    pcm = codec.decode(tokens.semantic, female).pcm
    assert np.isfinite(pcm).all()
    assert 0.05 < pcm.std() < 0.3
    assert np.abs(pcm).max() < 0.99


def test_full_has_the_released_dimensions() -> None:
    layout = configs.vocabulary_layout("full")
    assert (layout.glm, layout.global_, layout.semantic) == (151_727, 168_111, 172_207)
    text = tokenizer_files(layout)
    ids = json.loads(text["added_tokens.json"])
    assert len(json.loads(text["vocab.json"])) == 151_643
    assert ids["<|endoftext|>"] == 151_643
    assert ids["<|im_end|>"] == 151_645
    assert ids["<|bicodec_semantic_8191|>"] == 172_207 + 8191
    assert max(ids.values()) == 180_445 - 1
    counts = {
        "lm": sum(tensor.size for tensor in parameters.language_model(configs.language_model("full", 0))),
        "wav2vec2": sum(tensor.size for tensor in parameters.wav2vec2(configs.wav2vec2("full"))),
    }
    # 220.2 M of the body and 92.4 M of the tied embedding; 317.4 M is the count of the public xlsr-53 checkpoint.
    assert round(counts["lm"] / 1e6, 1) == 312.6
    assert round(counts["wav2vec2"] / 1e6, 1) == 317.4


def test_full_vocabulary_round_trips_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    text = tokenizer_files(configs.vocabulary_layout("full"))["tokenizer.json"]
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for sentence in ("The quick brown fox jumps over 13 lazy dogs.", "今天天气很好。", "naïve \t façade\n\n"):
        encoded = tokenizer.encode(sentence).ids
        assert max(encoded) < 151_643
        assert tokenizer.decode(encoded) == sentence
    assert len(tokenizer.encode("international").ids) < 10  # of 13 letters


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="out"):
            make_checkpoint(tmp_path / "out", "tiny", 0, overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="not a folder"):
        make_checkpoint(tmp_path / "out", "tiny", 0, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_overwrite_replaces_a_random_checkpoint_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny, tmp_path / "out"))
    with pytest.raises(CheckpointError, match="exists"):
        make_checkpoint(out, "tiny", 3)
    make_checkpoint(out, "tiny", 3, overwrite=True)
    assert json.loads((out / "config.json").read_text())["gpa_random_weights"] == {"size": "tiny", "seed": 3}
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        make_checkpoint(out, "tiny", 4, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (make_checkpoint(tmp_path / "out", "tiny", 0) / "model.safetensors").is_file()


def test_a_disk_without_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 990, 10))
    with pytest.raises(CheckpointError, match="10 free"):
        make_checkpoint(tmp_path / "out", "full", 0)
    assert os.listdir(tmp_path) == []


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'huge'; expected one of tiny, full"):
        make_checkpoint(tmp_path / "out", "huge", 0)  # pyright: ignore


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C cannot be sent to one child there")
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """Interrupted while the weights of the full size are being written."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "out", "--size", "full"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1 << 20 for path in tmp_path.rglob("*.safetensors")):
        assert time.monotonic() < deadline, "no weights were written"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_script_writes_the_path_and_refuses_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "out", "--size", "tiny", "--seed", "5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "out"
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert "Traceback" not in again.stderr


def test_making_one_needs_no_framework() -> None:
    code = "import sys, gpa_engines.random_checkpoint; print({'torch', 'transformers', 'tokenizers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_tiny_random_is_cached_and_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_ENGINES_CACHE", str(tmp_path / "cache"))
    folder = tiny_random_checkpoint()
    assert folder.parent == tmp_path / "cache"
    before = (folder / "model.safetensors").stat()
    assert tiny_random_checkpoint() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    (folder / "BiCodec" / "model.safetensors").unlink()
    assert files(tiny_random_checkpoint()) == HASHES


def test_processes_at_once_share_one_cached_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_ENGINES_CACHE", str(tmp_path))
    with ProcessPoolExecutor(4) as pool:
        folders = {future.result() for future in [pool.submit(tiny_random_checkpoint) for _ in range(4)]}
    assert len(folders) == 1
    assert files(folders.pop()) == HASHES
    assert len(os.listdir(tmp_path)) == 1


def test_uniform_weights_keep_the_level_they_are_given() -> None:
    """A layer's rows have the norm that its gain says, whatever the fan-in."""
    tensors = {tensor.name: tensor for tensor in parameters.language_model(configs.language_model("full", 0))}
    for name, gain in (("q_proj", 1.0), ("gate_proj", 1.0), ("down_proj", 2.1 * 28**-0.5)):
        block = "mlp" if name in ("gate_proj", "down_proj") else "self_attn"
        tensor = tensors[f"model.layers.0.{block}.{name}.weight"]
        deviation = (tensor.high - tensor.low) / math.sqrt(12)
        assert deviation * math.sqrt(tensor.shape[1]) == pytest.approx(gain)
