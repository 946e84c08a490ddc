"""What is measured: the sizes, the order of the measurements, the prompts, and who runs them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gpa_codecs.errors import RequestError

Head = Literal["full", "restricted"]
"""Which rows of the LM head a decode may use: the whole vocabulary, or the semantic family only (as tts-a and vc)."""

HEADS: tuple[Head, ...] = ("full", "restricted")

MINIMUM_NEW_TOKENS = 4
"""Fewest tokens that give a decode rate: three intervals."""

PROMPT_SEED = 20250101


@dataclass(frozen=True, slots=True)
class Measurement:
    """One thing to measure. prefill: one prompt. decode: `batch` concurrent requests, with one of the heads."""

    kind: Literal["prefill", "decode"]
    batch: int = 1
    head: Head = "full"

    def __str__(self) -> str:
        return self.kind if self.kind == "prefill" else f"decode, batch {self.batch}, {self.head} head"


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes of a benchmark. Lengths in tokens; logit_positions 0 leaves the comparison of logits out."""

    prompt_tokens: int = 200
    new_tokens: int = 64
    batches: tuple[int, ...] = (1, 4, 16)
    heads: tuple[Head, ...] = HEADS
    repeats: int = 3
    logit_positions: int = 256

    def __post_init__(self) -> None:
        _at_least("prompt-tokens", self.prompt_tokens, 1)
        _at_least("new-tokens", self.new_tokens, MINIMUM_NEW_TOKENS)
        _at_least("repeats", self.repeats, 1)
        _at_least("logit-positions", self.logit_positions, 0)
        for batch in self.batches:
            _at_least("batch", batch, 1)
        for head in self.heads:
            if head not in HEADS:
                raise RequestError(f"head is {head!r}; expected one of {', '.join(HEADS)}")
        object.__setattr__(self, "batches", tuple(sorted(set(self.batches))))
        object.__setattr__(self, "heads", tuple(head for head in HEADS if head in self.heads))
        if not self.batches or not self.heads:
            raise RequestError("a benchmark needs at least one batch size and one head")

    def check_context(self, max_context: int) -> None:
        """Raise RequestError where a request would not fit into the model's context."""
        needed = self.prompt_tokens + self.new_tokens
        if needed > max_context:
            raise RequestError(
                f"prompt-tokens {self.prompt_tokens} and new-tokens {self.new_tokens} need {needed} positions; "
                f"the model has {max_context}: lower one of them"
            )
        if self.logit_positions > max_context:
            raise RequestError(f"logit-positions is {self.logit_positions}; the model has {max_context} positions")

    def measurements(self) -> list[Measurement]:
        """In the order in which every round takes them; small batches first, so that peak memory can be told apart."""
        decodes = [Measurement("decode", batch, head) for batch in self.batches for head in self.heads]
        return [Measurement("prefill"), *decodes]


@dataclass(frozen=True, slots=True)
class ContenderSpec:
    """One way to run the language model; kind "engine" is a backend of the registry, "transformers" the yardstick.

    options: of the backend, beside those that have a field here.
    """

    kind: Literal["engine", "transformers"]
    backend: str
    dtype: str
    device: str
    threads: int
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return f"{self.backend}/{self.dtype}"


def yardstick_dtype(dtype: str) -> str:
    """The dtype of transformers that an engine's dtype is held against: the same, and bfloat16 for quantised ones."""
    return dtype if dtype in ("float32", "float16", "bfloat16") else "bfloat16"


def prompts(seed: int, count: int, length: int, vocab_size: int) -> list[tuple[int, ...]]:
    """`count` prompts of `length` random ids, all different, the same for every contender.

    A fresh seed per round keeps a prefix cache from answering instead of the model.
    """
    random = np.random.default_rng((PROMPT_SEED, seed))
    return [tuple(row.tolist()) for row in random.integers(0, vocab_size, (count, length))]


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise RequestError(f"{name} is {value}; expected at least {minimum}")
