"""The parts of the case families that can be wrong by themselves: stream faults, partings, coefficients, distances."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gpa_codecs.errors import RequestError
from gpa_conformance.families.answers import answer, describe_difference, first_difference
from gpa_conformance.families.codec import log_mel_distance, signal_to_noise
from gpa_conformance.families.suspects import coefficient_of
from gpa_engines.engine import EngineInfo, GenerationRequest, GenerationUsage, SamplingParams, TokenDelta
from tests.conformance.crooked_engines import load

EVERYTHING = frozenset(("logits", "batch", "allowed", "seed", "chunked_prefill"))


class Scripted:
    """Streams what it is told to."""

    def __init__(self, *deltas: TokenDelta) -> None:
        self.deltas = deltas

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("scripted", "cpu", "float32", 100, 1000, EVERYTHING)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        for delta in self.deltas:
            yield delta

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        raise RequestError("a scripted engine has no logits")

    async def close(self) -> None: ...


def usage(**changes: float) -> GenerationUsage:
    figures = {"prompt_tokens": 2, "new_tokens": 2, "seed": 5, "queue": 0.0, "prefill": 0.1, "decode": 0.1}
    return GenerationUsage(**(figures | changes))  # pyright: ignore[reportArgumentType]


def wanted(**more: object) -> GenerationRequest:
    return GenerationRequest((1, 2), SamplingParams(max_new_tokens=2, seed=5), **more)  # pyright: ignore[reportArgumentType]


def faults_of(request: GenerationRequest, *deltas: TokenDelta) -> tuple[str, ...]:
    return asyncio.run(answer(Scripted(*deltas), request)).faults


def test_a_stream_that_keeps_the_contract_has_no_fault() -> None:
    assert faults_of(wanted(), TokenDelta((7,)), TokenDelta((8,), "length", usage())) == ()
    assert faults_of(wanted(), TokenDelta((7, 8)), TokenDelta((), "length", usage())) == ()
    assert faults_of(wanted(stop_ids=(9,)), TokenDelta((7,)), TokenDelta((), "stop", usage(new_tokens=1))) == ()


@pytest.mark.parametrize(
    ("request_", "deltas", "told"),
    [
        (wanted(), (), "the stream ended without a delta"),
        (wanted(), (TokenDelta((7, 8)),), "the finish reason is None"),
        (wanted(), (TokenDelta((7, 8), "length"),), "the last delta has no usage"),
        (wanted(), (TokenDelta((7, 8), "cancelled", usage()),), "the finish reason is 'cancelled'"),
        (wanted(), (TokenDelta((7,), "length", usage(new_tokens=1)),), "'length' after 1 ids"),
        (wanted(), (TokenDelta((7,), "stop", usage(new_tokens=1)),), "there is no stop id"),
        (wanted(), (TokenDelta((7, 8, 9), "length", usage(new_tokens=3)),), "3 ids, though max_new_tokens is 2"),
        (wanted(), (TokenDelta((7, 8), "length", usage(new_tokens=3)),), "counts 3 new tokens, the stream had 2"),
        (wanted(), (TokenDelta((7, 8), "length", usage(prompt_tokens=3)),), "counts 3 prompt tokens; there were 2"),
        (wanted(), (TokenDelta((7, 8), "length", usage(seed=6)),), "says seed 6; the request had 5"),
        (wanted(), (TokenDelta((7, 8), "length", usage(decode=-1.0)),), "decode took -1.0 s"),
        (wanted(), (TokenDelta((7, 8), "length", usage(prefill=float("nan"))),), "prefill took nan s"),
        (wanted(), (TokenDelta((7,), "length", usage()), TokenDelta((8,), "length", usage())), "a delta followed"),
        (wanted(stop_ids=(8,)), (TokenDelta((7, 8), "stop", usage()),), "the stop id 8 is part of the answer"),
        (wanted(allowed=(range(5, 8),)), (TokenDelta((7, 8), "length", usage()),), "id 8 is not allowed"),
        (
            GenerationRequest((1, 2), SamplingParams(max_new_tokens=9, min_new_tokens=4, seed=5), (3,)),
            (TokenDelta((7, 8), "stop", usage()),),
            "stopped after 2 ids, though min_new_tokens is 4",
        ),
    ],
)
def test_what_a_stream_breaks_is_named(request_: GenerationRequest, deltas: tuple[TokenDelta, ...], told: str) -> None:
    found = faults_of(request_, *deltas)
    assert any(told in fault for fault in found), found


def test_an_answer_without_end_is_broken_off() -> None:
    class Endless(Scripted):
        async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
            while True:
                yield TokenDelta((7,))

    given = asyncio.run(answer(Endless(), wanted()))
    assert len(given.ids) < 100
    assert any("though max_new_tokens is 2" in fault for fault in given.faults)


def test_the_torch_engine_keeps_the_contract(tiny_checkpoint: Path) -> None:
    async def ask() -> tuple[str, ...]:
        engine = load(tiny_checkpoint)
        given = await answer(engine, GenerationRequest((1, 2, 3), SamplingParams(max_new_tokens=5, seed=1)))
        await engine.close()
        return given.faults

    assert asyncio.run(ask()) == ()


def test_differences_are_found_and_described() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 5, 3], [1, 2, 3]) == 1
    assert describe_difference([1, 5], [1, 2]) == "token 1 is 5, not 2"
    assert describe_difference([1], [1, 2]) == "token 1 is missing, not 2"


def test_the_coefficient_of_a_mistake_is_found_below_noise_ten_times_its_size() -> None:
    random = np.random.default_rng(0)
    direction = random.normal(0, 1, (64, 500))
    size = np.square(direction).sum(1)
    for share in (0.0, 1.0):
        moved = share * direction + random.normal(0, 10, direction.shape)
        coefficient, error = coefficient_of((moved * direction).sum(1), size)
        assert abs(coefficient - share) < 3 * error
        assert error == pytest.approx(10 / np.sqrt(size.sum()), rel=0.3)


def test_a_standard_error_is_that_of_repeated_measurements() -> None:
    random = np.random.default_rng(1)
    direction = random.normal(0, 1, (40, 100))
    size = np.square(direction).sum(1)
    found = [coefficient_of((random.normal(0, 3, direction.shape) * direction).sum(1), size) for _ in range(200)]
    spread = np.std([coefficient for coefficient, _ in found])
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.15)


def test_distances_of_waveforms() -> None:
    random = np.random.default_rng(2)
    clip = random.normal(0, 0.1, 8000)
    assert signal_to_noise(clip, clip) == np.inf
    assert signal_to_noise(clip, clip * 0.9) == pytest.approx(20)
    assert signal_to_noise(np.zeros(8000), clip) == -np.inf
    assert log_mel_distance(clip, clip) == 0
    assert log_mel_distance(clip, clip * np.e) == pytest.approx(1, rel=1e-6)
    assert log_mel_distance(clip[:300], clip[:300] * np.e) == pytest.approx(1, rel=0.2)
    assert log_mel_distance(np.zeros(8000), np.zeros(8000)) == 0
