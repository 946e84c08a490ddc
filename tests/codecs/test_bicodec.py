"""BiCodec's building blocks and configuration; whole clips are in test_torch_codec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gpa_codecs.bicodec.config import BiCodecConfig, GeneratorConfig
from gpa_codecs.bicodec.generator import Snake, WaveGenerator
from gpa_codecs.bicodec.quantizer import fsq_codes, fsq_values, nearest_by_angle
from gpa_codecs.errors import CheckpointError

LEVELS = (4,) * 6


# --- quantisers -------------------------------------------------------------------------------------------------------


def test_every_global_code_is_the_code_of_its_own_values() -> None:
    codes = torch.arange(4096)
    values = fsq_values(codes, LEVELS)
    assert values.unique().tolist() == [-1.0, -0.5, 0.0, 0.5]
    # The bound maps the real line to the levels, so a value's preimage is searched: its own level on a fine grid.
    grid = torch.linspace(-6, 6, 2001)
    reached = fsq_codes(torch.stack([grid, *[torch.full_like(grid, -9.0)] * 5], dim=1), LEVELS)
    assert reached.unique().tolist() == [0, 1, 2, 3], "all four levels of a scalar can be reached, in order"
    assert (reached.diff() >= 0).all()


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_the_first_level_counts_least(digits: list[int]) -> None:
    code = sum(digit * 4**place for place, digit in enumerate(digits))
    assert (fsq_values(torch.tensor(code), LEVELS) * 2 + 2).tolist() == digits


def test_global_codes_follow_the_published_rule() -> None:
    z = np.random.default_rng(1).normal(scale=2.0, size=(500, 6))
    levels = np.round(np.tanh(z + np.arctanh(0.5 / 1.5015)) * 1.5015 - 0.5) + 2
    assert fsq_codes(torch.from_numpy(z), LEVELS).tolist() == (levels @ [1, 4, 16, 64, 256, 1024]).tolist()


def test_levels_of_odd_count_are_centred() -> None:
    assert fsq_codes(torch.zeros(2), (5, 3)).item() == 2 + 5 * 1
    assert fsq_values(torch.tensor(7), (5, 3)).tolist() == [0.0, 0.0]


def test_semantic_codes_are_found_by_angle_not_by_distance() -> None:
    codebook = torch.tensor([[10.0, 0.0], [0.6, 0.8], [0.0, 0.1]])
    latents = torch.tensor([[0.1, 5.0, 0.0], [0.0, 5.0, 9.0]])[None]
    assert nearest_by_angle(latents, codebook).tolist() == [[0, 1, 2]]


def test_the_first_of_equal_codewords_wins() -> None:
    codebook = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert nearest_by_angle(torch.tensor([[[2.0], [0.0]]]), codebook).item() == 1


def test_snake_is_its_formula_and_leaves_its_input_alone() -> None:
    snake = Snake(3).double().requires_grad_(False)
    snake.alpha[:] = torch.tensor([0.1, 1.0, 3.0]).view(1, 3, 1)
    x = torch.randn(2, 3, 50, dtype=torch.float64)
    before = x.clone()
    expected = x + torch.sin(snake.alpha * x) ** 2 / snake.alpha
    torch.testing.assert_close(snake(x), expected, rtol=1e-7, atol=1e-7)
    assert torch.equal(x, before)


def test_a_sample_depends_on_no_more_codes_than_the_context_says() -> None:
    config = GeneratorConfig(input_channel=4, channels=32, rates=(8, 5, 4, 2), kernel_sizes=(16, 11, 8, 4))
    torch.manual_seed(0)
    generator = WaveGenerator(config).double().requires_grad_(False).model[:-1]
    for parameter in generator.parameters():
        parameter.normal_(std=0.3)
    assert config.context == 11, "as released"
    latents = torch.zeros(1, 4, 41, dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, 20] = 1.0
    (differs,) = torch.nonzero((generator(latents) - generator(changed)).flatten(), as_tuple=True)
    first, last = differs[0].item() // 320, differs[-1].item() // 320
    assert 20 - config.context <= first <= 20 - config.context + 1
    assert 20 + config.context - 1 <= last <= 20 + config.context


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def values(tiny_checkpoint: Path) -> dict[str, Any]:
    return yaml.safe_load((tiny_checkpoint / "BiCodec" / "config.yaml").read_text())


def test_sizes_that_others_ask_for(tiny_checkpoint: Path) -> None:
    config = BiCodecConfig.from_file(tiny_checkpoint / "BiCodec" / "config.yaml")
    assert (config.codebook_size, config.voice_length, config.voice_cardinality) == (320, 32, 4096)
    assert config.ref_segment_length == 96000


def test_the_reference_clip_is_whole_latent_frames(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values | {"ref_segment_duration": 1.99}))
    assert BiCodecConfig.from_file(path).ref_segment_length == 99 * 320


def _set(section: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["audio_tokenizer"][section].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v: v.__setitem__("sample_rate", 24000), "sample_rate is 24000; expected 16000"),
        (lambda v: v.__setitem__("latent_hop_length", 640), "latent_hop_length is 640; expected 320"),
        (lambda v: v.__setitem__("volume_normalize", False), "volume_normalize is False; expected true"),
        (lambda v: v.__setitem__("ref_segment_duration", 0.01), "ref_segment_duration is 0.01"),
        (lambda v: v.__setitem__("ref_segment_duration", None), "ref_segment_duration is None"),
        (lambda v: v.pop("audio_tokenizer"), "audio_tokenizer is missing"),
        (lambda v: v.__setitem__("audio_tokenizer", 3), "audio_tokenizer is 3; expected a section"),
        (lambda v: v["audio_tokenizer"].pop("prenet"), "audio_tokenizer: prenet is missing"),
        (_set("mel_params", "sample_rate", 8000), "mel_params: sample_rate is 8000"),
        (_set("mel_params", "win_length", 2048), "win_length 2048 is larger than n_fft 1024"),
        (_set("mel_params", "mel_fmax", 9000), "mel_fmin 10 and mel_fmax 9000 Hz"),
        (_set("mel_params", "num_mels", True), "num_mels is True; expected a positive integer"),
        (_set("mel_params", "num_mels", 80), "speaker_encoder.input_dim is 40, but mel_params.num_mels is 80"),
        (_set("encoder", "sample_ratios", [1, 2]), "sample_ratios is [1, 2]; expected [1, 1]"),
        (_set("prenet", "sample_ratios", [2]), "prenet: sample_ratios is [2]"),
        (_set("prenet", "use_tanh_at_final", True), "use_tanh_at_final is True"),
        (_set("prenet", "condition_dim", 40), "prenet.condition_dim is 40, but speaker_encoder.out_dim is 48"),
        (_set("encoder", "out_channels", 40), "encoder.out_channels is 40, but quantizer.input_dim is 48"),
        (_set("decoder", "input_channel", 40), "decoder.input_channel is 40, but prenet.out_channels is 48"),
        (_set("quantizer", "use_l2_normlize", False), "use_l2_normlize is False"),
        (_set("quantizer", "codebook_size", "many"), "codebook_size is 'many'"),
        (_set("speaker_encoder", "token_num", 16), "token_num is 16; expected 32"),
        (_set("speaker_encoder", "fsq_num_quantizers", 2), "fsq_num_quantizers is 2"),
        (_set("speaker_encoder", "fsq_levels", [4, 4]), "fsq_levels [4, 4] make 16 codes; expected 4096"),
        (_set("decoder", "rates", [8, 5, 4]), "rates [8, 5, 4] make 160 samples per code; expected 320"),
        (_set("decoder", "kernel_sizes", [16, 11, 8]), "kernel_sizes [16, 11, 8] do not go with rates"),
        (_set("decoder", "kernel_sizes", [16, 10, 8, 4]), "kernel_sizes [16, 10, 8, 4] do not go with rates"),
        (_set("decoder", "kernel_sizes", [16, 11, 8, 0]), "kernel_sizes is [16, 11, 8, 0]"),
        (_set("decoder", "channels", 72), "channels 72 cannot be halved 4 times"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_refused(
    change: Callable[[dict[str, Any]], None], complaint: str, values: dict[str, Any], tmp_path: Path
) -> None:
    change(values)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError) as raised:
        BiCodecConfig.from_file(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("", "expected keys and values"), ("- 1", "found list"), ("a: [", "cannot be parsed")],
)
def test_a_damaged_configuration_is_refused(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=complaint):
        BiCodecConfig.from_file(path)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.yaml: No such file"):
        BiCodecConfig.from_file(tmp_path / "config.yaml")
