"""What vLLM is told of a request: every field, so that none of its own defaults decides."""

# vllm has an environment of its own, which is not that of the type checker.
# pyright: reportMissingImports=false

from __future__ import annotations

import pytest

from gpa_codecs.errors import RequestError
from gpa_engines.backends.vllm.sampling_fields import RULE, choose_seed, logits_fields, sampling_fields
from gpa_engines.engine import GenerationRequest, SamplingParams


def fields(stop_ids: tuple[int, ...] = (), allowed: tuple[range, ...] | None = None, **sampling: float) -> dict:
    params = SamplingParams(**sampling)  # pyright: ignore[reportArgumentType]
    return sampling_fields(GenerationRequest((1, 2), params, stop_ids, allowed), 11)


def test_a_greedy_request_is_greedy_whatever_filters_it_has() -> None:
    told = fields(top_k=3, top_p=0.5, min_p=0.2)
    assert (told["temperature"], told["top_k"], told["top_p"], told["min_p"]) == (0.0, 0, 1.0, 0.0)
    assert told["extra_args"] is None


def test_a_sampled_request_carries_the_filters_and_the_seed_past_those_of_vllm() -> None:
    told = fields(temperature=3.5, top_k=3, top_p=0.5, min_p=0.2)
    assert (told["temperature"], told["top_k"], told["top_p"], told["min_p"]) == (1.0, 0, 1.0, 0.0)
    assert told["extra_args"] == {RULE: {"temperature": 3.5, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "seed": 11}}


def test_vllm_gets_no_seed_since_it_ends_when_a_seeded_prompt_is_read_in_parts() -> None:
    assert fields(temperature=1.0)["seed"] is None


def test_lengths_stop_ids_and_penalty_are_vllms_own() -> None:
    told = fields((9, 5), max_new_tokens=7, min_new_tokens=3, repetition_penalty=1.3)
    assert (told["max_tokens"], told["min_tokens"], told["repetition_penalty"]) == (7, 3, 1.3)
    assert told["stop_token_ids"] == [5, 9]
    assert told["ignore_eos"] is True


def test_stop_ids_are_always_allowed() -> None:
    assert fields((9,), (range(2, 4),))["allowed_token_ids"] == [2, 3, 9]
    assert fields((9,))["allowed_token_ids"] is None
    assert fields((9,), ())["allowed_token_ids"] == [9]


def test_a_first_token_that_cannot_be_is_refused() -> None:
    with pytest.raises(RequestError, match=r"min_new_tokens is 1, but the only ids .* are stop ids"):
        fields((9,), (), min_new_tokens=1)
    with pytest.raises(RequestError, match="no token is possible"):
        fields((5, 6), (range(5, 7),), min_new_tokens=2)


def test_nothing_is_detokenized_and_nothing_else_changes_the_draw() -> None:
    told = fields(temperature=0.7)
    assert told["detokenize"] is False
    assert (told["presence_penalty"], told["frequency_penalty"], told["n"]) == (0.0, 0.0, 1)
    for name in ("stop", "logit_bias", "bad_words", "structured_outputs", "logprobs", "prompt_logprobs"):
        assert told[name] is None


def test_every_field_that_changes_an_answer_is_set(vllm_installed: None) -> None:
    """A field that a newer vLLM adds must be looked at."""
    import msgspec
    from vllm.sampling_params import SamplingParams as VllmParams

    known = {each.name for each in msgspec.structs.fields(VllmParams) if not each.name.startswith("_")}
    told = set(fields(temperature=0.7))
    assert told <= known
    left = {
        *("output_kind", "stream_interval", "skip_clone", "output_text_buffer_length"),
        # For scores of chosen ids, which no request of ours asks for.
        *("prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids"),
        # Off unless the engine is started with what they belong to, and the engine fields for that are refused.
        *("watermarking", "thinking_token_budget", "trace_decode_token_ids", "routed_experts_prompt_start"),
        *("repetition_detection", "skip_reading_prefix_cache"),
    }
    assert known - told == left


def test_a_seed_is_the_requests_or_fresh() -> None:
    assert choose_seed(SamplingParams(seed=5)) == 5
    assert choose_seed(SamplingParams()) != choose_seed(SamplingParams())


def test_logits_are_raw_and_of_one_forward_pass() -> None:
    told = logits_fields(prompt=True)
    assert (told["max_tokens"], told["logprobs"], told["prompt_logprobs"]) == (1, -1, -1)
    assert logits_fields(prompt=False)["prompt_logprobs"] is None
    assert set(told) == set(fields())
