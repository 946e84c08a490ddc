"""A request as the fields of vLLM's SamplingParams: every one of them, since vLLM's defaults are not ours.

vLLM masks the ids that are not allowed, bars stop ids until `min_tokens`, applies the repetition penalty to every id of
prompt and answer, and takes the highest logit at temperature 0, ties to the lowest id: all as the one sampling rule has
it. Its other steps are not ours:

- It refuses temperatures above 2 and raises those below 0.01.
- It applies min-p before top-k and top-p, which is another distribution as soon as top-p is on.
- Its GPU kernels drop ids that tie with the k-th; ties at the limit of top-p stay as its sort happens to leave them.
- A request with a seed whose prompt is read in parts ends the engine on a CPU ("CPU Generator does not use offset"); on
  a GPU it draws from another place of its random numbers than one whose prompt is read at once.

So a sampled request has temperature 1, no filter and no seed in vLLM's fields, and carries ours in `extra_args`, for
:mod:`gpa_engines.backends.vllm.sampling_rule` to filter and draw by in vLLM's worker.
"""

from __future__ import annotations

import secrets
from typing import Any

from gpa_codecs.errors import RequestError
from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.sampling import candidate_ids

RULE = "gpa_sampling"
"""Key of `extra_args` under which a sampled request carries temperature, top_k, top_p, min_p and its seed."""

SEED = "seed"


def choose_seed(sampling: SamplingParams) -> int:
    """The request's seed, or a fresh one."""
    return secrets.randbits(63) if sampling.seed is None else sampling.seed


def sampling_fields(request: GenerationRequest, seed: int) -> dict[str, Any]:
    """Values of the fields of vllm.SamplingParams, but for `output_kind`, whose type is vLLM's.

    Raises RequestError for a request whose first token could only be a stop id that min_new_tokens forbids.
    """
    sampling = request.sampling
    allowed = candidate_ids(request.allowed, request.stop_ids)
    if sampling.min_new_tokens and allowed is not None and len(allowed) == len(request.stop_ids):
        raise RequestError(
            f"min_new_tokens is {sampling.min_new_tokens}, but the only ids that the answer may hold are stop ids: "
            "no token is possible; allow other ids or lower min_new_tokens"
        )
    greedy = sampling.temperature == 0
    return _unused_fields() | {
        "temperature": 0.0 if greedy else 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": None,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop_token_ids": list(request.stop_ids),
        "allowed_token_ids": None if allowed is None else allowed.tolist(),
        "extra_args": None if greedy else {RULE: _rule(sampling) | {SEED: seed}},
    }


def logits_fields(*, prompt: bool) -> dict[str, Any]:
    """Fields of a request for raw logits: those behind the last id and, with `prompt`, behind every one before."""
    return _unused_fields() | {
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "max_tokens": 1,
        "min_tokens": 0,
        "stop_token_ids": [],
        "allowed_token_ids": None,
        "extra_args": None,
        "logprobs": -1,
        "prompt_logprobs": -1 if prompt else None,
        "flat_logprobs": True,
    }


def _rule(sampling: SamplingParams) -> dict[str, int | float]:
    return {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}


def _unused_fields() -> dict[str, Any]:
    """What no request of ours uses, at the values that switch it off."""
    return {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": None,
        "ignore_eos": True,
        "logprobs": None,
        "prompt_logprobs": None,
        "flat_logprobs": False,
        "detokenize": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "include_stop_str_in_output": False,
        "logit_bias": None,
        "bad_words": None,
        "structured_outputs": None,
    }
