"""The torch step model is transformers' Qwen3, however its rows are cut, joined and laid out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from gpa_codecs.errors import CheckpointError
from gpa_engines.backends.torch import attention, cuda_graphs, linear, model
from gpa_engines.backends.torch.engine import TorchStepModel
from gpa_engines.backends.torch.kv_cache import KVCache
from gpa_engines.step_model import CandidateSet, StepRow
from tests.engines.generating import CPU, allocate, every_row, load_model, relative_l2

LENGTH = 150
DTYPES = ("float32", "bfloat16", "float16", "int8")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def transformers_logits(folder: Path, ids: Sequence[int], dtype: torch.dtype) -> NDArray[np.floating]:
    reference = Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return reference(torch.tensor([list(ids)])).logits[0].double().numpy()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(0).integers(0, 5141, LENGTH).tolist()


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, ids: list[int]) -> NDArray[np.floating]:
    return transformers_logits(tiny_checkpoint, ids, torch.float32)


def logits(step_model: TorchStepModel, ids: Sequence[int], cuts: Sequence[int] = ()) -> NDArray[np.float32]:
    """float32[T, V]; the ids are fed in the pieces that the cuts leave."""
    slot = allocate(step_model, len(ids))
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        (part,) = step_model.step([every_row(slot, ids[start:stop], start)])
        assert part is not None
        parts.append(part)
    step_model.release(slot)
    return np.concatenate(parts)


@pytest.mark.parametrize(
    "cuts", [(), (64, 128), (1, 8, 93), range(1, LENGTH)], ids=["whole", "chunks", "odd", "tokens"]
)
@pytest.mark.usefixtures("threads")
def test_float32_is_transformers(
    tiny_checkpoint: Path, ids: list[int], reference: NDArray[np.floating], cuts: Sequence[int]
) -> None:
    ours = logits(load_model(tiny_checkpoint), ids, cuts)
    # transformers' own float32 is 1e-6 in all, and 2e-6 at its worst position, from its float64 on this checkpoint.
    assert relative_l2(ours, reference) < 1.2e-6
    assert max(map(relative_l2, ours, reference)) < 3e-6


def test_float32_is_as_close_to_the_exact_result_as_transformers(
    tiny_checkpoint: Path, ids: list[int], reference: NDArray[np.floating]
) -> None:
    exact = transformers_logits(tiny_checkpoint, ids, torch.float64)
    assert relative_l2(logits(load_model(tiny_checkpoint), ids), exact) < 1.3 * relative_l2(reference, exact)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.02), ("float16", 0.003), ("int8", 0.05)])
def test_smaller_dtypes_stay_near(
    tiny_checkpoint: Path, ids: list[int], reference: NDArray[np.floating], dtype: str, limit: float
) -> None:
    ours = logits(load_model(tiny_checkpoint, dtype), ids)
    assert 0 < relative_l2(ours, reference) < limit


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_do_not_change_a_bit(tiny_checkpoint: Path, ids: list[int], dtype: str) -> None:
    step_model = load_model(tiny_checkpoint, dtype)
    alone = logits(step_model, ids, cuts=(64, *range(128, LENGTH)))
    slots = [allocate(step_model, 200) for _ in range(9)]
    own, *others = slots
    together = []
    fed = dict.fromkeys(others, 0)
    for step, (start, stop) in enumerate([(0, 64), (64, 128), *((at, at + 1) for at in range(128, LENGTH))]):
        rows = [every_row(own, ids[start:stop], start)]
        for place, other in enumerate(others[: 1 + step % 8]):
            count = 1 if step % 3 else 1 + 3 * place
            neighbour = [(step + 31 * place + at) % 5141 for at in range(count)]
            rows.insert(place % 2, StepRow(other, neighbour, fed[other], "last" if place % 3 else "none"))
            fed[other] += count
        results = step_model.step(rows)
        together.append(next(result for row, result in zip(rows, results, strict=True) if row.slot == own))
    np.testing.assert_array_equal(np.concatenate(together), alone)


def test_the_padded_plan_of_accelerators_gives_the_row_plans_result(
    tiny_checkpoint: Path, ids: list[int], reference: NDArray[np.floating], monkeypatch: pytest.MonkeyPatch
) -> None:
    step_model = load_model(tiny_checkpoint)
    step_model.cache.keys.fill_(float("nan"))
    step_model.cache.values.fill_(float("nan"))
    monkeypatch.setattr(
        step_model, "_plan", lambda spans, rows: attention.PaddedPlan(step_model.cache, spans, bucket=32)
    )
    monkeypatch.setattr(step_model, "format", linear.WeightFormat("float32", CPU, torch.float32, linear.PlainLinear))
    first, second = allocate(step_model, LENGTH), allocate(step_model, LENGTH)
    assert first is not None
    assert second is not None
    both = [
        step_model.step([every_row(first, ids[:40], 0), every_row(second, ids[:7], 0)]),
        step_model.step([every_row(second, ids[7:8], 7), every_row(first, ids[40:], 40)])[::-1],
        [None, step_model.step([every_row(second, ids[8:], 8)])[0]],
    ]
    for place in (0, 1):
        ours = np.concatenate([step[place] for step in both if step[place] is not None])
        assert relative_l2(ours, reference) < 1.2e-6


def test_rows_added_to_fill_a_fixed_shape_change_nothing(tiny_checkpoint: Path, ids: list[int]) -> None:
    step_model = load_model(tiny_checkpoint)
    slots = [allocate(step_model, 40) for _ in range(3)]
    for count, slot in enumerate(slots):
        step_model.step([StepRow(slot, ids[: 10 + count], 0)])
    spans = [attention.Span(step_model.cache.offset(slot), 10 + count, 1) for count, slot in enumerate(slots)]
    inputs = cuda_graphs.pad_decode(step_model.cache, ids[20:23], spans)
    assert [tuple(tensor.shape) for tensor in inputs.tensors] == [(4,), (4,), (4, 1, 1, 1, 256), (1024,), (4,)]
    with torch.inference_mode():
        padded = step_model.model.forward(inputs.ids, inputs.positions, inputs.plan)[:3]
        rows = attention.RowPlan(step_model.cache, spans, 3)
        plain = step_model.model.forward(inputs.ids[:3], inputs.positions[:3], rows)
    assert relative_l2(padded.numpy(), plain.numpy()) < 1e-6


def test_rotation_is_the_same_by_real_and_by_complex_products() -> None:
    generator = torch.Generator().manual_seed(0)
    x, rotation = torch.randn(5, 3, 8, generator=generator), torch.randn(5, 1, 4, 2, generator=generator)
    real = model.turn_pairs(x.clone(), rotation)
    torch.testing.assert_close(model.rotate(x, rotation), real)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("writer", [4, 5])
def test_configs_of_transformers_4_and_5(tmp_path: Path, tied: bool, writer: int) -> None:
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    reference = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    reference.save_pretrained(tmp_path)
    ids = list(range(0, 300, 5))
    expected = transformers_logits(tmp_path, ids, torch.float32)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    if writer == 4:
        values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
        values["torch_dtype"] = values.pop("dtype")
        path.write_text(json.dumps(values))
    else:
        assert "rope_theta" not in values
    assert relative_l2(logits(load_model(tmp_path), ids), expected) < 2e-6


def test_a_tied_head_is_the_embedding_table(tiny_checkpoint: Path) -> None:
    step_model = load_model(tiny_checkpoint)
    assert step_model.model.head_weight is step_model.model.embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", [range(4816, 5141), range(4000), (3, 514, *range(700, 900))], ids=str)
def test_a_restricted_head_computes_its_columns(
    tiny_checkpoint: Path, ids: list[int], dtype: str, wanted: Sequence[int]
) -> None:
    step_model = load_model(tiny_checkpoint, dtype)
    columns = np.array(wanted, dtype=np.int64)
    full = logits(step_model, ids[:9])[-1]
    slots = [allocate(step_model, 9) for _ in range(3)]
    rows = [StepRow(slot, ids[:9], 0, "last", CandidateSet(columns.copy())) for slot in slots]
    for result in step_model.step(rows):
        assert result is not None
        # An int8 layer has one scale per row, so cutting rows out changes nothing but rounding.
        assert relative_l2(result, full[columns]) < {"float32": 1e-6, "int8": 3e-3}.get(dtype, 3e-3)


def test_the_head_keeps_a_bounded_number_of_restrictions(tiny_checkpoint: Path) -> None:
    step_model = load_model(tiny_checkpoint)
    slot = allocate(step_model, 20)
    for at in range(10):
        wanted = CandidateSet(np.arange(at, at + 5))
        (result,) = step_model.step([StepRow(slot, [at], at, "last", wanted)])
        assert result is not None
        assert result.shape == (5,)
    assert len(step_model.head.restricted) == step_model.head.MAX_KEPT


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"lacks 1 of .*model\.layers\.1\.mlp\.up_proj\.weight"),
        ("model.layers.0.self_attn.q_norm.weight", (16,), r"q_norm\.weight has shape \(16,\); expected \(32,\)"),
        (
            "model.embed_tokens.weight",
            (5140, 64),
            r"embed_tokens\.weight has shape \(5140, 64\); expected \(5141, 64\)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    tiny_checkpoint: Path, tmp_path: Path, name: str, change: tuple[int, ...] | None, message: str
) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = tensor[: change[0]].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_full_cache_closes_its_gaps_and_keeps_what_it_holds() -> None:
    cache = KVCache(layers=2, kv_heads=1, head_dim=4, tokens=30, dtype=torch.float32, device=CPU)
    slots = [cache.allocate(10) for _ in range(3)]
    assert cache.allocate(1) is None
    middle = cache.offset(slots[1] or 0)
    cache.keys[:, :, middle : middle + 10] = torch.arange(10.0)[:, None]
    cache.values[:, :, middle : middle + 10] = -torch.arange(10.0)[:, None]
    cache.release(slots[0] or 0)
    cache.release(slots[2] or 0)
    assert cache.allocate(20) is not None
    assert cache.offset(slots[1] or 0) == 0
    assert torch.equal(cache.keys[1, 0, :10, 0], torch.arange(10.0))
    assert torch.equal(cache.values[1, 0, :10, 3], -torch.arange(10.0))


def test_int8_on_other_devices_is_the_same_arithmetic() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 16, generator=generator), torch.randn(5, 16, generator=generator).bfloat16()
    here, elsewhere = linear.Int8Linear(weight), linear.ExpandedInt8Linear(weight, CPU)
    torch.testing.assert_close(elsewhere(x), here(x), rtol=0.02, atol=0.02)
    torch.testing.assert_close(here.wide(x), here(x), rtol=0.02, atol=0.02)
    assert relative_l2(here(x).float().numpy(), (x.float() @ weight.T).numpy()) < 0.02
