"""The GLM-4-Voice tokenizer's network and configuration; whole clips are in test_torch_codec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpa_codecs.errors import CheckpointError
from gpa_codecs.glm_tokenizer.config import GlmFeatureConfig, GlmTokenizerConfig
from gpa_codecs.glm_tokenizer.model import GlmEncoder
from gpa_codecs.weights import load_module


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint / "glm-4-voice-tokenizer"


@pytest.fixture(scope="module")
def network(folder: Path) -> GlmEncoder:
    config = GlmTokenizerConfig.from_file(folder / "config.json")
    return load_module(lambda: GlmEncoder(config), folder, torch.device("cpu"))


@pytest.fixture
def log_mel() -> torch.Tensor:
    """6.4 s of noise: 640 frames, 320 positions, 80 codes; a block is 200 positions, 50 codes."""
    return torch.from_numpy(np.random.default_rng(1).normal(size=(1, 40, 640)).astype(np.float32))


def codes(network: GlmEncoder, log_mel: torch.Tensor, frames: int) -> torch.Tensor:
    with torch.inference_mode():
        return network(log_mel, frames)


def test_a_block_is_not_changed_by_what_comes_after_it(network: GlmEncoder, log_mel: torch.Tensor) -> None:
    whole = codes(network, log_mel, 640)
    changed = log_mel.clone()
    changed[:, :, 400:] = 0
    assert torch.equal(codes(network, changed, 640)[:, :50], whole[:, :50])
    assert not torch.equal(codes(network, changed, 640), whole)


def test_a_block_sees_all_of_itself_and_what_comes_before(network: GlmEncoder) -> None:
    visible = network._visible_positions(450, 430, torch.device("cpu"))
    assert visible[0, :200].all()
    assert not visible[0, 200:].any()
    assert visible[250, :400].all()
    assert not visible[250, 400:].any()
    assert visible[449, :430].all()
    assert not visible[:, 430:].any(), "padding is seen by nobody"


def test_the_nearest_codeword_in_plain_l2_wins(network: GlmEncoder, log_mel: torch.Tensor) -> None:
    taken: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        taken.append(output)

    hook = network.layers[-1].register_forward_hook(keep)
    found = codes(network, log_mel, 640)
    hook.remove()
    pooled = taken[0][0].double().unflatten(0, (-1, 4)).mean(dim=1)
    distances = torch.cdist(pooled, network.codebook.weight.double())
    assert torch.equal(found[0], distances.argmin(dim=1))


# --- configuration ----------------------------------------------------------------------------------------------------


def test_only_layers_before_the_codebook_are_built(network: GlmEncoder, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert len(network.layers) == config["quantize_position"] < config["encoder_layers"]
    assert not any(name.startswith(("embed_positions2", "ema")) for name in network.state_dict())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"encoder_causal_convolution": False}, "encoder_causal_convolution is False"),
        ({"encoder_causal_attention": True}, "encoder_causal_attention is True"),
        ({"quantize_causal_encoder": True}, "quantize_causal_encoder is True"),
        ({"pooling_type": "max"}, "pooling_type is 'max'; expected \"avg\""),
        ({"pooling_position": 1}, "pooling_position is 1; expected 2"),
        ({"quantize_causal_block_size": None}, "quantize_causal_block_size is None"),
        ({"quantize_vocab_size": 0}, "quantize_vocab_size is 0"),
        ({"encoder_attention_heads": 5}, "d_model 64 is no multiple of encoder_attention_heads 5"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_refused(
    changes: dict[str, Any], complaint: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    with pytest.raises(CheckpointError) as raised:
        GlmTokenizerConfig.from_file(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sampling_rate": 8000}, "sampling_rate is 8000"),
        ({"padding_value": 1.0}, "padding_value is 1.0"),
        ({"dither": 0.1}, "dither is 0.1"),
        ({"feature_size": 80}, "feature_size is 80, but the model's num_mel_bins is 40"),
        ({"hop_length": 80}, "makes 640 samples per code; expected 1280"),
        ({"chunk_length": 31}, "chunk_length needs 1550 positions"),
    ],
)
def test_features_that_do_not_go_with_the_model_are_refused(
    changes: dict[str, Any], complaint: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads((folder / "preprocessor_config.json").read_text()) | changes))
    model = GlmTokenizerConfig.from_file(folder / "config.json")
    with pytest.raises(CheckpointError) as raised:
        GlmFeatureConfig.from_file(path).check(model, str(path))
    assert str(raised.value).startswith(f"{path}: ")
    assert complaint in str(raised.value)
