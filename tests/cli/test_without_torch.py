"""All three tasks from files, in a process where torch cannot be imported, with the answers that torch gives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.audio import load_audio
from gpa_engines.speech import SpeechModel

ROOT = Path(__file__).parents[2]

BLOCKED = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'mlx_lm', 'onnx', 'gguf')))"

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 24, "min_new_tokens": 24, "seed": 1}
OPTIONS = [word for name, value in GREEDY.items() for word in (f"--{name.replace('_', '-')}", str(value))]

PACKAGES = {"llama-cpp": "llama_cpp", "mlx": "mlx.core", "onnx": "onnxruntime"}


def convert(script: str, *arguments: str | Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "convert" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def edge(tiny_checkpoint: Path, onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a machine without torch is given, by backend: no weights of the codec, and for two no safetensors either."""
    pytest.importorskip("gguf", reason="converting to GGUF needs gguf")
    folder = tmp_path_factory.mktemp("edge")
    shutil.copytree(onnx_folder, folder / "onnx")
    convert("to_onnx.py", tiny_checkpoint, "--what", "lm", "--out", folder / "onnx")
    convert("to_gguf.py", tiny_checkpoint, "--outtype", "f32", "--vocab", "all", "--outfile", folder)
    shutil.copy(tiny_checkpoint / "tokenizer.json", folder)
    weights = tmp_path_factory.mktemp("mlx")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(tiny_checkpoint / name, weights)
    return {"llama-cpp": folder, "onnx": folder, "mlx": weights}


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, audio_dir: Path) -> dict[str, Any]:
    """Text of stt, semantic codes and audio of tts-a and vc, by torch."""
    source, voice = audio_dir / "en_male_16k.wav", audio_dir / "en_female_16k.wav"
    with SpeechModel.load(tiny_checkpoint, backend="torch", dtype="float32", threads=1) as model:
        return {
            "stt": model.transcribe(source, **GREEDY).text,
            "tts-a": model.synthesize("Hello.", voice, **GREEDY).waveform.pcm,
            "vc": model.convert(source, voice, **GREEDY).waveform.pcm,
        }


def gpa_run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = f"{BLOCKED}; from gpa_engines.cli.run import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.mark.parametrize("backend", PACKAGES)
def test_three_tasks_without_torch(
    edge: dict[str, Path], expected: dict[str, Any], audio_dir: Path, tmp_path: Path, backend: str
) -> None:
    pytest.importorskip(PACKAGES[backend], reason=f"needs {PACKAGES[backend]}")
    source, voice = audio_dir / "en_male_16k.wav", audio_dir / "en_female_16k.wav"
    model: list[str | Path] = ["--backend", backend, "--model", edge[backend], "--dtype", "float32"]
    if backend == "mlx":
        model += ["--codec", edge["onnx"]]
    heard = gpa_run("--task", "stt", *model, "--src-audio", source, *OPTIONS, "--json")
    assert heard.returncode == 0, heard.stderr
    document = json.loads(heard.stdout)
    assert document["text"] == expected["stt"]
    assert (document["backend"], document["codec"]) == (backend, "onnxruntime")
    assert "torch" not in document["versions"]
    for task, inputs in (("tts-a", ("--text", "Hello.")), ("vc", ("--src-audio", source))):
        out = tmp_path / f"{task}.wav"
        done = gpa_run("--task", task, *model, *inputs, "--ref-audio", voice, *OPTIONS, "-o", out)
        assert done.returncode == 0, done.stderr
        # Equal codes, decoded within 1e-4, and rounded to 16 bits.
        np.testing.assert_allclose(load_audio(out).pcm, expected[task], atol=1.5e-4)


def test_a_gguf_file_is_a_model_and_auto_takes_llama_cpp(edge: dict[str, Path], audio_dir: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    (file,) = (path for path in edge["llama-cpp"].glob("*.gguf") if "text" in path.name)
    done = gpa_run(
        "--task", "stt", "--model", file, "--src-audio", audio_dir / "short_1600.wav", "--max-new-tokens", "4", "-v"
    )
    assert done.returncode == 0, done.stderr
    assert "backend llama-cpp: " in done.stderr
    assert "codec: ONNX Runtime" in done.stderr


def test_a_speech_file_refuses_to_transcribe(edge: dict[str, Path], audio_dir: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    (file,) = (path for path in edge["llama-cpp"].glob("*.gguf") if "speech" in path.name)
    done = gpa_run("--task", "stt", "--model", file, "--src-audio", audio_dir / "short_1600.wav")
    assert done.returncode == 2
    assert "to_gguf.py" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("backend", ["llama-cpp", "onnx"])
def test_a_model_beside_another_tokenizer_is_refused(
    edge: dict[str, Path], tmp_path: Path, audio_dir: Path, backend: str
) -> None:
    pytest.importorskip(PACKAGES[backend], reason=f"needs {PACKAGES[backend]}")
    folder = shutil.copytree(edge[backend], tmp_path / "model")
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    clip = audio_dir / "short_1600.wav"
    done = gpa_run("--task", "stt", "--backend", backend, "--model", folder, "--src-audio", clip)
    assert done.returncode == 2
    assert "it is of another checkpoint" in done.stderr


def test_a_precision_that_was_not_exported_is_refused(
    edge: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, audio_dir: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(edge["onnx"] / "onnx", folder / "onnx")
    shutil.copy(tiny_checkpoint / "tokenizer.json", folder)
    shutil.rmtree(folder / "onnx" / "codec")
    convert("to_onnx.py", tiny_checkpoint, "--what", "codec", "--out", folder / "onnx")
    voice = ("--ref-audio", audio_dir / "en_female_16k.wav", "--text", "Hi.")
    speak = ("--task", "tts-a", "--backend", "onnx", "--model", folder, *voice)
    done = gpa_run(*speak, "--codec-precision", "int8")
    assert done.returncode == 2
    assert "--precision int8" in done.stderr
    for graph in (folder / "onnx" / "codec").glob("*decoder*"):
        graph.unlink()
    for graph in (folder / "onnx" / "codec").glob("*generator*"):
        graph.unlink()
    done = gpa_run(*speak)
    assert done.returncode == 2
    assert "is missing" in done.stderr
    assert not (Path.cwd() / "gpa-output.wav").exists()
