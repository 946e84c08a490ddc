"""The one sampling rule, against transformers' own processors and against statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpa_codecs.errors import RequestError
from gpa_engines.engine import SamplingParams
from gpa_engines.sampling import Sampler, candidate_ids

VOCAB = 200
STOPS = (3, 150)


def random_row(seed: int, ties: bool = False, size: int = VOCAB) -> np.ndarray:
    row = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    return np.round(row) if ties else row


def transformers_distribution(params: SamplingParams, prompt: list[int], answer: list[int], row: np.ndarray) -> Any:
    """float64[V]: probabilities after the processors of transformers' `generate`, in its order."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = torch.tensor([prompt + answer])
    processors = []
    if params.repetition_penalty != 1:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_new_tokens:
        processors.append(
            transformers.MinNewTokensLengthLogitsProcessor(
                len(prompt), params.min_new_tokens, list(STOPS), device="cpu"
            )
        )
    processors.append(transformers.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(transformers.MinPLogitsWarper(params.min_p))
    scores = torch.tensor(row)[None]
    for process in processors:
        scores = process(ids, scores)
    return torch.softmax(scores[0].double(), -1).numpy()


def dense(sampler: Sampler, row: np.ndarray) -> np.ndarray:
    ids, probabilities = sampler.distribution(row)
    result = np.zeros(VOCAB)
    result[ids] = probabilities
    return result


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.2},
    {"temperature": 3.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 1.5, "top_p": 0.01},
    {"temperature": 1.5, "top_p": 0.999},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 2.0, "repetition_penalty": 1.2},
    {"temperature": 2.0, "repetition_penalty": 0.7},
    {"temperature": 2.0, "min_new_tokens": 3},
    {"temperature": 2.5, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3, "min_new_tokens": 9},
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_distribution_is_that_of_transformers(setting: dict[str, Any], ties: bool) -> None:
    params = SamplingParams(seed=0, **setting)
    for seed in range(20):
        prompt = np.random.default_rng(seed).integers(0, VOCAB, 60).tolist()
        sampler = Sampler(params, prompt, STOPS)
        answer: list[int] = []
        for step in range(5):
            row = random_row(100 * seed + step, ties)
            ours, theirs = dense(sampler, row), transformers_distribution(params, prompt, answer, row)
            if ties and params.top_p < 1:  # which of the equals are dropped depends on torch's sort
                ours, theirs = np.sort(ours), np.sort(theirs)
            assert np.array_equal(ours > 0, theirs > 0)
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-12)
            answer.append(sampler.next(row))


def test_of_equal_logits_the_lowest_ids_stay_within_top_p_and_all_within_top_k() -> None:
    row = np.zeros(8, np.float32)
    row[5] = 3

    def kept(**setting: Any) -> list[int]:
        return Sampler(SamplingParams(temperature=1.0, **setting), [0]).distribution(row)[0].tolist()

    assert kept(top_p=0.8) == [0, 1, 5]
    assert kept(top_p=0.01) == [5]
    assert kept(top_k=2) == list(range(8))
    row[5] = 0
    assert kept(top_p=0.01) == [0]


def test_greedy_is_the_penalised_maximum() -> None:
    params = SamplingParams(repetition_penalty=1.5)
    sampler = Sampler(params, [0, 0, 1], STOPS)
    row = np.full(VOCAB, -9, np.float32)
    row[:3] = [3.0, -1.0, 1.9]
    assert sampler.next(row) == 0  # 3 / 1.5 is still above 1.9, and the prompt's two zeros count once
    row[0] = 2.5
    assert sampler.next(row) == 2
    assert sampler.next(row) == 0  # 2.5 / 1.5 against 1.9 / 1.5


def test_the_penalty_pushes_negative_logits_down() -> None:
    row = np.array([-1.0, -1.4, -9.0], np.float32)
    assert Sampler(SamplingParams(repetition_penalty=1.5), [0]).next(row) == 1
    assert Sampler(SamplingParams(repetition_penalty=1.3), [0]).next(row) == 0


@pytest.mark.parametrize("restricted", [False, True])
def test_greedy_ties_go_to_the_lowest_id(restricted: bool) -> None:
    row = np.zeros(VOCAB, np.float32)
    row[[40, 17, 99]] = 5
    sampler = Sampler(SamplingParams(), [1], STOPS, [range(10, VOCAB)] if restricted else None)
    if sampler.candidate_ids is not None:
        row = row[sampler.candidate_ids]
    assert sampler.next(row) == 17


