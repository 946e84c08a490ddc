"""Which requests logits are read by, and how they are taken out of what vLLM's client receives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import CapacityError, RequestError
from gpa_engines.backends.vllm.logits import LogitsTap, Taken, check_memory, reads_whole

VOCABULARY = 6


@dataclass
class Arrays:
    """As vLLM's LogprobsTensors and LogprobsLists."""

    logprob_token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass
class Output:
    """As vLLM's EngineCoreOutput."""

    request_id: str
    new_logprobs: Arrays | None = None
    new_prompt_logprobs_tensors: Arrays | None = None


@dataclass
class Outputs:
    outputs: list[Output]


class Client:
    """As vLLM's AsyncMPClient."""

    def __init__(self, *received: Outputs) -> None:
        self._received = list(received)

    async def get_output_async(self) -> Outputs:
        return self._received.pop(0)


def sorted_rows(rows: np.ndarray) -> Arrays:
    """Rows of logits as vLLM gives them: the token that followed, then all by falling value."""
    order = np.argsort(-rows, axis=1)
    ids = np.concatenate([order[:, -1:], order], axis=1).astype(np.int32)
    return Arrays(ids, np.take_along_axis(rows, ids.astype(np.int64), axis=1))


def logits(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, VOCABULARY)).astype(np.float32)


def test_few_positions_are_read_alone_and_many_at_once() -> None:
    assert not reads_whole([0])
    assert not reads_whole([499])
    assert not reads_whole([10, 499])
    assert reads_whole(range(500))
    assert reads_whole(range(0, 500, 3))


def test_rows_come_back_in_the_order_of_ids() -> None:
    expected = logits(5)
    before, last = sorted_rows(expected[:4]), sorted_rows(expected[4:])
    taken = Taken(
        [(part.logprob_token_ids, part.logprobs) for part in (before,)], [(last.logprob_token_ids, last.logprobs)]
    )
    np.testing.assert_array_equal(taken.rows(5, VOCABULARY), expected)
    np.testing.assert_array_equal(taken.rows(1, VOCABULARY), expected[4:])


def test_arrays_that_are_not_understood_are_an_error() -> None:
    part = sorted_rows(logits(2))
    taken = Taken([], [(part.logprob_token_ids, part.logprobs)])
    with pytest.raises(RequestError, match=r"vLLM gave logits of shapes \[\[2, 7\]\]; expected 3 rows of 6 \+ 1"):
        taken.rows(3, VOCABULARY)
    with pytest.raises(RequestError, match="expected 2 rows of 9"):
        taken.rows(2, 9)
    with pytest.raises(RequestError, match=r"shapes \[\]; expected 1 rows"):
        Taken().rows(1, VOCABULARY)


def test_the_tap_takes_what_is_wanted_and_leaves_the_rest() -> None:
    mine, other = sorted_rows(logits(1)), sorted_rows(logits(1))
    received = Outputs([Output("gpa1-0f3a", mine, sorted_rows(logits(3))), Output("gpa10-77aa", other)])
    client: Any = Client(received, Outputs([Output("gpa1-0f3a", mine)]), Outputs([Output("gpa1", mine)]))
    tap = LogitsTap(client)
    taken = tap.open("gpa1")

    async def receive() -> Outputs:
        return await client.get_output_async()

    first = asyncio.run(receive()).outputs
    assert first[0].new_logprobs is None
    assert first[0].new_prompt_logprobs_tensors is None
    assert first[1].new_logprobs is other
    assert (len(taken.before), len(taken.last)) == (1, 1)
    asyncio.run(receive())
    assert len(taken.last) == 2
    tap.close("gpa1")
    assert asyncio.run(receive()).outputs[0].new_logprobs is mine


def test_more_than_there_is_memory_for_is_refused() -> None:
    check_memory(range(10), VOCABULARY)
    with pytest.raises(
        CapacityError, match=r"logits of 100000000 positions take .* GiB .* are free: ask for a shorter"
    ):
        check_memory(range(100_000_000), 180445)
