"""The torch codec on checkpoints whose weights are stored in other files and under other names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpa_codecs.codec import Voice
from gpa_codecs.torch_codec import WAV2VEC2_FOLDER, TorchCodec

Tensors = dict[str, torch.Tensor]
Arrays = Callable[[str], dict[str, np.ndarray]]


def new_weight_norm_names(tensors: Tensors) -> Tensors:
    part = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {re.sub(r"weight_[gv]$", lambda match: part[match[0]], name): tensor for name, tensor in tensors.items()}


def fused_weight_norm(tensors: Tensors) -> Tensors:
    fused = {name: tensor for name, tensor in tensors.items() if not name.endswith(("weight_g", "weight_v"))}
    for name in (name for name in tensors if name.endswith("weight_v")):
        magnitude, direction = tensors[name[:-1] + "g"], tensors[name]
        width, channels, kernel_size = direction.shape
        layer = torch.nn.Conv1d(channels, width, kernel_size, bias=False)
        layer = torch.nn.utils.parametrizations.weight_norm(layer, dim=2 if name.startswith("wav2vec2.") else 0)
        layer.load_state_dict(dict(zip(layer.state_dict(), (magnitude, direction), strict=True)))
        probes = torch.eye(channels * kernel_size).view(-1, channels, kernel_size)
        fused[name[:-2]] = layer(probes).detach().squeeze(2).T.reshape(direction.shape)
    return fused


def with_prefix(tensors: Tensors) -> Tensors:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("wav2vec2."): tensor for name, tensor in tensors.items()}


def in_double_precision(tensors: Tensors) -> Tensors:
    """Stored as float64: a checkpoint may be stored in any precision, and the codec computes in float32."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


RENAMINGS = [
    new_weight_norm_names,
    fused_weight_norm,
    with_prefix,
    without_prefix,
    in_double_precision,
]


def to_safetensors(folder: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def to_sharded_safetensors(folder: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    shards = {f"model-{part + 1:05d}-of-00003.safetensors": names[part::3] for part in range(3)}
    for file, members in shards.items():
        save_file({name: tensors[name].contiguous() for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def to_pickle(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def to_old_pickle(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


FORMATS = [to_safetensors, to_sharded_safetensors, to_pickle, to_old_pickle]


def rewrite(
    checkpoint: Path, rename: Callable[[Tensors], Tensors], save: Callable[[Path, Tensors], None]
) -> TorchCodec:
    """Store all the codec's weights anew and open the codec on them."""
    bicodec, glm = checkpoint / "BiCodec", checkpoint / "glm-4-voice-tokenizer"
    for folder in (bicodec, bicodec / WAV2VEC2_FOLDER, glm):
        old = next(path for name in ("model.safetensors", "pytorch_model.bin") if (path := folder / name).exists())
        tensors = load_file(old) if old.suffix == ".safetensors" else torch.load(old, weights_only=True)
        old.unlink()
        save(folder, rename(tensors))
    return TorchCodec(bicodec, glm)


@pytest.mark.parametrize("rename", RENAMINGS)
def test_names_in_other_styles_give_the_recorded_codes(
    rename: Callable[[Tensors], Tensors], tiny_checkpoint_copy: Path, golden_arrays: Arrays, audio_dir: Path
) -> None:
    assert_recorded(rewrite(tiny_checkpoint_copy, rename, to_safetensors), golden_arrays, audio_dir)


@pytest.mark.parametrize("save", FORMATS)
def test_weights_in_other_files_give_the_recorded_codes(
    save: Callable[[Path, Tensors], None], tiny_checkpoint_copy: Path, golden_arrays: Arrays, audio_dir: Path
) -> None:
    assert_recorded(rewrite(tiny_checkpoint_copy, new_weight_norm_names, save), golden_arrays, audio_dir)


def assert_recorded(codec: TorchCodec, golden_arrays: Arrays, audio_dir: Path) -> None:
    """A clip whose recorded margins are all above the demanded ones, so every code must be equal."""
    recorded, clip = golden_arrays("en_male_16k"), audio_dir / "en_male_16k.wav"
    tokens = codec.encode(clip)
    np.testing.assert_array_equal(tokens.semantic, recorded["semantic"])
    np.testing.assert_array_equal(tokens.glm, recorded["glm"])
    assert codec.voice(clip).codes == tuple(recorded["globals"])
    recorded = golden_arrays("detok10")
    waveform = codec.decode(recorded["semantic"], Voice(tuple(recorded["globals"])))
    np.testing.assert_allclose(waveform.pcm, recorded["wav_raw"], atol=1e-4)
