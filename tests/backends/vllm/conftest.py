"""One vLLM engine for the session, since each takes half a minute and more to start, and the torch engine beside it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpa_engines.engine import Engine
from gpa_engines.registry import create_engine
from tests.backends.vllm.asking import answer, request

MAX_CONTEXT = 2048


@pytest.fixture(scope="session")
def twins(checkpoint: Path) -> tuple[int, int, int]:
    """Ids with the same embedding, which is the LM head's row too: those of the file that the checkpoint holds."""
    return tuple(json.loads((checkpoint / "twins.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, but two ids have the embedding of the one that greedy decoding puts behind `PROMPT`."""
    pytest.importorskip("torch", reason="the engines are compared with the torch engine")
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("vllm") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    engine = create_engine("torch", tiny_checkpoint, device="cpu", dtype="float32")
    (best,) = asyncio.run(answer(engine, request(max_new_tokens=1))).ids
    asyncio.run(engine.close())
    same = [best, *[token for token in (600, 5120, 601, 5121) if token != best][:2]]
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    for token in same[1:]:
        table[token] = table[best]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "twins.json").write_text(json.dumps(same), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def torch_engine(checkpoint: Path) -> Iterator[Engine]:
    """The reference, in float32."""
    engine = create_engine("torch", checkpoint, device="cpu", dtype="float32")
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed: this runs in tox -e vllm")


@pytest.fixture(scope="session")
def engine(vllm_installed: None, checkpoint: Path) -> Iterator[Engine]:
    """In float32."""
    engine = create_engine("vllm", checkpoint, dtype="float32", max_context=MAX_CONTEXT, max_num_seqs=16)
    yield engine
    asyncio.run(engine.close())
