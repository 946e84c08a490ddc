"""What runs on a passing thread gives its result or its error, and leaves no thread behind."""

from __future__ import annotations

import threading

import pytest

from gpa_engines.passing_thread import in_passing_thread


def test_the_result_comes_back_and_the_thread_is_gone() -> None:
    before = threading.active_count()
    name = in_passing_thread(lambda: threading.current_thread().name)
    assert name != threading.current_thread().name
    assert threading.active_count() == before


def test_an_error_comes_back_as_it_was() -> None:
    error = KeyError("missing")

    def fail() -> None:
        raise error

    with pytest.raises(KeyError) as caught:
        in_passing_thread(fail)
    assert caught.value is error
