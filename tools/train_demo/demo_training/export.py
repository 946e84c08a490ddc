"""The checkpoint folder: every file and every tensor of the released layout, the trained ones by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from demo_training.corpus import Corpus
from demo_training.dimensions import (
    TRAINED_WAV2VEC2_LAYERS,
    bicodec,
    glm_tokenizer,
    language_model,
    wav2vec2,
)
from demo_training.encoding import glm_codes, semantic_codes
from demo_training.recipe import Recipe, Report
from gpa_codecs.audio import Waveform
from gpa_codecs.errors import CheckpointError
from gpa_codecs.torch_codec import TorchCodec
from gpa_codecs.weights import SAFETENSORS
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.checkpoint.layout import Layout
from gpa_engines.random_checkpoint import parameters
from gpa_engines.random_checkpoint.values import Tensor as Stored

LARGEST = 25_000_000
"""Bytes of the whole folder."""

_CHECKED = 40  # recordings whose codes must be those that training saw
_AGREEMENT = 0.999  # batches add up in another order, which may move a code in a thousand
_LICENSE = Path(__file__).parents[3] / "LICENSE"


@dataclass(frozen=True, slots=True)
class _Network:
    """Names and shapes that the released file has, and the tensors that training gives."""

    stored: list[Stored]
    trained: dict[str, Tensor]


def export(recipe: Recipe, report: Report) -> None:
    """Stage `export`: write the checkpoint beside its place, check it as the product reads it, then move it there."""
    place, folder = recipe.out / "checkpoint", recipe.out / "work" / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recipe.layout, folder)
    layout = Layout.find(folder)
    networks = {
        layout.root: _Network(parameters.language_model(language_model()), recipe.load("tuning")),
        layout.bicodec_dir: _Network(
            parameters.bicodec(bicodec(), dtype="BF16"),
            {
                **recipe.load("semantic", "bicodec."),
                **recipe.load("voice", "bicodec."),
                **recipe.load("generator", "bicodec."),
            },
        ),
        layout.wav2vec2_dir: _Network(
            parameters.wav2vec2(wav2vec2(), dtype="BF16"),
            {f"wav2vec2.{name}": value for name, value in recipe.load("semantic", "wav2vec2.").items()},
        ),
        layout.glm_dir: _Network(parameters.glm_tokenizer(glm_tokenizer(), dtype="BF16"), recipe.load("glm")),
    }
    for target, network in networks.items():
        tensors = _tensors(network, recipe.rng("export", target.name))
        save_file(tensors, target / SAFETENSORS, metadata={"format": "pt"})
    shutil.copy(_LICENSE, folder / "LICENSE")
    (folder / "training.json").write_text(json.dumps(training_record(recipe.out), indent=2) + "\n", encoding="utf-8")
    figures = _check(recipe, layout)
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
    report(1, 1, figures)


def check_size(folder: Path) -> int:
    """Bytes of a checkpoint. Raises CheckpointError for too many."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise CheckpointError(f"the checkpoint has {size:,} bytes; at most {LARGEST:,} are allowed")
    return size


def training_record(out: Path) -> dict[str, Any]:
    """How a run was made and how it went: its settings, and a curve and a summary of every stage that is done."""
    record: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    record["stages"] = {}
    for summary in sorted((out / "logs").glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        stage = json.loads(summary.read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in summary.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
        curve = [line for line in lines if "loss" in line]
        record["stages"][summary.stem] = stage | ({"curve": curve[:: max(1, len(curve) // 40)]} if curve else {})
    return record


def _tensors(network: _Network, rng: np.random.Generator) -> dict[str, Tensor]:
    unused = set(network.trained)
    tensors = {}
    for stored in network.stored:
        tensor, source = _tensor(stored, network.trained, rng)
        if tuple(tensor.shape) != stored.shape:
            raise CheckpointError(f"{stored.name} has shape {tuple(tensor.shape)}; the layout has {stored.shape}")
        tensors[stored.name] = tensor.contiguous()
        unused.discard(source)
    if unused:
        raise CheckpointError(f"the layout has no place for the trained tensor {min(unused)}")
    return tensors


def _tensor(stored: Stored, trained: Mapping[str, Tensor], rng: np.random.Generator) -> tuple[Tensor, str]:
    """A tensor as it goes into the file, and the name of the trained one that it was made of."""
    stem, _, leaf = stored.name.rpartition(".")
    if stored.name in trained:
        return trained[stored.name].bfloat16(), stored.name
    weight = f"{stem}.weight"
    if leaf == "weight_v" and weight in trained:
        return trained[weight].bfloat16(), weight
    if leaf == "weight_g" and weight in trained:
        # In float32, so that the product of magnitude and direction is the trained weight to the last bits.
        others = [axis for axis, size in enumerate(stored.shape) if size == 1]
        return torch.linalg.vector_norm(trained[weight].float(), dim=others, keepdim=True), weight
    if stored.dtype == "I64":
        return torch.zeros(stored.shape, dtype=torch.int64), ""
    if _adds_nothing(stored.name):
        return torch.zeros(stored.shape, dtype=torch.bfloat16), ""
    # What inference never reads, two values for each tensor.
    middle, width = (stored.high + stored.low) / 2, (stored.high - stored.low) / 2
    signs = torch.from_numpy(rng.integers(2, size=stored.shape) * 2 - 1)
    return (middle + width / 2 * signs).bfloat16(), ""


def _adds_nothing(name: str) -> bool:
    """Whether a tensor of wav2vec2 ends a branch of one of the layers that were not trained."""
    prefix = "wav2vec2.encoder.layers."
    if not name.startswith(prefix):
        return False
    layer, _, rest = name.removeprefix(prefix).partition(".")
    return int(layer) >= TRAINED_WAV2VEC2_LAYERS and rest.startswith(
        ("attention.out_proj", "feed_forward.output_dense")
    )


def _check(recipe: Recipe, layout: Layout) -> dict[str, float]:
    """Read the folder as the product does. Raises CheckpointError where it is not what was trained."""
    Checkpoint.open(layout.root)
    size = check_size(layout.root)
    corpus = Corpus.load(recipe.file("corpus.npz"))
    waves = [corpus.wave(index) for index in range(min(_CHECKED, len(corpus)))]
    codec = TorchCodec(layout.bicodec_dir, layout.glm_dir)
    read = codec.encode_batch([Waveform(wave) for wave in waves])
    seen = {"semantic": semantic_codes(recipe, waves), "glm": glm_codes(recipe, waves)}
    figures = {"megabytes": size / 1e6}
    for family, codes in seen.items():
        equal = np.concatenate([getattr(tokens, family) for tokens in read]) == np.concatenate(codes)
        figures[f"{family}_agreement"] = float(equal.mean())
        if equal.mean() < _AGREEMENT:
            raise CheckpointError(f"the checkpoint gives {equal.mean():.2%} of the {family} codes that training saw")
    return figures
