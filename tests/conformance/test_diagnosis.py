"""Hints name the metric that moved, and tell faults apart; each is planted on the tiny checkpoint's own logits."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpa_conformance.diagnosis import diagnose
from gpa_conformance.limits import DtypeLimits, load_limits
from gpa_conformance.metrics import LogitsComparison, LogitsMetrics
from gpa_conformance.prompts import spread_ids
from gpa_conformance.reference_rows import FullRows, keep_top
from gpa_engines.registry import create_engine

IDS = spread_ids(96, 5, 5141)


def logits_of(folder: Path, ids: list[int] = IDS, dtype: str = "float32") -> np.ndarray:
    async def ask() -> np.ndarray:
        engine = create_engine("torch", folder, device="cpu", dtype=dtype, threads=1)
        try:
            return await engine.logits(ids)
        finally:
            await engine.close()

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> np.ndarray:
    return logits_of(tiny_checkpoint)


@pytest.fixture(scope="module")
def float32() -> DtypeLimits:
    return load_limits().for_dtype("float32")


def compare(reference: np.ndarray, x: np.ndarray, top: bool = False) -> LogitsMetrics:
    positions = np.arange(len(reference))
    comparison = LogitsComparison(None)
    comparison.add(keep_top(reference, positions, None) if top else FullRows(positions, reference), x)
    return comparison.result()


def with_config(folder: Path, target: Path, **values: object) -> Path:
    copy = Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("BiCodec", "glm*")))
    config = json.loads((copy / "config.json").read_text())
    for name, value in values.items():
        holder = config["rope_parameters"] if name in config.get("rope_parameters", {}) else config
        holder[name] = value
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_equal_logits_and_rounding_give_no_hint(reference: np.ndarray, float32: DtypeLimits) -> None:
    assert diagnose(compare(reference, reference), float32) == []
    assert diagnose(compare(reference, reference * np.float32(1 + 1e-6)), float32) == []


def test_healthy_bfloat16_gives_no_hint(reference: np.ndarray, tiny_checkpoint: Path) -> None:
    limits = load_limits().for_dtype("bfloat16")
    assert diagnose(compare(reference, logits_of(tiny_checkpoint, dtype="bfloat16")), limits) == []


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
class TestWholeExplanations:
    """One hint, and no other: it explains everything."""

    def hint(self, reference: np.ndarray, x: np.ndarray, top: bool, dtype: str) -> str:
        (only,) = diagnose(compare(reference, x.astype(np.float32), top), load_limits().for_dtype(dtype))
        return only

    def test_scaled_logits(self, reference: np.ndarray, top: bool, dtype: str) -> None:
        hint = self.hint(reference, 1.5 * reference, top, dtype)
        assert hint.startswith("scale: the logits are the reference's times 1.5, the same at every position")
        assert "offset" not in hint

    def test_constant_shift(self, reference: np.ndarray, top: bool, dtype: str) -> None:
        hint = self.hint(reference, reference + 3, top, dtype)
        assert hint.startswith("offset: every row is the reference's plus a constant, on average 3, the same")

    def test_a_shift_of_each_row_its_own(self, reference: np.ndarray, top: bool, dtype: str) -> None:
        shifts = np.linspace(-4, 2, len(reference))[:, None]
        hint = self.hint(reference, reference + shifts, top, dtype)
        assert hint.startswith("offset: ")
        assert "differing by 6" in hint

    def test_log_probabilities(self, reference: np.ndarray, top: bool, dtype: str) -> None:
        x = reference - np.log(np.exp(reference.astype(np.float64)).sum(-1, keepdims=True))
        assert "log-probabilities" in self.hint(reference, x, top, dtype)

    def test_probabilities(self, reference: np.ndarray, top: bool, dtype: str) -> None:
        weights = np.exp(reference.astype(np.float64))
        assert "these are probabilities" in self.hint(reference, weights / weights.sum(-1, keepdims=True), top, dtype)


def test_rows_of_the_next_position(reference: np.ndarray, float32: DtypeLimits) -> None:
    (hint,) = diagnose(compare(reference[:-1], reference[1:]), float32)
    assert "one position later" in hint
    (hint,) = diagnose(compare(reference[1:], reference[:-1]), float32)
    assert "one position earlier" in hint


def test_nan_is_named_with_its_first_position(reference: np.ndarray, float32: DtypeLimits) -> None:
    broken = reference.copy()
    broken[40:44, 7] = np.nan
    (hint,) = diagnose(compare(reference, broken), float32)
    assert hint.startswith("non_finite: 4 NaN or infinite logits at 4 of 96 positions, the first at 40")
    broken[:] = np.inf
    (hint,) = diagnose(compare(reference, broken), float32)
    assert "every position" in hint


def test_nan_does_not_hide_another_fault(reference: np.ndarray, float32: DtypeLimits) -> None:
    broken = 1.5 * reference
    broken[40, 7] = np.nan
    first, second = diagnose(compare(reference, broken.astype(np.float32)), float32)
    assert first.startswith("non_finite")
    assert second.startswith("scale")


def test_wrong_theta_is_a_matter_of_positions(
    reference: np.ndarray, tiny_checkpoint: Path, tmp_path: Path, float32: DtypeLimits
) -> None:
    x = logits_of(with_config(tiny_checkpoint, tmp_path / "theta", rope_theta=100.0))
    (hint,) = diagnose(compare(reference, x), float32)
    assert "position 0 is right" in hint
    assert "rotary" in hint


def test_wrong_eps_is_wrong_at_position_0_too(
    reference: np.ndarray, tiny_checkpoint: Path, tmp_path: Path, float32: DtypeLimits
) -> None:
    x = logits_of(with_config(tiny_checkpoint, tmp_path / "eps", rms_norm_eps=1e-2))
    (hint,) = diagnose(compare(reference, x), float32)
    assert "position 0 is wrong too" in hint
    assert "eps" in hint


def test_another_head_has_nothing_in_common(reference: np.ndarray, float32: DtypeLimits) -> None:
    other = reference[:, np.random.default_rng(0).permutation(reference.shape[1])]
    assert "nothing in common" in diagnose(compare(reference, other), float32)[0]


def test_an_id_that_was_changed_is_found_at_its_position(tiny_checkpoint: Path, reference: np.ndarray) -> None:
    ids = list(IDS)
    ids[30] = ids[31]
    limits = load_limits().for_dtype("float32")
    hints = diagnose(compare(reference, logits_of(tiny_checkpoint, ids)), limits)
    assert any("right up to position 29, wrong from 30 on" in hint for hint in hints)


def test_what_was_estimated_is_said(reference: np.ndarray, float32: DtypeLimits) -> None:
    other = reference[:, ::-1]
    assert any("kl is an estimate" in hint for hint in diagnose(compare(reference, other, top=True), float32))
