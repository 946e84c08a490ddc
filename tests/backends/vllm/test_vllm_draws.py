"""The sampling rule in torch is the Sampler's, to the token, ties and seeds included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpa_engines.engine import SamplingParams
from gpa_engines.sampling import Sampler

torch = pytest.importorskip("torch", reason="the rule runs in vLLM's worker, on torch tensors")

from gpa_engines.backends.vllm.draws import Filters, draw, uniform  # noqa: E402

FILTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 30.0},
    "very cold": {"temperature": 1e-5},
    "top-k": {"top_k": 7},
    "top-k of one": {"top_k": 1},
    "top-k of more than there are": {"top_k": 1000},
    "top-p": {"top_p": 0.6},
    "tiny top-p": {"top_p": 1e-9},
    "min-p": {"min_p": 0.3},
    "all": {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    "min-p behind top-p": {"temperature": 1.5, "top_p": 0.7, "min_p": 0.5},
}


def make(**values: Any) -> Filters:
    return Filters(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | values))


def params(**values: Any) -> SamplingParams:
    merged: dict[str, Any] = {"temperature": 1.0} | values
    return SamplingParams(**merged)


def rows(count: int = 40, width: int = 300, *, coarse: bool = False) -> np.ndarray:
    """Logits; coarse ones tie often, as those in bfloat16 do."""
    values = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32) * 3
    return np.round(values) if coarse else values


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("values", FILTERS.values(), ids=FILTERS)
def test_the_distribution_is_the_samplers(values: dict[str, Any], coarse: bool) -> None:
    logits = rows(coarse=coarse)
    logits[:, ::3] = -np.inf
    weights = make(**values).weights(torch.from_numpy(logits)).numpy()
    for row, found in zip(logits, weights, strict=True):
        ids, probabilities = Sampler(params(**values), (1,)).distribution(row)
        assert np.flatnonzero(found).tolist() == ids[probabilities > 0].tolist()
        np.testing.assert_allclose(found[ids] / found.sum(), probabilities, rtol=1e-12)


@pytest.mark.parametrize("values", FILTERS.values(), ids=FILTERS)
def test_a_seed_gives_the_samplers_tokens(values: dict[str, Any]) -> None:
    """Also where rows are drawn from together, or again."""
    steps = rows(30, coarse=True)
    samplers = [Sampler(params(seed=seed, **values), (1,)) for seed in range(5)]
    for step, logits in enumerate(steps):
        weights = make(**values).weights(torch.from_numpy(np.stack([logits] * 5)))
        for _ in range(2):
            drawn = draw(weights, [uniform(seed, step) for seed in range(5)])
        assert drawn.tolist() == [sampler.next(logits) for sampler in samplers]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.one_of(st.integers(-3, 3), st.just(-np.inf)), min_size=1, max_size=30),
    st.integers(0, 2**63 - 1),
    st.floats(0.01, 5),
    st.integers(0, 8),
    st.floats(0.01, 1),
    st.floats(0, 0.9),
)
def test_any_row(values: list[float], seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = np.array([*values, 0.0], np.float32)
    sampling = SamplingParams(temperature, top_k, top_p, min_p, seed=seed)
    weights = make(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).weights(
        torch.from_numpy(logits[None])
    )
    ids, _ = Sampler(sampling, (1,)).distribution(logits)
    assert int(draw(weights, [uniform(seed, 0)])[0]) in ids.tolist()


def test_the_last_possible_id_is_drawn_by_the_largest_number() -> None:
    weights = torch.tensor([[0.0, 0.1, 0.0, 0.7, 0.0]], dtype=torch.float64)
    assert draw(weights, [np.nextafter(1.0, 0.0)]).tolist() == [3]
    assert draw(weights, [0.0]).tolist() == [1]


def test_a_row_of_nothing_does_not_end_the_worker() -> None:
    """vLLM's other requests are in the same batch."""
    logits = torch.full((1, 4), -torch.inf)
    assert 0 <= int(draw(make().weights(logits), [0.5])[0]) < 4
