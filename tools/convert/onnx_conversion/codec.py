"""The codec of a checkpoint as ONNX graphs: which there are, and the folder that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

import gpa_engines
from gpa_codecs.bicodec.config import BiCodecConfig
from gpa_codecs.bicodec.model import SemanticEncoder, VoiceEncoder, WaveDecoder
from gpa_codecs.errors import GpaError
from gpa_codecs.files import write_atomically
from gpa_codecs.glm_tokenizer.config import GlmFeatureConfig, GlmTokenizerConfig
from gpa_codecs.glm_tokenizer.model import GlmEncoder
from gpa_codecs.network_codec import BiCodecSettings, GlmSettings
from gpa_codecs.onnx_folder import CODEC_FOLDER, PRECISIONS, CodecFolder, Graph
from gpa_codecs.wav2vec2.config import Wav2Vec2Config
from gpa_codecs.wav2vec2.model import Wav2Vec2Features
from gpa_codecs.weights import load_module
from gpa_engines.checkpoint import Checkpoint, Part

from .fast_convolution import speed_up
from .graphs import OPSET, save, trace
from .new_folder import new_folder
from .precision import to_fp16, to_int8

Progress = Callable[[str, int, int], None]
"""Called with a graph's name, the graphs that are done and the graphs in all."""

CODEC_PARTS: tuple[Part, ...] = ("tokenizer", "bicodec", "wav2vec2", "glm")
"""The parts of a checkpoint that are converted, or copied."""

_TOKENIZER = "tokenizer.json"
_PRENET, _GENERATOR = "decoder-prenet", "decoder-generator"


@dataclass(frozen=True, slots=True)
class _Plan:
    """A network to trace: inputs by name and the output's name, and which of their axes have a free length."""

    part: str
    name: str
    build: Callable[[], nn.Module]
    folder: Path
    inputs: Mapping[str, Tensor]
    output: str
    lengths: Mapping[str, Mapping[int, str]]


def export_codec(
    checkpoint: Checkpoint,
    out_dir: Path,
    precisions: Sequence[str],
    progress: Progress,
    inspect: Callable[[Path], None] | None = None,
) -> None:
    """Write `out_dir`/codec (see :mod:`gpa_codecs.onnx_folder`), and tokenizer.json into `out_dir`.

    precisions: of the decoder; fp32 is always among them. inspect: called with the folder before it takes its name;
    what it raises keeps the folder from being there. An earlier codec folder is replaced once this one is whole.
    Raises CheckpointError for a checkpoint that is not whole, and GpaError for a folder that cannot be written.
    """
    chosen = [each for each in PRECISIONS if each == "fp32" or each in precisions]
    sources = {name: digest for name, digest in checkpoint.fingerprint().items() if not name.startswith("lm/")}
    try:
        with new_folder(out_dir / CODEC_FOLDER) as folder:
            parts = _write_graphs(checkpoint, folder, chosen, progress)
            _manifest(checkpoint, folder, parts, sources).write()
            if inspect is not None:
                inspect(folder)
        write_atomically(out_dir / _TOKENIZER, checkpoint.tokenizer_file.read_bytes())
    except OSError as error:
        raise GpaError(f"{out_dir}: the codec could not be written: {error.strerror or error}") from error


def _write_graphs(
    checkpoint: Checkpoint, folder: Path, precisions: Sequence[str], progress: Progress
) -> dict[str, dict[str, tuple[Graph, ...]]]:
    plans = list(_plans(checkpoint))
    total = len(plans) + sum({"fp32": 0, "fp16": 2, "int8": 1}[precision] for precision in precisions)
    parts: dict[str, dict[str, tuple[Graph, ...]]] = {}
    done = 0

    def written(model: onnx.ModelProto, name: str) -> Graph:
        nonlocal done
        progress(name, done, total)
        graph = save(model, folder, name)
        done += 1
        progress(name, done, total)
        return graph

    for plan in plans:
        progress(plan.name, done, total)
        network = load_module(plan.build, plan.folder, torch.device("cpu"))
        part = parts.setdefault(plan.part, {})
        for precision, model, name in _models(plan, network, precisions, folder):
            part[precision] = (*part.get(precision, ()), written(model, name))
        if plan.name == _GENERATOR and "int8" in precisions:
            part["int8"] += part["fp32"][-1:]  # it has no matrix product
        del network
    return parts


def _models(
    plan: _Plan, network: nn.Module, precisions: Sequence[str], folder: Path
) -> Iterator[tuple[str, onnx.ModelProto, str]]:
    """Precision, graph and name of what is written for a plan."""

    def traced(network: nn.Module) -> onnx.ModelProto:
        return trace(network, plan.inputs, plan.output, plan.lengths, folder)

    # Fast only in float32: interpolation would make the rounding of shorter weights ten times larger.
    yield "fp32", traced(speed_up(deepcopy(network)) if plan.name == _GENERATOR else network), plan.name
    if plan.part == "decoder" and "fp16" in precisions:
        yield "fp16", to_fp16(traced(network)), f"{plan.name}-fp16"
    if plan.name == _PRENET and "int8" in precisions:
        yield "int8", to_int8(traced(network)), f"{plan.name}-int8"


