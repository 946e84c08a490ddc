"""Recordings that are the same whenever they are made: each call has a synthesiser that has not spoken before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from demo_training.corpus import VOICES, Corpus, SpeakerVoice
from gpa_codecs.errors import BackendError

_SCRIPT = Path(__file__).parents[1] / "narrate.py"


def narrate(
    texts: Sequence[str],
    voices: Sequence[SpeakerVoice] = VOICES,
    progress: Callable[[int], None] = lambda done: None,
) -> Corpus:
    """Speak every text in every voice. progress: told how many texts are done. Raises BackendError without
    espeak-ng.
    """
    asked = json.dumps({"texts": list(texts), "voices": [(voice.name, voice.variant, voice.f0) for voice in voices]})
    with TemporaryDirectory() as folder, TemporaryFile("w+", encoding="utf-8") as errors:
        path = Path(folder) / "corpus.npz"
        command = [sys.executable, str(_SCRIPT), str(path)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(asked)
            process.stdin.close()
            for line in process.stdout:
                progress(int(line))
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status:
            errors.seek(0)
            raise BackendError(errors.read().strip().removeprefix("error: ") or f"the synthesiser ended with {status}")
        return Corpus.load(path)
