"""The MLX step model is the torch engine's Qwen3, however its rows are cut, joined, quantised and restricted."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gpa_codecs.errors import RequestError
from gpa_engines.step_model import CandidateSet, Interruptible, StepInterrupted, StepRow
from tests.engines.generating import allocate, every_row, load_model, relative_l2

mx = pytest.importorskip("mlx.core", reason="needs mlx")

from gpa_engines.backends.mlx.attention import RowPlan  # noqa: E402
from gpa_engines.backends.mlx.device import choose_dtype  # noqa: E402
from gpa_engines.backends.mlx.engine import MlxStepModel  # noqa: E402
from gpa_engines.backends.mlx.kv_cache import KVCache  # noqa: E402
from gpa_engines.backends.mlx.linear import StoredWeight, WeightFormat, dequantize, quantize  # noqa: E402
from gpa_engines.backends.mlx.weights import WeightFolder  # noqa: E402
from gpa_engines.checkpoint.checks import lm_shapes  # noqa: E402
from gpa_engines.checkpoint.mlx_quantization import Quantization  # noqa: E402

LENGTH = 150
VOCAB = 5141
FORMATS = ("float32", "bfloat16", "float16", "mlx-8bit", "mlx-4bit")

EXACT = sys.platform == "linux" and "LD_PRELOAD" not in os.environ
"""The BLAS of MLX's Linux wheel sums a row alike whatever rows are beside it; others need not."""


def load(folder: Path, dtype: str = "auto", max_tokens: int = 8192) -> MlxStepModel:
    opened = WeightFolder.open(folder)
    _, compute = choose_dtype(dtype, "cpu", opened)
    model = MlxStepModel(opened, "cpu", compute, max_tokens=max_tokens, max_batch=16)
    model.load()
    return model


def logits(model: MlxStepModel, ids: Sequence[int], cuts: Sequence[int] = ()) -> NDArray[np.float32]:
    """float32[T, V]; the ids are fed in the pieces that the cuts leave."""
    slot = allocate(model, len(ids))
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        (part,) = model.step([every_row(slot, ids[start:stop], start)])
        assert part is not None
        parts.append(part)
    model.release(slot)
    return np.concatenate(parts)


def assert_same_rows(ours: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    if EXACT:
        np.testing.assert_array_equal(ours, expected)
    else:
        assert relative_l2(ours, expected) < 1e-3


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(0).integers(0, VOCAB, LENGTH).tolist()


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path, ids: list[int]) -> NDArray[np.float32]:
    model = load_model(tiny_checkpoint)
    (rows,) = model.step([every_row(allocate(model, LENGTH), ids, 0)])
    assert rows is not None
    return rows


@pytest.fixture(scope="module")
def model_of(tiny_checkpoint: Path, quantized: Callable[[int], Path]) -> Callable[[str], MlxStepModel]:
    """model_of("mlx-8bit"): the tiny model in one of the formats, loaded once."""
    loaded: dict[str, MlxStepModel] = {}

    def get(name: str) -> MlxStepModel:
        if name not in loaded:
            bits = {"mlx-8bit": 8, "mlx-4bit": 4}.get(name)
            loaded[name] = load(quantized(bits)) if bits else load(tiny_checkpoint, name)
        return loaded[name]

    return get


@pytest.mark.parametrize(
    "cuts", [(), (64, 128), (1, 8, 93), range(1, LENGTH)], ids=["whole", "chunks", "odd", "tokens"]
)
def test_float32_is_the_torch_engines(
    model_of: Callable[[str], MlxStepModel], ids: list[int], reference: NDArray[np.float32], cuts: Sequence[int]
) -> None:
    ours = logits(model_of("float32"), ids, cuts)
    assert relative_l2(ours, reference) < 2e-6
    assert max(map(relative_l2, ours, reference)) < 4e-6


@pytest.mark.parametrize(
    ("name", "limit"), [("bfloat16", 0.02), ("float16", 0.003), ("mlx-8bit", 0.04), ("mlx-4bit", 0.6)]
)
def test_smaller_formats_stay_near(
    model_of: Callable[[str], MlxStepModel],
    ids: list[int],
    reference: NDArray[np.float32],
    name: str,
    limit: float,
) -> None:
    assert 0 < relative_l2(logits(model_of(name), ids), reference) < limit


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_is_the_torch_engine_on_the_weights_that_it_stands_for(
    tiny_checkpoint: Path, quantized: Callable[[int], Path], tmp_path: Path, ids: list[int], bits: int
) -> None:
    converted = WeightFolder.open(quantized(bits))
    assert converted.quantization is not None
    tensors, values = converted.read(), {}
    for name in lm_shapes(converted.config):
        stored = tensors.matrix(name)
        plain = stored.weight if stored.scales is None else dequantize(stored, converted.quantization)
        values[name] = plain.astype(mx.float32)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), values)
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    theirs = load_model(tmp_path)
    (expected,) = theirs.step([every_row(allocate(theirs, LENGTH), ids, 0)])
    assert expected is not None
    assert relative_l2(logits(load(quantized(bits)), ids), expected) < 2e-6


