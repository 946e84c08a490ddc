"""Audio in and out: one loader and one writer for every codec and every entry.

Everything after the loader is 16 kHz mono; 1.0 is full scale.
"""

from __future__ import annotations

import io
import operator
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from gpa_codecs.errors import AudioError
from gpa_codecs.files import why_not_writable, write_all, write_atomically

SAMPLE_RATE = 16000
"""Hz of all audio inside the codecs."""

LOWEST_RATE = 1000
"""Hz; below it there is no speech, and resampling to 16000 Hz would multiply a small file into gigabytes."""


@dataclass(frozen=True, slots=True, eq=False)
class Waveform:
    """Mono audio. pcm: floating[N], full scale is 1. sample_rate: Hz."""

    pcm: NDArray[np.floating]
    sample_rate: int = SAMPLE_RATE

    @property
    def duration(self) -> float:
        """Seconds."""
        return len(self.pcm) / self.sample_rate


AudioSource: TypeAlias = str | os.PathLike[str] | BinaryIO | bytes | Waveform
Channel: TypeAlias = Literal["first", "mean"] | int
Samples: TypeAlias = NDArray[np.float64]


def load_audio(
    source: AudioSource | NDArray[np.generic], *, sample_rate: int | None = None, channel: Channel = "first"
) -> Waveform:
    """Read audio as mono float64[N] at 16000 Hz, not normalised; the same samples give the same result from any source.

    source: a local path, the bytes or an open binary file (read from where it stands to its end) of a WAV, FLAC, Ogg or
    MP3, a Waveform, or an array [N] or [N, channels] of floats with full scale 1, or of int16 or int32, which are
    divided by 2**15 or 2**31. sample_rate: Hz of a bare array, and only of that. channel: "first", the "mean" of all,
    or an index from 0; chosen before resampling. Resampling is soxr's VHQ.

    Raises AudioError naming the source for anything that is missing, empty, not audio, slower than 1000 Hz, or holds
    NaN or infinite samples.
    """
    name = _name(source)
    if isinstance(source, np.ndarray):
        if sample_rate is None:
            raise AudioError(f"{name}: an array needs its sample_rate (Hz)")
        mono, rate = _mono(_as_float(source, name), channel, name), sample_rate
    elif sample_rate is not None:
        raise AudioError(
            f"{name}: sample_rate={sample_rate} is for bare arrays; files and waveforms carry their own rate"
        )
    elif isinstance(source, Waveform):
        mono, rate = _mono(_as_float(source.pcm, name), channel, name), source.sample_rate
    else:
        mono, rate = _decode(_read(source, name), channel, name)
    rate = _positive_rate(rate, name)
    if rate < LOWEST_RATE:
        raise AudioError(f"{name}: sample rate {rate} Hz; expected {LOWEST_RATE} Hz or more")
    if len(mono) == 0:
        raise AudioError(f"{name} holds no samples")
    _refuse_non_finite(mono, rate, name)
    if rate != SAMPLE_RATE:
        mono = _resample(mono, rate, name)
    return Waveform(mono, SAMPLE_RATE)


def normalize_volume(pcm: NDArray[np.floating]) -> Samples:
    """Bring speech to a common loudness: floating[N] -> float64[N], |x| <= 1 unless ten samples or fewer exceed 0.01.

    The rule of Spark-TTS (Wang et al. 2025), which BiCodec was trained with: a peak below 0.1 is raised to 0.1, then
    the mean magnitude between the 90% and 99% quantiles of the samples above 0.01 is brought to 0.2 with a gain of 0.1
    to 10, and a peak above 1 is divided out. The quantiles are those of the samples as given, so the two gains of a
    quiet clip add up; silence stays silence.
    """
    samples: Samples = np.asarray(pcm, np.float64)
    magnitude = np.sort(np.abs(samples))
    if len(magnitude) == 0:
        raise AudioError("the volume of an empty waveform cannot be normalised")
    if magnitude[-1] < 0.1:
        samples = samples / max(magnitude[-1], 1e-3) * 0.1
    audible = magnitude[magnitude > 0.01]
    count = len(audible)
    if count <= 10:
        return samples
    volume = np.mean(audible[int(0.9 * count) : int(0.99 * count)])
    samples = samples * np.clip(0.2 / volume, 0.1, 10)
    peak = np.max(np.abs(samples))
    return samples / peak if peak > 1 else samples


