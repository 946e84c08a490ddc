"""Writing audio."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from gpa_codecs.audio import Waveform, check_writable, load_audio, write_wav
from gpa_codecs.errors import AudioError


def test_a_16_bit_file_survives_reading_and_writing(audio_dir: Path, tmp_path: Path) -> None:
    for file in ("en_male_16k.wav", "zh_female_16k.wav"):
        write_wav(tmp_path / "copy.wav", load_audio(audio_dir / file))
        original, copy = (soundfile.read(path, dtype="int16")[0] for path in (audio_dir / file, tmp_path / "copy.wav"))
        assert np.array_equal(original, copy)
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy.wav"]


def test_samples_beyond_full_scale_are_clipped() -> None:
    file = io.BytesIO()
    write_wav(file, Waveform(np.array([1.0, -1.0, 3.0, -3.0, 0.25, 0.4 / 32768, 0.6 / 32768]), 24000))
    file.seek(0)
    samples, rate = soundfile.read(file, dtype="int16")
    assert rate == 24000
    assert list(samples) == [32767, -32768, 32767, -32768, 8192, 0, 1]


def test_dash_writes_to_standard_output(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    code = "import numpy as np; from gpa_codecs.audio import *; write_wav('-', Waveform(np.full(100, 0.5)))"
    subprocess.run([sys.executable, "-c", code], check=True)
    samples, rate = soundfile.read(io.BytesIO(capfdbinary.readouterr().out), dtype="int16")
    assert rate == 16000
    assert list(samples) == [16384] * 100


def test_a_closed_pipe_is_an_error_that_says_so() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as pipe, pytest.raises(AudioError, match="Broken pipe"):
        write_wav(pipe, Waveform(np.zeros(100_000)))


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Terminal(screen))
    with pytest.raises(AudioError, match="terminal"):
        check_writable("-")
    with pytest.raises(AudioError, match="terminal"):
        write_wav("-", Waveform(np.zeros(10)))
    assert screen.getvalue() == b""


@pytest.mark.parametrize(
    ("pcm", "reason"),
    [
        (np.empty(0), "no samples"),
        (np.array([0.0, np.nan]), "sample 1"),
        (np.zeros((10, 2)), "mono"),
        (np.zeros(10, np.int16), "floating-point"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(pcm: np.ndarray, reason: str, tmp_path: Path) -> None:
    target = tmp_path / "out.wav"
    target.write_bytes(b"old")
    with pytest.raises(AudioError, match=reason):
        write_wav(target, Waveform(pcm))
    assert target.read_bytes() == b"old"


def test_writability_is_said_before_the_work_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    check_writable(tmp_path / "new.wav")
    check_writable(tmp_path / "file")
    for target, reason in [
        (tmp_path, "it is a folder"),
        (tmp_path / "missing" / "out.wav", "does not exist"),
        (tmp_path / "file" / "out.wav", "is not a folder"),
        ("out\0.wav", "null"),
        (tmp_path / ("x" * 300), "too long"),
    ]:
        with pytest.raises(AudioError, match=reason):
            check_writable(target)
        with pytest.raises(AudioError, match=reason):
            write_wav(target, Waveform(np.zeros(10)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_permissions_are_respected(tmp_path: Path) -> None:
    kept = tmp_path / "kept.wav"
    kept.touch(mode=0o444)
    with pytest.raises(AudioError, match="permission denied"):
        write_wav(kept, Waveform(np.zeros(10)))
    tmp_path.chmod(0o555)
    with pytest.raises(AudioError, match="no permission"):
        check_writable(tmp_path / "new.wav")


def test_devices_are_written_to_and_links_followed(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_wav(fifo, Waveform(np.zeros(100)))
        assert os.read(descriptor, 4) == b"RIFF"
    finally:
        os.close(descriptor)
    assert fifo.is_fifo()
    link = tmp_path / "link.wav"
    link.symlink_to(tmp_path / "real.wav")
    write_wav(link, Waveform(np.zeros(100)))
    assert link.is_symlink()
    assert load_audio(tmp_path / "real.wav").duration == 100 / 16000
