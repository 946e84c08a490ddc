"""The Ascend engine on the simulated device; test_simulated_npu.py runs this file in a process of its own.

All results here are a simulated device's: they show where tensors are, nothing of an NPU's numbers or speed.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, RequestError
from gpa_conformance.parity import HARDWARE, unavailable, unsupported
from gpa_engines.backends.ascend import create_engine
from gpa_engines.backends.torch import attention
from gpa_engines.backends.torch import create_engine as create_torch_engine
from gpa_engines.backends.torch import model as torch_model
from gpa_engines.backends.torch.engine import TorchStepModel
from gpa_engines.backends.torch.linear import PlainLinear, WeightFormat
from gpa_engines.engine import Engine
from gpa_engines.lm_config import LMConfig
from gpa_engines.memory import MemoryReport
from gpa_engines.registry import require_backend
from gpa_engines.spread_engine import SpreadEngine
from gpa_engines.step_engine import StepEngine
from tests.backends.ascend import simulated_npu
from tests.engines.generating import allocate, answer, answers, every_row, mixed_requests, relative_l2, request

CPU = torch.device("cpu")
CARDS = 2

simulated_npu.install(CARDS)


@pytest.fixture
def npu_engine(tiny_checkpoint: Path) -> Iterator[Callable[..., Any]]:
    """npu_engine(dtype="float16"): an engine, closed at the end of the test."""
    engines: list[Engine] = []

    def create(**options: Any) -> Engine:
        options.setdefault("dtype", "float32")
        engines.append(create_engine(tiny_checkpoint, **options))
        return engines[-1]

    yield create
    for engine in engines:
        asyncio.run(engine.close())


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """bfloat16(False): let the chip be one without it."""
    return lambda has: monkeypatch.setattr(simulated_npu.cards, "bfloat16", has)


def test_the_engine_says_that_the_device_is_simulated(npu_engine: Callable[..., Engine]) -> None:
    info = npu_engine(dtype="auto").info
    assert (info.backend, info.device, info.dtype) == ("ascend", "npu:0", "bfloat16")
    assert info.note.startswith("simulated device, torch_npu ")
    assert npu_engine(device="npu:1").info.device == "npu:1"
    assert require_backend("ascend").packages == ("torch", "torch_npu")


def test_eager_attention_gives_the_cpus_logits_to_the_last_bit(
    tiny_checkpoint: Path,
    npu_engine: Callable[..., Engine],
    goldens: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU runs the same operations here: plain products, padded eager attention, rotation by pairs."""
    on_npu = npu_engine(attention="eager", prefill_chunk=64)
    logits = [asyncio.run(on_npu.logits(prompt["input_ids"])) for prompt in goldens["prompts"][:3]]
    monkeypatch.setattr(torch_model, "rotate", torch_model.turn_pairs)
    on_cpu = plain_model(tiny_checkpoint, attention.eager_attention)
    for place, found in enumerate(logits):
        expected = chunked_logits(on_cpu, goldens["prompts"][place]["input_ids"], 64)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_logits_are_the_cpu_engines_and_the_references(
    tiny_checkpoint: Path,
    npu_engine: Callable[..., Engine],
    golden_arrays: Callable[[str], dict[str, NDArray[Any]]],
    kernel: str,
) -> None:
    on_npu, on_cpu = npu_engine(attention=kernel), create_torch_engine(tiny_checkpoint, device="cpu")
    for place in range(6):
        golden = golden_arrays(f"prompt{place}_logits")
        ids = golden["input_ids"].tolist()
        found, expected = (asyncio.run(engine.logits(ids)) for engine in (on_npu, on_cpu))
        assert relative_l2(found, expected) < 1e-6
        assert relative_l2(found[-1], golden["last_logits"]) < 1e-5
    asyncio.run(on_cpu.close())


