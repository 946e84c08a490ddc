"""The one sampling rule: a row of logits to the next token, for every engine that owns its forward pass.

The order is that of transformers' `generate`: only the allowed ids and the stop ids are candidates; repetition penalty
(CTRL, Keskar et al. 2019); no stop id before `min_new_tokens`; then the highest logit if the temperature is 0, else
temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024), softmax and one draw. Penalty and
comparison are done in float32, the type of the logits, probabilities in float64. Where logits tie, all stay at the
limit of top-k; the lowest ids stay at the limit of top-p, where transformers leaves it to its sort.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import RequestError
from gpa_engines.engine import SamplingParams


def candidate_ids(allowed: Sequence[range] | None, stop_ids: Sequence[int]) -> NDArray[np.int64] | None:
    """Ids that an answer may hold: the allowed ones and the stop ids, ascending int64[R], read-only; None for all.

    The same arguments give the same array object.
    """
    return None if allowed is None else _candidates(tuple(allowed), tuple(stop_ids))


class Sampler:
    """Chooses the tokens of one request, one after the other.

    candidate_ids: int64[R], the ids that the rows given to `next` stand for, ascending; None is the whole vocabulary.
    seed: what the request's own random generator started from; drawn afresh if `params` has none.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: Sequence[int] = (),
        allowed: Sequence[range] | None = None,
    ) -> None:
        self.candidate_ids = candidate_ids(allowed, stop_ids)
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._params = params
        self._random = np.random.default_rng(self.seed)
        self._stop_rows = self._rows_of(stop_ids)
        self._chosen = 0
        seen = self._rows_of(prompt_ids)
        self._seen = set(seen.tolist())
        self._penalised = np.concatenate([seen, np.empty(params.max_new_tokens, np.int64)])

    def next(self, logits: NDArray[np.float32]) -> int:
        """The next token's id, a stop id included; the sampler remembers it.

        logits: float32[R] of the candidates, or [V] without candidates; unnormalised, left unchanged. -inf is
        impossible. Raises RequestError for NaN, +inf and a row without a possible token.
        """
        scores = self._scores(logits)
        if self._params.temperature == 0:
            row = int(np.argmax(scores))
        else:
            rows, probabilities = self._kept(scores)
            cumulative = np.cumsum(probabilities)
            # The sum may round below the draw; a zero probability is never reached from below.
            last = np.flatnonzero(probabilities)[-1]
            drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
            row = int(rows[min(drawn, last)])
        self._remember(row)
        return row if self.candidate_ids is None else int(self.candidate_ids[row])

    def replay(self, ids: Sequence[int]) -> None:
        """Go on as if `next` had chosen these ids, the random numbers that it took for them included.

        Raises RequestError for an id that is no candidate.
        """
        for token in ids:
            rows = self._rows_of((token,))
            if not len(rows):
                raise RequestError(f"the answer holds id {token}, which may not be generated")
            if self._params.temperature != 0:
                self._random.random()
            self._remember(int(rows[0]))

    def distribution(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """What `next` would draw from: kept ids int64[K], ascending, and their probabilities float64[K].

        Greedy keeps one id. Neither draws nor remembers anything.
        """
        scores = self._scores(logits)
        if self._params.temperature == 0:
            rows, probabilities = np.array([np.argmax(scores)], np.int64), np.ones(1)
        else:
            rows, probabilities = self._kept(scores)
        return rows if self.candidate_ids is None else self.candidate_ids[rows], probabilities

    def _rows_of(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Rows of those distinct ids that are candidates."""
        distinct = np.unique(np.asarray(ids, np.int64))
        if self.candidate_ids is None:
            return distinct
        rows = np.searchsorted(self.candidate_ids, distinct)
        inside = rows < len(self.candidate_ids)
        return rows[inside][self.candidate_ids[rows[inside]] == distinct[inside]]

    def _remember(self, row: int) -> None:
        self._chosen += 1
        if row not in self._seen:
            if len(self._seen) == len(self._penalised):
                self._penalised = np.concatenate([self._penalised, np.empty_like(self._penalised)])
            self._penalised[len(self._seen)] = row
            self._seen.add(row)

    def _scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Penalised and masked float32 logits with at least one finite and no infinite or NaN maximum."""
        scores = np.array(logits, np.float32)
        if scores.ndim != 1 or (self.candidate_ids is not None and len(scores) != len(self.candidate_ids)):
            expected = "V" if self.candidate_ids is None else len(self.candidate_ids)
            raise ValueError(f"logits have shape {list(scores.shape)}; expected [{expected}]")
        if self._params.repetition_penalty != 1:
            seen = self._penalised[: len(self._seen)]
            values, penalty = scores[seen], np.float32(self._params.repetition_penalty)
            with np.errstate(all="ignore"):
                scores[seen] = np.where(values < 0, values * penalty, values / penalty)
        if self._chosen < self._params.min_new_tokens:
            scores[self._stop_rows] = -np.inf
        best = scores.max(initial=-np.inf)  # NaN if there is one
        if not np.isfinite(best):
            reason = "no token is possible" if best == -np.inf else f"the logits hold {best}"
            raise RequestError(f"cannot choose token {self._chosen} of the answer: {reason}")
        return scores

    def _kept(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows that top-k, top-p and min-p leave, ascending, and their probabilities."""
        params = self._params
        limit = np.float32(-np.inf)
        if 0 < params.top_k < len(scores):
            limit = np.partition(scores, -params.top_k)[-params.top_k]
        rows = np.flatnonzero((scores >= limit) & (scores > -np.inf))
        kept = scores[rows].astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature leaves only the best
            weights = np.exp((kept - kept.max()) / params.temperature)
        if params.top_p < 1:
            inside = _nucleus(weights, params.top_p)
            rows, weights = rows[inside], weights[inside]
        if params.min_p > 0:
            inside = weights >= params.min_p * weights.max()
            rows, weights = rows[inside], weights[inside]
        return rows, weights / weights.sum()


@lru_cache(maxsize=16)
def _candidates(allowed: tuple[range, ...], stop_ids: tuple[int, ...]) -> NDArray[np.int64]:
    stops = np.array(stop_ids, np.int64)
    ids = np.unique(np.concatenate([stops, *(np.arange(part.start, part.stop, dtype=np.int64) for part in allowed)]))
    ids.flags.writeable = False
    return ids


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Positions that top-p keeps, ascending: sorted from the smallest, the tail of at most 1 - top_p is dropped."""
    tail = (1 - top_p) * weights.sum()
    # All weights up to tail / N together are within the tail, so only the others need sorting.
    large = np.flatnonzero(weights > tail / len(weights) * (1 - 1e-6))[::-1]
    order = large[np.argsort(weights[large], kind="stable")]
    small = weights.sum() - weights[large].sum() if len(large) < len(weights) else 0.0
    dropped = np.searchsorted(small + np.cumsum(weights[order]), tail, side="right")
    return np.sort(order[min(dropped, len(order) - 1) :])
