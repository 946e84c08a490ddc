"""The demo checkpoint says a text in each of its voices and writes down what it said, on every backend that is here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.audio import load_audio
from gpa_conformance.speech.pitch import median_f0
from gpa_engines import SpeechModel
from gpa_engines.checkpoint.speech_domain import SpeechDomain
from gpa_engines.demo import DEMO, demo_checkpoint
from gpa_engines.registry import BACKENDS, backend_status

CONVERTERS = Path(__file__).parents[2] / "tools" / "convert"
NEAR = 0.1
"""Of the voice's pitch."""

CONVERSIONS = {
    "llama-cpp": ("to_gguf.py", "--outtype", "q8_0", "--vocab", "all"),
    "onnx": ("to_onnx.py", "--what", "all"),
}
"""What a backend needs beside the checkpoint's own files."""

OPTIONS: dict[str, dict[str, Any]] = {"vllm": {"max_context": 1024}}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of its own, so that nothing that is converted here is found elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPA_ENGINES_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield demo_checkpoint()


@pytest.mark.parametrize("backend", ["torch", "mlx", "onnx", "llama-cpp", "vllm"])
def test_what_it_says_it_understands(backend: str, demo: Path) -> None:
    status = backend_status(BACKENDS[backend])
    if status.state != "ready":
        pytest.skip(f"{backend}: {status.remedy}")
    if backend in CONVERSIONS:
        if missing := [name for name in ("torch", "onnx", "gguf") if find_spec(name) is None]:
            pytest.skip(f"converting for {backend} needs {', '.join(missing)}")
        script, *arguments = CONVERSIONS[backend]
        command = [sys.executable, str(CONVERTERS / script), str(demo), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    domain = SpeechDomain.open(demo)
    texts = ("three one four", "seven two nine six", "eight zero five", "one six four two")
    with SpeechModel.load(DEMO, backend=backend, **OPTIONS.get(backend, {})) as model:
        for voice, text in zip(domain.voices, texts, strict=True):
            clip = domain.clip_file(voice.clip)
            speech = model.synthesize(text, clip, temperature=0.0)
            assert not speech.warnings
            assert model.transcribe(speech.waveform).text == text
            assert median_f0(speech.waveform.pcm) == pytest.approx(voice.f0, rel=NEAR)
        # The same words in another voice.
        source, target = domain.voices[0], domain.voices[-1]
        converted = model.convert(domain.clip_file(source.clip), domain.clip_file(target.clip), temperature=0.0)
        assert model.transcribe(converted.waveform).text == source.clip.text
        assert median_f0(converted.waveform.pcm) == pytest.approx(target.f0, rel=NEAR)


def test_the_first_command_of_the_readme_says_what_it_should(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "hello.wav"
    _gpa_run("--task", "tts-a", "--text", "three one four", "--ref-audio", "example:voice", "--output", str(out))
    assert np.abs(load_audio(out).pcm).max() > 0.1
    assert _gpa_run("--task", "stt", "--src-audio", str(out)) == "three one four\n"


def _gpa_run(*arguments: str) -> str:
    command = [sys.executable, "-m", "gpa_engines.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
