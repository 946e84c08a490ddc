"""Reading a converted folder again: every tensor against the checkpoint, and the logits of both models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from gpa_codecs.vocabulary import TokenSpace
from gpa_codecs.weights import SAFETENSORS, TensorSpec, read_header
from gpa_engines.backends.mlx.device import choose_dtype
from gpa_engines.backends.mlx.engine import MlxStepModel
from gpa_engines.backends.mlx.linear import StoredWeight, dequantize
from gpa_engines.backends.mlx.weights import WeightFolder
from gpa_engines.step_model import SlotRequest, StepRow

from .faults import ConversionFault
from .plan import Plan
from .writing import Progress, convert_tensor, number

TEXT = "Hello, how are you doing today?"

LOGIT_LIMITS = {"F32": 1e-6, "F16": 0.005, "BF16": 0.05, 8: 0.15, 4: 1.0}
"""Relative L2 of the logits beyond which something is broken: by stored dtype, or by bits. Both models compute in
float32, so that only the rounding of the weights counts. With random weights of the released size 8 bits in groups of
64 measured 0.028, 4 bits 0.41; float16 of the released bfloat16 weights 3e-6."""


@dataclass(frozen=True, slots=True)
class Verification:
    """tensors: compared. weight_error: relative L2 of all weights together. steps: the largest error of a weight, in
    steps of its group (0 without quantisation). logits: relative L2 over `positions` positions of one prompt. agreed:
    at how many of them both models rate the same id highest."""

    tensors: int
    weight_error: float
    steps: float
    logits: float
    agreed: int
    positions: int


def verify(plan: Plan, folder: Path, progress: Progress) -> Verification:
    """Compare a converted folder with its source. Raises ConversionFault naming the tensor."""
    _check_header(plan, read_header(folder / SAFETENSORS))
    converted = WeightFolder.open(folder)
    with mx.stream(mx.cpu):
        weight_error, steps = _compare_tensors(plan, converted, progress)
    ids = _prompt(plan.space)
    progress("logits of the checkpoint", len(plan.shapes), len(plan.shapes))
    expected = _logits(plan.source, ids)
    progress("logits of the converted model", len(plan.shapes), len(plan.shapes))
    logits = _logits(converted, ids)
    error = _relative_l2(logits, expected)
    limit = LOGIT_LIMITS[plan.quantization.bits if plan.quantization else plan.dtype or "F32"]
    if not error <= limit:
        raise ConversionFault(
            f"the logits are {error:.3g} (relative L2) from the checkpoint's; at most {limit:g} is right"
        )
    agreed = int((logits.argmax(axis=1) == expected.argmax(axis=1)).sum())
    return Verification(len(plan.stored), weight_error, steps, error, agreed, len(ids))


def _check_header(plan: Plan, found: dict[str, TensorSpec]) -> None:
    wanted = {name: TensorSpec(*spec) for name, spec in plan.stored.items()}
    if different := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        name = different[0]
        raise ConversionFault(f"{SAFETENSORS}: {name} is {found.get(name)}; expected {wanted.get(name)}")


def _compare_tensors(plan: Plan, converted: WeightFolder, progress: Progress) -> tuple[float, float]:
    """(relative L2 of all weights, largest error in steps)."""
    source, result = plan.source.read(), converted.read()
    squares = np.zeros(2)
    largest = 0.0
    for done, (name, shape) in enumerate(plan.shapes.items()):
        progress(f"reading {name} again", done, len(plan.shapes))
        weight, stored = source.matrix(name).weight, result.matrix(name)
        expected = convert_tensor(name, weight, len(shape) == 2, plan.quantization, plan.dtype)
        for array, again in zip(expected.values(), stored.arrays, strict=True):
            if not mx.array_equal(array, again).item():
                raise ConversionFault(f"{SAFETENSORS}: {name} was not stored as it was converted")
        values = weight.astype(mx.float32)
        error = mx.abs(_values(stored, plan) - values)
        squares += [number(mx.sum(error * error)), number(mx.sum(values * values))]
        largest = max(largest, _steps(name, error, stored))
    return float(np.sqrt(squares[0] / squares[1])), largest


def _values(stored: StoredWeight, plan: Plan) -> mx.array:
    if stored.scales is None:
        return stored.weight.astype(mx.float32)
    assert plan.quantization is not None
    return dequantize(stored, plan.quantization)


def _steps(name: str, error: mx.array, stored: StoredWeight) -> float:
    """The largest error in steps. Rounding makes half a step; MLX moves a group's grid onto zero, another half."""
    if stored.scales is None:
        return 0.0
    rows, groups = stored.scales.shape
    steps = mx.abs(stored.scales)
    worst = mx.max(error.reshape(rows, groups, -1), axis=2)
    ratio = number(mx.max(mx.where(steps > 0, worst / mx.maximum(steps, 1e-30), 0)))
    if ratio > 1.01:
        raise ConversionFault(f"{name}: a value is {ratio:.2f} steps of its group from the checkpoint's; expected 1")
    return ratio


def _prompt(space: TokenSpace) -> list[int]:
    control = space.control
    return [control.start_content, *space.encode_text(TEXT), control.end_content, *space.semantic.ids([0, 1, 2])]


def _logits(folder: WeightFolder, ids: list[int]) -> NDArray[np.float32]:
    """float32[T, V], computed in float32 on the CPU."""
    _, compute = choose_dtype("auto", "cpu", folder)
    model = MlxStepModel(folder, "cpu", compute, max_tokens=len(ids), max_batch=1)
    model.load()
    slot = model.allocate(SlotRequest(len(ids), ids))
    assert slot is not None
    (logits,) = model.step([StepRow(slot.number, ids, 0, "at", offsets=range(len(ids)))])
    assert logits is not None
    return logits


def _relative_l2(x: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    x64, reference64 = x.astype(np.float64), reference.astype(np.float64)
    return float(np.linalg.norm(x64 - reference64) / np.linalg.norm(reference64))
