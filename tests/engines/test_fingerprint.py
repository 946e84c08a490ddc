"""What a model answers to fixed prompts: the same weights are known again, others are not."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_engines.engine import EngineInfo
from gpa_engines.fingerprint import LENGTH, PROMPTS, TOP, Fingerprint, prompts


def made(shift: float = 0.0, **other: Any) -> Fingerprint:
    """Of scores that fall by tenths; `shift` moves every second one."""
    top = {token: -token / 10 + shift * (token % 2) for token in range(TOP)}
    return replace(Fingerprint("here", "float32", 100, (top,) * PROMPTS), **other)


def test_the_prompts_are_the_same_everywhere() -> None:
    found = prompts(5141)
    assert [len(prompt) for prompt in found] == [LENGTH] * PROMPTS
    assert found[0][:4] == (2615, 4779, 4267, 3333)
    assert {token for prompt in prompts(3) for token in prompt} == {0, 1, 2}


def test_a_difference_is_told_from_rounding() -> None:
    mine = made()
    assert mine.difference(made()) is None
    # Logits and log-probabilities differ by a constant of each prompt.
    assert mine.difference(made(tops=tuple({t: s - 7 for t, s in top.items()} for top in mine.tops))) is None
    assert mine.difference(made(0.001)) is None
    assert "scores of the likeliest ids differ by 0.08" in str(mine.difference(made(0.1)))
    assert mine.difference(made(0.1, dtype="bfloat16")) is None
    assert "more than 0.3 of their spread" in str(mine.difference(made(0.6, dtype="bfloat16")))
    assert mine.difference(made(0.6, dtype="int8")) is None
    assert mine.difference(made(vocab_size=101)) == "vocabularies of 100 and 101 ids"
    others = tuple({token + 11: score for token, score in top.items()} for top in mine.tops)
    assert mine.difference(made(tops=others)) == "only 36 of the 80 likeliest ids after 4 prompts are the same"
    same = made(tops=({5: 1.0, 6: 1.0},) * PROMPTS)
    assert "only 8 of the 80" in str(mine.difference(same))


def test_a_file_is_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "fingerprint.json"
    made(0.3).write(path)
    found = Fingerprint.read(path)
    assert found == replace(made(0.3), source=str(path))
    assert found.difference(made(0.3)) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; record it anew with gpa-run fingerprint"),
        ("{", "is not JSON"),
        ("[]", "is no fingerprint of schema gpa-fingerprint/1"),
        ({"schema": "other/1"}, "schema 'other/1'"),
        ({"tops": []}, "tops"),
        ({"tops": [[]] * PROMPTS}, "tops"),
        ({"tops": [[[1, "x"]]] * PROMPTS}, "could not convert"),
        ({"tops": [[[1, float("nan")]]] * PROMPTS}, "tops"),
        ({"vocab_size": None}, "is no fingerprint"),
    ],
)
def test_a_damaged_file_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "fingerprint.json"
    if isinstance(content, dict):
        made().write(path)
        content = json.dumps({**json.loads(path.read_text()), **content})
    if content is not None:
        path.write_text(content)
    else:
        path.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=message):
        Fingerprint.read(path)


class Rows:
    """An engine of fixed rows, asked for whole prompts only."""

    def __init__(self, **info: Any) -> None:
        self.info = replace(EngineInfo("rows", "cpu", "float32", 50, 64, frozenset(("logits",))), **info)

    async def logits(self, ids: Any) -> Any:
        rows = np.zeros((len(ids), 50), np.float32)
        rows[-1] = np.sin(np.arange(50) * (1 + ids[-1]))
        return rows


def test_any_engine_can_be_asked() -> None:
    found = asyncio.run(Fingerprint.take(Rows()))  # type: ignore[arg-type]
    assert (found.source, found.vocab_size) == ("rows on cpu", 50)
    for prompt, top in zip(prompts(50), found.tops, strict=True):
        row = np.sin(np.arange(50) * (1 + prompt[-1])).astype(np.float32)
        assert list(top) == np.argsort(-row, kind="stable")[:TOP].tolist()
    with pytest.raises(BackendError, match="has a part of the vocabulary"):
        asyncio.run(Fingerprint.take(Rows(logit_ids=(range(3),))))  # type: ignore[arg-type]


def test_the_tiny_checkpoint_is_known_in_every_dtype_and_no_other_is(tiny_checkpoint_copy: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    from safetensors.torch import load_file, save_file

    options = {"device": "cpu", "threads": 1}
    exact = Fingerprint.of_model("torch", tiny_checkpoint_copy, {**options, "dtype": "float32"})
    for dtype in ("float32", "bfloat16", "float16", "int8"):
        other = Fingerprint.of_model("torch", tiny_checkpoint_copy, {**options, "dtype": dtype})
        assert exact.difference(other) is None, dtype
    config_file, weights_file = tiny_checkpoint_copy / "config.json", tiny_checkpoint_copy / "model.safetensors"
    config, weights = json.loads(config_file.read_text()), load_file(weights_file)

    def changed() -> str:
        found = Fingerprint.of_model("torch", tiny_checkpoint_copy, {**options, "dtype": "float32"})
        return str(exact.difference(found))

    config_file.write_text(json.dumps({**config, "rope_theta": 10000.0}))
    assert "of the 80 likeliest ids after 4 prompts are the same" in changed()
    config_file.write_text(json.dumps(config))
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: weights[name] * 1.1}, weights_file, {"format": "pt"})
    assert "scores of the likeliest ids differ" in changed()
    save_file({key: tensor.flip(0) for key, tensor in weights.items()}, weights_file, {"format": "pt"})
    assert "of the 80 likeliest ids after 4 prompts are the same" in changed()
