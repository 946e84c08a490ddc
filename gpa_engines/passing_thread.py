"""Heavy calls on a thread that ends with them.

OpenMP gives every thread that runs a parallel region a pool of its own. While all pools together have more threads
than the machine has cores, libgomp lets none of them spin at a barrier, and each of the hundreds of barriers of a
decode step costs a sleep and a wake-up: on two cores a step of the int8 model took 21 ms instead of 13. A pool ends
with its thread, so whatever computes beside an engine's own thread does it on a thread that ends too.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


def in_passing_thread(function: Callable[[], T]) -> T:
    """Call `function` on a new thread, wait, and return or raise what it did."""
    call = _Call(function)
    thread = Thread(target=call.run, name="gpa-passing", daemon=True)
    thread.start()
    thread.join()
    return call.result()


class _Call(Generic[T]):
    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._values: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._values.append(self._function())
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._values[0]