@pytest.mark.parametrize("setting", [{"temperature": 0.0}, *SETTINGS], ids=str)
def test_restricted_rows_are_full_rows_with_the_others_impossible(setting: dict[str, Any]) -> None:
    params = SamplingParams(**{"seed": 5, "repetition_penalty": 1.1, **setting})
    allowed = (range(20, 60), range(61, 140))
    prompt = list(range(0, 100, 3))
    restricted, full = Sampler(params, prompt, STOPS, allowed), Sampler(params, prompt, STOPS)
    candidates = restricted.candidate_ids
    assert candidates is not None
    for step in range(30):
        row = random_row(step, ties=step % 2 == 0)
        masked = np.full_like(row, -np.inf)
        masked[candidates] = row[candidates]
        assert np.array_equal(dense(restricted, row[candidates]), dense(full, masked))
        assert restricted.next(row[candidates]) == full.next(masked)


def test_candidates_are_the_allowed_and_the_stop_ids() -> None:
    ids = candidate_ids([range(5, 8), range(10, 12)], [2, 6])
    assert ids is not None
    assert ids.tolist() == [2, 5, 6, 7, 10, 11]
    assert ids.dtype == np.int64
    assert not ids.flags.writeable
    assert candidate_ids((range(5, 8), range(10, 12)), (2, 6)) is ids
    assert candidate_ids(None, [2]) is None
    assert Sampler(SamplingParams(), [1], [2, 6], [range(5, 8), range(10, 12)]).candidate_ids is ids


