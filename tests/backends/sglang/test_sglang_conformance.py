"""The suite on the SGLang engine with a fake of SGLang in its process: what the adapter adds must change no answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpa_conformance.cases import load_cases, select
from gpa_conformance.limits import load_limits
from gpa_conformance.preparation import make_baseline
from gpa_conformance.runner import run_cases
from gpa_conformance.session import Setup
from gpa_conformance.target import Target
from gpa_engines.checkpoint import Checkpoint

CASES = (
    "logits/one-id,logits/mixed-1,generate/ascend-1,generate/chinese,cache/prefixes,"
    "contract/cancel,contract/empty-prompt,contract/max-new-tokens,contract/min-new-tokens,contract/one-token,"
    "contract/out-of-range,contract/seed,contract/too-long,contract/usage,contract/vocabulary"
)


@pytest.mark.slow
def test_the_suite_passes(fake_sglang: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    packaged = load_cases()
    chosen = select(packaged, CASES)

    async def run():
        baseline = await make_baseline(
            checkpoint, tmp_path_factory.mktemp("baseline") / "base", None, chosen, threads=1
        )

        def no_codec():
            raise AssertionError("no case of these has audio")

        setup = Setup(
            target=Target("backend", "sglang", tiny_checkpoint, {"device": "cpu"}),
            baseline=baseline,
            limits=load_limits(),
            cases={case.id: case for case in packaged},
            space=checkpoint.token_space(),
            make_codec=no_codec,
            isolate=False,
            seed=0,
        )
        return await run_cases(setup, checkpoint, chosen)

    report = asyncio.run(run())
    wrong = {case.case: case.reason for case in report.cases if case.status != "passed"}
    assert not wrong, wrong
    assert len(report.cases) == len(CASES.split(","))
