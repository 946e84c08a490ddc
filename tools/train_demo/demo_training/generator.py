"""The wave generator: from codes to samples, learned by spectra alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from demo_training.corpus import Corpus
from demo_training.dimensions import Geometry
from demo_training.encoding import semantic_codes
from demo_training.initialization import initialize
from demo_training.recipe import Recipe, Report, as_stored
from demo_training.spectra import FLOOR, magnitudes, to_log_mel
from demo_training.training import Losses, Optimization, cosine, train
from gpa_codecs.bicodec.generator import ResidualUnit, Snake
from gpa_codecs.bicodec.model import WaveDecoder
from gpa_codecs.codec import HOP_LENGTH

_STEPS = 4000
_BATCH = 4
_CODES = 48
_FFTS = (2048, 1024, 512, 256)
_MELS, _MEL_FFT = 80, 1024


class _SnakeFunction(torch.autograd.Function):
    """x + sin(alpha * x) ** 2 / alpha, keeping nothing but its input for the gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, alpha: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, alpha)
        return torch.addcmul(x, (x * alpha).sin_().square_(), (alpha + 1e-9).reciprocal())

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, alpha = ctx.saved_tensors  # type: ignore[attr-defined]
        angle = x * alpha
        sine, double = angle.sin(), (2 * angle).sin_()
        inverse = (alpha + 1e-9).reciprocal()
        by_alpha = (gradient * (x * double - sine.square_() * inverse)).sum((0, 2), keepdim=True) * inverse
        return gradient + gradient * double, by_alpha


class TrainingSnake(nn.Module):
    """The product's Snake works in place, which training cannot."""

    def __init__(self, snake: Snake) -> None:
        super().__init__()
        self.alpha = snake.alpha

    def forward(self, x: Tensor) -> Tensor:
        return _SnakeFunction.apply(x, self.alpha)


class TrainingResidual(nn.Module):
    """The product's residual unit adds in place."""

    def __init__(self, unit: ResidualUnit) -> None:
        super().__init__()
        self.block = unit.block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def train_generator(recipe: Recipe, report: Report) -> None:
    """Stage `generator`: the prenet, from where stage `semantic` left it, and the wave generator; codes are fixed."""
    geometry = Geometry.read(recipe.layout)
    corpus = Corpus.load(recipe.file("corpus.npz"))
    codes = semantic_codes(recipe, [corpus.wave(index) for index in range(len(corpus))])
    bank = recipe.load("voice")["codes"].to(recipe.device)
    recipe.seed_torch("generator")
    decoder = WaveDecoder(geometry.bicodec)
    initialize(decoder)
    known = {**recipe.load("semantic", "bicodec."), **recipe.load("voice", "bicodec.")}
    decoder.load_state_dict({name: known.get(name, value) for name, value in decoder.state_dict().items()})
    decoder.quantizer.requires_grad_(False)
    decoder.speaker_encoder.requires_grad_(False)
    network = _for_training(decoder).to(recipe.device)

    def losses(step: int, rng: np.random.Generator) -> Losses:
        semantic, target, voices = _batch(corpus, codes, rng)
        globals_ = bank[voices, torch.from_numpy(rng.integers(bank.shape[1], size=_BATCH))]
        made = network(semantic.to(recipe.device), globals_)
        return _spectral_losses(made, target.to(recipe.device))

    optimization = Optimization(recipe.steps(_STEPS), 1.5e-3, cosine, betas=(0.8, 0.99), clip=5.0)
    train(recipe, "generator", network, optimization, losses, report)
    as_stored(network)
    recipe.save("generator", {f"bicodec.{name}": value for name, value in network.state_dict().items()})


def _for_training(decoder: WaveDecoder) -> WaveDecoder:
    """Replace what works in place, under the same names."""
    for name, module in list(decoder.decoder.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, ResidualUnit):
            setattr(decoder.decoder.get_submodule(parent), leaf, TrainingResidual(module))
    for name, module in list(decoder.decoder.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, Snake):
            setattr(decoder.decoder.get_submodule(parent), leaf, TrainingSnake(module))
    return decoder


def _batch(corpus: Corpus, codes: list[np.ndarray], rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (B, T), the samples that they stand for (B, T * 320), and voices (B)."""
    semantic, waves, voices = [], [], []
    while len(semantic) < _BATCH:
        index = int(rng.integers(len(corpus)))
        if len(codes[index]) < _CODES:
            continue
        first = int(rng.integers(len(codes[index]) - _CODES + 1))
        semantic.append(codes[index][first : first + _CODES])
        waves.append(corpus.wave(index)[first * HOP_LENGTH : (first + _CODES) * HOP_LENGTH])
        voices.append(corpus.voice(index))
    return torch.from_numpy(np.stack(semantic)), torch.from_numpy(np.stack(waves)), torch.tensor(voices)


def _spectral_losses(made: Tensor, target: Tensor) -> Losses:
    """Multi-resolution spectra (Yamamoto et al. 2020) and mel bands; no loss sees a phase."""
    logs, convergences = [], []
    mel = torch.zeros((), device=made.device)
    for n_fft in _FFTS:
        ours, theirs = (magnitudes(waves, n_fft, n_fft // 4) for waves in (made, target))
        logs.append(F.l1_loss((ours + FLOOR).log(), (theirs + FLOOR).log()))
        convergences.append(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))
        if n_fft == _MEL_FFT:
            mel = F.l1_loss(to_log_mel(ours, _MELS), to_log_mel(theirs, _MELS))
    found = {"log": torch.stack(logs).mean(), "convergence": torch.stack(convergences).mean(), "mel": mel}
    return {"loss": torch.stack(list(found.values())).sum(), **found}
