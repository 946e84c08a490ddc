"""The codec in ONNX Runtime: the ground truth, the same answers as the torch codec, laziness, threads, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the codec in ONNX needs onnxruntime")
pytest.importorskip("torch", reason="it is compared with the torch codec")

from gpa_codecs.audio import Waveform
from gpa_codecs.codec import SpeechCodec, Voice
from gpa_codecs.errors import AudioError, TokenError
from gpa_codecs.onnx_codec import OnnxCodec
from gpa_codecs.torch_codec import TorchCodec
from gpa_engines.examples import example_clip
from tests.codecs.test_torch_codec import (
    CLIPS,
    GLM_CLIPS,
    GLM_MARGIN,
    GLOBAL_MARGIN,
    SEMANTIC_MARGIN,
    VOICE,
    assert_codes,
    tone,
)

Arrays = Callable[[str], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def codec(onnx_folder: Path) -> OnnxCodec:
    return OnnxCodec(onnx_folder, threads=1)


@pytest.fixture(scope="module")
def torch_codec(tiny_checkpoint: Path) -> TorchCodec:
    return TorchCodec(tiny_checkpoint / "BiCodec", tiny_checkpoint / "glm-4-voice-tokenizer")


# --- ground truth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", CLIPS)
def test_semantic_codes_are_the_recorded_ones(
    clip: str, codec: OnnxCodec, goldens: dict[str, Any], golden_arrays: Arrays, audio_dir: Path
) -> None:
    recorded = golden_arrays(clip)
    tokens = codec.encode(audio_dir / goldens["files"][clip]["path"], ["semantic"])
    assert tokens.semantic.dtype == np.int64
    assert tokens.glm.shape == (0,)
    assert tokens.duration == goldens["files"][clip]["n_wav"] / 16000
    assert_codes(tokens.semantic, recorded["semantic"], recorded["semantic_margin"], SEMANTIC_MARGIN)


@pytest.mark.parametrize("clip", CLIPS)
def test_voices_are_the_recorded_ones(
    clip: str, codec: OnnxCodec, goldens: dict[str, Any], golden_arrays: Arrays, audio_dir: Path
) -> None:
    recorded = golden_arrays(clip)
    path = audio_dir / goldens["files"][clip]["path"]
    voice = codec.voice(path)
    assert voice.origin == path.name
    assert_codes(np.array(voice.codes), recorded["globals"], recorded["global_margin"], GLOBAL_MARGIN)


@pytest.mark.parametrize("clip", GLM_CLIPS)
def test_glm_codes_are_the_recorded_ones(
    clip: str, codec: OnnxCodec, goldens: dict[str, Any], golden_arrays: Arrays, audio_dir: Path
) -> None:
    recorded = golden_arrays(clip)
    tokens = codec.encode(audio_dir / goldens["files"][clip]["path"], ["glm"])
    assert tokens.glm.dtype == np.int64
    assert_codes(tokens.glm, recorded["glm"], recorded["glm_margin"], GLM_MARGIN)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [1, 3, 10, 50])
def test_decoded_audio_is_the_recorded_one(length: int, threads: int, onnx_folder: Path, golden_arrays: Arrays) -> None:
    recorded = golden_arrays(f"detok{length}")
    waveform = OnnxCodec(onnx_folder, threads=threads).decode(recorded["semantic"], Voice(tuple(recorded["globals"])))
    assert waveform.sample_rate == 16000
    assert waveform.pcm.shape == (320 * length,)
    assert waveform.pcm.dtype == np.float32
    np.testing.assert_allclose(waveform.pcm, recorded["wav_raw"], atol=1e-4)


# --- the torch codec --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["example:speech", "example:voice"])
def test_example_clips_give_what_torch_gives(name: str, codec: OnnxCodec, torch_codec: TorchCodec) -> None:
    clip = example_clip(name)
    found, expected = codec.encode(clip), torch_codec.encode(clip)
    np.testing.assert_array_equal(found.semantic, expected.semantic)
    np.testing.assert_array_equal(found.glm, expected.glm)
    voice = codec.voice(clip)
    assert voice == torch_codec.voice(clip)
    pcm = codec.decode(found.semantic, voice).pcm
    np.testing.assert_allclose(pcm, torch_codec.decode(found.semantic, voice).pcm, atol=1e-4)


@pytest.mark.parametrize("samples", [400, 719, 720, 1280, 1281, 15999, 16000])
def test_lengths_are_free(samples: int, codec: OnnxCodec, torch_codec: TorchCodec) -> None:
    found, expected = codec.encode(tone(samples)), torch_codec.encode(tone(samples))
    assert len(found.semantic) == (samples - 400) // 320 + 1
    assert len(found.glm) == -(-samples // 1280)
    np.testing.assert_array_equal(found.semantic, expected.semantic)
    np.testing.assert_array_equal(found.glm, expected.glm)


def test_thirty_seconds_are_375_glm_codes(codec: OnnxCodec) -> None:
    assert len(codec.encode(tone(480000), ["glm"]).glm) == 375


@pytest.mark.parametrize(("precision", "least_snr"), [("fp16", 45.0), ("int8", 20.0)])
def test_fewer_bits_are_close_and_are_what_was_asked_for(
    precision: str, least_snr: float, onnx_folder: Path, codec: OnnxCodec
) -> None:
    semantic = np.arange(0, 320, 4)
    smaller = OnnxCodec(onnx_folder, precision=precision, threads=1)
    assert smaller.precision == precision
    expected, found = codec.decode(semantic, VOICE).pcm, smaller.decode(semantic, VOICE).pcm
    error = float(np.square(found - expected).mean())
    assert error > 0, "the weights have fewer bits"
    assert 10 * np.log10(np.square(expected).mean() / error) >= least_snr


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [7, 22, 23, 100, 131])
def test_long_audio_is_decoded_in_windows_as_if_at_once(
    length: int, threads: int, codec: OnnxCodec, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread one after the other, with more two at a time."""
    semantic = np.arange(length) * 2
    whole = codec.decode(semantic, VOICE).pcm
    monkeypatch.setattr("gpa_codecs.onnx_codec.WINDOW", 16)
    monkeypatch.setattr("gpa_codecs.onnx_codec.LEAST_PAIR", 23)
    windows = OnnxCodec(onnx_folder, threads=threads).decode(semantic, VOICE).pcm
    assert windows.shape == whole.shape == (320 * length,)
    np.testing.assert_allclose(windows, whole, atol=1e-5)


