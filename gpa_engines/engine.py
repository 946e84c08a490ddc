"""The contract between the front end and every inference engine: token ids in, token ids out.

No engine ever sees a string. The front end builds the prompt ids, the engine returns new ids, and the token space
maps them back to text or audio codes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import CapacityError, RequestError

FinishReason = Literal["stop", "length", "cancelled"]
Capability = Literal["logits", "batch", "batch_invariant", "allowed", "seed", "chunked_prefill"]
"""What an engine can do beyond plain generation:

logits: `Engine.logits` returns the full float32[T, V].
batch: concurrent requests share forward passes.
batch_invariant: the logits of a request do not depend on what else runs, to the last bit. Without it sums are in an
    order that depends on the batch, and an answer may go another way where rounding decides between two tokens.
allowed: `GenerationRequest.allowed` is enforced.
seed: the same seed gives the same tokens.
chunked_prefill: a long prompt does not stall running requests.
"""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the order of the steps is defined in `gpa_engines.sampling`.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. repetition_penalty: 1 is off; it counts
    every distinct id of prompt and answer once. min_new_tokens: stop ids are impossible before. seed: None draws a
    fresh one, which the result reports.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    min_new_tokens: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        _expect("temperature", self.temperature, self.temperature >= 0, "a finite number of at least 0 (0 is greedy)")
        _expect("top_k", self.top_k, self.top_k >= 0, "0 (off) or a positive integer")
        _expect("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)")
        _expect("min_p", self.min_p, 0 <= self.min_p < 1, "at least 0 (off) and below 1")
        _expect("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1 is off)")
        _expect("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1")
        within = 0 <= self.min_new_tokens <= self.max_new_tokens
        _expect("min_new_tokens", self.min_new_tokens, within, f"0 to max_new_tokens ({self.max_new_tokens})")
        if self.seed is not None:
            _expect("seed", self.seed, 0 <= self.seed < 2**63, "None or 0 to 2**63 - 1")


def _expect(name: str, value: float, valid: bool, expected: str) -> None:
    if not (valid and np.isfinite(value)):
        raise RequestError(f"{name} is {value!r}; expected {expected}")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    prompt_ids: at least one id. stop_ids: generation ends at any of them; the stop id is not part of the answer.
    allowed: disjoint ascending ranges of the ids that may be generated, or None for the whole vocabulary; stop ids are
    always possible, whether or not a range holds them.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: tuple[int, ...] = ()
    allowed: tuple[range, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", tuple(int(i) for i in self.prompt_ids))
        object.__setattr__(self, "stop_ids", tuple(sorted({int(i) for i in self.stop_ids})))
        if not self.prompt_ids:
            raise RequestError("prompt_ids is empty; a prompt needs at least one token id")
        if self.allowed is None:
            return
        end = -1
        for ids in self.allowed:
            if ids.step != 1 or len(ids) == 0 or ids.start < max(end, 0):
                raise RequestError(f"allowed holds {ids}; expected non-empty, ascending, disjoint ranges of step 1")
            end = ids.stop
        if not self.allowed and not self.stop_ids:
            raise RequestError("allowed is empty and there is no stop id: nothing could be generated")

    def check_against(self, vocab_size: int, max_context: int, holder: str = "the model") -> None:
        """Raise RequestError for an id outside the vocabulary, CapacityError for a request beyond the context.

        holder: whose context it is, for the message.
        """
        check_ids("prompt_ids", self.prompt_ids, vocab_size)
        check_ids("stop_ids", self.stop_ids, vocab_size)
        if self.allowed and self.allowed[-1].stop > vocab_size:
            raise RequestError(f"allowed ends at id {self.allowed[-1].stop - 1}; the vocabulary has {vocab_size} ids")
        needed = len(self.prompt_ids) + self.sampling.max_new_tokens
        if needed > max_context:
            raise CapacityError(
                f"prompt of {len(self.prompt_ids)} tokens and max_new_tokens {self.sampling.max_new_tokens} need "
                f"{needed} positions; {holder} has {max_context}: shorten the prompt or lower max_new_tokens"
            )


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise RequestError naming the first of `ids` that is outside [0, vocab_size)."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name}[{position}] is {token}; the vocabulary has ids 0 to {vocab_size - 1}")


def check_positions(positions: NDArray[np.int64], length: int) -> None:
    """Raise RequestError unless `positions` ascend strictly within [0, length)."""
    if positions.ndim != 1 or (np.diff(positions) <= 0).any():
        raise RequestError(f"positions are {positions.tolist()}; expected one strictly ascending list")
    if len(positions) and not (positions[0] >= 0 and positions[-1] < length):
        raise RequestError(f"positions {positions[0]} to {positions[-1]} are outside the {length} ids of the prompt")


@dataclass(frozen=True, slots=True)
class GenerationUsage:
    """What one request took; times in seconds.

    seed: the seed that was used, also when none was given. queue: from submission until the first forward pass.
    prefill: from then until the first token was known. decode: from the first to the last token.
    """

    prompt_tokens: int
    new_tokens: int
    seed: int
    queue: float
    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New ids of a request. The last delta of a request carries the reason and the usage; its ids may be empty."""

    ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: GenerationUsage | None = None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is.

    max_context: positions of prompt and answer together. note: e.g. "simulated device". logit_ids: disjoint ascending
    ranges of the ids that the engine has logits of, None for the whole vocabulary. An engine that holds a part of the
    vocabulary gives -inf for the rest, and refuses requests that the rest would be needed for. tokenizer_sha256: of the
    tokenizer.json that a converted model was made with, "" where the model does not say.
    """

    backend: str
    device: str
    dtype: str
    vocab_size: int
    max_context: int
    capabilities: frozenset[Capability]
    note: str = ""
    logit_ids: tuple[range, ...] | None = None
    tokenizer_sha256: str = ""

    def seed_warning(self, sampling: SamplingParams) -> str | None:
        """Why a seed that somebody gave will not repeat what it draws, in a sentence; None where it will."""
        if sampling.seed is None or sampling.temperature == 0 or "seed" in self.capabilities:
            return None
        return f"{self.backend} on {self.device} draws without seeds: seed {sampling.seed} repeats nothing"


@runtime_checkable
class Engine(Protocol):
    """A loaded language model that continues token ids. All methods belong to one asyncio event loop at a time."""

    @property
    def info(self) -> EngineInfo: ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """Stream the answer. Closing the generator (or cancelling its task) cancels the request and frees what it held.

        A request's tokens do not depend on what else runs, but for rounding in an engine that lacks the capability
        "batch_invariant". Raises RequestError (CapacityError) before the first delta for a request that cannot be
        served.
        """
        ...

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32[T, V], unnormalised; row t predicts the token after ids[t]. Raises RequestError for bad ids."""
        ...

    async def close(self) -> None:
        """Cancel what runs and free the model; further calls raise RequestError. Closing twice is harmless."""
        ...


@runtime_checkable
class GivesRows(Protocol):
    """An engine that need not hold the logits of a whole prompt at once."""

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        """float32[P, V], the rows of `Engine.logits` at these positions, which ascend strictly.

        Ids behind the last position are not read. Raises RequestError for bad ids or positions.
        """
        ...