class _Prenet(WaveDecoder):
    """The decoder up to the generator's input."""

    def __init__(self, config: BiCodecConfig) -> None:
        super().__init__(config)
        del self.decoder

    def forward(self, semantic: Tensor, voice: Tensor) -> Tensor:
        return self.latents(semantic, voice)


class _Generator(nn.Module):
    """The generator alone, under the names that the weight file has."""

    def __init__(self, config: BiCodecConfig) -> None:
        super().__init__()
        self.decoder = WaveDecoder(config).decoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(latents).squeeze(1)


def _plans(checkpoint: Checkpoint) -> Iterator[_Plan]:
    """Every graph, with inputs to trace it with: their numbers do not matter, but lengths that differ must differ."""
    bicodec = BiCodecConfig.from_file(checkpoint.bicodec_dir / "config.yaml")
    wav2vec2 = Wav2Vec2Config.from_file(checkpoint.wav2vec2_dir / "config.json")
    glm = GlmTokenizerConfig.from_file(checkpoint.glm_dir / "config.json")
    random = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def codes(count: int, cardinality: int) -> Tensor:
        return torch.randint(cardinality, (1, count), generator=random)

    samples, features = {"samples": noise(1, 16000)}, {"features": noise(1, 49, wav2vec2.hidden_size)}
    free = {"samples": {1: "samples"}, "features": {1: "frames"}}
    yield _Plan(
        "wav2vec2", "wav2vec2", lambda: Wav2Vec2Features(wav2vec2), checkpoint.wav2vec2_dir, samples, "features", free
    )
    free = {"features": {1: "frames"}, "codes": {1: "frames"}}
    yield _Plan(
        "semantic", "semantic", lambda: SemanticEncoder(bicodec), checkpoint.bicodec_dir, features, "codes", free
    )
    mel = {"mel": noise(1, bicodec.mel.num_mels, 301).abs()}
    yield _Plan(
        "voice", "voice", lambda: VoiceEncoder(bicodec), checkpoint.bicodec_dir, mel, "codes", {"mel": {2: "frames"}}
    )
    pieces = {"semantic": codes(20, bicodec.codebook_size), "voice": codes(bicodec.voice_length, 4096)}
    free = {"semantic": {1: "codes"}, "latents": {2: "codes"}}
    yield _Plan("decoder", _PRENET, lambda: _Prenet(bicodec), checkpoint.bicodec_dir, pieces, "latents", free)
    latents = {"latents": noise(1, bicodec.generator.input_channel, 20)}
    free = {"latents": {2: "codes"}, "pcm": {1: "samples"}}
    yield _Plan("decoder", _GENERATOR, lambda: _Generator(bicodec), checkpoint.bicodec_dir, latents, "pcm", free)
    log_mel = {"log_mel": noise(1, glm.num_mel_bins, 208), "frames": torch.tensor(201)}
    free = {"log_mel": {2: "mel_frames"}, "codes": {1: "codes"}}
    yield _Plan("glm", "glm", lambda: GlmEncoder(glm), checkpoint.glm_dir, log_mel, "codes", free)


def _manifest(
    checkpoint: Checkpoint,
    folder: Path,
    parts: Mapping[str, Mapping[str, tuple[Graph, ...]]],
    sources: Mapping[str, str],
) -> CodecFolder:
    bicodec = BiCodecConfig.from_file(checkpoint.bicodec_dir / "config.yaml")
    wav2vec2 = Wav2Vec2Config.from_file(checkpoint.wav2vec2_dir / "config.json")
    glm = GlmTokenizerConfig.from_file(checkpoint.glm_dir / "config.json")
    features = GlmFeatureConfig.from_file(checkpoint.glm_dir / "preprocessor_config.json")
    return CodecFolder(
        root=folder,
        bicodec=BiCodecSettings(bicodec.codebook_size, bicodec.ref_segment_length, bicodec.mel),
        glm=GlmSettings(glm.codebook_size, features),
        parts=parts,
        opset=OPSET,
        converter=f"gpa-engines {gpa_engines.__version__}, torch {torch.__version__}, onnx {onnx.__version__}",
        sources=sources,
        generator_context=bicodec.generator.context,
        geometry={
            "hop_length": bicodec.hop_length,
            "voice_length": bicodec.voice_length,
            "voice_cardinality": bicodec.voice_cardinality,
            "prenet": asdict(bicodec.prenet),
            "generator": {name: _plain(value) for name, value in asdict(bicodec.generator).items()},
            "wav2vec2": {"conv_kernel": list(wav2vec2.conv_kernel), "conv_stride": list(wav2vec2.conv_stride)},
        },
    )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
