"""When the tokens of one request came."""

from __future__ import annotations

import time

from gpa_engines.engine import GenerationUsage


class RequestClock:
    """Counts and times one answer, from its creation on.

    A server does not say when it began with a request, so its queue is counted as prefill, and `queue` is 0.
    """

    def __init__(self, prompt_tokens: int, seed: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._seed = seed
        self._begun = time.perf_counter()
        self._first = self._last = self._begun
        self.tokens = 0

    def count(self, tokens: int, ended: bool) -> None:
        """New tokens have come; `ended`: also if there are none, as where only a stop id came."""
        if tokens or ended:
            self._last = time.perf_counter()
            if not self.tokens:
                self._first = self._last
            self.tokens += tokens

    def usage(self) -> GenerationUsage:
        prefill, decode = self._first - self._begun, self._last - self._first
        return GenerationUsage(self._prompt_tokens, self.tokens, self._seed, 0.0, prefill, decode)
