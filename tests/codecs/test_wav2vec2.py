"""wav2vec 2.0 features, against the goldens and against transformers' own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Model

from gpa_codecs.errors import CheckpointError
from gpa_codecs.features import normalize_samples
from gpa_codecs.torch_codec import WAV2VEC2_FOLDER
from gpa_codecs.wav2vec2.config import Wav2Vec2Config, check_preprocessor
from gpa_codecs.wav2vec2.model import Wav2Vec2Features
from gpa_codecs.weights import load_module

Arrays = Callable[[str], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint / "BiCodec" / WAV2VEC2_FOLDER


@pytest.fixture(scope="module")
def network(folder: Path) -> Wav2Vec2Features:
    config = Wav2Vec2Config.from_file(folder / "config.json")
    return load_module(lambda: Wav2Vec2Features(config), folder, torch.device("cpu"))


def features(network: Wav2Vec2Features, wave: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(normalize_samples(wave))[None])[0].numpy()


@pytest.mark.parametrize("clip", ["en_male_16k", "en_female_16k", "mono_8k", "short_1600", "silence_16k"])
def test_features_are_the_recorded_ones(clip: str, network: Wav2Vec2Features, golden_arrays: Arrays) -> None:
    recorded = golden_arrays(clip)
    computed = features(network, recorded["wav"])
    assert len(computed) == len(recorded["semantic"])
    np.testing.assert_allclose(computed[:4], recorded["w2v_first"], atol=2e-5)
    np.testing.assert_allclose(computed[-2:], recorded["w2v_last"], atol=2e-5)


def test_features_are_the_mean_of_transformers_hidden_states(
    network: Wav2Vec2Features, folder: Path, golden_arrays: Arrays
) -> None:
    wave = golden_arrays("en_male_16k")["wav"]
    yardstick = Wav2Vec2Model.from_pretrained(folder).eval()
    with torch.inference_mode():
        samples = torch.from_numpy(normalize_samples(wave))[None]
        states = yardstick(samples, output_hidden_states=True).hidden_states
    expected = torch.stack([states[index] for index in (11, 14, 16)]).mean(dim=0)[0]
    np.testing.assert_allclose(features(network, wave), expected.numpy(), atol=2e-5)


@pytest.mark.parametrize(("samples", "frames"), [(400, 1), (719, 1), (720, 2), (16000, 49)])
def test_a_frame_begins_every_320_samples(samples: int, frames: int, network: Wav2Vec2Features) -> None:
    pcm = np.random.default_rng(1).normal(size=samples).astype(np.float32)
    assert len(features(network, pcm)) == frames


def test_layers_after_the_sixteenth_and_the_final_norm_are_not_built(network: Wav2Vec2Features) -> None:
    assert len(network.encoder.layers) == 16
    names = network.state_dict().keys()
    assert not any(name.startswith(("encoder.layer_norm", "masked_spec_embed", "quantizer")) for name in names)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_the_receptive_field_is_400_samples(folder: Path) -> None:
    assert Wav2Vec2Config.from_file(folder / "config.json").minimum_length == 400


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "hubert"}, "model_type is 'hubert'; expected \"wav2vec2\""),
        ({"do_stable_layer_norm": False}, "do_stable_layer_norm is False"),
        ({"feat_extract_norm": "group"}, "feat_extract_norm is 'group'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"feat_extract_activation": "relu"}, "feat_extract_activation is 'relu'"),
        ({"add_adapter": True}, "add_adapter is True"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim is 16"),
        ({"num_hidden_layers": 15}, "num_hidden_layers is 15; BiCodec's features need hidden state 16"),
        ({"hidden_size": 0}, "hidden_size is 0; expected a positive integer"),
        ({"hidden_size": 66}, "hidden_size 66 is no multiple of num_attention_heads 4"),
        ({"num_conv_pos_embedding_groups": 5}, "no multiple of num_conv_pos_embedding_groups 5"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 1]}, "makes 160 samples per frame; expected 320"),
        ({"conv_kernel": [10, 3]}, "conv_dim, conv_kernel and conv_stride differ in length"),
        ({"conv_dim": []}, "conv_dim is []; expected a list of positive integers"),
        ({"conv_bias": 1}, "conv_bias is 1; expected true or false"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'; expected a number"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_refused(
    changes: dict[str, Any], complaint: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    with pytest.raises(CheckpointError) as raised:
        Wav2Vec2Config.from_file(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"do_normalize": False}, "do_normalize is False"), ({"sampling_rate": 8000}, "sampling_rate is 8000")],
)
def test_a_preprocessor_of_another_kind_is_refused(
    changes: dict[str, Any], complaint: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads((folder / "preprocessor_config.json").read_text()) | changes))
    with pytest.raises(CheckpointError, match=complaint):
        check_preprocessor(path)


@pytest.mark.parametrize("key", ["hidden_size", "conv_stride", "conv_bias", "model_type"])
def test_a_missing_key_is_named(key: str, folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values[key]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        Wav2Vec2Config.from_file(path)
