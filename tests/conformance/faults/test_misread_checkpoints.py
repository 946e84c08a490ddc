"""An engine that misreads the checkpoint is caught, in both dtypes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance.faults import altered_checkpoints as alter
from tests.conformance.faults.suite import DTYPES, Fault, Suite, expect_caught, result

EPS, THETA = "logits/suspect-eps", "logits/suspect-theta"

FAULTS: list[tuple[Callable[[Path], None], Fault]] = [
    (alter.set_eps, Fault("rms eps 1e-5", EPS, "mistake", "moved in the direction of rms_norm_eps")),
    (alter.set_theta, Fault("rope theta 1e4", f"{THETA},logits/stt-speech", "mistake", "moved in the direction of")),
    (
        alter.ignore_tying,
        Fault("tied embedding ignored", "logits/ascend-1,generate/tts", "rel_l2", "a tied embedding ignored"),
    ),
    (
        alter.swap_layer_norms,
        Fault("swapped layer norms", "logits/ascend-1,logits/tts-english", "rel_l2", "position 0 is wrong too"),
    ),
    (alter.swap_head_norms, Fault("swapped query and key norms", "logits/ascend-1", "rel_l2", "position 0 is right")),
    (alter.swap_gate_and_up, Fault("swapped gate and up", "logits/ascend-1", "rel_l2", "position 0 is wrong too")),
    (alter.swap_head_groups, Fault("swapped head groups", "logits/ascend-1", "rel_l2", "")),
    (alter.forget_final_norm, Fault("final norm forgotten", "logits/ascend-1", "rel_l2", "position 0 is wrong too")),
    (alter.drop_last_layer, Fault("last layer dropped", "logits/ascend-1", "rel_l2", "position 0 is wrong too")),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("change", "fault"), FAULTS, ids=[str(fault) for _, fault in FAULTS])
def test_misread_checkpoint_is_caught(
    suite: Suite, tmp_path: Path, change: Callable[[Path], None], fault: Fault, dtype: str
) -> None:
    report = suite.run(suite.misread(_altered(suite, tmp_path, change), dtype), fault.caught_by)
    expect_caught(report, fault)


def test_wrong_eps_and_swapped_norms_are_told_apart(suite: Suite, tmp_path: Path) -> None:
    """The eps moves the logits in its own direction, the norms in another; neither looks like a scale or an offset."""
    cases = f"{EPS},{THETA},logits/ascend-1"
    eps = suite.run(suite.misread(_altered(suite, tmp_path / "eps", alter.set_eps), "float32"), cases)
    norms = suite.run(suite.misread(_altered(suite, tmp_path / "norms", alter.swap_layer_norms), "float32"), cases)
    assert result(eps, EPS).metrics["coefficient"] == pytest.approx(1, abs=0.02)
    assert abs(result(eps, THETA).metrics["coefficient"]) < 0.1
    assert "rms_norm_eps" in result(eps, EPS).reason
    assert "moved in the direction" not in result(norms, EPS).reason
    for report in (eps, norms):
        reason = result(report, "logits/ascend-1").reason
        assert "position 0 is wrong too" in reason
        assert "plus a constant" not in reason
        assert "the reference's times" not in reason


def _altered(suite: Suite, folder: Path, change: Callable[[Path], None]) -> Path:
    folder.mkdir(exist_ok=True)
    altered = alter.copy_language_model(suite.checkpoint.root, folder / "altered")
    change(altered)
    return altered
