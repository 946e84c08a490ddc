"""The domain: nothing that the gates ask is ever trained on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from demo_training.digits import LONGEST, WORDS, held_out_texts, is_held_out, training_texts, written_form


def test_training_and_held_out_strings_are_disjoint() -> None:
    trained = training_texts(3000, np.random.default_rng(0))
    held_out = list(itertools.islice(held_out_texts(np.random.default_rng(0)), 60))
    assert len(set(trained)) == 3000
    assert len(set(held_out)) == 60
    assert {len(text.split()) for text in held_out} == {3, 4, 5, 6}
    assert not set(trained) & set(held_out)
    assert all(map(is_held_out, held_out))


def test_training_has_every_short_string_and_all_lengths() -> None:
    lengths = np.bincount([len(text.split()) for text in training_texts(3000, np.random.default_rng(0))])
    assert lengths[1:3].tolist() == [10, 100]
    assert len(lengths) == LONGEST + 1
    assert lengths[3:].min() > 300


def test_the_seed_decides_the_strings() -> None:
    first, again, other = (training_texts(500, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("seed", range(8))
def test_written_forms_keep_the_digits(seed: int) -> None:
    text = "three one four zero"
    written = written_form(text, np.random.default_rng(seed))
    words = written.lower().replace(",", "").replace(".", "").split()
    assert [WORDS[int(word)] if word.isdigit() else word for word in words] == text.split()
    assert written != text


def test_held_out_strings_go_on_when_the_short_ones_are_used_up() -> None:
    many = list(itertools.islice(held_out_texts(np.random.default_rng(0)), 400))
    assert len(set(many)) == 400
    assert all(map(is_held_out, many))