def test_late_positions_turn_by_the_same_angles(tiny_checkpoint: Path) -> None:
    ours, theirs = load(tiny_checkpoint, max_tokens=32768), load_model(tiny_checkpoint, max_tokens=32768)
    angles = theirs.model.rotation[32000:].numpy()
    cosines, sines = (np.array(table)[32000:] for table in ours.model.rotation)
    half = cosines.shape[1] // 2
    np.testing.assert_allclose(cosines[:, :half], angles[..., 0], rtol=0, atol=2e-7)
    np.testing.assert_allclose(sines[:, half:], angles[..., 1], rtol=0, atol=2e-7)
    np.testing.assert_array_equal(sines[:, :half], -sines[:, half:])
    np.testing.assert_array_equal(cosines[:, :half], cosines[:, half:])


@pytest.mark.parametrize("name", FORMATS)
def test_neighbours_do_not_change_a_row(model_of: Callable[[str], MlxStepModel], ids: list[int], name: str) -> None:
    model = model_of(name)
    alone = logits(model, ids, cuts=(64, *range(128, LENGTH)))
    own, *others = slots = [allocate(model, 200) for _ in range(9)]
    together = []
    fed = dict.fromkeys(others, 0)
    for step, (start, stop) in enumerate([(0, 64), (64, 128), *((at, at + 1) for at in range(128, LENGTH))]):
        rows = [every_row(own, ids[start:stop], start)]
        for place, other in enumerate(others[: 1 + step % 8]):
            count = 1 if step % 3 else 1 + 3 * place
            neighbour = [(step + 31 * place + at) % VOCAB for at in range(count)]
            rows.insert(place % 2, StepRow(other, neighbour, fed[other], "last" if place % 3 else "none"))
            fed[other] += count
        results = model.step(rows)
        together.append(next(result for row, result in zip(rows, results, strict=True) if row.slot == own))
    for slot in slots:
        model.release(slot)
    assert_same_rows(np.concatenate(together), alone)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "wanted",
    [np.arange(4816, VOCAB), np.array([514, *range(4816, VOCAB)]), np.arange(0, VOCAB, 2)],
    ids=["one range", "range and stop id", "half of all"],
)
def test_a_restricted_head_gives_the_full_heads_columns(
    model_of: Callable[[str], MlxStepModel], ids: list[int], name: str, wanted: NDArray[np.int64]
) -> None:
    model = model_of(name)
    candidates = CandidateSet(wanted)
    slots = [allocate(model, 40) for _ in range(3)]
    full, part, last = model.step(
        [
            every_row(slots[0], ids[:40], 0),
            StepRow(slots[1], ids[:40], 0, "at", candidates, offsets=range(40)),
            StepRow(slots[2], ids[:40], 0, "last", candidates),
        ]
    )
    for slot in slots:
        model.release(slot)
    assert full is not None
    assert part is not None
    assert last is not None
    assert_same_rows(part, full[:, wanted])
    assert_same_rows(last, full[-1, wanted])


def test_a_head_of_its_own_is_used(untied_checkpoint: Path, ids: list[int]) -> None:
    theirs = load_model(untied_checkpoint)
    (expected,) = theirs.step([every_row(allocate(theirs, 40), ids[:40], 0)])
    assert expected is not None
    ours = logits(load(untied_checkpoint), ids[:40])
    assert relative_l2(ours, expected) < 2e-6


def test_each_row_gets_what_it_asks_for(model_of: Callable[[str], MlxStepModel], ids: list[int]) -> None:
    model = model_of("float32")
    expected = logits(model, ids[:50])
    few = CandidateSet(np.array([3, 7, 500]))
    slots = [allocate(model, 50) for _ in range(4)]
    rows = [
        StepRow(slots[0], ids[:50], 0, "none"),
        StepRow(slots[1], ids[:50], 0, "at", few, offsets=(0, 17)),
        StepRow(slots[2], ids[:30], 0, "last"),
        StepRow(slots[3], ids[:50], 0, "last", few),
    ]
    nothing, two, whole, three = model.step(rows)
    for slot in slots:
        model.release(slot)
    assert nothing is None
    assert two is not None
    assert whole is not None
    assert three is not None
    assert (two.dtype, two.shape, whole.shape, three.shape) == (np.float32, (2, 3), (VOCAB,), (3,))
    assert_same_rows(two, expected[[0, 17]][:, few.ids])
    assert_same_rows(whole, expected[29])
    assert_same_rows(three, expected[49, few.ids])


