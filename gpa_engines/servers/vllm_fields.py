"""A request in vLLM's words: fields that SamplingParams and the HTTP API of its server have in common.

Every field that bears on the answer is named, since the defaults are not ours: 16 tokens, temperature 1, the model's
own end id beside the stop ids. What vLLM would do differently from `gpa_engines.sampling`, each read in the source of
0.32.0 and seen by running:

- It drops what is below min_p before it looks at top_p. With top_k the order makes no difference; with top_p it does.
- It raises a temperature between 0 and 0.01 to 0.01 without a word, and knows none above 2.
- min_tokens holds back the model's own end ids too, stop ids or not, and also where ignore_eos is set.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from gpa_codecs.errors import DeclinedRequest
from gpa_engines.engine import GenerationRequest
from gpa_engines.sampling import candidate_ids

LOWEST_TEMPERATURE = 0.01
HIGHEST_TEMPERATURE = 2.0


def vllm_fields(request: GenerationRequest, seed: int) -> dict[str, Any]:
    """The fields by name, of JSON's types. The stop id that ends an answer is part of what vLLM gives.

    Raises DeclinedRequest for what vLLM cannot do as asked.
    """
    sampling = request.sampling
    greedy = sampling.temperature == 0
    _check(request)
    candidates = candidate_ids(request.allowed, request.stop_ids)
    return {
        "n": 1,
        "temperature": float(sampling.temperature),
        "top_k": 0 if greedy else sampling.top_k,
        "top_p": 1.0 if greedy else float(sampling.top_p),
        "min_p": 0.0 if greedy else float(sampling.min_p),
        "repetition_penalty": float(sampling.repetition_penalty),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "max_tokens": sampling.max_new_tokens,
        # Without a stop id there is nothing that must wait.
        "min_tokens": sampling.min_new_tokens if request.stop_ids else 0,
        "stop": [],
        "stop_token_ids": list(request.stop_ids),
        "ignore_eos": True,
        "allowed_token_ids": None if candidates is None else candidates.tolist(),
        "logit_bias": None,
        "bad_words": [],
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
    }


def until_minimum(request: GenerationRequest, end_ids: Collection[int], vocab_size: int) -> GenerationRequest | None:
    """The first `min_new_tokens` of an answer as a request of their own, where min_tokens would do more than is asked.

    end_ids: the model's own end ids; where one of them may be generated and is no stop id, min_tokens would hold it
    back too. None where min_tokens does what is asked.
    """
    sampling = request.sampling
    others = set(end_ids) - set(request.stop_ids)
    if not (sampling.min_new_tokens and request.stop_ids and others):
        return None
    if request.allowed is not None and not any(token in ids for ids in request.allowed for token in others):
        return None
    return replace(
        request,
        sampling=replace(sampling, max_new_tokens=sampling.min_new_tokens, min_new_tokens=0),
        stop_ids=(),
        allowed=_without(request.allowed or (range(vocab_size),), request.stop_ids),
    )


def after_minimum(request: GenerationRequest, ids: Sequence[int]) -> GenerationRequest | None:
    """What is left of the request when the answer of :func:`until_minimum` has come; None for nothing."""
    sampling = request.sampling
    left = sampling.max_new_tokens - len(ids)
    if not left:
        return None
    return replace(
        request,
        prompt_ids=(*request.prompt_ids, *ids),
        sampling=replace(sampling, max_new_tokens=left, min_new_tokens=0),
    )


def _without(ranges: Sequence[range], ids: Sequence[int]) -> tuple[range, ...]:
    """The ranges without single ids, which ascend."""
    left = list(ranges)
    for token in ids:
        parts = []
        for each in left:
            if token in each:
                parts += [range(each.start, token), range(token + 1, each.stop)]
            else:
                parts.append(each)
        left = [each for each in parts if len(each)]
    return tuple(left)


def _check(request: GenerationRequest) -> None:
    sampling = request.sampling
    if sampling.temperature == 0:
        return
    if not LOWEST_TEMPERATURE <= sampling.temperature <= HIGHEST_TEMPERATURE:
        raise DeclinedRequest(
            f"temperature is {sampling.temperature}; vLLM samples only from {LOWEST_TEMPERATURE} to "
            f"{HIGHEST_TEMPERATURE:g}: give one of these, or 0 for greedy"
        )
    if sampling.top_p < 1 and sampling.min_p > 0:
        raise DeclinedRequest(
            f"top_p {sampling.top_p} and min_p {sampling.min_p} are both given; vLLM applies min_p first, which draws "
            "from other tokens than top_p first: give one of the two"
        )
