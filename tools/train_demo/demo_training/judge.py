"""An independent recogniser of digits, and word errors with their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from demo_training.digits import WORDS

_PEAK = 0.45
_MARGIN = 4800  # samples of faint noise around a clip: the recogniser's noise estimate needs some
_NOISE = 30.0  # of 32768
_BEAMS = {"beam": 1e-64, "wbeam": 1e-48, "pbeam": 1e-64}
_INSERTION = 0.01  # chosen on natural recordings alone
_RESAMPLES = 2000
_CONFIDENCE = 0.95


class Judge:
    """pocketsphinx (Huggins-Daines et al. 2006) with its English model and a grammar of digits."""

    def __init__(self) -> None:
        from pocketsphinx import Decoder, get_model_path

        grammar = f"#JSGF V1.0;\ngrammar digits;\npublic <digits> = ({' | '.join(WORDS)})+ ;\n"
        with TemporaryDirectory() as folder:
            path = Path(folder) / "digits.gram"
            path.write_text(grammar, encoding="utf-8")
            self._decoder = Decoder(
                hmm=get_model_path("en-us/en-us"),
                dict=get_model_path("en-us/cmudict-en-us.dict"),
                jsgf=str(path),
                lm=None,
                loglevel="FATAL",
                cmn="batch",
                wip=_INSERTION,
                **_BEAMS,
            )

    def words(self, pcm: NDArray[np.floating]) -> str:
        """The digits that are heard in float[N] at 16 kHz, as words."""
        clip = pcm / (np.abs(pcm).max() + 1e-9) * _PEAK * 32767
        noise = np.random.default_rng(0).normal(0.0, _NOISE, len(clip) + 2 * _MARGIN)
        noise[_MARGIN : _MARGIN + len(clip)] += clip
        self._decoder.start_utt()
        self._decoder.process_raw(noise.astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return found.hypstr if found else ""


@dataclass(frozen=True, slots=True)
class WordErrors:
    """Errors and reference words of each utterance, in the order of the utterances."""

    errors: NDArray[np.int64]
    words: NDArray[np.int64]

    @classmethod
    def of(cls, references: Sequence[str], heard: Sequence[str]) -> WordErrors:
        """Count them. Both hold words with spaces between."""
        pairs = [(reference.split(), words.split()) for reference, words in zip(references, heard, strict=True)]
        return cls(
            np.array([edit_distance(*pair) for pair in pairs]), np.array([len(reference) for reference, _ in pairs])
        )

    @property
    def rate(self) -> float:
        """Word error rate; more than 1 where many words are put in."""
        return float(self.errors.sum() / self.words.sum())

    def interval(self, against: WordErrors | None = None) -> tuple[float, float]:
        """95% interval of the rate, or of its distance to that of the same utterances in another condition.

        By resampling utterances (bootstrap, Bisani & Ney 2004).
        """
        rng = np.random.default_rng(0)
        chosen = rng.integers(len(self.words), size=(_RESAMPLES, len(self.words)))
        rates = self.errors[chosen].sum(1) / self.words[chosen].sum(1)
        if against is not None:
            rates = rates - against.errors[chosen].sum(1) / against.words[chosen].sum(1)
        low, high = np.quantile(rates, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
        return float(low), float(high)


def edit_distance(reference: Sequence[str], heard: Sequence[str]) -> int:
    """Fewest words to replace, leave out and put in (Levenshtein 1966)."""
    row = list(range(len(heard) + 1))
    for count, word in enumerate(reference, start=1):
        before, row[0] = row[0], count
        for place, other in enumerate(heard, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (word != other))
    return row[-1]
