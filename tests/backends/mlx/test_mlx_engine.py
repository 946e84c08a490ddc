"""The MLX engine generates what the reference generated, alone and in company, on one thread that ends with it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, RequestError
from gpa_engines.engine import Engine
from gpa_engines.registry import create_engine
from gpa_engines.step_engine import StepEngine
from tests.backends.mlx.conftest import change_config
from tests.engines.generating import answer, answers, mixed_requests, relative_l2, request

pytest.importorskip("mlx.core", reason="needs mlx")


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    engine = create_engine("mlx", tiny_checkpoint, device="cpu")
    yield engine
    asyncio.run(engine.close())


def run_python(code: str, *arguments: object) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_it_says_what_it_is(engine: Engine) -> None:
    assert isinstance(engine, StepEngine)
    info = engine.info
    assert (info.backend, info.device, info.dtype) == ("mlx", "cpu", "float32")
    assert (info.vocab_size, info.max_context, info.tokenizer_sha256) == (5141, 32768, "")
    assert info.capabilities == {"logits", "batch", "batch_invariant", "allowed", "seed", "chunked_prefill"}
    assert engine.memory_meter is None


@pytest.mark.parametrize("place", range(6))
def test_logits_are_the_references(
    engine: Engine, golden_arrays: Callable[[str], dict[str, NDArray[Any]]], place: int
) -> None:
    expected = golden_arrays(f"prompt{place}_logits")
    logits = asyncio.run(engine.logits(expected["input_ids"].tolist()))
    assert relative_l2(logits[-1], expected["last_logits"]) < 1e-5
    assert relative_l2(logits[::8], expected["logits_every8"]) < 1e-5


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize(("name", "penalty"), [("greedy", 1.0), ("greedy_rp1.2", 1.2)])
def test_greedy_ids_are_the_references(
    engine: Engine, goldens: dict[str, Any], place: int, name: str, penalty: float
) -> None:
    prompt = goldens["prompts"][place]
    # One penalised prompt has a near tie late in its answer.
    decided = 64 if prompt[f"{name}_min_margin"] >= 1e-4 else 16
    ours = asyncio.run(answer(engine, request(prompt["input_ids"], decided, repetition_penalty=penalty)))
    assert list(ours.ids) == prompt[name][:decided]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mlx-8bit", "mlx-4bit"])
def test_eight_concurrent_requests_get_what_each_gets_alone(
    tiny_checkpoint: Path, quantized: Callable[[int], Path], goldens: dict[str, Any], dtype: str
) -> None:
    """Greedy and seeded ones, over all ids and over some, of different lengths and cut into chunks."""
    bits = {"mlx-8bit": 8, "mlx-4bit": 4}.get(dtype)
    weights = quantized(bits) if bits else None
    requests = mixed_requests(goldens["prompts"], 8)
    assert {each.sampling.temperature for each in requests} == {0.0, 0.8}

    async def main() -> None:
        engine = create_engine("mlx", tiny_checkpoint, dtype=dtype, device="cpu", weights=weights, prefill_chunk=48)
        assert engine.info.dtype == dtype
        alone = [await answer(engine, each) for each in requests]
        together = await answers(engine, requests)
        assert [each.ids for each in together] == [each.ids for each in alone]
        await engine.close()

    asyncio.run(main())


def test_a_quantised_engine_names_the_tokenizer_that_it_was_made_with(
    tiny_checkpoint: Path, quantized: Callable[[int], Path]
) -> None:
    from gpa_engines.backends.mlx.weights import file_sha256

    engine = create_engine("mlx", quantized(8))
    assert engine.info.dtype == "mlx-8bit"
    assert engine.info.tokenizer_sha256 == file_sha256(tiny_checkpoint / "tokenizer.json")
    asyncio.run(engine.close())


def test_an_engine_may_be_made_used_and_closed_on_different_threads(
    tiny_checkpoint: Path, goldens: dict[str, Any]
) -> None:
    from gpa_engines.passing_thread import in_passing_thread

    ids = goldens["prompts"][0]["input_ids"]
    engine = in_passing_thread(lambda: create_engine("mlx", tiny_checkpoint))
    here = asyncio.run(answer(engine, request(ids, 8)))
    there = in_passing_thread(lambda: asyncio.run(answer(engine, request(ids, 8))))
    assert here.ids == there.ids == tuple(goldens["prompts"][0]["greedy"][:8])
    in_passing_thread(lambda: asyncio.run(engine.close()))
    with pytest.raises(RequestError, match="closed"):
        asyncio.run(engine.logits(ids))


def test_ids_outside_the_vocabulary_are_refused_and_the_engine_lives(engine: Engine) -> None:
    for bad in (-1, 5141, 10**9):
        with pytest.raises(RequestError, match=rf"ids\[2\] is {bad}"):
            asyncio.run(engine.logits([1, 2, bad]))
    assert np.isfinite(asyncio.run(engine.logits([1, 2, 3]))).all()


def test_a_closed_engine_gives_its_memory_back(tiny_checkpoint: Path) -> None:
    code = """
        import asyncio, sys
        import mlx.core as mx
        from gpa_engines.registry import create_engine

        async def main():
            engine = create_engine("mlx", sys.argv[1])
            await engine.logits(range(200))
            print(mx.get_active_memory() > 2_000_000)
            await engine.close()
            print(mx.get_active_memory() + mx.get_cache_memory())

        asyncio.run(main())
    """
    held, left = run_python(code, tiny_checkpoint).split()
    assert held == "True"
    assert int(left) < 100_000


def test_memory_settings_are_the_processs(tiny_checkpoint: Path) -> None:
    code = """
        import sys
        import mlx.core as mx
        from gpa_engines.registry import create_engine

        create_engine("mlx", sys.argv[1], memory_limit=3 << 30, cache_limit=5 << 20)
        print(mx.set_memory_limit(0), mx.set_cache_limit(0))
    """
    assert run_python(code, tiny_checkpoint).split() == [str(3 << 30), str(5 << 20)]


def test_neither_torch_nor_mlx_lm_is_imported(tiny_checkpoint: Path) -> None:
    code = """
        import asyncio, sys
        import gpa_engines.backends.mlx
        print("mlx" in sys.modules)
        engine = gpa_engines.backends.mlx.create_engine(sys.argv[1])
        asyncio.run(engine.logits([1, 2, 3]))
        asyncio.run(engine.close())
        print(sorted({"mlx", "mlx_lm", "torch", "transformers"} & sys.modules.keys()))
    """
    assert run_python(code, tiny_checkpoint).splitlines() == ["False", "['mlx']"]


def test_the_process_ends_while_a_request_runs(tiny_checkpoint: Path) -> None:
    code = """
        import asyncio, sys
        from gpa_engines.engine import GenerationRequest, SamplingParams
        from gpa_engines.registry import create_engine

        async def main():
            engine = create_engine("mlx", sys.argv[1])
            async for delta in engine.generate(GenerationRequest((1, 2), SamplingParams(max_new_tokens=8000))):
                print(len(delta.ids))
                sys.exit(0)

        asyncio.run(main())
    """
    assert run_python(code, tiny_checkpoint) == "1\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "device 'cuda' is unknown; expected auto, cpu or gpu"),
        ({"dtype": "int8"}, r"dtype 'int8' is unknown for .* expected auto, float32.*to_mlx.py --bits 8"),
        ({"dtype": "mlx-8bit"}, "dtype 'mlx-8bit' is unknown for .*whose weights are not quantised"),
        ({"max_batch": 0}, "max_batch is 0; expected at least 1"),
        ({"prefill_chunk": -1}, "prefill_chunk is -1"),
        ({"max_tokens_in_flight": 0}, "max_tokens_in_flight is 0"),
        ({"memory_limit": -1}, "memory_limit is -1; expected a number of bytes"),
        ({"cache_limit": "1G"}, "cache_limit is '1G'; expected a number of bytes"),
        ({"wired_limit": 1, "device": "cpu"}, "wired_limit needs Apple's GPU; the device is 'cpu'"),
        ({"threads": 2}, "backend 'mlx' has no option 'threads'"),
    ],
)
def test_options_that_cannot_be_had_are_refused(tiny_checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        create_engine("mlx", tiny_checkpoint, **options)


def test_a_gpu_that_is_not_there_is_refused(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    monkeypatch.setattr(mx, "is_available", lambda device: False)
    with pytest.raises(BackendError, match="device 'gpu' is not available: MLX needs a Mac"):
        create_engine("mlx", tiny_checkpoint, device="gpu")


def test_a_quantised_folder_keeps_its_dtype(quantized: Callable[[int], Path]) -> None:
    with pytest.raises(BackendError, match=r"dtype is 'float32', but .* weights of 8 bits: use auto or mlx-8bit"):
        create_engine("mlx", quantized(8), dtype="float32")


def test_a_checkpoint_by_transformers_5_is_read(tiny_checkpoint_copy: Path, engine: Engine) -> None:
    parameters = {"rope_theta": 1000000.0, "rope_type": "default"}
    change_config(tiny_checkpoint_copy, rope_theta=None, rope_scaling=None, rope_parameters=parameters)
    other = create_engine("mlx", tiny_checkpoint_copy, device="cpu")
    np.testing.assert_array_equal(asyncio.run(other.logits([1, 2, 3])), asyncio.run(engine.logits([1, 2, 3])))
    asyncio.run(other.close())


def test_a_sharded_checkpoint_is_read(tiny_checkpoint_copy: Path, engine: Engine) -> None:
    shard(tiny_checkpoint_copy)
    other = create_engine("mlx", tiny_checkpoint_copy, device="cpu")
    np.testing.assert_array_equal(asyncio.run(other.logits([1, 2, 3])), asyncio.run(engine.logits([1, 2, 3])))
    asyncio.run(other.close())


def shard(folder: Path) -> None:
    """Put every other tensor into a file of its own kind, as transformers does with large models."""
    import mlx.core as mx

    whole = folder / "model.safetensors"
    tensors = mx.load(str(whole))
    assert isinstance(tensors, dict)
    mx.eval(list(tensors.values()))
    names = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(sorted(tensors))}
    whole.unlink()
    for file in set(names.values()):
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in tensors if names[name] == file})
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
