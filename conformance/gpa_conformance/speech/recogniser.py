"""An independent recogniser of the domain's words: pocketsphinx with a grammar of any number of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

SILENCE = 4800
"""Samples of faint noise before and after a clip: its acoustic model knows no clip that begins with a word."""

PEAK, NOISE = 0.45 * 32767, 30.0
"""16-bit steps: the clip's peak, and the deviation of the noise under it."""

DECODER = {"beam": 1e-64, "wbeam": 1e-48, "pbeam": 1e-64, "cmn": "batch", "wip": 0.01}
"""Wide beams; the penalty of a further word was chosen on natural audio alone. Each clip is normalised by itself, so
that what is heard does not depend on the clips before."""

INSTALL = "no independent recogniser: pip install pocketsphinx"


class Recogniser(Protocol):
    """Hears words in audio. name: with its version, for the report."""

    name: str

    def hear(self, pcm: NDArray[np.floating]) -> tuple[str, ...]:
        """Words of floating[N] at 16000 Hz; the same for the same samples."""
        ...


def find_recogniser(words: Sequence[str], language: str) -> tuple[Recogniser | None, str]:
    """A recogniser of these words, or None and why there is none."""
    if language != "en":
        return None, f"no independent recogniser of language {language!r}: pocketsphinx brings a model of English only"
    try:
        from pocketsphinx import Decoder, get_model_path
    except ImportError:
        return None, INSTALL
    known = _spoken_words(Path(get_model_path("en-us/cmudict-en-us.dict")))
    if unknown := [word for word in words if word not in known]:
        return None, f"no independent recogniser: pocketsphinx's dictionary lacks {', '.join(map(repr, unknown))}"
    return Pocketsphinx(words, Decoder, get_model_path), ""


class Pocketsphinx:
    """See `Recogniser`. Not for several threads at a time."""

    def __init__(self, words: Sequence[str], decoder: Any, model_path: Any) -> None:
        self.name = f"pocketsphinx {version('pocketsphinx')}"
        with tempfile.TemporaryDirectory(prefix="gpa-grammar-") as folder:
            grammar = Path(folder) / "words.gram"
            grammar.write_text(
                f"#JSGF V1.0;\ngrammar words;\npublic <words> = ({' | '.join(words)})+ ;\n", encoding="utf-8"
            )
            self._decoder = decoder(
                hmm=model_path("en-us/en-us"),
                dict=model_path("en-us/cmudict-en-us.dict"),
                jsgf=str(grammar),
                lm=None,
                loglevel="FATAL",
                **DECODER,
            )

    def hear(self, pcm: NDArray[np.floating]) -> tuple[str, ...]:
        samples = np.pad(np.nan_to_num(np.asarray(pcm, np.float64)), SILENCE)
        samples = samples * (PEAK / max(np.abs(samples).max(), 1e-9))
        samples = samples + np.random.default_rng(0).normal(0, NOISE, len(samples))
        self._decoder.start_utt()
        self._decoder.process_raw(samples.astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return tuple(found.hypstr.split()) if found is not None else ()


def _spoken_words(dictionary: Path) -> set[str]:
    with dictionary.open(encoding="utf-8") as lines:
        return {line.split(maxsplit=1)[0] for line in lines if line.strip()}