def test_a_batch_gives_what_each_clip_gives_alone(codec: OnnxCodec) -> None:
    clips = [tone(9000, 150), tone(4000), tone(9000, 80)]
    for clip, tokens in zip(clips, codec.encode_batch(clips), strict=True):
        alone = codec.encode(clip)
        np.testing.assert_array_equal(tokens.semantic, alone.semantic)
        np.testing.assert_array_equal(tokens.glm, alone.glm)
    pieces = [(np.arange(7), VOICE), (np.arange(50, 90), VOICE), (np.arange(7)[::-1], VOICE)]
    for piece, waveform in zip(pieces, codec.decode_batch(pieces), strict=True):
        np.testing.assert_array_equal(waveform.pcm, codec.decode(*piece).pcm)
    assert codec.encode_batch([]) == codec.voice_batch([]) == codec.decode_batch([]) == []


# --- laziness and threads ---------------------------------------------------------------------------------------------


def test_nothing_is_loaded_that_a_call_does_not_need(onnx_folder: Path) -> None:
    codec = OnnxCodec(onnx_folder, threads=1)
    assert codec.loaded_parts == ()
    codec.voice(tone(16000))
    assert codec.loaded_parts == ("voice",), "a voice needs no wav2vec2"
    codec.decode(np.arange(3), VOICE)
    assert codec.loaded_parts == ("voice", "decoder")
    codec.encode(tone(16000), ["glm"])
    assert codec.loaded_parts == ("voice", "decoder", "glm")
    codec.encode(tone(16000), ["semantic"])
    assert codec.loaded_parts == ("wav2vec2", "semantic", "voice", "decoder", "glm")