def test_greedy_answers_are_the_references(npu_engine: Callable[..., Engine], goldens: dict[str, Any]) -> None:
    engine = npu_engine()
    for prompt in goldens["prompts"]:
        ours = asyncio.run(answer(engine, request(prompt["input_ids"], 16)))
        assert list(ours.ids) == prompt["greedy"][:16]


def test_sixteen_mixed_requests_get_what_each_gets_alone_and_on_the_cpu(
    tiny_checkpoint: Path, npu_engine: Callable[..., Engine], goldens: dict[str, Any]
) -> None:
    requests = mixed_requests(goldens["prompts"], 16)
    engine, on_cpu = npu_engine(prefill_chunk=48), create_torch_engine(tiny_checkpoint, device="cpu", prefill_chunk=48)

    async def main() -> None:
        alone = [(await answer(engine, each)).ids for each in requests]
        assert [each.ids for each in await answers(engine, requests)] == alone
        assert [each.ids for each in await answers(on_cpu, requests)] == alone
        await on_cpu.close()

    asyncio.run(main())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_the_reference(
    npu_engine: Callable[..., Engine], golden_arrays: Callable[[str], dict[str, NDArray[Any]]], dtype: str
) -> None:
    engine = npu_engine(dtype=dtype)
    golden = golden_arrays("prompt1_logits")
    found = asyncio.run(engine.logits(golden["input_ids"].tolist()))
    assert 1e-5 < relative_l2(found[-1], golden["last_logits"]) < 0.03


