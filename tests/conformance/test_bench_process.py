"""Children that measure: what the parent learns when one of them fails, and that the others go on."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from gpa_conformance.bench.process import Child, ChildFailed
from gpa_conformance.bench.rounds import Record, run_rounds
from gpa_conformance.bench.timing import peak_rss
from gpa_conformance.bench.workload import ContenderSpec, Workload

SPEC = ContenderSpec("engine", "torch", "float32", "cpu", 1)

WORKLOAD = Workload(prompt_tokens=8, new_tokens=4, batches=(1,), heads=("full",), repeats=3, logit_positions=0)


def contender(model: Path, timeout: float = 60) -> Child:
    settings = {
        "spec": asdict(SPEC),
        "model": str(model),
        "workload": asdict(WORKLOAD),
        "vocab_size": 5141,
        "semantic": (4816, 5141),
    }
    return Child("contender", settings, threads=1, timeout=timeout)


def crash(child: Child) -> None:
    os.kill(child.pid, signal.SIGKILL)


def test_a_child_that_dies_says_how(tiny_checkpoint: Path) -> None:
    with contender(tiny_checkpoint) as child:
        child.ask("load")
        crash(child)
        with pytest.raises(ChildFailed, match="killed by signal 9"):
            child.ask("warm_up")


def test_a_child_that_cannot_become_what_it_should_gives_the_reason(tmp_path: Path) -> None:
    settings = {"model": str(tmp_path / "nothing"), "stage": "voice", "kind": "torch", "device": "cpu", "threads": 1}
    with pytest.raises(ChildFailed, match="nothing"):
        Child("codec", settings, threads=1, timeout=60)


def test_a_child_answers_again_after_an_error(tiny_checkpoint: Path) -> None:
    with contender(tiny_checkpoint) as child:
        with pytest.raises(ChildFailed, match="not loaded"):
            child.ask("measure", kind="prefill", batch=1, head="full", seed=1)
        assert child.ask("load")["info"]["backend"] == "torch"


def test_threads_are_set_before_the_child_starts(tiny_checkpoint: Path) -> None:
    with contender(tiny_checkpoint) as child:
        environment = Path(f"/proc/{child.pid}/environ")
        if not environment.exists():
            pytest.skip("no /proc to look at a process's environment")
        assert b"OMP_NUM_THREADS=1" in environment.read_bytes().split(b"\0")


def test_the_peak_memory_of_a_child_is_not_its_parents(tiny_checkpoint: Path) -> None:
    ballast = bytearray(os.urandom(1024)) * (512 * 1024)
    with contender(tiny_checkpoint) as child:
        assert child.ask("load")["peak_rss"] < len(ballast) <= peak_rss()


def test_a_crash_in_the_second_round_keeps_the_first_and_spares_the_others(tiny_checkpoint: Path) -> None:
    told: list[str] = []

    with contender(tiny_checkpoint) as doomed, contender(tiny_checkpoint) as healthy:
        records = [Record(SPEC, WORKLOAD, child) for child in (doomed, healthy)]
        for record in records:
            record.facts = record.ask("load")

        def progress(step: str) -> None:
            told.append(step)
            if step.startswith("round 2") and sum(each.startswith("round 2") for each in told) == 1:
                crash(doomed)

        run_rounds(records, 3, progress)
    assert records[0].failed == "the process was killed by signal 9"
    assert [sample.round for sample in records[0].samples] == [0, 0]
    assert records[1].failed is None
    assert [sample.round for sample in records[1].samples] == [0, 0, 1, 1, 2, 2]


def test_contenders_take_turns_within_a_round(tiny_checkpoint: Path) -> None:
    told: list[str] = []
    with contender(tiny_checkpoint) as one, contender(tiny_checkpoint) as other:
        records = [
            Record(SPEC, WORKLOAD, one),
            Record(ContenderSpec("engine", "torch", "int8", "cpu", 1), WORKLOAD, other),
        ]
        for record in records:
            record.facts = record.ask("load")
        run_rounds(records, 1, told.append)
    assert told == [
        "warm-up: torch/float32",
        "warm-up: torch/int8",
        "round 1 of 1: prefill: torch/float32",
        "round 1 of 1: prefill: torch/int8",
        "round 1 of 1: decode, batch 1, full head: torch/float32",
        "round 1 of 1: decode, batch 1, full head: torch/int8",
    ]
