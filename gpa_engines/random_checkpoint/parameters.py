"""Every tensor of the four models, derived from their configurations: names and shapes as released, and an interval.

The intervals keep activations healthy without any training: a linear layer passes on `gain` times the level that it
reads, residual branches stay below their trunk, norms lie around 1, variances and Snake alphas are positive, biases are
small. Nothing sits at its neutral value, so that a forgotten tensor shows in the output. The gains were chosen by
measuring: tokens change with time and with the speaker, decoded audio has an RMS near 0.15, greedy ids do not repeat,
and rounding to bfloat16 moves the logits by a few percent, as it does in trained models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gpa_engines.random_checkpoint.values import Dtype, Tensor

_ECAPA = 512  # channels of the speaker encoder, fixed by the architecture
_ECAPA_FEATURES = 3 * _ECAPA
_RES2_SCALE = 8
_BOTTLENECK = 128
_PERCEIVER_INNER = 512  # 8 heads of 64
_PERCEIVER_DEPTH = 2

# Level in front of a GELU. Near 1, its positive mean would add the same vector to every frame in every layer, until
# all frames look alike and the tokens stop changing with time; so low, it is nearly linear.
_BEFORE_GELU = 0.3


def language_model(config: dict[str, Any]) -> list[Tensor]:
    """Qwen3 with tied embeddings, bfloat16."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    branch = config["num_hidden_layers"] ** -0.5  # the trunk's final level does not depend on the depth
    tensors = [
        _around("model.embed_tokens.weight", (config["vocab_size"], hidden), 0.0, 0.57 * hidden**-0.25),
        _around("model.norm.weight", (hidden,), 1.0, 0.3),
    ]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        tensors += [
            _around(f"{name}.input_layernorm.weight", (hidden,), 1.0, 0.3),
            _around(f"{name}.post_attention_layernorm.weight", (hidden,), 1.0, 0.3),
            _around(f"{name}.self_attn.q_norm.weight", (head_dim,), 0.8, 0.3),
            _around(f"{name}.self_attn.k_norm.weight", (head_dim,), 0.8, 0.3),
            _weight(f"{name}.self_attn.q_proj.weight", (queries, hidden)),
            _weight(f"{name}.self_attn.k_proj.weight", (keys, hidden)),
            _weight(f"{name}.self_attn.v_proj.weight", (keys, hidden)),
            _weight(f"{name}.self_attn.o_proj.weight", (hidden, queries), gain=1.6 * branch),
            _weight(f"{name}.mlp.gate_proj.weight", (inner, hidden)),
            _weight(f"{name}.mlp.up_proj.weight", (inner, hidden)),
            _weight(f"{name}.mlp.down_proj.weight", (hidden, inner), gain=2.1 * branch),
        ]
    return _cast(tensors, "BF16")


def bicodec(config: dict[str, Any], *, dtype: Dtype = "F32") -> list[Tensor]:
    """BiCodec with the classic weight-norm names (`weight_g`, `weight_v`)."""
    parts = config["audio_tokenizer"]
    tensors = [
        *_encoder(parts["encoder"]),
        *_quantizer(parts["quantizer"]),
        *_speaker_encoder(parts["speaker_encoder"]),
        *_feature_decoder("prenet", parts["prenet"]),
        *_feature_decoder("postnet", parts["postnet"]),
        *_wave_generator(parts["decoder"]),
    ]
    return _cast(tensors, dtype)


