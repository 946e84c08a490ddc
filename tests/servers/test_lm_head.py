"""The head that turns a server's hidden states into logits, read from the checkpoint here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpa_codecs.errors import CheckpointError
from gpa_engines.lm_config import LMConfig
from gpa_engines.servers.lm_head import LMHead


def test_the_head_is_found_in_every_dtype_and_checked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = LMConfig.from_file(tiny_checkpoint / "config.json")

    weights = load_file(tiny_checkpoint / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    hidden = np.random.default_rng(0).standard_normal((3, config.hidden_size), np.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        save_file({name: weights[name].to(dtype)}, tmp_path / "model.safetensors")
        head = LMHead.find(tmp_path, config)
        assert head is not None
        expected = hidden @ weights[name].to(dtype).float().numpy().T
        assert np.abs(head.logits(hidden) - expected).max() < 1e-4
    save_file({name: weights[name][:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected"):
        LMHead.find(tmp_path, config)
    (tmp_path / "model.safetensors").unlink()
    assert LMHead.find(tmp_path, config) is None
