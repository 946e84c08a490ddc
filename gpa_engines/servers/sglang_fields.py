"""A request in SGLang's words: the `sampling_params` of `sglang.Engine` and of the server's `/generate`.

Every field that bears on the answer is named, since the defaults are not ours and a server may have others of its own.
`native_fields` uses SGLang's own sampler. Where that does something other than `gpa_engines.sampling`, the request is
refused by name; each difference was read in the source of 0.5.23, and those that matter seen by running:

- The repetition penalty counts the ids of the answer alone. It is the rule's own as long as no id of the prompt can be
  generated, which holds for speech from text and not for voice conversion.
- With the overlap schedule, SGLang's default, the penalty is a token late: each step is penalised for what was known
  before the last token came, and the first for the prompt's last id. Only without it is it told of every token in time.
- top-k and top-p are both applied to the unfiltered distribution; the rule applies top-p to what top-k has left.
- There is no list of allowed ids. A bias of -1e30 on all others is one to the last bit: adding 0 changes no logit.
- The model's own end ids end an answer whether or not they are stop ids, and `ignore_eos` switches off both; whoever
  reads the answer goes on behind an end id that is no stop id (see `sglang_engine`).
- `min_new_tokens` needs a tokenizer and also holds back the model's own end ids. Until the minimum is reached the
  request is sent without stop ids, with a bias on them, and for so many tokens only.
- A seed counts only on a server that was started with `--enable-deterministic-inference`, where min_p ends the server.

`rule_fields` sends the rule's own parameters to `sglang_rule`, which chooses the token inside SGLang's scheduler.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gpa_codecs.errors import DeclinedRequest
from gpa_engines.engine import GenerationRequest
from gpa_engines.sampling import candidate_ids
from gpa_engines.servers.sglang_rule import RuleParams, SamplingRule

NEVER = -1e30
"""Added to a logit it makes the token impossible; finite, since JSON knows no infinity."""

LOWEST_TEMPERATURE = 1e-6
"""Below, SGLang decodes greedily."""

HIGHEST_PENALTY = 2.0

Fields = dict[str, Any]


def native_fields(
    request: GenerationRequest,
    answer: Sequence[int],
    seed: int,
    vocab_size: int,
    *,
    deterministic: bool = False,
    overlap: bool = False,
) -> Fields:
    """`sampling_params` for what is to follow `answer`, which stands behind the prompt that is sent.

    The stop id that ends an answer is part of what SGLang gives; the answer may also end at the model's own end id, and
    at the minimum (see `leg_length`). deterministic, overlap: whether the server was started with
    `--enable-deterministic-inference`, and without `--disable-overlap-schedule`. Raises DeclinedRequest for what SGLang
    cannot do as asked.
    """
    sampling = request.sampling
    greedy = sampling.temperature == 0
    _check_native(request, answer, deterministic, overlap)
    held = _holds_stops(request, answer)
    return _fields(
        max_new_tokens=leg_length(request, answer),
        stop_token_ids=[] if held else list(request.stop_ids),
        temperature=float(sampling.temperature),
        top_k=1 if greedy else sampling.top_k or -1,
        top_p=1.0 if greedy else float(sampling.top_p),
        min_p=0.0 if greedy else float(sampling.min_p),
        repetition_penalty=float(sampling.repetition_penalty),
        logit_bias=_bias(request.allowed, request.stop_ids, held, vocab_size),
        sampling_seed=seed,
    )


_GREEDY: Fields = {
    "temperature": 0.0,
    "top_k": 1,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "sampling_seed": None,
}
"""SGLang takes the highest logit, and nothing is done to it."""


def rule_fields(request: GenerationRequest, answer: Sequence[int], seed: int) -> Fields:
    """`sampling_params` for `sglang_rule.SamplingRule`: SGLang itself takes the only token that is left possible."""
    return _fields(
        max_new_tokens=request.sampling.max_new_tokens - len(answer),
        stop_token_ids=list(request.stop_ids),
        **_GREEDY,
        custom_params=RuleParams.of(request, seed).to_wire(),
    )


def reading_fields() -> Fields:
    """`sampling_params` of a request for hidden states: one greedy token, which nobody reads."""
    return _fields(
        max_new_tokens=1,
        stop_token_ids=[],
        **_GREEDY,
    )


def leg_length(request: GenerationRequest, answer: Sequence[int]) -> int:
    """Tokens to ask SGLang's own sampler for: up to the minimum where stop ids are held back, else all that is left."""
    least, most = request.sampling.min_new_tokens, request.sampling.max_new_tokens
    return (least if _holds_stops(request, answer) else most) - len(answer)


