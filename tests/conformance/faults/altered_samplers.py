"""Samplers that break one step of the sampling rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpa_engines.engine import SamplingParams
from gpa_engines.sampling import Sampler


class PenaltyOfNewTokensOnly(Sampler):
    """The ids of the prompt are not penalised."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int] = (),
        allowed: Sequence[range] | None = None,
    ) -> None:
        super().__init__(params, (), stop_ids, allowed)


class PenaltyOfPromptOnly(Sampler):
    """The ids of the answer are not penalised."""

    def _remember(self, row: int) -> None:
        self._chosen += 1


class PenaltyPerOccurrence(Sampler):
    """An id that stands twice in prompt and answer is penalised twice."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int] = (),
        allowed: Sequence[range] | None = None,
    ) -> None:
        super().__init__(params, prompt_ids, stop_ids, allowed)
        again = [token for token, count in Counter(prompt_ids).items() for _ in range(count - 1)]
        self._again = [int(row) for token in again for row in self._rows_of([token])]

    def _remember(self, row: int) -> None:
        if row in self._seen:
            self._again.append(row)
        super()._remember(row)

    def _scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        scores, penalty = np.array(logits, np.float32), np.float32(self._params.repetition_penalty)
        for row in self._again:
            scores[row] = scores[row] * penalty if scores[row] < 0 else scores[row] / penalty
        return super()._scores(scores)


class PenaltyByDivisionOnly(Sampler):
    """Negative logits are divided, too, which makes their ids likelier."""

    def _scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        scores = np.array(logits, np.float32)
        seen = sorted(self._seen)
        negative = [row for row in seen if scores[row] < 0]
        scores[negative] /= np.float32(self._params.repetition_penalty) ** 2
        return super()._scores(scores)


class TopPBeforeTopK(Sampler):
    """The nucleus is that of all candidates instead of that of the top-k."""

    def _kept(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        params = self._params
        weights = np.exp((scores.astype(np.float64) - scores.max()) / params.temperature)
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        kept = order[before < params.top_p * weights.sum()] if params.top_p < 1 else order
        if params.top_k:
            kept = kept[: params.top_k]
        kept = np.sort(kept[weights[kept] >= params.min_p * weights.max()])
        return kept, weights[kept] / weights[kept].sum()


class TopPBeforeTemperature(Sampler):
    """The nucleus is that of temperature 1."""

    def _kept(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        params, best = self._params, scores.max()
        rows = np.argsort(-scores, kind="stable")[: params.top_k or len(scores)]
        plain = np.exp(scores[rows].astype(np.float64) - best)
        rows = rows[np.cumsum(plain) - plain < params.top_p * plain.sum()]
        weights = np.exp((scores[rows].astype(np.float64) - best) / params.temperature)
        rows, weights = rows[weights >= params.min_p], weights[weights >= params.min_p]
        order = np.argsort(rows)
        return rows[order], weights[order] / weights.sum()


class SharedGenerator(Sampler):
    """All requests draw from one generator, which the seed of the first has started."""

    generator: np.random.Generator | None = None

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int] = (),
        allowed: Sequence[range] | None = None,
    ) -> None:
        super().__init__(params, prompt_ids, stop_ids, allowed)
        SharedGenerator.generator = SharedGenerator.generator or self._random
        self._random = SharedGenerator.generator


class GeneratorRestarts(Sampler):
    """Every token is drawn with the generator's first number."""

    def next(self, logits: NDArray[np.float32]) -> int:
        self._random = np.random.default_rng(self.seed)
        return super().next(logits)


class NoiseRestarts(Sampler):
    """Draws are the best of noisy scores (Gumbel's trick), and every token has the same noise."""

    def next(self, logits: NDArray[np.float32]) -> int:
        rows, probabilities = self._kept(self._scores(logits))
        noise = np.random.default_rng(self.seed).gumbel(size=len(logits))
        row = int(rows[np.argmax(np.log(probabilities) + noise[rows])])
        self._remember(row)
        return row if self.candidate_ids is None else int(self.candidate_ids[row])
