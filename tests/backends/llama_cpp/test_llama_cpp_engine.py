"""The llama.cpp engine is the reference's model, alone and in company, and gives back what it held."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

from gpa_codecs.errors import CapacityError, RequestError
from gpa_engines.backends.llama_cpp import create_engine
from gpa_engines.backends.llama_cpp.engine import LlamaStepModel
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.step_model import Interruptible, Slot, SlotRequest, StepInterrupted, StepRow
from tests.backends.llama_cpp.asking import (
    SEMANTIC,
    allocate,
    answer,
    answers,
    crowd,
    last_logits,
    load,
    mixed_requests,
    relative_l2,
    request,
    speech_request,
)

FULL = {"float32": "tiny-F32.gguf", "float16": "tiny-F16.gguf", "q8_0": "tiny-Q8_0.gguf"}


def test_it_is_an_engine_and_says_what_it_is(gguf_folder: Path) -> None:
    engine = create_engine(gguf_folder / FULL["float32"], threads=1)
    assert isinstance(engine, Engine)
    info = engine.info
    assert (info.backend, info.device, info.dtype) == ("llama-cpp", "cpu", "float32")
    assert (info.vocab_size, info.max_context, info.logit_ids) == (5141, 32768, None)
    assert info.capabilities == {"logits", "batch", "batch_invariant", "allowed", "seed", "chunked_prefill"}
    assert info.note == "tiny-F32.gguf (full); mode exact"
    asyncio.run(engine.close())


@pytest.mark.parametrize(
    ("dtype", "mode", "limit"),
    [("float32", "exact", 1e-5), ("float32", "fast", 2e-3), ("float16", "fast", 3e-3), ("q8_0", "fast", 0.06)],
)
@pytest.mark.parametrize("place", [0, 1, 5])
def test_logits_are_the_references(
    gguf_folder: Path,
    golden_arrays: Callable[[str], dict[str, NDArray[Any]]],
    dtype: str,
    mode: Any,
    limit: float,
    place: int,
) -> None:
    expected = golden_arrays(f"prompt{place}_logits")
    ids = expected["input_ids"].tolist()

    async def main() -> NDArray[np.float32]:
        engine = create_engine(gguf_folder / FULL[dtype], mode=mode, threads=1, prefill_chunk=48)
        logits = await engine.logits(ids)
        some = await engine.logits_at(ids, [0, 3, 47, 48, len(ids) - 2])
        assert relative_l2(some, logits[[0, 3, 47, 48, -2]]) < limit
        await engine.close()
        return logits

    logits = asyncio.run(main())
    assert logits.dtype == np.float32
    assert logits.shape == (len(ids), 5141)
    assert relative_l2(logits[-1], expected["last_logits"]) < limit
    assert relative_l2(logits[::8], expected["logits_every8"]) < limit


def test_greedy_ids_are_the_references(gguf_folder: Path, prompts: list[dict[str, Any]]) -> None:
    async def main() -> None:
        engine = create_engine(gguf_folder / FULL["float32"], threads=1)
        for prompt in prompts:
            assert prompt["greedy_min_margin"] > 1e-4
            ours = await answer(engine, request(prompt["input_ids"], 64))
            assert list(ours.ids) == prompt["greedy"]
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(("dtype", "mode"), [("float32", "exact"), ("float16", "fast"), ("q8_0", "fast")])
def test_sixteen_mixed_requests_get_what_each_gets_alone(
    gguf_folder: Path, prompts: list[dict[str, Any]], dtype: str, mode: Any
) -> None:
    requests = mixed_requests(prompts, 16)

    async def main() -> None:
        path = gguf_folder / FULL[dtype]
        engine = create_engine(path, mode=mode, threads=1, prefill_chunk=48, prefix_reuse=False)
        alone = [await answer(engine, each) for each in requests]
        together = await answers(engine, requests)
        assert [each.ids for each in together] == [each.ids for each in alone]
        await engine.close()

    asyncio.run(main())


def assert_rows_are_those_alone(model: LlamaStepModel, asked: Sequence[Sequence[int]]) -> None:
    """Prompts and four steps behind them, all at once, to the last bit."""

    def decode(slots: list[Slot], count: int) -> list[list[NDArray[np.float32]]]:
        rows: list[list[NDArray[np.float32]]] = [[] for _ in slots]
        for step in range(count):
            work = [StepRow(slot.number, [7 + step], len(ids) + step) for slot, ids in zip(slots, asked, strict=True)]
            for index, row in enumerate(model.step(work)):
                assert row is not None
                rows[index].append(row)
        return rows

    alone = []
    for ids in asked:
        slot = allocate(model, ids)
        first = last_logits(model, slot, ids)
        steps = [model.step([StepRow(slot.number, [7 + step], len(ids) + step)])[0] for step in range(4)]
        alone.append([first, *steps])
        model.release(slot.number)
    crowd(model)
    slots = [allocate(model, ids) for ids in asked]
    firsts = [last_logits(model, slot, ids) for slot, ids in zip(slots, asked, strict=True)]
    for expected, first, others in zip(alone, firsts, decode(slots, 4), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, [first, *others], strict=True))


@pytest.mark.parametrize(("dtype", "mode"), [("float32", "exact"), ("float16", "fast"), ("q8_0", "fast")])
def test_rows_do_not_depend_on_their_neighbours_to_the_last_bit(
    gguf_folder: Path, prompts: list[dict[str, Any]], dtype: str, mode: str
) -> None:
    model = load(gguf_folder / FULL[dtype], mode=mode, prefix_reuse=False, max_batch=12)
    lengths = (60, 33, 70, 5, 64, 100, 9, 41, 12, 80, 23, 50)
    assert_rows_are_those_alone(
        model, [prompts[number % len(prompts)]["input_ids"][:length] for number, length in enumerate(lengths)]
    )


def test_rows_of_k_quants_depend_neither_on_neighbours_nor_on_what_was_kept(
    k_quant: Path, prompts: list[dict[str, Any]]
) -> None:
    """llama.cpp multiplies eight rows and more of a K-quant in tiles, with sums in another order."""
    model = load(k_quant, mode="fast", prefix_reuse=False, max_batch=12)
    first = prompts[1]["input_ids"]
    assert_rows_are_those_alone(model, [first[: 20 + 7 * number] for number in range(12)])
    for length in (66, 67, 75, 130):
        whole = load(k_quant, mode="fast")
        expected = last_logits(whole, allocate(whole, first[:length]), first[:length])
        for kept in (length - 1, 61, 40):
            model = load(k_quant, mode="fast")
            slot = allocate(model, [*first[:kept], 3, 4, 5, 6, 7, 8, 9, 10])
            last_logits(model, slot, [*first[:kept], 3, 4, 5, 6, 7, 8, 9, 10])
            model.release(slot.number)
            slot = allocate(model, first[:length])
            assert slot.filled > 16
            assert np.array_equal(last_logits(model, slot, first[:length]), expected)


def test_the_cache_is_small_until_more_requests_come(gguf_folder: Path) -> None:
    model = load(gguf_folder / FULL["q8_0"], max_batch=8)
    crowd(model)
    slots = [allocate(model, [1, 2, 3]) for _ in range(8)]
    assert model.allocate(SlotRequest(19, [1, 2, 3], None, True)) is None, "max_batch"
    for slot in slots:
        model.release(slot.number)
    few = load(gguf_folder / FULL["q8_0"], max_batch=2)
    assert [few.allocate(SlotRequest(19, [1, 2, 3], None, True)) is None for _ in range(3)] == [False, False, True]


def test_requests_of_any_size_share_a_small_cache(gguf_folder: Path, prompts: list[dict[str, Any]]) -> None:
    """The cache is divided anew for long requests and for many short ones, whatever order they come in."""
    sizes = (40, 350, 20, 20, 20, 20, 20, 20, 20, 129, 20, 20, 397, 20, 20)
    longest = prompts[1]["input_ids"]
    requests = [request(longest[index : index + size], 30, seed=index) for index, size in enumerate(sizes)]

    async def main() -> None:
        path = gguf_folder / FULL["q8_0"]
        engine = create_engine(path, threads=1, max_tokens_in_flight=1024, prefix_reuse=False)
        together = await answers(engine, requests)
        alone = [await answer(engine, each) for each in requests]
        assert [each.ids for each in together] == [each.ids for each in alone]
        with pytest.raises(CapacityError, match="max_tokens_in_flight is 1024"):
            await answer(engine, request(longest, 700))
        await engine.close()

    asyncio.run(main())


def test_a_repeated_voice_is_read_once(gguf_folder: Path, prompts: list[dict[str, Any]]) -> None:
    """The prefix is taken over, and the logits are those of a prompt that was read as a whole."""
    first = prompts[0]["input_ids"]
    second = [*first[:40], *prompts[1]["input_ids"][:60]]
    fresh = load(gguf_folder / FULL["q8_0"], prefix_reuse=False)
    slot = allocate(fresh, second)
    assert slot.filled == 0
    expected = last_logits(fresh, slot, second)

    model = load(gguf_folder / FULL["q8_0"])
    slot = allocate(model, first)
    last_logits(model, slot, first)
    assert allocate(model, second).filled == 0, "what a running request holds is not shared"
    model.release(slot.number)
    slot = allocate(model, second)
    assert slot.filled == 40
    assert np.array_equal(last_logits(model, slot, second), expected)
    model.release(slot.number)
    assert allocate(model, second[:40], reuse=False).filled == 0


def test_the_same_prompt_again_reads_two_ids(gguf_folder: Path, prompts: list[dict[str, Any]]) -> None:
    ids = prompts[0]["input_ids"][:120]
    model = load(gguf_folder / FULL["q8_0"], max_batch=1)
    slot = allocate(model, ids)
    expected = last_logits(model, slot, ids)
    model.release(slot.number)
    slot = allocate(model, ids)
    assert slot.filled == len(ids) - 2
    assert np.array_equal(last_logits(model, slot, ids), expected)


def test_exact_mode_reuses_nothing(gguf_folder: Path, prompts: list[dict[str, Any]]) -> None:
    ids = prompts[0]["input_ids"]
    model = load(gguf_folder / FULL["float32"])
    slot = allocate(model, ids)
    last_logits(model, slot, ids)
    model.release(slot.number)
    assert allocate(model, ids).filled == 0


def test_answers_with_a_reused_prefix_are_the_same(gguf_folder: Path, prompts: list[dict[str, Any]]) -> None:
    voice = prompts[0]["input_ids"][:40]
    asked = [
        speech_request([*voice, *prompt["input_ids"][:50]], 20, temperature=0.8, seed=index)
        for index, prompt in enumerate(prompts)
    ]

    async def main(reuse: bool) -> list[tuple[int, ...]]:
        engine = create_engine(gguf_folder / FULL["q8_0"], threads=1, prefix_reuse=reuse)
        ids = [(await answer(engine, each)).ids for each in asked]
        await engine.close()
        return ids

    assert asyncio.run(main(True)) == asyncio.run(main(False))


def test_a_step_that_is_broken_off_changes_nothing(gguf_folder: Path, prompts: list[dict[str, Any]]) -> None:
    ids = prompts[1]["input_ids"]
    model = load(gguf_folder / FULL["float32"])
    assert isinstance(model, Interruptible)
    slot = allocate(model, ids, positions=2048)
    expected = last_logits(model, slot, ids)
    decode = StepRow(slot.number, [7], len(ids))
    (after,) = model.step([decode])
    assert after is not None
    # Whenever it comes, before a step or within one.
    long = StepRow(slot.number, (ids * 3)[:1000], len(ids) + 1, "at", offsets=range(0, 1000, 50))
    ((lane, stream),) = model._seats[slot.number]

    def read() -> Any:
        (result,) = model.step([long])
        lane.forget(stream, long.start)
        return result

    reference = read()
    within = 0
    for delay in np.linspace(0, 0.05, 12):
        timer = threading.Timer(delay, model.interrupt)
        timer.start()
        try:
            result = read()
        except StepInterrupted as error:
            within += "in a decode" in str(error)
            result = read()
        timer.join()
        model._abort.clear()
        assert np.array_equal(result, reference)
    assert within > 0
    model.release(slot.number)
    slot = allocate(model, ids, positions=2048)
    assert np.array_equal(last_logits(model, slot, ids), expected)


def test_cancelling_a_long_prompt_frees_its_place_at_once(gguf_folder: Path, prompts: list[dict[str, Any]]) -> None:
    long = (prompts[1]["input_ids"] * 50)[:12000]
    short = request(prompts[0]["input_ids"], 8)

    async def main() -> None:
        engine = create_engine(
            gguf_folder / FULL["float32"], threads=1, max_tokens_in_flight=16384, max_batch=1, prefill_chunk=4096
        )
        expected = await answer(engine, short)
        reading = asyncio.create_task(answer(engine, request(long, 8)))
        await asyncio.sleep(0.3)
        assert not reading.done()
        reading.cancel()
        started = time.perf_counter()
        assert (await answer(engine, short)).ids == expected.ids
        # 12,000 positions take several times as long.
        assert time.perf_counter() - started < 2
        await engine.close()

    asyncio.run(main())


def test_allowed_and_stop_ids_hold(gguf_folder: Path, prompts: list[dict[str, Any]]) -> None:
    async def main() -> None:
        engine = create_engine(gguf_folder / FULL["q8_0"], threads=1)
        ids = prompts[0]["input_ids"]
        given = await answer(engine, speech_request(ids, 40, temperature=2.0, seed=3))
        assert set(given.ids) <= set(SEMANTIC)
        free = await answer(engine, request(ids, 30))
        stop = free.ids[12]
        from_stop = await answer(engine, GenerationRequest(tuple(ids), SamplingParams(max_new_tokens=30), (stop,)))
        assert from_stop.ids == free.ids[: free.ids.index(stop)]
        assert from_stop.finish_reason == "stop"
        await engine.close()

    asyncio.run(main())


def test_ids_and_sizes_out_of_range_are_refused_and_the_engine_lives_on(
    gguf_folder: Path, prompts: list[dict[str, Any]]
) -> None:
    ids = prompts[0]["input_ids"]

    async def main() -> None:
        engine = create_engine(gguf_folder / FULL["float32"], threads=1, max_tokens_in_flight=40000)
        expected = await answer(engine, request(ids, 5))
        for wrong in (5141, -1, 2**31):
            with pytest.raises(RequestError, match=f"is {wrong}; the vocabulary has ids 0 to 5140"):
                await answer(engine, request([1, wrong], 5))
            with pytest.raises(RequestError, match=f"is {wrong}"):
                await engine.logits([1, wrong])
        with pytest.raises(CapacityError, match="the model has 32768"):
            await answer(engine, request([1] * 32768, 5))
        with pytest.raises(CapacityError, match="the model has 32768"):
            await engine.logits([1] * 32769)
        assert (await answer(engine, request(ids, 5))).ids == expected.ids
        await engine.close()

    asyncio.run(main())


def test_a_closed_engine_refuses_and_closing_twice_is_harmless(gguf_folder: Path) -> None:
    async def main() -> None:
        engine = create_engine(gguf_folder / FULL["float32"], threads=1)
        running = asyncio.create_task(answer(engine, request([5, 6, 7], 2000)))
        await asyncio.sleep(0.1)
        await engine.close()
        assert (await running).finish_reason == "cancelled"
        await engine.close()
        with pytest.raises(RequestError, match="closed"):
            await answer(engine, request([1, 2, 3], 5))

    asyncio.run(main())


def test_the_memory_of_a_closed_engine_is_given_back(gguf_folder: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    async def once() -> None:
        engine = create_engine(gguf_folder / FULL["float32"], threads=1, max_tokens_in_flight=65536)
        await answer(engine, request([1, 2, 3], 4))
        await engine.close()

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know the memory in use")
    asyncio.run(once())
    before = resident()
    for _ in range(4):
        asyncio.run(once())
    # A cache of 65,536 positions has 96 MiB.
    assert resident() - before < 60 * 2**20