def test_threads_that_start_at_once_load_each_part_once_and_agree(onnx_folder: Path, codec: OnnxCodec) -> None:
    shared, clips = OnnxCodec(onnx_folder, threads=1), [tone(4000 + 320 * index) for index in range(4)]
    networks = set()

    def work(clip: Waveform) -> tuple[list[int], Voice, np.ndarray]:
        tokens, voice = shared.encode(clip), shared.voice(clip)
        networks.add(id(shared._parts["decoder"].get()))
        return tokens.semantic.tolist(), voice, shared.decode(tokens.semantic, voice).pcm

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, clips))
    assert len(networks) == 1
    for clip, (semantic, voice, pcm) in zip(clips, results, strict=True):
        assert semantic == codec.encode(clip).semantic.tolist()
        assert voice == codec.voice(clip)
        np.testing.assert_array_equal(pcm, codec.decode(np.array(semantic), voice).pcm)


@pytest.mark.parametrize(("variable", "expected"), [("3", 3), ("3,2", 3), ("0", None), ("many", None), (None, None)])
def test_the_default_number_of_threads_is_the_usual_variable_or_the_cores(
    variable: str | None, expected: int | None, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = OnnxCodec(onnx_folder)._threads
    assert cores >= 1
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert OnnxCodec(onnx_folder)._threads == (expected or cores)
    assert OnnxCodec(onnx_folder, threads=2)._threads == 2


# --- contract and refusals --------------------------------------------------------------------------------------------


def test_it_is_a_speech_codec(codec: OnnxCodec) -> None:
    assert isinstance(codec, SpeechCodec)
    assert (codec.sample_rate, codec.semantic_cardinality, codec.glm_cardinality) == (16000, 320, 160)
    assert codec.precision == "fp32"


def test_it_refuses_what_the_torch_codec_refuses_in_the_same_words(
    codec: OnnxCodec, torch_codec: TorchCodec, audio_dir: Path
) -> None:
    short = audio_dir / "too_short_399.wav"
    calls: list[tuple[type[Exception], Callable[[SpeechCodec], object]]] = [
        (AudioError, lambda each: each.encode(short)),
        (AudioError, lambda each: each.voice(short)),
        (AudioError, lambda each: each.encode(tone(480001))),
        (TokenError, lambda each: each.encode(tone(16000), ["global"])),  # type: ignore[list-item]
        (TokenError, lambda each: each.decode(np.zeros(0, dtype=np.int64), VOICE)),
        (TokenError, lambda each: each.decode(np.array([3, -1]), VOICE)),
        (TokenError, lambda each: each.decode(np.array([320]), VOICE)),
        (TokenError, lambda each: each.decode(np.array([0.5]), VOICE)),
        (TokenError, lambda each: each.decode(np.array([[1, 2]]), VOICE)),
    ]
    for kind, call in calls:
        said = []
        for each in (codec, torch_codec):
            with pytest.raises(kind) as caught:
                call(each)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_a_process_without_torch_encodes_reads_a_voice_and_decodes(
    onnx_folder: Path, codec: OnnxCodec, audio_dir: Path
) -> None:
    clip = audio_dir / "en_male_16k.wav"
    code = (
        "import json, sys\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from gpa_codecs.onnx_codec import OnnxCodec\n"
        "codec = OnnxCodec(sys.argv[1], threads=1)\n"
        "tokens, voice = codec.encode(sys.argv[2]), codec.voice(sys.argv[2])\n"
        "pcm = codec.decode(tokens.semantic, voice).pcm\n"
        "print(json.dumps([tokens.semantic.tolist(), tokens.glm.tolist(), voice.codes, float(abs(pcm).sum())]))"
    )
    command = [sys.executable, "-c", code, str(onnx_folder), str(clip)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    semantic, glm, voice, loudness = json.loads(result.stdout)
    tokens = codec.encode(clip)
    assert (semantic, glm) == (tokens.semantic.tolist(), tokens.glm.tolist())
    assert tuple(voice) == codec.voice(clip).codes
    expected = codec.decode(tokens.semantic, codec.voice(clip)).pcm
    assert loudness == pytest.approx(float(abs(expected).sum()), rel=1e-6)
