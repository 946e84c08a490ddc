"""The sampling rule as SGLang's scheduler calls it: rows of several requests, which may come again or be of others."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.sampling import Sampler
from gpa_engines.servers.sglang_rule import RuleParams, SamplingRule

VOCAB = 50


@pytest.fixture(autouse=True)
def fake_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a processor finds how SGLang gives a request up."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "fakes"))


class Sent:
    """A request in SGLang's hands."""

    def __init__(self, wanted: GenerationRequest, seed: int, answer: tuple[int, ...] = ()) -> None:
        self.request = SimpleNamespace(origin_input_ids=[*wanted.prompt_ids, *answer], output_ids=[], to_finish=None)
        self.values: dict[str, Any] = RuleParams.of(wanted, seed).to_wire() | {"__req__": self.request}


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, VOCAB)).astype(np.float32) * 3)


def step(logits: torch.Tensor, *sent: Sent, commit: bool = True) -> list[int]:
    """What SGLang would take: the only tokens that are possible."""
    result = SamplingRule()(logits.clone(), [each.values for each in sent])
    assert torch.isfinite(result).sum(1).tolist() == [1] * len(sent)
    tokens = result.argmax(1).tolist()
    for each, token in zip(sent, tokens, strict=True):
        if commit:
            each.request.output_ids.append(token)
    return tokens


def wanted(**sampling: Any) -> GenerationRequest:
    return GenerationRequest((1, 2, 3), SamplingParams(max_new_tokens=9, **sampling), (4,), (range(5, 30),))


def test_every_row_gets_what_its_own_sampler_chooses() -> None:
    requests = [wanted(temperature=1.0), wanted(), GenerationRequest((7,), SamplingParams(1.5, max_new_tokens=9))]
    sent = [Sent(each, seed) for seed, each in enumerate(requests)]
    samplers = [
        Sampler(RuleParams.of(each, n).sampling, each.prompt_ids, each.stop_ids, each.allowed)
        for n, each in enumerate(requests)
    ]
    for number in range(6):
        logits = rows(3, number)
        expected = [
            sampler.next(row if sampler.candidate_ids is None else row[sampler.candidate_ids])
            for sampler, row in zip(samplers, logits.numpy(), strict=True)
        ]
        assert step(logits, *sent) == expected


def test_a_row_that_sglang_drops_costs_no_random_number() -> None:
    dropped, plain = Sent(wanted(temperature=1.0), 5), Sent(wanted(temperature=1.0), 5)
    step(rows(1, 99), dropped, commit=False)  # of a part of the prompt
    assert [step(rows(1, n), dropped) for n in range(4)] == [step(rows(1, n), plain) for n in range(4)]


def test_a_request_that_comes_back_to_the_device_goes_on() -> None:
    away, plain = (
        Sent(wanted(temperature=1.0, repetition_penalty=1.3), 5),
        Sent(wanted(temperature=1.0, repetition_penalty=1.3), 5),
    )
    for number in range(3):
        assert step(rows(1, number), away) == step(rows(1, number), plain)
    vars(away.request).pop("gpa_sampling")  # another process took it over
    for number in range(3, 6):
        assert step(rows(1, number), away) == step(rows(1, number), plain)


def test_what_was_sent_behind_the_prompt_counts_as_drawn() -> None:
    sampling = wanted(temperature=1.0, repetition_penalty=1.3)
    plain = Sent(sampling, 5)
    first = [step(rows(1, number), plain)[0] for number in range(3)]
    later = Sent(sampling, 5, tuple(first))
    assert [step(rows(1, n), later) for n in range(3, 6)] == [step(rows(1, n), plain) for n in range(3, 6)]


def test_half_precision_logits_are_read_as_they_are() -> None:
    logits = rows(1).to(torch.bfloat16)
    assert step(logits, Sent(wanted(), 0)) == [int(logits[0, 4:30].float().argmax()) + 4]


@pytest.mark.parametrize("damage", [{"temperature": -1}, {"stop_ids": None}, {"allowed": [5]}, {"seed": "x"}])
def test_a_request_of_other_hands_ends_with_an_error_and_the_others_go_on(damage: dict[str, Any]) -> None:
    good, bad = Sent(wanted(), 0), Sent(wanted(), 0)
    bad.values |= damage
    logits = rows(2)
    assert step(logits, bad, good)[1] == step(logits[1:], Sent(wanted(), 0))[0]
    told = bad.request.to_finish.to_json()
    assert told["type"] == "abort"
    assert told["status_code"] == 400
    assert told["message"].startswith("sampling failed: ")
    assert good.request.to_finish is None


def test_a_nan_is_never_a_token() -> None:
    sick = Sent(wanted(), 0)
    logits = rows(1)
    logits[0, 7] = float("nan")
    step(logits, sick)
    assert "nan" in sick.request.to_finish.message


def test_parameters_without_a_request_are_ignored() -> None:
    assert SamplingRule()(rows(1), [{}]).isfinite().sum() == 1
