"""Both styles in which SGLang streams give the same ids, and nothing that makes no sense passes for an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import CapacityError, DeclinedRequest
from gpa_engines.servers.sglang_stream import Finish, OutputReader, RequestAborted, UnexpectedOutput, hidden_rows

LENGTH = {"type": "length", "length": 3}


def chunk(ids: Any, total: Any, reason: Any = None) -> dict[str, Any]:
    return {"output_ids": ids, "meta_info": {"completion_tokens": total, "finish_reason": reason}}


def test_new_ids_one_by_one() -> None:
    reader = OutputReader()
    assert [reader.read(chunk([token], count)) for count, token in enumerate((7, 8), 1)] == [
        ((7,), None),
        ((8,), None),
    ]
    assert reader.read(chunk([9], 3, LENGTH)) == ((9,), Finish("length"))


def test_all_ids_so_far_in_one_list_that_goes_on_growing() -> None:
    reader, ids = OutputReader(), [7]
    first = chunk(ids, 1)
    ids.append(8)  # before the first chunk is looked at
    second = chunk(ids, 2)
    ids.append(9)
    assert [reader.read(each)[0] for each in (first, second, chunk(list(ids), 3, LENGTH))] == [(7,), (8,), (9,)]


def test_several_tokens_at_once_and_a_chunk_without_any() -> None:
    reader = OutputReader()
    assert reader.read(chunk([7, 8], 2))[0] == (7, 8)
    assert reader.read(chunk([], 2))[0] == ()
    assert reader.read(chunk([7, 8], 2, LENGTH))[0] == ()


def test_the_end_id_is_the_last_id() -> None:
    stop = {"type": "stop", "matched": 9}
    assert OutputReader().read(chunk([9], 1, stop)) == ((9,), Finish("stop", 9))
    with pytest.raises(UnexpectedOutput, match="ended an answer with"):
        OutputReader().read(chunk([8], 1, stop))


@pytest.mark.parametrize(
    "wrong",
    [
        chunk([7, 8], 3),
        chunk([7], None),
        chunk(["7"], 1),
        chunk([True], 1),
        chunk("7", 1),
        chunk([7], 1, {"type": "stop", "matched": "text"}),
        chunk([7], 1, "length"),
        {"text": "Hello"},
        {"output_ids": [7], "meta_info": None},
    ],
)
def test_what_no_version_sends_is_no_answer(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnexpectedOutput):
        OutputReader().read(wrong)


def test_a_count_that_falls_is_no_answer() -> None:
    reader = OutputReader()
    reader.read(chunk([7, 8], 2))
    with pytest.raises(UnexpectedOutput, match="counts 1 tokens"):
        reader.read(chunk([7], 1))


def test_an_error_inside_a_stream_is_told_by_its_status() -> None:
    with pytest.raises(DeclinedRequest, match="temperature"):
        OutputReader().read({"error": {"message": "temperature must be", "code": 400}})
    with pytest.raises(RequestAborted, match="out of memory"):
        OutputReader().read({"error": {"message": "out of memory", "code": 500}})
    with pytest.raises(CapacityError, match="context length"):
        OutputReader().read({"error": {"message": "longer than the model's context length", "code": 400}})


def test_an_abort_is_no_end_of_an_answer() -> None:
    with pytest.raises(RequestAborted, match="Aborted") as raised:
        OutputReader().read(chunk([7], 1, {"type": "abort", "message": "Aborted", "status_code": None}))
    assert raised.value.status is None


def test_hidden_states_of_a_prompt_come_in_parts() -> None:
    answer = {"meta_info": {"hidden_states": [[[1.0, 2.0], [3.0, 4.0]], [5.0, 6.0]]}}
    assert hidden_rows(answer, 3).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert hidden_rows({"meta_info": {"hidden_states": [np.ones((1, 2), np.float32)]}}, 3).shape == (1, 2)


@pytest.mark.parametrize("states", [None, [], [[[1.0, 2.0]] * 4], [[[1.0, 2.0]], [1.0]]])
def test_hidden_states_that_fit_no_prompt_are_refused(states: Any) -> None:
    with pytest.raises(UnexpectedOutput):
        hidden_rows({"meta_info": {"hidden_states": states}}, 3)
