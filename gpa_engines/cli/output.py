"""Where results go: files that appear only when they are whole, and streams that grow as the model speaks."""

from __future__ import annotations

import io
import json
import struct
import sys
import unicodedata
import wave
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from gpa_codecs.audio import SAMPLE_RATE, Waveform, write_wav
from gpa_codecs.errors import GpaError
from gpa_codecs.files import replacing, write_all, write_atomically

UNKNOWN_LENGTH = 0xFFFFFFFF
"""What a WAV header says when the length is not known yet; as ffmpeg writes to a pipe."""


STANDARD_OUTPUT = "standard output"


class AudioSink(Protocol):
    """Takes the pieces of a stream."""

    def write(self, piece: Waveform) -> None: ...


def print_line(text: str, end: str = "\n") -> None:
    """Text to standard output at once; on a terminal, control characters from a model cannot act."""
    _print((_harmless(text) if sys.stdout.isatty() else text) + end)


def print_json(document: dict[str, Any], *, one_line: bool = False) -> None:
    """A JSON document to standard output at once."""
    _print(json.dumps(document, ensure_ascii=False, indent=None if one_line else 2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, replaced only once the new one is whole. Raises GpaError naming the file."""
    with named(path):
        write_atomically(path, text.encode())


def write_audio(path: Path, waveform: Waveform) -> None:
    """A WAV file, or the WAV to standard output; the folder is made if it is not there."""
    if str(path) == "-":
        buffer = io.BytesIO()
        write_wav(buffer, waveform)
        with named(STANDARD_OUTPUT):
            sys.stdout.buffer.write(buffer.getbuffer())
            sys.stdout.buffer.flush()
        return
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, waveform)


@contextmanager
def audio_stream(path: Path) -> Generator[AudioSink, None, None]:
    """A sink whose content is that of `write_audio` of the joined pieces.

    A file grows beside `path` and takes its name when the block ends well; if it does not, nothing is left. Standard
    output, devices and pipes get a header of unknown length with the first piece.
    """
    if str(path) == "-":
        yield _Pipe(sys.stdout.buffer, STANDARD_OUTPUT)
    elif path.exists() and not path.is_file():
        with named(path):
            device = path.open("wb", buffering=0)
        with device:
            yield _Pipe(device, path)
    else:
        with _growing_file(path) as file:
            yield file


class _Pipe:
    def __init__(self, file: BinaryIO | io.FileIO, path: Path | str) -> None:
        self._file = file
        self._path = path
        self._begun = False

    def write(self, piece: Waveform) -> None:
        with named(self._path):
            if not self._begun:
                self._begun = True
                write_all(self._file, _open_header())
            write_all(self._file, _samples(piece))
            self._file.flush()


class _File:
    def __init__(self, file: wave.Wave_write, path: Path) -> None:
        self._file = file
        self._path = path

    def write(self, piece: Waveform) -> None:
        with named(self._path):
            self._file.writeframesraw(_samples(piece))


@contextmanager
def _growing_file(path: Path) -> Generator[AudioSink, None, None]:
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as open_files:
        with named(path):
            file = open_files.enter_context(wave.open(open_files.enter_context(replacing(path)), "wb"))
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", "not compressed"))
        yield _File(file, path)
        with named(path):
            open_files.close()


def _samples(piece: Waveform) -> bytes:
    """The 16-bit samples that `write_wav` writes, without its header."""
    buffer = io.BytesIO()
    write_wav(buffer, piece)
    buffer.seek(0)
    with wave.open(buffer) as file:
        return file.readframes(file.getnframes())


def _open_header() -> bytes:
    form = struct.pack("<4sI4s", b"RIFF", UNKNOWN_LENGTH, b"WAVE")
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return form + layout + struct.pack("<4sI", b"data", UNKNOWN_LENGTH)


@contextmanager
def named(path: Path | str) -> Generator[None, None, None]:
    """Failures of the file system, the path in front."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise GpaError(f"{path}: cannot be written: {error.strerror or error}") from error


def _print(text: str) -> None:
    with named(STANDARD_OUTPUT):
        sys.stdout.write(text)
        sys.stdout.flush()


def _harmless(text: str) -> str:
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)
