"""Requests in vLLM's words, and what vLLM would do otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from gpa_codecs.errors import DeclinedRequest
from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.servers.vllm_fields import after_minimum, until_minimum, vllm_fields


def request(
    stops: tuple[int, ...] = (), allowed: tuple[range, ...] | None = None, **sampling: Any
) -> GenerationRequest:
    return GenerationRequest((1, 2), SamplingParams(**sampling), stops, allowed)


def test_every_field_is_named() -> None:
    fields = vllm_fields(
        request(
            (9, 7),
            (range(3, 5), range(20, 22)),
            temperature=0.5,
            top_k=3,
            top_p=0.9,
            repetition_penalty=1.2,
            max_new_tokens=30,
            min_new_tokens=4,
        ),
        17,
    )
    assert fields == {
        "n": 1,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 17,
        "max_tokens": 30,
        "min_tokens": 4,
        "stop": [],
        "stop_token_ids": [7, 9],
        "ignore_eos": True,
        "allowed_token_ids": [3, 4, 7, 9, 20, 21],
        "logit_bias": None,
        "bad_words": [],
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
    }


def test_greedy_switches_every_filter_off_and_nothing_waits_without_a_stop_id() -> None:
    fields = vllm_fields(request(top_k=3, top_p=0.5, min_p=0.1, min_new_tokens=4), 0)
    assert (fields["temperature"], fields["top_k"], fields["top_p"], fields["min_p"]) == (0.0, 0, 1.0, 0.0)
    assert fields["min_tokens"] == 0
    assert fields["allowed_token_ids"] is None


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": 0.005}, r"temperature is 0.005; vLLM samples only from 0.01 to 2"),
        ({"temperature": 2.5}, r"temperature is 2.5; .* or 0 for greedy"),
        ({"temperature": 1.0, "top_p": 0.9, "min_p": 0.1}, r"top_p 0.9 and min_p 0.1 .* give one of the two"),
    ],
)
def test_what_vllm_would_do_otherwise_is_declined(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(DeclinedRequest, match=message):
        vllm_fields(request(**sampling), 0)


def test_what_vllm_does_alike_is_not_declined() -> None:
    alike: list[dict[str, Any]] = [
        {"temperature": 0.01},
        {"temperature": 2.0, "top_k": 4, "min_p": 0.1},
        {"top_p": 0.5, "min_p": 0.5},
    ]
    for sampling in alike:
        vllm_fields(request(**sampling), 0)


def test_a_minimum_that_would_hold_back_the_models_own_end_is_a_request_of_its_own() -> None:
    wanted = request((7, 9), min_new_tokens=4, max_new_tokens=10, temperature=0.5, repetition_penalty=1.2)
    first = until_minimum(wanted, {5}, 12)
    assert first is not None
    assert first.stop_ids == ()
    assert first.allowed == (range(7), range(8, 9), range(10, 12))
    assert (first.sampling.max_new_tokens, first.sampling.min_new_tokens) == (4, 0)
    assert (first.sampling.temperature, first.sampling.repetition_penalty) == (0.5, 1.2)
    rest = after_minimum(wanted, (3, 4, 5, 6))
    assert rest is not None
    assert rest.prompt_ids == (1, 2, 3, 4, 5, 6)
    assert (rest.sampling.max_new_tokens, rest.sampling.min_new_tokens) == (6, 0)
    assert (rest.stop_ids, rest.allowed) == ((7, 9), None)
    assert after_minimum(wanted, range(10)) is None


@pytest.mark.parametrize(
    ("wanted", "ends"),
    [
        (request((7,), max_new_tokens=9), {5}),
        (request((7,), min_new_tokens=4), {7}),
        (request((7,), min_new_tokens=4), set()),
        (request((), min_new_tokens=4), {5}),
        (request((7,), (range(6, 9),), min_new_tokens=4), {5}),
    ],
)
def test_elsewhere_min_tokens_does_what_is_asked(wanted: GenerationRequest, ends: set[int]) -> None:
    assert until_minimum(wanted, ends, 12) is None


def test_ranges_without_their_stop_ids_hold_nothing_empty() -> None:
    first = until_minimum(request((5, 6, 7), (range(5, 9),), min_new_tokens=2), {8}, 12)
    assert first is not None
    assert first.allowed == (range(8, 9),)
