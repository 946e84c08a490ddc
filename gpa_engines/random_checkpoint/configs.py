"""The configuration files of a random checkpoint: the released dimensions (`full`) and very small ones (`tiny`).

Sources of the full dimensions: GPA's released config; BiCodec/config.yaml of Spark-TTS-0.5B; the config of
wav2vec2-large-xlsr-53; the config of glm-4-voice-tokenizer, whose weights hold 16 of its 32 configured layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gpa_engines.random_checkpoint.vocabulary import VocabularyLayout, control_id

Size = Literal["tiny", "full"]
SIZES: tuple[Size, ...] = ("tiny", "full")

_FSQ_LEVELS = [4, 4, 4, 4, 4, 4]


@dataclass(frozen=True, slots=True)
class _Dimensions:
    """Everything in which the two sizes differ."""

    vocabulary: VocabularyLayout
    lm_vocab: int
    lm_hidden: int
    lm_intermediate: int
    lm_layers: int
    lm_heads: int
    lm_kv_heads: int
    lm_head_dim: int
    mels: int
    vocos: int
    vocos_intermediate: int
    encoder_layers: int
    postnet_layers: int
    latent: int  # width between BiCodec's parts
    generator: int  # channels of the wave generator's first layer
    speaker_latent: int
    w2v_conv: int
    w2v_hidden: int
    w2v_layers: int
    w2v_heads: int
    w2v_intermediate: int
    w2v_positions: int
    w2v_groups: int
    w2v_codevector: int
    glm_width: int
    glm_heads: int
    glm_intermediate: int
    glm_configured: int
    glm_layers: int


_DIMENSIONS: dict[Size, _Dimensions] = {
    "tiny": _Dimensions(
        vocabulary=VocabularyLayout(
            base=384, glm=432, glm_size=128, global_size=4096, semantic_size=256, named=4912 + 4
        ),
        lm_vocab=4920,
        lm_hidden=64,
        lm_intermediate=128,
        lm_layers=2,
        lm_heads=4,
        lm_kv_heads=2,
        lm_head_dim=32,
        mels=32,
        vocos=32,
        vocos_intermediate=64,
        encoder_layers=2,
        postnet_layers=1,
        latent=48,
        generator=64,
        speaker_latent=16,
        w2v_conv=32,
        w2v_hidden=64,
        w2v_layers=17,
        w2v_heads=4,
        w2v_intermediate=96,
        w2v_positions=16,
        w2v_groups=4,
        w2v_codevector=16,
        glm_width=64,
        glm_heads=4,
        glm_intermediate=128,
        glm_configured=4,
        glm_layers=2,
    ),
    "full": _Dimensions(
        vocabulary=VocabularyLayout(
            base=151_643, glm=151_727, glm_size=16_384, global_size=4096, semantic_size=8192, named=180_445
        ),
        lm_vocab=180_445,
        lm_hidden=512,
        lm_intermediate=3072,
        lm_layers=28,
        lm_heads=16,
        lm_kv_heads=8,
        lm_head_dim=128,
        mels=128,
        vocos=384,
        vocos_intermediate=2048,
        encoder_layers=12,
        postnet_layers=6,
        latent=1024,
        generator=1536,
        speaker_latent=128,
        w2v_conv=512,
        w2v_hidden=1024,
        w2v_layers=24,
        w2v_heads=16,
        w2v_intermediate=4096,
        w2v_positions=128,
        w2v_groups=16,
        w2v_codevector=768,
        glm_width=1280,
        glm_heads=20,
        glm_intermediate=5120,
        glm_configured=32,
        glm_layers=16,
    ),
}


def vocabulary_layout(size: Size) -> VocabularyLayout:
    """Where the token families of this size lie."""
    return _DIMENSIONS[size].vocabulary


def language_model(size: Size, seed: int) -> dict[str, Any]:
    """config.json: Qwen3, written as transformers 4 (`rope_theta`, `torch_dtype`) and 5 (`rope_parameters`) do."""
    dims = _DIMENSIONS[size]
    rope_theta = 1_000_000.0
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": control_id(dims.vocabulary, "<|endoftext|>"),
        "dtype": "bfloat16",
        "eos_token_id": control_id(dims.vocabulary, "<|im_end|>"),
        "gpa_random_weights": {"size": size, "seed": seed},
        "head_dim": dims.lm_head_dim,
        "hidden_act": "silu",
        "hidden_size": dims.lm_hidden,
        "initializer_range": 0.02,
        "intermediate_size": dims.lm_intermediate,
        "layer_types": ["full_attention"] * dims.lm_layers,
        "max_position_embeddings": 32_768,
        "max_window_layers": dims.lm_layers,
        "model_type": "qwen3",
        "num_attention_heads": dims.lm_heads,
        "num_hidden_layers": dims.lm_layers,
        "num_key_value_heads": dims.lm_kv_heads,
        "pad_token_id": control_id(dims.vocabulary, "<|endoftext|>"),
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": dims.lm_vocab,
    }


def generation(size: Size) -> dict[str, Any]:
    """generation_config.json."""
    layout = _DIMENSIONS[size].vocabulary
    return {
        "eos_token_id": control_id(layout, "<|im_end|>"),
        "pad_token_id": control_id(layout, "<|endoftext|>"),
    }


def bicodec(size: Size) -> dict[str, Any]:
    """BiCodec/config.yaml."""
    dims = _DIMENSIONS[size]
    backbone = {"vocos_dim": dims.vocos, "vocos_intermediate_dim": dims.vocos_intermediate}
    return {
        "highpass_cutoff_freq": 40,
        "sample_rate": 16_000,
        "segment_duration": 2.4,
        "max_val_duration": 12,
        "latent_hop_length": 320,
        "ref_segment_duration": 6,
        "volume_normalize": True,
        "audio_tokenizer": {
            "mel_params": {
                "sample_rate": 16_000,
                "n_fft": 1024,
                "win_length": 640,
                "hop_length": 320,
                "mel_fmin": 10,
                "mel_fmax": None,
                "num_mels": dims.mels,
            },
            "encoder": {
                "input_channels": dims.w2v_hidden,
                **backbone,
                "vocos_num_layers": dims.encoder_layers,
                "out_channels": dims.latent,
                "sample_ratios": [1, 1],
            },
            "decoder": {
                "input_channel": dims.latent,
                "channels": dims.generator,
                "rates": [8, 5, 4, 2],
                "kernel_sizes": [16, 11, 8, 4],
            },
            "quantizer": {
                "input_dim": dims.latent,
                "codebook_size": dims.vocabulary.semantic_size,
                "codebook_dim": 8,
                "commitment": 0.25,
                "codebook_loss_weight": 2.0,
                "use_l2_normlize": True,
                "threshold_ema_dead_code": 0.2,
            },
            "speaker_encoder": {
                "input_dim": dims.mels,
                "out_dim": dims.latent,
                "latent_dim": dims.speaker_latent,
                "token_num": 32,
                "fsq_levels": list(_FSQ_LEVELS),
                "fsq_num_quantizers": 1,
            },
            "prenet": {
                "input_channels": dims.latent,
                **backbone,
                "vocos_num_layers": dims.encoder_layers,
                "out_channels": dims.latent,
                "condition_dim": dims.latent,
                "sample_ratios": [1, 1],
                "use_tanh_at_final": False,
            },
            "postnet": {
                "input_channels": dims.latent,
                **backbone,
                "vocos_num_layers": dims.postnet_layers,
                "out_channels": dims.w2v_hidden,
                "sample_ratios": [1, 1],
                "use_tanh_at_final": False,
            },
        },
    }


def wav2vec2(size: Size) -> dict[str, Any]:
    """BiCodec/wav2vec2-large-xlsr-53/config.json."""
    dims = _DIMENSIONS[size]
    return {
        "activation_dropout": 0.0,
        "apply_spec_augment": True,
        "architectures": ["Wav2Vec2ForPreTraining"],
        "attention_dropout": 0.1,
        "bos_token_id": 1,
        "codevector_dim": dims.w2v_codevector,
        "conv_bias": True,
        "conv_dim": [dims.w2v_conv] * 7,
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "ctc_loss_reduction": "sum",
        "ctc_zero_infinity": False,
        "do_stable_layer_norm": True,
        "dtype": "float32",
        "eos_token_id": 2,
        "feat_extract_activation": "gelu",
        "feat_extract_norm": "layer",
        "feat_proj_dropout": 0.1,
        "final_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout": 0.1,
        "hidden_size": dims.w2v_hidden,
        "initializer_range": 0.02,
        "intermediate_size": dims.w2v_intermediate,
        "layer_norm_eps": 1e-5,
        "layerdrop": 0.1,
        "model_type": "wav2vec2",
        "num_attention_heads": dims.w2v_heads,
        "num_codevector_groups": 2,
        "num_codevectors_per_group": 320,
        "num_conv_pos_embedding_groups": dims.w2v_groups,
        "num_conv_pos_embeddings": dims.w2v_positions,
        "num_feat_extract_layers": 7,
        "num_hidden_layers": dims.w2v_layers,
        "pad_token_id": 0,
        "proj_codevector_dim": dims.w2v_codevector,
        "torch_dtype": "float32",
        "vocab_size": 32,
    }


def wav2vec2_preprocessor() -> dict[str, Any]:
    """BiCodec/wav2vec2-large-xlsr-53/preprocessor_config.json."""
    return {
        "do_normalize": True,
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0,
        "return_attention_mask": True,
        "sampling_rate": 16_000,
    }


def glm_tokenizer(size: Size) -> dict[str, Any]:
    """glm-4-voice-tokenizer/config.json; the weights hold the first `quantize_position` of `encoder_layers` layers."""
    dims = _DIMENSIONS[size]
    return {
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "architectures": ["WhisperVQEncoder"],
        "attention_dropout": 0.0,
        "d_model": dims.glm_width,
        "dropout": 0.0,
        "dtype": "float32",
        "encoder_attention_heads": dims.glm_heads,
        "encoder_causal_attention": False,
        "encoder_causal_convolution": True,
        "encoder_ffn_dim": dims.glm_intermediate,
        "encoder_layerdrop": 0.0,
        "encoder_layers": dims.glm_configured,
        "init_std": 0.02,
        "is_encoder_decoder": True,
        "max_source_positions": 1500,
        "model_type": "whisper",
        "num_hidden_layers": dims.glm_configured,
        "num_mel_bins": dims.mels,
        "pooling_kernel_size": 4,
        "pooling_position": dims.glm_layers,
        "pooling_type": "avg",
        "quantize_causal_block_size": 200,
        "quantize_causal_encoder": False,
        "quantize_commit_coefficient": 0.25,
        "quantize_ema_decay": 0.99,
        "quantize_encoder_only": True,
        "quantize_loss_scale": 10.0,
        "quantize_position": dims.glm_layers,
        "quantize_restart_interval": 100,
        "quantize_vocab_size": dims.vocabulary.glm_size,
        "scale_embedding": False,
        "skip_language_detection": True,
        "torch_dtype": "float32",
        "vocab_size": 51_866,
    }


def glm_preprocessor(size: Size) -> dict[str, Any]:
    """glm-4-voice-tokenizer/preprocessor_config.json."""
    return {
        "chunk_length": 30,
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": _DIMENSIONS[size].mels,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 480_000,
        "nb_max_frames": 3000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": 16_000,
    }
