"""A wrong token never passes: what servers may stream, and what not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("httpx", reason="needs httpx")

from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.servers.answer_reader import AnswerReader
from gpa_engines.servers.http_server import MalformedAnswer, MalformedStream
from gpa_engines.servers.score_rows import coarsest_dtype, full_row, is_log_probabilities, scores_by_id


def reader(**request: Any) -> AnswerReader:
    wanted = {"sampling": SamplingParams(max_new_tokens=3), "stop_ids": (9,), "allowed": (range(2, 6),), **request}
    return AnswerReader("http://a", GenerationRequest((1,), **wanted), 12)


def test_a_right_answer_passes_without_its_stop_id() -> None:
    reading = reader()
    assert reading.take([2, 3], None) == (2, 3)
    assert reading.take([9], "stop") == ()
    assert reader().take([2, 3, 4], "length") == (2, 3, 4)
    assert reader(allowed=None).take([11, 9], "stop") == (11,)


@pytest.mark.parametrize(
    ("ids", "reason", "message"),
    [
        (None, None, "its token ids are None; expected a list of integers"),
        ("12", None, "expected a list of integers"),
        ([1.5], None, "expected a list of integers"),
        ([True], None, "expected a list of integers"),
        ([7], None, "id 7 is not among the allowed ones"),
        ([9, 2], None, "stop id 9 came and the answer went on"),
        ([9], None, "stop id 9 came and the answer went on"),
        ([3], "stop", r"it ended at id 3, which is not one of the stop ids \[9\]"),
        ([], "stop", "it ended at no id"),
        ([2, 3, 4, 5], None, "4 ids came, though max_new_tokens is 3"),
        ([2], "length", "cut it off after 1 of 3 ids; .* --generation-config vllm"),
    ],
)
def test_a_wrong_answer_is_refused(ids: Any, reason: Any, message: str) -> None:
    with pytest.raises(MalformedStream, match=f"http://a gave a wrong answer: .*{message}"):
        reader().take(ids, reason)


@pytest.mark.parametrize("token", [-1, 12, 99])
def test_an_id_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(MalformedStream, match=f"id {token} is outside the vocabulary of 12"):
        reader(allowed=None).take([token], None)


def test_rows_are_whole_or_refused() -> None:
    written = {"token_id:2": -1.5, "token_id:0": 3.0, "token_id:1": 0.25}
    row = full_row(scores_by_id(written, "http://a"), 3, "http://a")
    assert row.tolist() == [3.0, 0.25, -1.5]
    for size in (2, 4):
        with pytest.raises(MalformedAnswer, match=f"http://a: 3 logits came; the vocabulary has {size} ids"):
            full_row({0: 1.0, 1: 2.0, 2: 3.0}, size, "http://a")
    with pytest.raises(MalformedAnswer, match="3 logits came"):
        full_row({0: 1.0, 1: 2.0, 3: 3.0}, 3, "http://a")
    for wrong in (None, [1.0], {"token_id:x": 1.0}, {"token_id:1": None}, {"Hello": 1.0}):
        with pytest.raises(MalformedAnswer, match="expected values by token id"):
            scores_by_id(wrong, "http://a")


def test_what_a_row_is_made_of_can_be_seen() -> None:
    row = np.linspace(-3, 3, 50).astype(np.float32)
    assert coarsest_dtype(row) == "float32"
    assert coarsest_dtype(row.astype(np.float16).astype(np.float32)) == "float16"
    assert coarsest_dtype(np.array([1.0, -2.5, 0.0078125], np.float32)) == "bfloat16"
    assert coarsest_dtype(np.array([1e30 + 3e22, 1.5], np.float32)) == "float32"
    assert not is_log_probabilities(row)
    assert is_log_probabilities(row - np.log(np.exp(row).sum()))
