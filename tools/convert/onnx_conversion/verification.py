"""Whether what was converted is what it was made from: the codec on clips, the language model on a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import numpy as np

from gpa_codecs.audio import Waveform, load_audio
from gpa_codecs.codec import AudioTokens, Voice
from gpa_codecs.onnx_codec import OnnxCodec
from gpa_codecs.onnx_folder import CodecFolder
from gpa_codecs.torch_codec import TorchCodec
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.examples import example_clip
from gpa_engines.registry import create_engine

MOST_DIFFERENT = 0.01
"""Share of codes that may differ: where two codewords are equally near, rounding decides."""

LARGEST_ERROR = 1e-4
"""Of the decoder's samples in fp32, between -1 and 1."""

LEAST_SNR = {"fp16": 40.0, "int8": 12.0}
"""Signal-to-noise ratio in dB of the decoder in fewer bits. Random weights of the released sizes give 47 and 18 dB,
where the generator, which is noise, hands an error on five times as large as it got it: the prenet's is at 33 dB."""


LARGEST_LOGIT_ERROR = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.2}
"""Relative L2 distance of the logits of a short prompt."""

_DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One thing that was compared: what came out, and whether that is good enough."""

    subject: str
    outcome: str
    passed: bool


def compare_codecs(checkpoint: Checkpoint, folder: Path) -> list[Comparison]:
    """Compare the codec in `folder` with the checkpoint's in torch, after its files with the manifest's sha256.

    Raises CheckpointError for a file that is not what the manifest says.
    """
    manifest = CodecFolder.open(folder)
    manifest.check(hashes=True)
    torch_codec = TorchCodec(checkpoint.bicodec_dir, checkpoint.glm_dir)
    onnx_codec = OnnxCodec(folder)
    comparisons = []
    pieces: list[tuple[np.ndarray, Voice]] = []
    for name, clip in _clips().items():
        expected, found = torch_codec.encode(clip), onnx_codec.encode(clip)
        voices = torch_codec.voice(clip), onnx_codec.voice(clip)
        comparisons += _compare_tokens(name, expected, found)
        comparisons.append(_codes(f"{name}: voice", np.array(voices[0].codes), np.array(voices[1].codes)))
        pieces.append((expected.semantic, voices[0]))
    wanted = [waveform.pcm for waveform in torch_codec.decode_batch(pieces)]
    for precision in manifest.precisions:
        codec = onnx_codec if precision == "fp32" else OnnxCodec(folder, precision=precision)
        decoded = [waveform.pcm for waveform in codec.decode_batch(pieces)]
        comparisons.append(_samples(precision, np.concatenate(wanted), np.concatenate(decoded)))
    return comparisons


def _clips() -> dict[str, Waveform]:
    """The example clips, and one whose last mel frames and GLM code are incomplete."""
    clips = {name: load_audio(example_clip(name)) for name in ("example:speech", "example:voice")}
    return clips | {"a cut clip": Waveform(clips["example:voice"].pcm[:29_900])}


def _compare_tokens(name: str, expected: AudioTokens, found: AudioTokens) -> list[Comparison]:
    return [
        _codes(f"{name}: semantic", expected.semantic, found.semantic),
        _codes(f"{name}: glm", expected.glm, found.glm),
    ]


def _codes(subject: str, expected: np.ndarray, found: np.ndarray) -> Comparison:
    if expected.shape != found.shape:
        return Comparison(subject, f"{len(found)} codes; expected {len(expected)}", False)
    different = int((expected != found).sum())
    # One code of a short clip may be more than the share that is allowed.
    passed = different <= max(1, MOST_DIFFERENT * len(expected))
    return Comparison(subject, f"{len(expected) - different} of {len(expected)} codes equal", passed)


def _samples(precision: str, expected: np.ndarray, found: np.ndarray) -> Comparison:
    subject = f"decoder {precision}"
    if expected.shape != found.shape:
        return Comparison(subject, f"{len(found)} samples; expected {len(expected)}", False)
    error = (found - expected).astype(np.float64)
    largest, power = float(np.abs(error).max()), float(np.square(error).mean())
    snr = 10 * np.log10(np.square(expected, dtype=np.float64).mean() / power) if power else np.inf
    passed = largest <= LARGEST_ERROR if precision == "fp32" else bool(snr >= LEAST_SNR[precision])
    return Comparison(subject, f"largest error {largest:.1e}, signal-to-noise ratio {snr:.1f} dB", passed)


def compare_language_models(root: Path, out: Path, precisions: Sequence[str]) -> list[Comparison]:
    """Compare the logits of the language models in `out` with those of the checkpoint `root` in torch, in float32."""
    expected = _logits("torch", root, "float32")
    comparisons = []
    for precision in precisions:
        found = _logits("onnx", out, _DTYPES[precision])
        distance = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        comparisons.append(
            Comparison(
                f"language model {precision}",
                f"logits differ by {distance:.1e} of their length",
                distance <= LARGEST_LOGIT_ERROR[precision],
            )
        )
    return comparisons


def _logits(backend: str, folder: Path, dtype: str) -> np.ndarray:
    async def compute() -> np.ndarray:
        engine = create_engine(backend, folder, dtype=dtype)
        try:
            # Spread over the vocabulary, so that text and every family of audio tokens takes part.
            ids = np.linspace(0, engine.info.vocab_size - 1, 24).astype(int).tolist()
            return np.asarray(await engine.logits(ids), dtype=np.float64)
        finally:
            await engine.close()

    return anyio.run(compute)