def reference_clip(pcm: NDArray[np.floating], length: int) -> NDArray[np.floating]:
    """The first `length` samples, a shorter clip repeated from its start: floating[N] -> floating[length]."""
    if len(pcm) == 0:
        raise AudioError("an empty waveform cannot be a reference clip")
    return np.tile(pcm, length // len(pcm) + 1)[:length] if len(pcm) < length else pcm[:length]


def remove_dc(pcm: NDArray[np.floating]) -> NDArray[np.floating]:
    """Subtract the mean of the whole waveform; a property of the whole, so never apply it to the chunks of a stream."""
    return pcm - np.mean(pcm) if len(pcm) else pcm


def write_wav(target: str | os.PathLike[str] | BinaryIO, waveform: Waveform) -> None:
    """Write a 16-bit PCM WAV to a path, to "-" (standard output) or into an open binary file.

    Samples are scaled by 32768 and rounded to the nearest, so a 16-bit file read by `load_audio` is written back
    unchanged; what lies beyond the range is clipped to its ends (1.0 becomes 32767). A file appears under its name only
    when it is whole. Raises AudioError for an empty or non-finite waveform, a terminal as standard
    output, and whatever keeps the file from being written.
    """
    name = _target_name(target)
    pcm = np.asarray(waveform.pcm)
    if pcm.ndim != 1 or not np.issubdtype(pcm.dtype, np.floating):
        raise AudioError(f"{name}: cannot write {pcm.dtype}{list(pcm.shape)}; expected mono floating-point samples [N]")
    if len(pcm) == 0:
        raise AudioError(f"{name}: there are no samples to write")
    rate = _positive_rate(waveform.sample_rate, name)
    _refuse_non_finite(pcm, rate, name)
    wav = io.BytesIO()
    # soundfile would round floats down, which adds half a step of DC.
    steps = np.clip(np.rint(pcm.astype(np.float64) * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(wav, steps, rate, format="WAV", subtype="PCM_16")
    if isinstance(target, str | os.PathLike):
        check_writable(target)
    try:
        if target == "-":
            _write_through(sys.stdout.buffer, wav.getbuffer())
        elif isinstance(target, str | os.PathLike):
            write_atomically(target, wav.getvalue())
        else:
            _write_through(target, wav.getbuffer())
    except OSError as error:
        raise AudioError(f"{name}: cannot be written: {error.strerror or error}") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise AudioError if `write_wav` could not write to `path` (or "-"); creates and touches nothing."""
    if path == "-":
        if not hasattr(sys.stdout, "buffer"):
            raise AudioError("standard output takes no binary data here; name an output file")
        if sys.stdout.isatty():
            raise AudioError("standard output is a terminal; pipe the audio into a program or name an output file")
        return
    if problem := why_not_writable(path):
        raise AudioError(f"{os.fspath(path)}: cannot be written: {problem}")


def _name(source: object) -> str:
    """What error messages call the source."""
    if isinstance(source, str | os.PathLike):
        return str(os.fspath(source)) or "''"
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>"
    if isinstance(source, np.ndarray):
        return "<array>"
    if isinstance(source, Waveform):
        return "<waveform>"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "<file object>"


def _target_name(target: str | os.PathLike[str] | BinaryIO) -> str:
    return "standard output" if target == "-" else _name(target)


def _read(source: object, name: str) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    try:
        if isinstance(source, str | os.PathLike):
            return Path(source).read_bytes()
        read = getattr(source, "read", None)
        if read is None:
            kind = type(source).__name__
            raise AudioError(
                f"cannot read audio from a {kind}; expected a path, bytes, a binary file, an array or a Waveform"
            )
        data = read()
    except IsADirectoryError as error:
        raise AudioError(f"{name} is a folder; expected an audio file") from error
    except OSError as error:
        hint = "; audio is read from local files only, download it first" if "://" in name else ""
        raise AudioError(f"{name}: {error.strerror or error}{hint}") from error
    except ValueError as error:  # a NUL in a path, a closed file
        raise AudioError(f"{name}: {error}") from error
    if not isinstance(data, bytes):
        raise AudioError(f"{name}: reading it gives {type(data).__name__}, not bytes; open the file in binary mode")
    return data


_BLOCK = 1 << 20
"""Frames decoded at a time: only the wanted channel is kept, and a header that lies about the length costs nothing."""


class _SequentialFile(soundfile.SoundFile):
    """soundfile seeks after every read of a seekable file; that restarts an MP3 decoder, whose samples then differ."""

    def seekable(self) -> bool:
        return False


def _decode(data: bytes, channel: Channel, name: str) -> tuple[Samples, int]:
    if not data:
        raise AudioError(f"{name}: the file is empty")
    blocks: list[Samples] = []
    try:
        with _SequentialFile(io.BytesIO(data)) as file:
            while len(block := file.read(_BLOCK, dtype="float64", always_2d=True)):
                blocks.append(_mono(np.asarray(block, np.float64), channel, name))
            rate = file.samplerate
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise AudioError(f"{name}: not readable as audio ({reason}); expected WAV, FLAC, Ogg or MP3") from error
    return np.concatenate(blocks) if blocks else np.empty(0), rate


def _as_float(samples: NDArray[np.generic], name: str) -> Samples:
    """Any array that is meant as audio -> float64, full scale 1."""
    if not isinstance(samples, np.ndarray) or samples.ndim not in (1, 2):
        shape = list(np.shape(samples))
        raise AudioError(f"{name} has shape {shape}; expected samples [N] or [N, channels]")
    if samples.ndim == 2 and samples.shape[1] > 64:
        raise AudioError(f"{name} has shape {list(samples.shape)}; expected [N, channels]: transpose it")
    if samples.dtype in (np.int16, np.int32):
        return samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
    if not np.issubdtype(samples.dtype, np.floating):
        raise AudioError(f"{name} holds {samples.dtype}; expected floats with full scale 1, int16 or int32")
    return samples.astype(np.float64)


def _mono(samples: Samples, channel: Channel, name: str) -> Samples:
    """[N] or [N, channels] -> [N]."""
    if samples.ndim == 1:
        samples = samples[:, np.newaxis]
    channels = samples.shape[1]
    if channels == 0:
        raise AudioError(f"{name} has no channels")
    if channel == "mean":
        return samples.mean(axis=1)
    try:
        index = 0 if channel == "first" else operator.index(channel)
    except TypeError:
        raise AudioError(f"channel is {channel!r}; expected 'first', 'mean' or an index from 0") from None
    if not 0 <= index < channels:
        raise AudioError(f"{name} has {channels} channel(s), numbered from 0; there is no channel {index}")
    return np.ascontiguousarray(samples[:, index])


def _positive_rate(rate: int, name: str) -> int:
    try:
        value = operator.index(rate)
    except TypeError:
        value = 0
    if value <= 0:
        raise AudioError(f"{name}: sample rate {rate!r}; expected a positive whole number of Hz")
    return value


def _refuse_non_finite(pcm: NDArray[np.floating], rate: int, name: str) -> None:
    finite = np.isfinite(pcm)
    if not finite.all():
        position = int(np.argmin(finite))
        raise AudioError(
            f"{name}: sample {position} ({position / rate:.3f} s) is {pcm[position]}; expected finite samples"
        )


def _resample(mono: Samples, rate: int, name: str) -> Samples:
    try:
        resampled = soxr.resample(mono, rate, SAMPLE_RATE, quality="VHQ")
    except (RuntimeError, ValueError) as error:
        raise AudioError(f"{name}: cannot be resampled from {rate} to {SAMPLE_RATE} Hz: {error}") from error
    if len(resampled) == 0:
        raise AudioError(f"{name}: {len(mono)} sample(s) at {rate} Hz are too short to leave one at {SAMPLE_RATE} Hz")
    _refuse_non_finite(resampled, SAMPLE_RATE, name)
    return resampled


def _write_through(file: BinaryIO, content: memoryview) -> None:
    write_all(file, content)
    file.flush()