def test_cancelling_frees_what_the_request_held(npu_engine: Callable[..., Any], goldens: dict[str, Any]) -> None:
    engine: StepEngine = npu_engine(max_tokens_in_flight=400)
    ids = goldens["prompts"][0]["input_ids"]

    async def main() -> None:
        stream = engine.generate(request(ids, 390 - len(ids)))
        await anext(stream)
        waiting = asyncio.create_task(answer(engine, request(ids, 4)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await stream.aclose()
        assert len((await asyncio.wait_for(waiting, 30)).ids) == 4

    asyncio.run(main())


def test_memory_is_the_weights_and_the_cache_and_the_head_is_the_embedding(
    tiny_checkpoint: Path, npu_engine: Callable[..., Engine]
) -> None:
    torch.npu.empty_cache()  # pyright: ignore[reportAttributeAccessIssue]
    before = simulated_npu.cards.memory[1].settle().allocated
    engine = npu_engine(device="npu:1", max_tokens_in_flight=1000)
    asyncio.run(answer(engine, request((1, 2, 3), 2)))
    config = LMConfig.from_file(tiny_checkpoint / "config.json")
    layer = config.hidden_size * (
        2 * config.num_attention_heads * config.head_dim
        + 2 * config.num_key_value_heads * config.head_dim
        + 3 * config.intermediate_size
    )
    cache = 2 * config.num_key_value_heads * 1001 * config.head_dim
    embedding = config.vocab_size * config.hidden_size
    rotation = 1000 * config.head_dim
    expected = 4 * (embedding + rotation + config.num_hidden_layers * (layer + cache))
    assert isinstance(engine, MemoryReport)
    assert engine.memory_meter is not None
    assert engine.memory_meter.source == "torch.npu allocator"
    use = engine.memory_meter.read()
    assert use.allocated is not None
    assert expected <= use.allocated - before < expected + 4 * embedding // 10
    assert use.peak_allocated is not None
    assert use.peak_allocated > use.allocated
    assert engine.memory_meter.reset_peak()
    assert engine.memory_meter.read().peak_allocated == use.allocated


def test_a_second_copy_of_a_tied_table_is_refused(
    npu_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.Tensor.to

    def copying(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        moved = real(tensor, *arguments, **options)
        return moved.clone() if moved is tensor and moved.device.type == "npu" else moved

    monkeypatch.setattr(torch.Tensor, "to", copying)
    with pytest.raises(BackendError, match=r"on npu:0 the head is a second copy of the embedding table \(1 MiB\)"):
        npu_engine()


def test_operations_on_two_devices_raise() -> None:
    here, there = torch.ones(3, device="npu:0"), torch.ones(3, device="npu:1")
    for other in (torch.ones(3), there):
        with pytest.raises(RuntimeError, match="same device, but found at least two devices"):
            _ = here + other
    assert (here + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]


def test_a_tensor_that_is_left_on_the_cpu_is_caught(
    npu_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = npu_engine(attention="eager")
    made = attention.PaddedPlan.__init__

    def forgetful(plan: attention.PaddedPlan, *arguments: Any, **options: Any) -> None:
        made(plan, *arguments, **options)
        plan.mask = plan.mask.cpu()

    with monkeypatch.context() as patch:
        patch.setattr(attention.PaddedPlan, "__init__", forgetful)
        with pytest.raises(RequestError, match=r"at least two devices, cpu and npu:0! \(aten::masked_fill"):
            asyncio.run(answer(engine, request((1, 2, 3), 4)))
    assert len(asyncio.run(answer(engine, request((1, 2, 3), 4))).ids) == 4


@pytest.mark.parametrize(("has", "chosen"), [(True, "bfloat16"), (False, "float16")])
def test_auto_is_bfloat16_where_the_chip_has_it(
    npu_engine: Callable[..., Engine], bfloat16: Callable[[bool], None], has: bool, chosen: str
) -> None:
    """A chip without bfloat16 is given none of the stored bfloat16 weights: the simulated one would raise."""
    bfloat16(has)
    engine = npu_engine(dtype="auto")
    assert engine.info.dtype == chosen
    assert len(asyncio.run(answer(engine, request((1, 2, 3), 4))).ids) == 4


def test_a_chip_without_bfloat16_holds_none(bfloat16: Callable[[bool], None]) -> None:
    bfloat16(False)
    with pytest.raises(RuntimeError, match="no bfloat16"):
        torch.ones(3, dtype=torch.bfloat16).to("npu:0")


def test_parity_runs_what_the_chip_can(bfloat16: Callable[[bool], None]) -> None:
    hardware = HARDWARE["ascend"]
    assert unavailable(hardware) == ""
    for has, reason in ((True, ""), (False, "the NPU has no bfloat16")):
        bfloat16(has)
        reasons = {each.name: unsupported(hardware, each) for each in hardware.variants}
        assert reasons == {"float32": "", "bfloat16": reason, "float16": ""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"'bfloat16' is not available: npu:0 \(simulated device\) has no bfloat16; use"),
        ({"dtype": "int8"}, "dtype 'int8' is not offered on an NPU: there is no product with int8 weights"),
        ({"dtype": "float64"}, "dtype 'float64' is unknown; expected auto, bfloat16, float16, float32"),
        ({"device": "npu:2"}, "device 'npu:2' is not available: torch_npu .* sees 2, npu:0 to npu:1"),
        ({"devices": "npu:0,npu:7"}, "device 'npu:7' is not available"),
        ({"attention": "flash"}, "attention 'flash' is unknown; expected sdpa or eager"),
        ({"max_batch": 0}, "max_batch is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_had_is_named(
    npu_engine: Callable[..., Engine], bfloat16: Callable[[bool], None], options: dict[str, Any], message: str
) -> None:
    bfloat16(False)
    with pytest.raises(BackendError, match=message):
        npu_engine(**options)


def test_no_visible_npu_is_named(npu_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    npu = torch.npu  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(npu, "device_count", lambda: 0)
    with pytest.raises(BackendError, match=r"no NPU is visible: torch_npu .* sees 0; look at `npu-smi info`"):
        npu_engine()

    def broken() -> bool:
        raise RuntimeError("error code is 507008")

    monkeypatch.setattr(npu, "is_available", broken)
    with pytest.raises(BackendError, match="cannot look for NPUs: error code is 507008"):
        npu_engine()


def test_kernels_are_not_compiled_for_every_shape(npu_engine: Callable[..., Engine]) -> None:
    npu_engine()
    assert torch.npu.jit_compile is False  # pyright: ignore[reportAttributeAccessIssue]


def test_two_cards_share_eight_requests_and_close_together(
    npu_engine: Callable[..., Any], goldens: dict[str, Any]
) -> None:
    engine: SpreadEngine = npu_engine(devices="npu:0,npu:1")
    alone = npu_engine()
    requests = mixed_requests(goldens["prompts"], 8)
    assert engine.info.device == "npu:0,npu:1"
    assert engine.info.note.startswith("simulated device")
    assert engine.info.note.endswith("; requests are spread over 2 engines")

    async def main() -> None:
        expected = [(await answer(alone, each)).ids for each in requests]
        streams = [engine.generate(each) for each in requests]
        await asyncio.gather(*(anext(stream) for stream in streams))
        assert [member.open for member in engine._members] == [4, 4]
        for stream in streams:
            await stream.aclose()
        assert [member.open for member in engine._members] == [0, 0]
        assert [each.ids for each in await answers(engine, requests)] == expected
        await engine.close()
        with pytest.raises(RequestError, match="the engine is closed"):
            await answer(engine, requests[0])

    asyncio.run(main())
    assert engine.memory_meter is not None
    assert engine.memory_meter.source == "torch.npu allocator; sum of 2 devices"


def test_every_engine_works_on_its_card(npu_engine: Callable[..., Any]) -> None:
    """The card is a setting of the thread, and the memory is taken where the weights are."""
    before = [memory.settle().allocated for memory in simulated_npu.cards.memory]
    engine: SpreadEngine = npu_engine(devices=["npu:1", "npu:0"])

    async def main() -> list[int]:
        members = [member.engine for member in engine._members]
        assert all(isinstance(member, StepEngine) for member in members)
        return [await member.call(lambda: simulated_npu.cards.current) for member in members]  # type: ignore[attr-defined]

    assert asyncio.run(main()) == [1, 0]
    taken = [memory.settle().allocated - held for memory, held in zip(simulated_npu.cards.memory, before, strict=True)]
    assert taken[0] == taken[1] > 0


def test_a_card_that_fails_at_the_start_leaves_nothing_behind(
    npu_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = simulated_npu.cards.memory[0].settle().allocated
    npu = torch.npu  # pyright: ignore[reportAttributeAccessIssue]

    def name(card: int) -> str:
        if card == 1:
            raise RuntimeError("the card is lost")
        return simulated_npu.NAME

    monkeypatch.setattr(npu, "get_device_name", name)
    with pytest.raises(RuntimeError, match="the card is lost"):
        npu_engine(devices="npu:0,npu:1")
    assert simulated_npu.cards.memory[0].settle().allocated == before


def test_threads_reach_the_engines_own_thread(npu_engine: Callable[..., Any]) -> None:
    before = torch.get_num_threads()
    engine: StepEngine = npu_engine(threads=1)
    assert asyncio.run(engine.call(torch.get_num_threads)) == 1
    torch.set_num_threads(before)


def plain_model(folder: Path, kernel: attention.AttentionKernel) -> TorchStepModel:
    """The step model on the CPU, held and computed as on an accelerator."""
    weights = WeightFormat("float32", CPU, torch.float32, lambda weight: PlainLinear(weight.to(torch.float32)))
    plans = attention.padded_plans(kernel)
    config = LMConfig.from_file(folder / "config.json")
    return TorchStepModel(folder, config, weights, max_tokens=8192, max_batch=16, plans=plans)


def chunked_logits(model: TorchStepModel, ids: list[int], chunk: int) -> NDArray[np.float32]:
    slot = allocate(model, len(ids))
    step = functools.partial(every_row, slot)
    parts = [model.step([step(ids[at : at + chunk], at)])[0] for at in range(0, len(ids), chunk)]
    model.release(slot)
    return np.concatenate([part for part in parts if part is not None])
