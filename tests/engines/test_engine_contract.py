"""The values that cross the engine contract refuse what no engine could serve, naming it."""

from __future__ import annotations

import math

import pytest

from gpa_codecs.errors import CapacityError, RequestError
from gpa_engines.engine import GenerationRequest, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", 1.0),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("min_new_tokens", 513),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_a_sampling_value_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(RequestError, match=f"^{field} is .*expected"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_a_prompt_needs_a_token() -> None:
    with pytest.raises(RequestError, match="prompt_ids is empty"):
        GenerationRequest(())


def test_stop_ids_are_a_set() -> None:
    assert GenerationRequest((1,), stop_ids=(9, 3, 9)).stop_ids == (3, 9)


@pytest.mark.parametrize("allowed", [(range(5, 9), range(2, 4)), (range(3, 3),), (range(0, 9, 2),), (range(-1, 4),)])
def test_allowed_ranges_are_ascending_and_disjoint(allowed: tuple[range, ...]) -> None:
    with pytest.raises(RequestError, match="allowed holds range"):
        GenerationRequest((1,), allowed=allowed)


def test_nothing_allowed_is_refused() -> None:
    with pytest.raises(RequestError, match="nothing could be generated"):
        GenerationRequest((1,), allowed=())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest((1, 100)), r"prompt_ids\[1\] is 100; the vocabulary has ids 0 to 99"),
        (GenerationRequest((-1,)), r"prompt_ids\[0\] is -1"),
        (GenerationRequest((1,), stop_ids=(100,)), r"stop_ids\[0\] is 100"),
        (GenerationRequest((1,), allowed=(range(90, 101),)), "allowed ends at id 100"),
    ],
)
def test_ids_outside_the_vocabulary_are_named(request_: GenerationRequest, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        request_.check_against(vocab_size=100, max_context=2048)


def test_a_request_beyond_the_context_says_the_numbers() -> None:
    request = GenerationRequest((1,) * 1537)
    with pytest.raises(CapacityError, match=r"prompt of 1537 tokens and max_new_tokens 512 need 2049 .* has 2048"):
        request.check_against(vocab_size=100, max_context=2048)
    GenerationRequest((1,) * 1536).check_against(vocab_size=100, max_context=2048)
