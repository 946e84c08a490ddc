"""Family "codec": a speech codec against the codes and waveforms that the baseline's float32 torch codec gave."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.audio import load_audio
from gpa_codecs.codec import HOP_LENGTH, SpeechCodec
from gpa_conformance.baseline import CodecReference
from gpa_conformance.cases import Case, clip_file
from gpa_conformance.context import Context, Skip
from gpa_conformance.families.findings import Findings
from gpa_conformance.results import CaseResult

FRAME = 1024
HOP = 256
BANDS = 40
"""Of the log-mel distance: 64 ms frames, 16 ms apart, bands evenly spaced on the mel scale."""

FLOOR = 1e-5
"""Amplitude under which bands are taken to be silent."""


async def run(context: Context, case: Case) -> CaseResult:
    """Kinds: "encode", "decode", "stream". The codec works in a thread; it needs no engine."""
    if context.make_codec is None:
        raise Skip(context.no_codec)
    if reason := context.baseline.missing(case):
        raise Skip(reason)
    codec = context.make_codec()
    reference = context.baseline.codec(case.spec["clip"])
    found = Findings(case)
    match case.kind:
        case "encode":
            await asyncio.to_thread(_encode, context, codec, reference, found)
        case "decode":
            await asyncio.to_thread(_decode, context, codec, reference, found)
        case "stream":
            await asyncio.to_thread(_stream, context, codec, reference, found, case.spec["pieces"])
        case kind:
            raise ValueError(f"case {case.id} has the kind {kind!r}")
    return found.result()


def _encode(context: Context, codec: SpeechCodec, reference: CodecReference, found: Findings) -> None:
    clip = load_audio(clip_file(reference.clip))
    tokens, voice = codec.encode(clip), codec.voice(clip)
    for name, given, expected, stable in (
        ("semantic", tokens.semantic, reference.tokens.semantic, reference.semantic_stable),
        ("glm", tokens.glm, reference.tokens.glm, reference.glm_stable),
        ("voice", np.asarray(voice.codes), np.asarray(reference.voice.codes), reference.voice_stable),
    ):
        found.check(f"{name}_count", len(given), "==", len(expected), "codes per second of audio")
        same = len(given) == len(expected)
        agreement = float((given == expected)[stable].mean()) if same and stable.any() else float(same)
        found.metrics[f"{name}_scored"] = float(stable.sum())
        found.add([context.all_limits.codec.check(f"{name}_agreement", agreement)])


def _decode(context: Context, codec: SpeechCodec, reference: CodecReference, found: Findings) -> None:
    pcm = np.asarray(codec.decode(reference.tokens.semantic, reference.voice).pcm, np.float64)
    expected = np.asarray(reference.waveform.pcm, np.float64)
    found.check("samples", len(pcm), "==", HOP_LENGTH * len(reference.tokens.semantic), "320 samples per code")
    found.check("non_finite", float((~np.isfinite(pcm)).sum()), "==", 0, "a NaN is never right")
    if not found.failed:
        limits = context.all_limits.codec
        found.add([limits.check("snr_db", signal_to_noise(expected, pcm))])
        found.add([limits.check("log_mel", log_mel_distance(expected, pcm))])


def _stream(
    context: Context, codec: SpeechCodec, reference: CodecReference, found: Findings, pieces: list[int]
) -> None:
    """Only for a codec that can decode in pieces: `decode_pieces(semantic, voice, sizes) -> list of Waveform`."""
    decode_pieces = getattr(codec, "decode_pieces", None)
    if decode_pieces is None:
        raise Skip("this codec has no streaming decoder (decode_pieces)")
    semantic = reference.tokens.semantic
    whole = np.asarray(codec.decode(semantic, reference.voice).pcm, np.float64)
    for size in pieces:
        parts = decode_pieces(semantic, reference.voice, size)
        joined = np.concatenate([np.asarray(part.pcm, np.float64) for part in parts])
        found.check(f"samples in pieces of {size}", len(joined), "==", len(whole), "streamed is the whole")
        if len(joined) == len(whole):
            error = float(np.abs(joined - whole).max())
            found.add([context.all_limits.codec.check("stream_error", error)])


def signal_to_noise(expected: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """dB; infinite for equal waveforms float64[N]."""
    noise = float(np.square(found - expected).sum())
    if noise == 0:
        return np.inf
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.square(expected).sum() / noise))


def log_mel_distance(expected: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Mean absolute difference of the log-mel spectra, in nats of amplitude; waveforms float64[N] at 16 kHz."""
    return float(np.abs(_log_mel(expected) - _log_mel(found)).mean())


def _log_mel(pcm: NDArray[np.float64]) -> NDArray[np.float64]:
    padded = np.pad(pcm, (0, max(0, FRAME - len(pcm))))
    starts = range(0, len(padded) - FRAME + 1, HOP)
    frames = np.stack([padded[start : start + FRAME] for start in starts]) * np.hanning(FRAME)
    amplitude = np.abs(np.fft.rfft(frames, axis=1)) / FRAME
    return np.log(np.maximum(amplitude @ _mel_bands().T, FLOOR))


def _mel_bands() -> NDArray[np.float64]:
    """float64[BANDS, FRAME / 2 + 1]: triangles evenly spaced on the mel scale of HTK, 0 to 8000 Hz."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), BANDS + 2) / 2595) - 1)
    bins = np.linspace(0, 8000, FRAME // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling))