@lru_cache(maxsize=1)
def rule_processor() -> str:
    """`custom_logit_processor` that names :class:`~gpa_engines.servers.sglang_rule.SamplingRule`.

    By reference: what the server unpickles is a module and a name, so gpa_engines must be installed there.
    """
    return json.dumps({"callable": pickle.dumps(SamplingRule).hex()})


def _fields(**differing: Any) -> Fields:
    """All fields; those in which requests do not differ have one value for all."""
    return {
        "n": 1,
        "min_new_tokens": 0,
        "stop": None,
        "stop_regex": None,
        "ignore_eos": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "json_schema": None,
        "regex": None,
        "ebnf": None,
        "structural_tag": None,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": True,
        "no_stop_trim": True,
        "stream_interval": 1,
        "custom_params": None,
        **differing,
    }


def _holds_stops(request: GenerationRequest, answer: Sequence[int]) -> bool:
    return bool(request.stop_ids) and len(answer) < request.sampling.min_new_tokens


def _bias(
    allowed: tuple[range, ...] | None, stop_ids: tuple[int, ...], held: bool, vocab_size: int
) -> dict[str, float] | None:
    if allowed is not None:
        return _all_but(allowed, () if held else stop_ids, stop_ids if held else (), vocab_size)
    return {str(token): NEVER for token in stop_ids} if held else None


@lru_cache(maxsize=8)
def _all_but(
    allowed: tuple[range, ...], stop_ids: tuple[int, ...], held: tuple[int, ...], vocab_size: int
) -> dict[str, float]:
    """A bias on every id that may not be generated. Shared by requests: not to be changed."""
    possible = np.zeros(vocab_size, np.bool_)
    for part in allowed:
        possible[part.start : part.stop] = True
    possible[list(stop_ids)] = True
    possible[list(held)] = False
    if not possible.any():
        raise DeclinedRequest("no token is possible: the allowed ids are stop ids, and min_new_tokens holds these back")
    return dict.fromkeys(map(str, np.flatnonzero(~possible).tolist()), NEVER)


def _check_native(request: GenerationRequest, answer: Sequence[int], deterministic: bool, overlap: bool) -> None:
    sampling = request.sampling
    if sampling.repetition_penalty != 1:
        _check_penalty(request, answer, overlap)
    if sampling.temperature == 0:
        return
    if sampling.temperature < LOWEST_TEMPERATURE:
        raise DeclinedRequest(
            f"temperature is {sampling.temperature}; below {LOWEST_TEMPERATURE} SGLang is greedy: give 0 for that"
        )
    if sampling.top_k and sampling.top_p < 1:
        raise DeclinedRequest(
            f"top_k {sampling.top_k} and top_p {sampling.top_p} are both given; SGLang's sampler applies both to the "
            f"unfiltered distribution, which keeps other tokens than one after the other: give one of the two; {REMEDY}"
        )
    if deterministic and sampling.min_p > 0:
        raise DeclinedRequest(
            f"min_p is {sampling.min_p}; an SGLang server with --enable-deterministic-inference ends with an error "
            "where a request has one: leave min_p at 0, or start the server without that option"
        )


def _check_penalty(request: GenerationRequest, answer: Sequence[int], overlap: bool) -> None:
    penalty = request.sampling.repetition_penalty
    if penalty > HIGHEST_PENALTY:
        raise DeclinedRequest(f"repetition_penalty is {penalty}; SGLang's sampler takes up to {HIGHEST_PENALTY:g}")
    if overlap:
        raise DeclinedRequest(
            f"repetition_penalty is {penalty}; with its overlap schedule SGLang's sampler applies it a token late: "
            f"start the server with --disable-overlap-schedule, or give repetition_penalty 1; {REMEDY}"
        )
    candidates = candidate_ids(request.allowed, request.stop_ids)
    seen = (*request.prompt_ids, *answer)
    both = seen if candidates is None else np.intersect1d(candidates, np.asarray(seen, np.int64)).tolist()
    if both:
        raise DeclinedRequest(
            f"repetition_penalty is {penalty}, and id {both[0]} of the prompt may be generated; SGLang's sampler "
            f"penalises ids of the answer alone: give repetition_penalty 1; {REMEDY}"
        )
    if request.stop_ids and request.sampling.min_new_tokens:
        raise DeclinedRequest(
            f"repetition_penalty {penalty} and min_new_tokens {request.sampling.min_new_tokens} are both given; "
            f"SGLang's sampler cannot hold back stop ids and remember the answer's: give one of the two; {REMEDY}"
        )


REMEDY = (
    "or use the project's own rule, which in-process SGLang does, and a server that has gpa-engines installed, was "
    "started with --enable-custom-logit-processor and is addressed with sampling=rule"
)
