"""A row's result is its own to the last bit, chunks and pages leave no trace, and a step can be broken off."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from gpa_engines.backends.onnx.exported import ExportedLM
from gpa_engines.backends.onnx.model import PAGE, OnnxStepModel
from gpa_engines.backends.onnx.runtime import CPU
from gpa_engines.step_model import CandidateSet, Interruptible, StepInterrupted, StepRow
from tests.engines.generating import allocate, every_row, relative_l2

LENGTHS = (5, 2 * PAGE + 2, 40, 300, PAGE - 1, PAGE, PAGE + 1, 1)


def load(folder: Path, dtype: str = "float32", threads: int = 1) -> OnnxStepModel:
    return OnnxStepModel(ExportedLM.open(folder, dtype), provider=CPU, threads=threads, max_tokens=4096, max_batch=16)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng((length, seed)).integers(0, 5141, length).tolist()


def fill(model: OnnxStepModel, length: int) -> int:
    slot = allocate(model, length + 8)
    model.step([StepRow(slot, prompt(length), 0, "none")])
    return slot


def run(model: OnnxStepModel, *rows: StepRow) -> list[NDArray[np.float32]]:
    """A step whose rows all want logits."""
    results = [result for result in model.step(rows) if result is not None]
    assert len(results) == len(rows)
    return results


def repeat_step(model: OnnxStepModel, rows: list[StepRow], times: int) -> None:
    for _ in range(times):
        model.step(rows)


def decode(model: OnnxStepModel, slots: list[int], lengths: list[int], step: int) -> list[NDArray[np.float32]]:
    return run(model, *(StepRow(slot, [7 + step], length + step) for slot, length in zip(slots, lengths, strict=True)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_row_is_bit_equal_beside_others_and_after_others_have_left(
    exported_dir: Path, dtype: str, threads: int
) -> None:
    model = load(exported_dir, dtype, threads)
    alone = []
    for length in LENGTHS:
        slot = fill(model, length)
        alone.append([decode(model, [slot], [length], step)[0] for step in range(3)])
        model.release(slot)

    slots = {length: fill(model, length) for length in LENGTHS}
    for step, staying in enumerate((LENGTHS, LENGTHS, LENGTHS[1::2])):
        for length in set(slots) - set(staying):
            model.release(slots.pop(length))
        results = decode(model, list(slots.values()), list(slots), step)
        for length, result in zip(slots, results, strict=True):
            np.testing.assert_array_equal(result, alone[LENGTHS.index(length)][step])


def test_chunks_of_any_size_give_the_same_logits(exported_dir: Path) -> None:
    model = load(exported_dir)
    ids = prompt(200)
    slot = allocate(model, 200)
    (whole,) = run(model, every_row(slot, ids, 0))
    for sizes in ((1,) * 200, (64, 64, 72), (63, 1, 130, 6), (199, 1)):
        other = fill(model, 30)  # so that pages do not begin at the first one
        slot = allocate(model, 200)
        parts, start = [], 0
        for size in sizes:
            parts += run(model, every_row(slot, ids[start : start + size], start))
            start += size
        assert relative_l2(np.concatenate(parts), whole) < 3e-6
        model.release(other)
        model.release(slot)


def test_a_prompt_between_the_pages_of_others_is_the_same(exported_dir: Path) -> None:
    model = load(exported_dir)
    ids = prompt(3 * PAGE)
    (expected,) = run(model, every_row(allocate(model, len(ids)), ids, 0))
    slots = allocate(model, len(ids)), allocate(model, len(ids))
    for start in range(0, len(ids), PAGE):
        rows = [every_row(slot, ids[start : start + PAGE], start) for slot in slots]
        for result in run(model, *rows):
            assert relative_l2(result, expected[start : start + PAGE]) < 3e-6


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_candidates_are_columns_of_the_whole_row(exported_dir: Path, dtype: str) -> None:
    model = load(exported_dir, dtype)
    ids = prompt(20)
    (whole,) = run(model, every_row(allocate(model, 20), ids, 0))
    for columns in (np.arange(4816, 5141), np.r_[514, 4816:5141], np.array([3, 9, 1000]), np.arange(4000)):
        row = StepRow(allocate(model, 20), ids, 0, "last", CandidateSet(columns.astype(np.int64)))
        # 8-bit heads differ: a whole one also rounds what it is given, a small one does not.
        (part,) = run(model, row)
        assert relative_l2(part, whole[-1, columns]) < (0.02 if dtype == "int8" else 1e-6)


def test_rows_of_a_step_may_want_different_columns(exported_dir: Path) -> None:
    model = load(exported_dir)
    small, large = (CandidateSet(np.arange(count, dtype=np.int64)) for count in (10, 5000))
    slots = [allocate(model, 9) for _ in range(5)]
    wanted = [("last", small, ()), ("last", None, ()), ("none", None, ()), ("at", small, (0, 3)), ("last", large, ())]
    rows = [
        StepRow(slot, prompt(5), 0, logits, candidates, offsets)
        for slot, (logits, candidates, offsets) in zip(slots, wanted, strict=True)
    ]
    results = model.step(rows)
    assert results[1] is not None
    assert [None if result is None else result.shape for result in results] == [(10,), (5141,), None, (2, 10), (5000,)]
    np.testing.assert_array_equal(results[0], results[1][:10])
    np.testing.assert_array_equal(results[4], results[1][:5000])


def test_an_interrupted_step_changes_nothing(exported_dir: Path) -> None:
    model = load(exported_dir)
    assert isinstance(model, Interruptible)
    ids = prompt(2000)
    short = fill(model, 10)
    expected = decode(model, [short], [10], 0)[0]
    model.interrupt()  # nothing runs: without effect
    slot = allocate(model, 2000)
    rows = [StepRow(short, [7], 10), StepRow(slot, ids, 0)]

    def keep_interrupting(finished: threading.Event) -> None:
        while not finished.wait(0.001):
            model.interrupt()

    finished = threading.Event()
    thread = threading.Thread(target=keep_interrupting, args=(finished,))
    thread.start()
    try:
        with pytest.raises(StepInterrupted):
            repeat_step(model, rows, 100)
    finally:
        finished.set()
        thread.join()

    result, _ = model.step(rows)
    np.testing.assert_array_equal(result, expected)


def test_a_request_within_max_tokens_fits_and_others_wait(exported_dir: Path) -> None:
    model = load(exported_dir)
    first = allocate(model, 4000)
    assert model.cache.allocate(97) is None
    second = model.cache.allocate(96)
    assert second is not None
    model.step([StepRow(first, prompt(4000), 0, "none"), StepRow(second, prompt(96), 0, "none")])
    model.release(first)
    model.release(second)
    assert model.cache.allocate(4096) is not None