def test_stop_ids_are_impossible_before_min_new_tokens() -> None:
    row = random_row(0)
    row[list(STOPS)] = 50
    sampler = Sampler(SamplingParams(min_new_tokens=2), [1], STOPS)
    assert [sampler.next(row) in STOPS for _ in range(3)] == [False, False, True]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def tokens(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), [1])
        return [sampler.next(random_row(step)) for step in range(40)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert len(set(tokens(0))) > 5  # seed 0 is a seed like any other


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_is_replayed_goes_on_as_it_would_have(temperature: float) -> None:
    rows = np.random.default_rng(1).standard_normal((8, 40)).astype(np.float32)
    params = SamplingParams(temperature, repetition_penalty=1.3, max_new_tokens=8, min_new_tokens=5, seed=3)
    whole = Sampler(params, (1, 2), (7,), (range(5, 30),))
    ids = whole.candidate_ids
    expected = [whole.next(row[ids]) for row in rows]
    again = Sampler(params, (1, 2), (7,), (range(5, 30),))
    again.replay(expected[:4])
    assert [again.next(row[ids]) for row in rows[4:]] == expected[4:]
    with pytest.raises(RequestError, match="holds id 35"):
        again.replay((35,))


def test_a_fresh_seed_is_drawn_and_repeats_the_run() -> None:
    rows = [random_row(step) for step in range(40)]
    first, second = (Sampler(SamplingParams(temperature=2.0), [1]) for _ in range(2))
    assert first.seed != second.seed
    again = Sampler(SamplingParams(temperature=2.0, seed=first.seed), [1])
    assert [first.next(row) for row in rows] == [again.next(row) for row in rows]


def test_requests_do_not_share_their_random_numbers() -> None:
    rows = [random_row(step) for step in range(20)]
    params = SamplingParams(temperature=2.0, seed=3)
    alone = Sampler(params, [1])
    expected = [alone.next(row) for row in rows]
    one, other = Sampler(params, [1]), Sampler(SamplingParams(temperature=2.0, seed=4), [1])
    interleaved = []
    for row in rows:
        interleaved.append(one.next(row))
        other.next(row)
    assert interleaved == expected


def test_one_uniform_number_per_token_through_the_inverse_distribution() -> None:
    row = random_row(1)
    sampler = Sampler(SamplingParams(temperature=2.0, seed=11), [1])
    uniform = np.random.default_rng(11)
    for _ in range(50):
        cumulative = np.cumsum(dense(sampler, row))
        assert sampler.next(row) == np.searchsorted(cumulative, uniform.random() * cumulative[-1], side="right")


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 1.0}, {"temperature": 2.0, "top_k": 8}, {"temperature": 2.0, "top_p": 0.8, "min_p": 0.02}],
    ids=str,
)
def test_draws_follow_the_distribution(setting: dict[str, Any]) -> None:
    """Chi-square test at a significance of 0.001 with a fixed seed."""
    row = random_row(2, size=30)
    sampler = Sampler(SamplingParams(seed=2026, max_new_tokens=1, **setting), [1])
    ids, probabilities = sampler.distribution(row)
    draws = 20_000
    counts = np.bincount([sampler.next(row) for _ in range(draws)], minlength=30)
    assert counts.sum() == counts[ids].sum()
    expected = draws * probabilities
    often = expected >= 5
    observed = np.append(counts[ids][often], counts[ids][~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    nonzero = expected > 0
    freedom = np.count_nonzero(nonzero) - 1
    statistic = np.sum((observed[nonzero] - expected[nonzero]) ** 2 / expected[nonzero])
    # Wilson and Hilferty 1931: the cube root of chi-square is nearly normal; 3.09 is the normal's 0.999 quantile.
    spread = 2 / (9 * freedom)
    assert (np.cbrt(statistic / freedom) - (1 - spread)) / np.sqrt(spread) < 3.09


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    row = random_row(3)
    assert Sampler(SamplingParams(temperature=temperature, seed=1), [1]).next(row) == np.argmax(row)


def test_impossible_tokens_are_never_drawn() -> None:
    row = np.full(VOCAB, -np.inf, np.float32)
    row[[4, 9]] = [0.0, 1.0]
    for setting in SETTINGS:
        sampler = Sampler(SamplingParams(seed=0, **setting), [1], STOPS)
        assert {sampler.next(row) for _ in range(50)} <= {4, 9}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("bad", "reason"), [(np.nan, "nan"), (np.inf, "inf")])
def test_broken_logits_are_an_error_and_not_a_token(temperature: float, bad: float, reason: str) -> None:
    row = random_row(4)
    row[77] = bad
    with pytest.raises(RequestError, match=f"the logits hold {reason}"):
        Sampler(SamplingParams(temperature=temperature), [1]).next(row)


def test_a_row_without_a_possible_token_is_an_error() -> None:
    with pytest.raises(RequestError, match="no token is possible"):
        Sampler(SamplingParams(), [1]).next(np.full(VOCAB, -np.inf, np.float32))
    sampler = Sampler(SamplingParams(min_new_tokens=1), [1], STOPS, [])
    with pytest.raises(RequestError, match="token 0 of the answer: no token is possible"):
        sampler.next(np.zeros(2, np.float32))


def test_rows_of_the_wrong_size_are_a_defect() -> None:
    with pytest.raises(ValueError, match=r"shape \[200\]; expected \[12\]"):
        Sampler(SamplingParams(), [1], STOPS, [range(10, 20)]).next(random_row(0))


def test_the_engines_logits_are_left_unchanged() -> None:
    row = random_row(5)
    before = row.copy()
    params = SamplingParams(temperature=1.0, top_p=0.5, repetition_penalty=1.3, min_new_tokens=1)
    Sampler(params, list(range(50)), STOPS).next(row)
    assert np.array_equal(row, before)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ties=st.booleans(),
    temperature=st.floats(0, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 0.99),
    penalty=st.floats(0.5, 2),
    low=st.integers(0, 100),
    size=st.integers(1, 100),
)
def test_every_setting_gives_a_distribution_of_candidates(
    seed: int,
    ties: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    low: int,
    size: int,
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty, seed=seed, max_new_tokens=4)
    prompt = np.random.default_rng(seed).integers(0, VOCAB, 30).tolist()
    sampler = Sampler(params, prompt, STOPS, (range(low, low + size),))
    candidates = sampler.candidate_ids
    assert candidates is not None
    for step in range(6):
        row = random_row(seed + step, ties)[candidates]
        ids, probabilities = sampler.distribution(row)
        assert set(ids.tolist()) <= {*range(low, low + size), *STOPS}
        assert np.all(np.diff(ids) > 0)
        assert np.all(probabilities >= 0)
        assert probabilities.sum() == pytest.approx(1)
        assert len(ids) >= 1
        assert sampler.next(row) in ids


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans(), top_p=st.floats(0.01, 0.999), size=st.integers(1, 500))
def test_top_p_keeps_the_smallest_sufficient_set(seed: int, ties: bool, top_p: float, size: int) -> None:
    row = random_row(seed, ties, size)
    everything = Sampler(SamplingParams(temperature=1.0, seed=0), [0]).distribution(row)[1]
    ids, _ = Sampler(SamplingParams(temperature=1.0, top_p=top_p, seed=0), [0]).distribution(row)
    kept = everything[ids]
    assert kept.sum() >= top_p - 1e-9
    assert kept.sum() - kept.min() < top_p + 1e-9
    assert len(ids) == 1 or np.delete(everything, ids).max(initial=0) <= kept.min()
