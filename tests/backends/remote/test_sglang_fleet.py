"""SGLang servers behind the remote engine, over fakes that serve the tiny checkpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from gpa_engines.registry import create_engine
from tests.servers.asking import answer, request
from tests.servers.fake_sglang_server import FakeSglangServer

PROMPT = (720, 11, 12, 13, 4816)


def test_logits_are_made_of_hidden_states_where_the_weights_are_here(tiny_checkpoint: Path) -> None:
    pytest.importorskip("torch", reason="the answers are compared with the torch engine's")
    local = create_engine("torch", tiny_checkpoint, device="cpu", dtype="float32")
    with (
        FakeSglangServer(tiny_checkpoint, enable_return_hidden_states=True) as one,
        FakeSglangServer(tiny_checkpoint, enable_return_hidden_states=True) as other,
    ):
        engine = create_engine("remote", tiny_checkpoint, url=[one.url, other.url], dtype="float32", expect="none")
        assert "logits" in engine.info.capabilities

        async def main() -> None:
            expected = await local.logits(PROMPT)
            for _ in range(2):
                assert np.abs(await engine.logits(PROMPT) - expected).max() < 1e-4
            alone = (await answer(local, request(PROMPT, 6))).ids
            given = await asyncio.gather(*(answer(engine, request(PROMPT, 6)) for _ in range(4)))
            assert {each.ids for each in given} == {alone}
            await engine.close()
            await local.close()

        asyncio.run(main())


def test_without_hidden_states_there_are_no_logits(tiny_checkpoint: Path) -> None:
    with FakeSglangServer(tiny_checkpoint) as fake:
        engine = create_engine("remote", tiny_checkpoint, url=fake.url, dtype="float32", expect="none")
        assert "logits" not in engine.info.capabilities
        asyncio.run(engine.close())
