"""The torch codec on whole clips: the ground truth, batches, lengths, laziness, threads and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpa_codecs.audio import Waveform
from gpa_codecs.codec import SpeechCodec, Voice
from gpa_codecs.errors import AudioError, BackendError, CheckpointError, TokenError
from gpa_codecs.torch_codec import WAV2VEC2_FOLDER, TorchCodec

Arrays = Callable[[str], dict[str, np.ndarray]]

CLIPS = [
    "en_male_16k",
    "en_female_16k",
    "zh_female_16k",
    "en_female",
    "en_male",
    "stereo_44k1",
    "mono_48k_24bit",
    "mono_8k",
    "short_1600",
    "silence_16k",
    "quiet_16k",
    "loud_float_16k",
    "long_33s",
]
GLM_CLIPS = [name for name in CLIPS if name not in {"stereo_44k1", "mono_48k_24bit", "mono_8k", "long_33s"}]
VOICE = Voice(tuple(range(0, 4096, 128)))

# The least decision margin, in the reference's own float32, from which on a token is demanded to be equal.
SEMANTIC_MARGIN, GLOBAL_MARGIN, GLM_MARGIN = 2e-5, 2e-4, 5e-3


def open_codec(checkpoint: Path) -> TorchCodec:
    return TorchCodec(checkpoint / "BiCodec", checkpoint / "glm-4-voice-tokenizer")


@pytest.fixture(scope="module")
def codec(tiny_checkpoint: Path) -> TorchCodec:
    return open_codec(tiny_checkpoint)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tone(samples: int, pitch: float = 220.0) -> Waveform:
    """A chirp with a little noise, so that codes vary along it."""
    time = np.arange(samples) / 16000
    noise = np.random.default_rng(samples).normal(size=samples)
    return Waveform(0.4 * np.sin(2 * np.pi * pitch * time * (1 + time)) + 0.01 * noise)


def assert_codes(computed: np.ndarray, expected: np.ndarray, margin: np.ndarray, least: float) -> None:
    assert computed.shape == expected.shape
    different = np.flatnonzero((computed != expected) & (margin >= least))
    assert not len(different), f"{len(different)} codes differ, first at {different[:5]}"


# --- ground truth -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("clip", CLIPS)
def test_semantic_codes_are_the_recorded_ones(
    clip: str, codec: TorchCodec, goldens: dict[str, Any], golden_arrays: Arrays, audio_dir: Path
) -> None:
    recorded = golden_arrays(clip)
    tokens = codec.encode(audio_dir / goldens["files"][clip]["path"], ["semantic"])
    assert tokens.semantic.dtype == np.int64
    assert tokens.glm.shape == (0,)
    assert tokens.duration == goldens["files"][clip]["n_wav"] / 16000
    assert_codes(tokens.semantic, recorded["semantic"], recorded["semantic_margin"], SEMANTIC_MARGIN)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("clip", CLIPS)
def test_voices_are_the_recorded_ones(
    clip: str, codec: TorchCodec, goldens: dict[str, Any], golden_arrays: Arrays, audio_dir: Path
) -> None:
    recorded = golden_arrays(clip)
    path = audio_dir / goldens["files"][clip]["path"]
    voice = codec.voice(path)
    assert voice.origin == path.name
    assert_codes(np.array(voice.codes), recorded["globals"], recorded["global_margin"], GLOBAL_MARGIN)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("clip", GLM_CLIPS)
def test_glm_codes_are_the_recorded_ones(
    clip: str, codec: TorchCodec, goldens: dict[str, Any], golden_arrays: Arrays, audio_dir: Path
) -> None:
    recorded = golden_arrays(clip)
    tokens = codec.encode(audio_dir / goldens["files"][clip]["path"], ["glm"])
    assert tokens.glm.dtype == np.int64
    assert tokens.semantic.shape == (0,)
    assert_codes(tokens.glm, recorded["glm"], recorded["glm_margin"], GLM_MARGIN)


def test_every_valid_glm_recording_is_compared(goldens: dict[str, Any]) -> None:
    assert [name for name, file in goldens["files"].items() if file.get("glm_valid")] == GLM_CLIPS
    assert [name for name, file in goldens["files"].items() if "error" not in file] == CLIPS


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("length", [1, 3, 10, 50])
def test_decoded_audio_is_the_recorded_one(length: int, codec: TorchCodec, golden_arrays: Arrays) -> None:
    recorded = golden_arrays(f"detok{length}")
    waveform = codec.decode(recorded["semantic"], Voice(tuple(recorded["globals"])))
    assert waveform.sample_rate == 16000
    assert waveform.pcm.shape == (320 * length,)
    assert waveform.pcm.dtype == np.float32
    np.testing.assert_allclose(waveform.pcm, recorded["wav_raw"], atol=1e-4)


# --- counts and lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [400, 719, 720, 1280, 1281, 15999, 16000])
def test_the_number_of_codes_follows_from_the_number_of_samples(samples: int, codec: TorchCodec) -> None:
    tokens = codec.encode(tone(samples))
    assert len(tokens.semantic) == (samples - 400) // 320 + 1
    assert len(tokens.glm) == -(-samples // 1280)
    assert tokens.duration == samples / 16000


def test_thirty_seconds_are_375_glm_codes(codec: TorchCodec) -> None:
    assert len(codec.encode(tone(480000), ["glm"]).glm) == 375


def test_more_than_thirty_seconds_are_refused_for_glm_before_anything_is_computed(tiny_checkpoint: Path) -> None:
    codec = open_codec(tiny_checkpoint)
    with pytest.raises(AudioError, match=r"480001 samples \(30\.0 s\) is longer than .*\.cut_at_silences"):
        codec.encode(tone(480001))
    assert codec.loaded_parts == ()


def test_399_samples_are_refused_with_their_number(codec: TorchCodec, audio_dir: Path) -> None:
    for method in (codec.encode, codec.voice):
        with pytest.raises(AudioError, match=r"399 samples \(24\.9375 ms at 16 kHz\) is too short; expected 400"):
            method(audio_dir / "too_short_399.wav")


def test_a_short_clip_is_repeated_for_its_voice(codec: TorchCodec) -> None:
    clip = tone(20000)
    assert codec.voice(clip) == codec.voice(Waveform(np.tile(clip.pcm, 5)[:96000]))


def test_only_the_first_six_seconds_of_equal_loudness_make_the_voice(codec: TorchCodec) -> None:
    first, rest = tone(96000).pcm, tone(48000, pitch=100).pcm
    peak = np.array([1.5])  # The same peak and quantiles on both sides keep the volume rule out of it.
    whole = np.concatenate([first, rest, peak])
    moved = np.concatenate([first, rest[::-1], peak])
    assert codec.voice(Waveform(whole)) == codec.voice(Waveform(moved))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_gives_what_each_clip_gives_alone(codec: TorchCodec) -> None:
    clips = [
        tone(samples, pitch) for samples, pitch in ((16000, 100), (9000, 150), (16000, 300), (400, 90), (9000, 80))
    ]
    for clip, tokens in zip(clips, codec.encode_batch(clips), strict=True):
        alone = codec.encode(clip)
        np.testing.assert_array_equal(tokens.semantic, alone.semantic)
        np.testing.assert_array_equal(tokens.glm, alone.glm)
        assert tokens.duration == alone.duration
    assert codec.voice_batch(clips) == [codec.voice(clip) for clip in clips]


def test_a_batch_decodes_what_each_piece_decodes_alone(codec: TorchCodec) -> None:
    other = Voice(tuple(range(31, 4096, 127))[:32])
    pieces = [(np.arange(7), VOICE), (np.arange(50, 90), other), (np.arange(7)[::-1], other), (np.arange(1), VOICE)]
    for piece, waveform in zip(pieces, codec.decode_batch(pieces), strict=True):
        np.testing.assert_array_equal(waveform.pcm, codec.decode(*piece).pcm)


def test_an_empty_batch_is_empty(codec: TorchCodec) -> None:
    assert codec.encode_batch([]) == codec.voice_batch([]) == codec.decode_batch([]) == []


# --- laziness and threads ---------------------------------------------------------------------------------------------


def test_nothing_is_loaded_that_a_call_does_not_need(tiny_checkpoint: Path) -> None:
    codec = open_codec(tiny_checkpoint)
    assert codec.loaded_parts == ()
    codec.voice(tone(16000))
    assert codec.loaded_parts == ("voice",), "a voice needs no wav2vec2"
    codec.decode(np.arange(3), VOICE)
    assert codec.loaded_parts == ("voice", "decoder")
    codec.encode(tone(16000), ["glm"])
    assert codec.loaded_parts == ("voice", "decoder", "glm")
    codec.encode(tone(16000), ["semantic"])
    assert codec.loaded_parts == ("wav2vec2", "semantic", "voice", "decoder", "glm")


def test_a_voice_and_decoding_work_without_wav2vec2_in_the_folder(tiny_checkpoint_copy: Path) -> None:
    for file in (tiny_checkpoint_copy / "BiCodec" / WAV2VEC2_FOLDER).iterdir():
        file.unlink()
    codec = open_codec(tiny_checkpoint_copy)
    assert len(codec.decode(np.arange(3), codec.voice(tone(16000))).pcm) == 960
    with pytest.raises(CheckpointError, match=r"wav2vec2-large-xlsr-53.config\.json"):
        codec.encode(tone(16000))


def test_threads_that_start_at_once_load_each_part_once_and_agree(tiny_checkpoint: Path, codec: TorchCodec) -> None:
    shared, clips = open_codec(tiny_checkpoint), [tone(4000 + 320 * index) for index in range(8)]
    networks = set()

    def work(clip: Waveform) -> tuple[list[int], Voice, np.ndarray]:
        tokens, voice = shared.encode(clip), shared.voice(clip)
        networks.add(id(shared._decoder.get()))
        return tokens.semantic.tolist(), voice, shared.decode(tokens.semantic, voice).pcm

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, clips))
    assert len(networks) == 1
    for clip, (semantic, voice, pcm) in zip(clips, results, strict=True):
        assert semantic == codec.encode(clip).semantic.tolist()
        assert voice == codec.voice(clip)
        np.testing.assert_array_equal(pcm, codec.decode(np.array(semantic), voice).pcm)


def test_the_number_of_threads_is_set_only_where_it_is_given(tiny_checkpoint: Path) -> None:
    code = (
        "import sys, torch; from gpa_codecs.torch_codec import TorchCodec\n"
        "torch.set_num_threads(3)\n"
        "TorchCodec(*sys.argv[1:]); print(torch.get_num_threads())\n"
        "TorchCodec(*sys.argv[1:], threads=2); print(torch.get_num_threads())"
    )
    folders = [str(tiny_checkpoint / "BiCodec"), str(tiny_checkpoint / "glm-4-voice-tokenizer")]
    result = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["3", "2"]


# --- contract and refusals --------------------------------------------------------------------------------------------


def test_it_is_a_speech_codec(codec: TorchCodec) -> None:
    assert isinstance(codec, SpeechCodec)
    assert (codec.sample_rate, codec.semantic_cardinality, codec.glm_cardinality) == (16000, 320, 160)


def test_no_speech_tokens_are_refused(codec: TorchCodec) -> None:
    with pytest.raises(TokenError, match="there are no speech tokens to decode"):
        codec.decode(np.zeros(0, dtype=np.int64), VOICE)


@pytest.mark.parametrize(
    ("semantic", "complaint"),
    [
        ([3, -1], "semantic code 1 is -1; expected 0 to 319"),
        ([320], "semantic code 0 is 320; expected 0 to 319"),
        ([0.5], r"float64\[1\]; expected a list of integers"),
        ([[1, 2]], r"int64\[1, 2\]; expected a list of integers"),
    ],
)
def test_codes_outside_the_codebook_are_refused(semantic: list, complaint: str, codec: TorchCodec) -> None:
    with pytest.raises(TokenError, match=complaint):
        codec.decode(np.array(semantic), VOICE)


def test_an_unknown_family_is_refused(codec: TorchCodec) -> None:
    with pytest.raises(TokenError, match=r"\['global'\] are unknown; expected any of \['semantic', 'glm'\]"):
        codec.encode(tone(16000), ["global"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("device", "complaint"), [("gpu", "device 'gpu' is unknown"), ("cuda:99", "device 'cuda:99' is not there")]
)
def test_a_device_that_is_not_there_is_refused(device: str, complaint: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match=complaint):
        TorchCodec(tiny_checkpoint / "BiCodec", tiny_checkpoint / "glm-4-voice-tokenizer", device=device)


def test_a_wav2vec2_of_another_width_is_refused(tiny_checkpoint_copy: Path) -> None:
    path = tiny_checkpoint_copy / "BiCodec" / WAV2VEC2_FOLDER / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 128}))
    with pytest.raises(CheckpointError, match=r"hidden_size is 128, but BiCodec's encoder takes 64 input_channels"):
        open_codec(tiny_checkpoint_copy).encode(tone(16000), ["semantic"])


def test_truncated_weights_are_refused_by_name(tiny_checkpoint_copy: Path) -> None:
    file = tiny_checkpoint_copy / "BiCodec" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"BiCodec.model\.safetensors has 100000 bytes, but its header announces"):
        open_codec(tiny_checkpoint_copy).voice(tone(16000))