def wav2vec2(config: dict[str, Any], *, dtype: Dtype = "F32") -> list[Tensor]:
    """wav2vec 2.0 (stable layer norm) with its pretraining heads, as the public checkpoint has them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    tensors = [_around("wav2vec2.masked_spec_embed", (hidden,), 0.5, 0.5)]
    channels = 1
    for index, (width, kernel) in enumerate(zip(config["conv_dim"], config["conv_kernel"], strict=True)):
        name = f"wav2vec2.feature_extractor.conv_layers.{index}"
        tensors += _linear(f"{name}.conv", (width, channels, kernel), gain=3.0)
        tensors += _norm(f"{name}.layer_norm", width, scale=_BEFORE_GELU)
        channels = width
    tensors += _norm("wav2vec2.feature_projection.layer_norm", channels)
    tensors += _linear("wav2vec2.feature_projection.projection", (hidden, channels), gain=3.0)
    positions, groups = config["num_conv_pos_embeddings"], config["num_conv_pos_embedding_groups"]
    scale = 0.5 * math.sqrt(hidden / positions)  # of a weight norm over (out, in) for each tap: half the input's level
    name = "wav2vec2.encoder.pos_conv_embed.conv"
    tensors += [
        _bias(f"{name}.bias", hidden),
        _around(f"{name}.weight_g", (1, 1, positions), scale, 0.2 * scale),
        _weight(f"{name}.weight_v", (hidden, hidden // groups, positions)),
    ]
    tensors += _norm("wav2vec2.encoder.layer_norm", hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"wav2vec2.encoder.layers.{layer}"
        tensors += _attention(f"{name}.attention", hidden, key_bias=True)
        tensors += _norm(f"{name}.layer_norm", hidden)
        tensors += _linear(f"{name}.feed_forward.intermediate_dense", (inner, hidden), gain=_BEFORE_GELU)
        tensors += _linear(f"{name}.feed_forward.output_dense", (hidden, inner), gain=2.5)
        tensors += _norm(f"{name}.final_layer_norm", hidden)
    groups, codes = config["num_codevector_groups"], config["num_codevectors_per_group"]
    width, projected = config["codevector_dim"], config["proj_codevector_dim"]
    tensors += [
        _around("quantizer.codevectors", (1, groups * codes, width // groups), 0.5, 0.5),
        *_linear("quantizer.weight_proj", (groups * codes, channels)),
        *_linear("project_hid", (projected, hidden)),
        *_linear("project_q", (projected, width)),
    ]
    return _cast(tensors, dtype)


def glm_tokenizer(config: dict[str, Any], *, dtype: Dtype = "F32") -> list[Tensor]:
    """The Whisper encoder up to its quantizer, with the codebook and its moving averages."""
    width, inner, codes = config["d_model"], config["encoder_ffn_dim"], config["quantize_vocab_size"]
    positions = config["max_source_positions"]
    tensors = [
        *_linear("conv1", (width, config["num_mel_bins"], 3), gain=_BEFORE_GELU),
        *_linear("conv2", (width, width, 3), gain=10.0),
        _around("embed_positions.weight", (positions, width), 0.0, 0.2),
        _around("embed_positions2.weight", (positions // config["pooling_kernel_size"], width), 0.0, 0.2),
        _around("codebook.weight", (codes, width), 0.0, 0.5),
        _around("ema_weight", (codes, width), 0.0, 0.5),
        _around("ema_count", (codes,), 1.0, 0.9),
    ]
    for layer in range(config["quantize_position"]):
        name = f"layers.{layer}"
        tensors += _attention(f"{name}.self_attn", width, key_bias=False)
        tensors += _norm(f"{name}.self_attn_layer_norm", width)
        tensors += _linear(f"{name}.fc1", (inner, width), gain=_BEFORE_GELU)
        tensors += _linear(f"{name}.fc2", (width, inner), gain=2.5)
        tensors += _norm(f"{name}.final_layer_norm", width)
    return _cast(tensors, dtype)


def _encoder(config: dict[str, Any]) -> Iterator[Tensor]:
    dim = config["vocos_dim"]
    yield from _backbone("encoder.encoder", config["input_channels"], config, config["vocos_num_layers"])
    yield from _downsample("encoder", config)
    yield from _linear("encoder.project", (config["out_channels"], dim))


def _feature_decoder(name: str, config: dict[str, Any]) -> Iterator[Tensor]:
    dim = config["vocos_dim"]
    yield from _linear(f"{name}.linear_pre", (dim, config["input_channels"]))
    yield from _downsample(name, config)
    layers, condition = config["vocos_num_layers"], config.get("condition_dim")
    yield from _backbone(f"{name}.vocos_backbone", dim, config, layers, condition)
    yield from _linear(f"{name}.linear", (config["out_channels"], dim))


def _downsample(name: str, config: dict[str, Any]) -> Iterator[Tensor]:
    for index in range(len(config["sample_ratios"])):
        yield from _backbone(f"{name}.downsample.{index}.1", config["vocos_dim"], config, 2)


def _backbone(
    name: str, inputs: int, config: dict[str, Any], layers: int, condition: int | None = None
) -> Iterator[Tensor]:
    """A Vocos backbone of ConvNeXt blocks (Siuzdak 2023); with `condition`, its norms are adaptive."""
    dim, inner = config["vocos_dim"], config["vocos_intermediate_dim"]
    yield from _linear(f"{name}.embed", (dim, inputs, 7))
    yield from _adaptive_norm(f"{name}.norm", dim, condition)
    for layer in range(layers):
        block = f"{name}.convnext.{layer}"
        yield from _linear(f"{block}.dwconv", (dim, 1, 7))
        yield from _adaptive_norm(f"{block}.norm", dim, condition)
        yield from _linear(f"{block}.pwconv1", (inner, dim), gain=_BEFORE_GELU)
        yield from _linear(f"{block}.pwconv2", (dim, inner), gain=7.0)
        yield _around(f"{block}.gamma", (dim,), 0.3, 0.2)
    yield from _norm(f"{name}.final_layer_norm", dim)


def _adaptive_norm(name: str, dim: int, condition: int | None) -> Iterator[Tensor]:
    if condition is None:
        yield from _norm(name, dim)
        return
    yield _around(f"{name}.scale.bias", (dim,), 1.0, 0.3)
    yield _weight(f"{name}.scale.weight", (dim, condition), gain=0.3)
    yield _around(f"{name}.shift.bias", (dim,), 0.0, 0.2)
    yield _weight(f"{name}.shift.weight", (dim, condition), gain=0.3)


def _quantizer(config: dict[str, Any]) -> Iterator[Tensor]:
    inputs, codes, width = config["input_dim"], config["codebook_size"], config["codebook_dim"]
    yield _around("quantizer.cluster_size", (codes,), 1.0, 0.9)
    yield _around("quantizer.codebook.weight", (codes, width), 0.0, 1.7)
    yield from _weight_normed("quantizer.in_project", (width, inputs, 1), scale=4.0)
    yield from _weight_normed("quantizer.out_project", (inputs, width, 1), scale=1.0)


def _speaker_encoder(config: dict[str, Any]) -> Iterator[Tensor]:
    latent, tokens, levels = config["latent_dim"], config["token_num"], len(config["fsq_levels"])
    yield from _ecapa(config["input_dim"], config["out_dim"])
    sampler = "speaker_encoder.perceiver_sampler"
    feed_forward = int(latent * 4 * 2 / 3)  # GEGLU keeps the parameter count of a plain 4x layer
    yield _around(f"{sampler}.latents", (tokens, latent), 0.0, 1.0)
    yield from _linear(f"{sampler}.proj_context", (latent, _ECAPA_FEATURES))
    for layer in range(_PERCEIVER_DEPTH):
        attention, expansion = f"{sampler}.layers.{layer}.0", f"{sampler}.layers.{layer}.1"
        yield _weight(f"{attention}.to_q.weight", (_PERCEIVER_INNER, latent))
        yield _weight(f"{attention}.to_kv.weight", (2 * _PERCEIVER_INNER, latent))
        yield _weight(f"{attention}.to_out.weight", (latent, _PERCEIVER_INNER))
        yield from _linear(f"{expansion}.0", (2 * feed_forward, latent))
        yield from _linear(f"{expansion}.2", (latent, feed_forward))
    yield _around(f"{sampler}.norm.gamma", (latent,), 1.0, 0.3)
    yield from _linear("speaker_encoder.quantizer.project_in", (levels, latent))
    yield from _linear("speaker_encoder.quantizer.project_out", (latent, levels))
    yield from _linear("speaker_encoder.project", (config["out_dim"], latent * tokens))


def _ecapa(mels: int, outputs: int) -> Iterator[Tensor]:
    """ECAPA-TDNN (Desplanques et al. 2020)."""
    name = "speaker_encoder.speaker_encoder"
    yield from _linear(f"{name}.layer1.conv", (_ECAPA, mels, 5), gain=6.0)  # the mel spectrogram is linear and faint
    yield from _batch_norm(f"{name}.layer1.bn", _ECAPA)
    for layer in (2, 3, 4):
        block = f"{name}.layer{layer}.se_res2block"
        for index in (0, 2):
            yield from _linear(f"{block}.{index}.conv", (_ECAPA, _ECAPA, 1), gain=1.4)
            yield from _batch_norm(f"{block}.{index}.bn", _ECAPA)
        width = _ECAPA // _RES2_SCALE
        for index in range(_RES2_SCALE - 1):
            yield from _linear(f"{block}.1.convs.{index}", (width, width, 3), gain=1.4)
            yield from _batch_norm(f"{block}.1.bns.{index}", width)
        yield from _linear(f"{block}.3.linear1", (_BOTTLENECK, _ECAPA))
        yield from _linear(f"{block}.3.linear2", (_ECAPA, _BOTTLENECK))
    yield from _linear(f"{name}.conv", (_ECAPA_FEATURES, _ECAPA_FEATURES, 1), gain=1.4)
    yield from _linear(f"{name}.pool.linear1", (_BOTTLENECK, 3 * _ECAPA_FEATURES, 1))
    yield from _linear(f"{name}.pool.linear2", (_ECAPA_FEATURES, _BOTTLENECK, 1))
    yield from _batch_norm(f"{name}.bn", 2 * _ECAPA_FEATURES)
    yield from _linear(f"{name}.linear", (outputs, 2 * _ECAPA_FEATURES))


def _wave_generator(config: dict[str, Any]) -> Iterator[Tensor]:
    """Snake upsampling blocks as in DAC (Kumar et al. 2023); the last scale sets the loudness."""
    channels = config["channels"]
    yield from _weight_normed("decoder.model.0", (channels, config["input_channel"], 7), scale=1.0)
    stages = list(zip(config["rates"], config["kernel_sizes"], strict=True))
    for stage, (rate, kernel) in enumerate(stages, start=1):
        block, width = f"decoder.model.{stage}.block", channels // 2
        yield _alpha(f"{block}.0.alpha", channels)
        # Transposed: the norm is over (out, kernel) of one input channel, and `kernel / rate` taps overlap.
        yield from _weight_normed(f"{block}.1", (channels, width, kernel), scale=math.sqrt(rate / 2), outputs=width)
        for unit in (2, 3, 4):
            yield _alpha(f"{block}.{unit}.block.0.alpha", width)
            yield from _weight_normed(f"{block}.{unit}.block.1", (width, width, 7), scale=1.0)
            yield _alpha(f"{block}.{unit}.block.2.alpha", width)
            yield from _weight_normed(f"{block}.{unit}.block.3", (width, width, 1), scale=0.4)
        channels = width
    last = len(stages) + 1
    yield _alpha(f"decoder.model.{last}.alpha", channels)
    yield from _weight_normed(f"decoder.model.{last + 1}", (1, channels, 7), scale=0.04, bias=0.02)


def _attention(name: str, width: int, *, key_bias: bool) -> list[Tensor]:
    tensors = [
        *_linear(f"{name}.q_proj", (width, width), gain=1.5),
        *_linear(f"{name}.k_proj", (width, width), gain=1.5),
        *_linear(f"{name}.v_proj", (width, width)),
        *_linear(f"{name}.out_proj", (width, width), gain=0.4),
    ]
    return tensors if key_bias else [tensor for tensor in tensors if not tensor.name.endswith("k_proj.bias")]


def _linear(name: str, shape: tuple[int, ...], *, gain: float = 1.0) -> list[Tensor]:
    return [_weight(f"{name}.weight", shape, gain=gain), _bias(f"{name}.bias", shape[0])]


def _weight_normed(
    name: str, shape: tuple[int, ...], *, scale: float, outputs: int | None = None, bias: float = 0.1
) -> list[Tensor]:
    """`weight_v` (any length) and `weight_g`, its norm per slice of the first dimension."""
    return [
        _around(f"{name}.weight_g", (shape[0], *(1 for _ in shape[1:])), scale, 0.25 * scale),
        _weight(f"{name}.weight_v", shape),
        _bias(f"{name}.bias", outputs or shape[0], bias),
    ]


def _batch_norm(name: str, width: int) -> list[Tensor]:
    return [
        *_norm(name, width),
        _around(f"{name}.running_mean", (width,), 0.2, 0.2),
        _around(f"{name}.running_var", (width,), 1.0, 0.5),
        Tensor(f"{name}.num_batches_tracked", (), 0.0, 0.0, "I64"),
    ]


def _norm(name: str, width: int, scale: float = 1.0) -> list[Tensor]:
    return [
        _around(f"{name}.weight", (width,), scale, 0.3 * scale),
        _around(f"{name}.bias", (width,), 0.0, 0.2 * scale),
    ]


def _alpha(name: str, channels: int) -> Tensor:
    return _around(name, (1, channels, 1), 1.25, 0.75)


def _bias(name: str, width: int, half_width: float = 0.1) -> Tensor:
    return _around(name, (width,), 0.0, half_width)


def _weight(name: str, shape: tuple[int, ...], *, gain: float = 1.0) -> Tensor:
    """Uniform with standard deviation gain / sqrt(fan-in): the output has `gain` times the input's level."""
    return _around(name, shape, 0.0, gain * math.sqrt(3 / math.prod(shape[1:])))


def _around(name: str, shape: tuple[int, ...], centre: float, half_width: float) -> Tensor:
    return Tensor(name, shape, centre - half_width, centre + half_width)


def _cast(tensors: list[Tensor], dtype: Dtype) -> list[Tensor]:
    return [tensor if tensor.dtype == "I64" else replace(tensor, dtype=dtype) for tensor in tensors]
