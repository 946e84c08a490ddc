"""The parts of the llama.cpp engine that need no llama.cpp: dividing a cache, columns, rows, cores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpa_engines.backends.llama_cpp.columns import MAX_RUNS, Columns
from gpa_engines.backends.llama_cpp.cpu import default_threads
from gpa_engines.backends.llama_cpp.model_files import VocabularyRows
from gpa_engines.backends.llama_cpp.streams import Division, Streams, divide


@pytest.mark.parametrize(
    ("positions", "expected"),
    [(1, (8, 512)), (512, (8, 512)), (513, (5, 768)), (1025, (3, 1280)), (1400, (2, 2048)), (4096, (1, 4096))],
)
def test_a_cache_is_divided_among_as_many_as_it_suffices_for(positions: int, expected: tuple[int, int]) -> None:
    assert divide(4096, 8, positions) == Division(*expected)


def test_no_division_has_more_than_the_cache_or_less_than_the_request() -> None:
    for max_tokens in (256, 1000, 4096, 32768):
        for max_batch in (1, 3, 8, 256):
            for positions in range(1, max_tokens + 1, 37):
                given = divide(max_tokens, max_batch, positions)
                assert given.length >= positions
                assert given.length % 256 == 0
                assert 1 <= given.streams <= max_batch
                assert given.streams * given.length < max_tokens + 256


def test_the_longest_shared_beginning_is_taken_then_an_empty_stream_then_the_oldest() -> None:
    streams = Streams(Division(3, 512), chunk=512, least=2)
    first, second = list(range(100)), list(range(50)) + list(range(200, 250))
    for ids in (first, second):
        stream = streams.take(ids, reuse=True)
        assert stream is not None
        stream.held.extend(ids)
    assert [stream.number for stream in streams.all if stream.taken] == [0, 1]
    streams.release(1)
    streams.release(0)
    assert streams.idle

    def take(ids: list[int], reuse: bool = True) -> tuple[int, int]:
        stream = streams.take(ids, reuse=reuse)
        assert stream is not None
        return stream.number, len(stream.held)

    assert take([*first[:80], 999, 998]) == (0, 80)
    assert take([*second[:15], 7, 7, 7, 7, 7]) == (2, 0), "15 shared ids are too few, and one stream is empty"
    assert take([5] * 40) == (1, 0)
    assert streams.take([1], reuse=True) is None


@pytest.mark.parametrize(
    ("chunk", "least", "kept"),
    [(512, 2, 58), (512, 8, 52), (59, 2, 57), (50, 8, 52), (54, 8, 46), (4, 8, 52), (57, 2, 58)],
)
def test_what_is_left_goes_through_the_kernels_of_the_whole(chunk: int, least: int, kept: int) -> None:
    """Neither the rest of the prompt nor the rest of a chunk is shorter than `least`."""
    streams = Streams(Division(1, 512), chunk=chunk, least=least)
    ids = list(range(60))
    stream = streams.take(ids, reuse=True)
    assert stream is not None
    stream.held.extend(ids)
    streams.release(0)
    again = streams.take(ids, reuse=True)
    assert again is not None
    assert again.held == ids[:kept]
    streams.release(0)
    fresh = streams.take(ids, reuse=False)
    assert fresh is not None
    assert fresh.held == []


def test_the_stream_released_first_is_given_away_first() -> None:
    streams = Streams(Division(3, 512), chunk=512, least=2)
    for _ in range(3):
        stream = streams.take([1, 2], reuse=True)
        assert stream is not None
        stream.held.extend([1, 2])
    for number in (2, 0, 1):
        streams.release(number)
    order = [streams.take([3, 4], reuse=True) for _ in range(3)]
    assert [stream.number for stream in order if stream] == [2, 0, 1]


def test_ids_have_rows_where_a_file_has_them() -> None:
    vocabulary = VocabularyRows([range(5, 8), range(20, 22)])
    rows = vocabulary.rows(np.array([5, 7, 20, 21]))
    assert rows is not None
    assert rows.tolist() == [0, 2, 3, 4]
    for missing in (4, 8, 19, 22):
        assert vocabulary.rows(np.array([6, missing])) is None


@pytest.mark.parametrize("runs", [1, 2, MAX_RUNS + 5])
def test_columns_are_cut_and_placed(runs: int) -> None:
    random = np.random.default_rng(runs)
    sources = np.concatenate([np.arange(10 * run, 10 * run + 4) for run in range(runs)])
    rows = random.standard_normal((3, 10 * runs), np.float32)
    assert np.array_equal(Columns(sources, np.arange(len(sources)), len(sources)).select(rows, 3), rows[:, sources])
    targets = sources + 3
    placed = Columns(sources, targets, 10 * runs + 3).select(rows, 3)
    assert np.array_equal(placed[:, targets], rows[:, sources])
    assert np.isneginf(np.delete(placed, targets, axis=1)).all()


def test_threads_are_the_cores_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 4, 5, 6, 7}, raising=False)
    assert default_threads(tmp_path) == 6, "nothing is known about the cores"
    for cpu in range(8):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n")
    assert default_threads(tmp_path) == 3
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for quota, expected in (("max 100000", 3), ("250000 100000", 2), ("50000 100000", 1)):
        (group / "cpu.max").write_text(quota)
        assert default_threads(tmp_path) == expected