@pytest.mark.parametrize("token", [-1, VOCAB, 10**6])
def test_an_id_outside_the_vocabulary_never_reaches_mlx(
    model_of: Callable[[str], MlxStepModel], ids: list[int], token: int
) -> None:
    model = model_of("float32")
    slot = allocate(model, 8)
    with pytest.raises(RequestError, match=rf"ids\[1\] is {token}; the vocabulary has ids 0 to {VOCAB - 1}"):
        model.step([StepRow(slot, [5, token], 0)])
    (row,) = model.step([StepRow(slot, [5, 6], 0)])
    assert row is not None
    assert np.isfinite(row).all()
    model.release(slot)


def test_a_position_beyond_the_slot_is_refused(model_of: Callable[[str], MlxStepModel]) -> None:
    model = model_of("float32")
    slot = allocate(model, 4)
    with pytest.raises(IndexError, match="has 4 positions; 5 are needed"):
        model.step([StepRow(slot, [1, 2, 3, 4, 5], 0)])
    model.release(slot)


def test_a_step_that_was_broken_off_may_be_repeated(
    model_of: Callable[[str], MlxStepModel], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("float32")
    assert isinstance(model, Interruptible)
    expected = logits(model, ids, cuts=(64,))
    slot = allocate(model, LENGTH)
    (first,) = model.step([every_row(slot, ids[:64], 0)])
    attend, layers = RowPlan.attend, []

    def attend_and_interrupt(plan: RowPlan, layer: int, *arrays: Any) -> Any:
        layers.append(layer)
        if layer == 1:
            model.interrupt()
        return attend(plan, layer, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(RowPlan, "attend", attend_and_interrupt)
        with pytest.raises(StepInterrupted):
            model.step([every_row(slot, [7] * (LENGTH - 64), 64)])
    assert layers == [0, 1]
    (second,) = model.step([every_row(slot, ids[64:], 64)])
    model.release(slot)
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(np.concatenate([first, second]), expected)


def test_a_decode_step_writes_the_cache_in_place(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    slots = [allocate(model, 2048) for _ in range(2)]
    model.step([StepRow(slot, [5], 2046) for slot in slots])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model.step([StepRow(slot, [5], 2047) for slot in slots])
    one_array = model.cache.arrays(slots[0])[0].nbytes
    assert one_array == 2048 * 2 * 32 * 4
    # Twelve of them are written; the scores of four heads over 2,048 positions are far smaller than one.
    assert mx.get_peak_memory() - before < one_array


def test_a_slot_grows_with_what_it_holds_and_no_further_than_it_was_given() -> None:
    cache = KVCache(layers=2, kv_heads=1, head_dim=4, tokens=1000, dtype=mx.float32)
    first = cache.allocate(600)
    assert first is not None
    assert cache.allocate(401) is None
    second = cache.allocate(400)
    assert second is not None
    assert cache.arrays(second) == []
    capacities = []
    for length in (1, 256, 257, 600):
        cache.reserve(first, length)
        keys = mx.full((1, 1, 1, 4), length)
        seen, _ = cache.write(first, 1, length - 1, keys, keys)
        assert seen.shape[2] == length
        capacities.append(cache.arrays(first)[0].shape[2])
    assert capacities == [256, 256, 512, 600]
    kept = np.array(cache.arrays(first)[1])[0, 0, :, 0]
    assert {int(at): int(kept[at]) for at in np.flatnonzero(kept)} == {0: 1, 255: 256, 256: 257, 599: 600}
    assert not np.array(cache.arrays(first)[0]).any()
    cache.release(first)
    assert cache.allocate(600) is not None


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_rows_are_selected_with_their_scales(bits: int) -> None:
    weight = mx.array(np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32))
    quantization = Quantization(bits, 32)
    stored = quantize(weight, quantization)
    weights = WeightFormat(mx.float32, quantization, transposed=True)
    whole = np.array(weights.values(stored))
    for chosen in (np.arange(7, 19), np.array([0, 3, 39])):
        selected = stored.select(chosen)
        assert isinstance(selected, StoredWeight)
        np.testing.assert_array_equal(np.array(weights.values(selected)), whole[chosen])
        x = mx.array(np.eye(64, dtype=np.float32))
        np.testing.assert_allclose(np.array(weights.build(selected)(x)), whole[chosen].T, atol=1e-6)
    assert np.abs(whole - np.array(weight)).max() < (0.5 if bits == 4 else 0.03)
