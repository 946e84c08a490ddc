"""A request in SGLang's words: everything is said, and what SGLang does otherwise is refused by name."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from gpa_codecs.errors import DeclinedRequest, RequestError
from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.servers.sglang_fields import NEVER, leg_length, native_fields, rule_fields, rule_processor
from gpa_engines.servers.sglang_rule import RuleParams, SamplingRule
from tests.servers.fakes.fake_scheduler import SAMPLING_DEFAULTS

VOCAB = 100


def fields(request: GenerationRequest, answer: tuple[int, ...] = (), **options: Any) -> dict[str, Any]:
    return native_fields(request, answer, 7, VOCAB, **options)


def request(stop_ids: tuple[int, ...] = (), allowed: Any = None, **sampling: Any) -> GenerationRequest:
    return GenerationRequest((1, 2, 3), SamplingParams(**sampling), stop_ids, allowed)


def test_every_field_that_bears_on_the_answer_is_said() -> None:
    assert fields(request()).keys() == rule_fields(request(), (), 7).keys() == SAMPLING_DEFAULTS.keys()


def test_greedy_switches_every_filter_off() -> None:
    said = fields(request(temperature=0.0, top_k=50, top_p=0.5, min_p=0.1))
    assert (said["temperature"], said["top_k"], said["top_p"], said["min_p"]) == (0.0, 1, 1.0, 0.0)


def test_sampling_is_passed_on_and_off_is_said_in_sglangs_way() -> None:
    said = fields(request(temperature=0.5, min_p=0.1, max_new_tokens=9))
    assert (said["temperature"], said["top_k"], said["top_p"], said["min_p"]) == (0.5, -1, 1.0, 0.1)
    assert said["max_new_tokens"] == 9
    assert said["sampling_seed"] == 7
    assert fields(request(temperature=0.5, top_k=5))["top_k"] == 5
    assert fields(request(temperature=0.5, top_p=0.5))["top_p"] == 0.5


def test_stop_ids_never_go_with_ignore_eos_which_would_switch_them_off() -> None:
    said = fields(request((5, 6)))
    assert said["stop_token_ids"] == [5, 6]
    assert said["ignore_eos"] is False


def test_allowed_is_a_bias_on_all_other_ids() -> None:
    said = fields(request((99,), (range(10, 20), range(30, 31))))
    possible = set(range(VOCAB)) - {int(token) for token in said["logit_bias"]}
    assert possible == {*range(10, 20), 30, 99}
    assert set(said["logit_bias"].values()) == {NEVER}
    json.dumps(said, allow_nan=False)


def test_the_minimum_is_a_leg_without_stop_ids_and_with_a_bias_on_them() -> None:
    wanted = request((5,), min_new_tokens=4, max_new_tokens=10)
    said = fields(wanted, (8, 8))
    assert (said["stop_token_ids"], said["logit_bias"], said["max_new_tokens"]) == ([], {"5": NEVER}, 2)
    assert said["min_new_tokens"] == 0
    after = fields(wanted, (8, 8, 8, 8))
    assert (after["stop_token_ids"], after["logit_bias"], after["max_new_tokens"]) == ([5], None, 6)
    assert leg_length(request(min_new_tokens=4, max_new_tokens=10), ()) == 10  # without a stop id nothing is held back


def test_a_minimum_that_leaves_nothing_possible_is_refused() -> None:
    with pytest.raises(DeclinedRequest, match="no token is possible"):
        fields(request((5,), (range(5, 6),), min_new_tokens=1))


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"temperature": 1e-7}, "temperature is 1e-07"),
        ({"temperature": 1.0, "top_k": 5, "top_p": 0.5}, "top_k 5 and top_p 0.5"),
        ({"repetition_penalty": 2.5}, "repetition_penalty is 2.5"),
        ({"repetition_penalty": 1.2}, "id 1 of the prompt may be generated"),
    ],
)
def test_what_sglangs_sampler_does_otherwise_is_refused(sampling: dict[str, Any], words: str) -> None:
    with pytest.raises(DeclinedRequest, match=words):
        fields(request(**sampling))
    rule_fields(request(**sampling), (), 7)


def test_the_penalty_is_the_rules_own_where_no_id_of_the_prompt_can_be_generated() -> None:
    apart = request((99,), (range(10, 20),), repetition_penalty=1.2)
    assert fields(apart)["repetition_penalty"] == 1.2
    with pytest.raises(DeclinedRequest, match="id 11"):
        fields(apart, (11,))  # a second leg would forget it
    with pytest.raises(DeclinedRequest, match="min_new_tokens 2"):
        fields(request((99,), (range(10, 20),), repetition_penalty=1.2, min_new_tokens=2))


def test_the_penalty_is_refused_where_it_would_come_a_token_late() -> None:
    apart = request((99,), (range(10, 20),), repetition_penalty=1.2)
    with pytest.raises(DeclinedRequest, match="--disable-overlap-schedule"):
        fields(apart, overlap=True)
    assert fields(request(temperature=1.0), overlap=True)


def test_min_p_is_refused_where_it_would_end_the_server() -> None:
    assert fields(request(temperature=1.0, min_p=0.1))["min_p"] == 0.1
    with pytest.raises(DeclinedRequest, match="deterministic"):
        fields(request(temperature=1.0, min_p=0.1), deterministic=True)


def test_the_rules_parameters_survive_the_way_through_json() -> None:
    wanted = request((5, 9), (range(1, 4), range(7, 9)), temperature=0.7, top_k=4, top_p=0.9, min_new_tokens=2)
    said = json.loads(json.dumps(rule_fields(wanted, (2,), 11)))
    params = RuleParams.from_wire(said["custom_params"])
    assert params == RuleParams.of(wanted, 11)
    assert params.sampling.seed == 11
    assert said["max_new_tokens"] == wanted.sampling.max_new_tokens - 1
    assert (said["top_k"], said["repetition_penalty"], said["logit_bias"]) == (1, 1.0, None)


def test_parameters_of_others_are_refused() -> None:
    with pytest.raises(RequestError, match="lack"):
        RuleParams.from_wire({"thinking_budget": 3})
    without_seed = rule_fields(request(), (), 7)["custom_params"] | {"seed": None}
    with pytest.raises(RequestError, match="lack seed"):
        RuleParams.from_wire(without_seed)


def test_the_processor_is_sent_by_name_and_not_as_code() -> None:
    pickled = bytes.fromhex(json.loads(rule_processor())["callable"])
    assert pickle.loads(pickled) is SamplingRule
    assert len(pickled) < 120
