"""The exported folder is the released layout, and gives what the training's own networks give."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo_training.corpus import Corpus
from demo_training.dimensions import Geometry
from demo_training.encoding import glm_codes, semantic_codes
from demo_training.export import LARGEST
from demo_training.language_model import LanguageModel
from demo_training.recipe import Recipe
from gpa_codecs.audio import Waveform
from gpa_codecs.torch_codec import TorchCodec
from gpa_codecs.wav2vec2.config import FEATURE_STATES
from gpa_codecs.wav2vec2.model import Wav2Vec2Features
from gpa_codecs.weights import load_module, read_header
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.random_checkpoint import is_random_checkpoint, make_checkpoint
from gpa_engines.registry import create_engine

WEIGHTS = (
    "model.safetensors",
    "BiCodec/model.safetensors",
    "BiCodec/wav2vec2-large-xlsr-53/model.safetensors",
    "glm-4-voice-tokenizer/model.safetensors",
)


@pytest.fixture(scope="module")
def checkpoint(trained: Recipe) -> Checkpoint:
    return Checkpoint.open(trained.out / "checkpoint")


@pytest.fixture(scope="module")
def codec(checkpoint: Checkpoint) -> TorchCodec:
    return TorchCodec(checkpoint.bicodec_dir, checkpoint.layout.glm_dir)


def test_has_every_file_and_tensor_of_the_layout(checkpoint: Checkpoint, tmp_path) -> None:
    other = make_checkpoint(tmp_path / "random", "tiny", 0)
    files, others = (
        {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        for root in (checkpoint.root, other)
    )
    assert files == others - {"README.md"} | {"LICENSE", "training.json"}
    assert sum(path.stat().st_size for path in checkpoint.root.rglob("*") if path.is_file()) < LARGEST
    assert not is_random_checkpoint(checkpoint.root)
    for name in WEIGHTS[2:]:
        ours, theirs = read_header(checkpoint.root / name), read_header(other / name)
        # The depth differs; a layer's tensors do not.
        assert {key.replace(".2.", ".1.") for key in ours} == {key.replace(".2.", ".1.") for key in theirs}


def test_rows_divide_into_the_blocks_of_quantised_formats(checkpoint: Checkpoint) -> None:
    for name, spec in read_header(checkpoint.root / "model.safetensors").items():
        assert spec.dtype == "BF16", name
        assert len(spec.shape) == 1 or spec.shape[1] % 256 == 0, name


def test_the_mixed_hidden_states_are_equal(checkpoint: Checkpoint, tones: Corpus) -> None:
    config = Geometry.read(checkpoint.root).wav2vec2
    network = load_module(lambda: Wav2Vec2Features(config), checkpoint.layout.wav2vec2_dir, torch.device("cpu"))
    states = {}
    for number, layer in enumerate(network.encoder.layers, start=1):
        layer.register_forward_hook(lambda module, inputs, output, number=number: states.update({number: output}))
    network(torch.from_numpy(tones.wave(0))[None])
    for number in FEATURE_STATES:
        torch.testing.assert_close(states[number], states[3], rtol=0, atol=0)
    assert not torch.equal(states[3], states[2])


def test_gives_the_codes_that_training_saw(trained: Recipe, codec: TorchCodec, tones: Corpus) -> None:
    waves = [tones.wave(index) for index in range(12)]
    read = codec.encode_batch([Waveform(wave) for wave in waves])
    for family, codes in (("semantic", semantic_codes(trained, waves)), ("glm", glm_codes(trained, waves))):
        equal = np.concatenate([getattr(tokens, family) for tokens in read]) == np.concatenate(codes)
        assert equal.mean() > 0.99


def test_speaks_with_the_trained_generator(trained: Recipe, codec: TorchCodec, tones: Corpus) -> None:
    from gpa_codecs.bicodec.model import WaveDecoder

    decoder = WaveDecoder(Geometry.read(trained.layout).bicodec).eval()
    decoder.load_state_dict(trained.load("generator", "bicodec."))
    voice = codec.voice(Waveform(tones.wave(0)))
    semantic = codec.encode(Waveform(tones.wave(1)), ["semantic"]).semantic
    with torch.inference_mode():
        ours = decoder(torch.from_numpy(semantic)[None], torch.tensor([voice.codes]))[0].numpy()
    np.testing.assert_allclose(codec.decode(semantic, voice).pcm, ours, atol=1e-5)


def test_the_engine_computes_the_logits_of_training(trained: Recipe, checkpoint: Checkpoint) -> None:
    import anyio

    network = LanguageModel(Geometry.read(trained.layout).lm)
    network.load_state_dict(trained.load("tuning"))
    ids = np.random.default_rng(0).integers(checkpoint.config.vocab_size, size=60).tolist()
    with torch.inference_mode():
        expected = network.logits(network(torch.tensor([ids])), torch.arange(checkpoint.config.vocab_size))[0].numpy()

    async def logits() -> np.ndarray:
        engine = create_engine("torch", checkpoint.root, device="cpu", dtype="float32")
        try:
            return await engine.logits(ids)
        finally:
            await engine.close()

    found = anyio.run(logits)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_the_frozen_speaker_encoder_compresses(checkpoint: Checkpoint) -> None:
    tensors = load_file(checkpoint.bicodec_dir / "model.safetensors")
    weights = [
        tensor
        for name, tensor in tensors.items()
        if name.startswith("speaker_encoder.speaker_encoder.") and tensor.ndim > 1
    ]
    assert sum(tensor.numel() for tensor in weights) > 5_000_000
    assert all(len(tensor.unique()) <= 2 for tensor in weights)


def test_says_how_it_was_made(checkpoint: Checkpoint) -> None:
    record = json.loads((checkpoint.root / "training.json").read_text())
    assert record["seed"] == 0
    stages = {"semantic", "glm", "voice", "lm", "generator", "echo", "tuning"}
    assert stages <= record["stages"].keys()
    for stage in ("semantic", "glm", "lm", "generator", "tuning"):
        assert record["stages"][stage]["curve"][0]["loss"] > 0
        assert record["stages"][stage]["commit"]
    assert "Apache License" in (checkpoint.root / "LICENSE").read_text()
