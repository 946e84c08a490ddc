"""The ONNX Runtime engine generates what the reference generated, alone and in company, without torch."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, RequestError
from gpa_engines.backends.onnx import create_engine
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.step_engine import StepEngine
from tests.engines.generating import answer, answers, mixed_requests, relative_l2, request

pytest.importorskip("onnxruntime", reason="needs onnxruntime")

SEMANTIC = range(4816, 5141)
IM_END = 514


@pytest.fixture(scope="module")
def engine(exported_dir: Path) -> Iterator[StepEngine]:
    engine = create_engine(exported_dir, threads=1)
    yield engine
    asyncio.run(engine.close())


def test_it_is_an_engine_and_says_what_it_is(engine: StepEngine, exported_dir: Path) -> None:
    assert isinstance(engine, Engine)
    info = engine.info
    assert (info.backend, info.device, info.dtype, info.note) == ("onnx", "cpu", "float32", "")
    assert (info.vocab_size, info.max_context) == (5141, 32768)
    assert info.capabilities == {"logits", "batch", "batch_invariant", "allowed", "seed", "chunked_prefill"}
    manifest = json.loads((exported_dir / "lm" / "manifest.json").read_text())
    assert info.tokenizer_sha256 == manifest["source"]["tokenizer_sha256"]


@pytest.mark.parametrize("place", range(6))
def test_logits_are_the_references(
    engine: StepEngine, golden_arrays: Callable[[str], dict[str, NDArray[Any]]], place: int
) -> None:
    expected = golden_arrays(f"prompt{place}_logits")
    logits = asyncio.run(engine.logits(expected["input_ids"].tolist()))
    assert logits.dtype == np.float32
    assert logits.shape == (len(expected["input_ids"]), 5141)
    assert relative_l2(logits[-1], expected["last_logits"]) < 1e-5
    assert relative_l2(logits[::8], expected["logits_every8"]) < 1e-5


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize(("name", "penalty"), [("greedy", 1.0), ("greedy_rp1.2", 1.2)])
def test_greedy_ids_are_the_references(
    engine: StepEngine, goldens: dict[str, Any], place: int, name: str, penalty: float
) -> None:
    prompt = goldens["prompts"][place]
    ours = asyncio.run(answer(engine, request(prompt["input_ids"], 64, repetition_penalty=penalty)))
    # One penalised prompt has a near tie late in its answer.
    decided = 64 if prompt[f"{name}_min_margin"] >= 1e-4 else 16
    assert list(ours.ids[:decided]) == prompt[name][:decided]


# bfloat16 weights are float16 numbers too, but for the smallest; int8 is held to the limits of Q8_0.
@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-5), ("int8", 0.06)])
def test_other_precisions_stay_near(
    exported_dir: Path, golden_arrays: Callable[[str], dict[str, NDArray[Any]]], dtype: str, limit: float
) -> None:
    expected = golden_arrays("prompt2_logits")

    async def main() -> NDArray[np.float32]:
        engine = create_engine(exported_dir, dtype=dtype, threads=1, prefill_chunk=32)
        assert engine.info.dtype == dtype
        logits = await engine.logits(expected["input_ids"].tolist())
        await engine.close()
        return logits

    assert relative_l2(asyncio.run(main())[::8], expected["logits_every8"]) < limit


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sixteen_mixed_requests_get_what_each_gets_alone(
    exported_dir: Path, goldens: dict[str, Any], dtype: str
) -> None:
    requests = mixed_requests(goldens["prompts"], 16)

    async def main() -> None:
        engine = create_engine(exported_dir, dtype=dtype, threads=1, prefill_chunk=48)
        alone = [await answer(engine, each) for each in requests]
        together = await answers(engine, requests)
        assert [each.ids for each in together] == [each.ids for each in alone]
        await engine.close()

    asyncio.run(main())


def test_only_allowed_ids_and_stop_ids_come(engine: StepEngine, goldens: dict[str, Any]) -> None:
    prompt = tuple(goldens["prompts"][2]["input_ids"])
    sampling = SamplingParams(temperature=5.0, max_new_tokens=40, min_new_tokens=40, seed=1)
    # The last is cut out of the whole head's result, the others have a head of their own.
    for allowed in ((SEMANTIC,), (range(10), range(700, 705)), (range(3000),)):
        result = asyncio.run(answer(engine, GenerationRequest(prompt, sampling, (IM_END,), allowed)))
        assert len(result.ids) == 40
        assert all(any(token in ids for ids in allowed) for token in result.ids)


def test_a_restricted_answer_is_the_best_of_the_whole_rows(engine: StepEngine, goldens: dict[str, Any]) -> None:
    prompt = goldens["prompts"][2]["input_ids"]
    sampling = SamplingParams(max_new_tokens=12, min_new_tokens=12)
    asked = GenerationRequest(tuple(prompt), sampling, (IM_END,), (SEMANTIC,))
    ids = asyncio.run(answer(engine, asked)).ids
    rows = asyncio.run(engine.logits([*prompt, *ids]))[len(prompt) - 1 : -1, SEMANTIC.start : SEMANTIC.stop]
    assert list(ids) == (rows.argmax(axis=1) + SEMANTIC.start).tolist()


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(engine: StepEngine, goldens: dict[str, Any]) -> None:
    prompt = tuple(goldens["prompts"][2]["input_ids"])
    free = asyncio.run(answer(engine, request(prompt, 20)))
    first = free.ids.index(free.ids[9])
    stopped = asyncio.run(answer(engine, GenerationRequest(prompt, SamplingParams(max_new_tokens=20), (free.ids[9],))))
    assert (stopped.ids, stopped.finish_reason) == (free.ids[:first], "stop")


def test_an_abandoned_request_makes_room_for_the_next(exported_dir: Path, goldens: dict[str, Any]) -> None:
    prompt = goldens["prompts"][2]["input_ids"]

    async def main() -> None:
        engine = create_engine(exported_dir, threads=1, max_tokens_in_flight=len(prompt) + 64, max_batch=1)
        expected = (await answer(engine, request(prompt, 20))).ids
        for _ in range(3):
            async with aclosing(engine.generate(request(prompt, 60))) as deltas:
                async for _ in deltas:
                    break
            assert (await answer(engine, request(prompt, 20))).ids == expected
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (GenerationRequest((1, 5141)), r"prompt_ids\[1\] is 5141"),
        (GenerationRequest((1,), stop_ids=(9999,)), r"stop_ids\[0\] is 9999"),
        (GenerationRequest((1,), allowed=(range(5000, 6000),)), "allowed ends at id 5999"),
        (GenerationRequest((1,) * 9000), "max_tokens_in_flight is 8192"),
        (GenerationRequest((1,) * 40000), "the model has 32768"),
    ],
)
def test_a_refused_request_leaves_the_engine_alive(engine: StepEngine, asked: GenerationRequest, message: str) -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match=message):
            await answer(engine, asked)
        assert len((await answer(engine, request((1,), 2))).ids) == 2

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, r"device 'tpu' is not available: onnxruntime .* has .*cpu"),
        ({"dtype": "float64"}, "dtype 'float64' is unknown; expected auto, float32, float16, int8"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_tokens_in_flight": -1}, "max_tokens_in_flight is -1"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
    ],
)
def test_an_option_that_cannot_be_had_is_named(exported_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        create_engine(exported_dir, **options)


def test_a_provider_may_be_named_in_full(exported_dir: Path) -> None:
    engine = create_engine(exported_dir, device="CPUExecutionProvider", threads=1)
    assert engine.info.device == "cpu"
    asyncio.run(engine.close())


def test_it_runs_without_torch(exported_dir: Path, goldens: dict[str, Any]) -> None:
    prompt = goldens["prompts"][0]
    script = f"""
import asyncio, sys
for name in ("torch", "transformers", "onnx"):
    sys.modules[name] = None
from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.registry import create_engine

async def main():
    engine = create_engine("onnx", {str(exported_dir)!r}, threads=1)
    request = GenerationRequest({tuple(prompt["input_ids"])!r}, SamplingParams(max_new_tokens=16))
    print([token async for delta in engine.generate(request) for token in delta.ids])
    await engine.close()

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == prompt["greedy"][:16]
    assert done.stderr == ""


def test_without_onnxruntime_the_error_says_how_to_get_it(exported_dir: Path) -> None:
    script = f"""
import sys
sys.modules["onnxruntime"] = None
from gpa_codecs.errors import BackendError
from gpa_engines.backends.onnx import create_engine
try:
    create_engine({str(exported_dir)!r})
except BackendError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert "needs onnxruntime: pip install 'gpa-engines[onnx]'" in done.stdout
