"""The language model's training: three tasks, and the penalty under which it will be sampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from demo_training.digits import LONGEST
from demo_training.dimensions import Geometry
from demo_training.examples import Example, Examples
from demo_training.language_model import LanguageModel
from demo_training.recipe import Recipe, Report, as_stored
from demo_training.tokens import TokenCorpus
from demo_training.training import Losses, Optimization, Schedule, cosine, plateau, train
from gpa_codecs.prompts import Task
from gpa_codecs.vocabulary import TokenSpace


@dataclass(frozen=True, slots=True)
class _Phase:
    """One training of the language model. tasks: of successive steps. echoed: share of the texts that are listened to
    that come from those with an echo. begins_short: strings of up to three digits come first.
    """

    steps: int
    schedule: Schedule
    tasks: tuple[Task, ...]
    echoed: float = 0.0
    begins_short: bool = False


_LM = _Phase(4000, plateau, ("tts-a", "stt", "tts-a", "vc"), begins_short=True)
# Conversion converges last, stt first.
_TUNING = _Phase(10000, cosine, ("vc", "tts-a", "vc", "stt", "tts-a", "vc", "tts-a", "stt"), echoed=0.4)

_BATCH = 10  # examples: small batches learn more per second
_RATE, _MUON_RATE = 2e-3, 4e-3

_PENALTY = 1.2
"""Speech is sampled with this repetition penalty by default; a model that never met it stumbles over its own runs."""

_SHORT, _SHORT_SHARE = 3, 0.15
"""Digits at most at first, and the share of the steps for which that holds."""

_SAMPLED_GLOBALS = 64  # global codes that a step's softmax sees: no answer holds one, so a few are enough


def train_lm(recipe: Recipe, report: Report) -> None:
    """Stage `lm`: the language model, on recordings; it begins with short strings."""
    geometry = Geometry.read(recipe.layout)
    recipe.seed_torch("lm")
    network = LanguageModel(geometry.lm)
    _train(recipe, report, "lm", network, _LM, _examples(recipe, geometry, None))


def tune_lm(recipe: Recipe, report: Report) -> None:
    """Stage `tuning`: goes on with that language model, on strings of any length, and where it listens on recordings
    and on what the codec makes of them alike: it is to understand what it has spoken.
    """
    geometry = Geometry.read(recipe.layout)
    network = LanguageModel(geometry.lm)
    network.load_state_dict(recipe.load("lm"))
    examples = _examples(recipe, geometry, TokenCorpus.load(recipe.file("echo.npz")))
    _train(recipe, report, "tuning", network, _TUNING, examples)


def _examples(recipe: Recipe, geometry: Geometry, echo: TokenCorpus | None) -> Examples:
    corpus = TokenCorpus.load(recipe.file("tokens.npz"))
    return Examples(corpus, recipe.load("voice")["codes"].numpy(), geometry.space, echo)


def _train(
    recipe: Recipe,
    report: Report,
    name: str,
    network: LanguageModel,
    phase: _Phase,
    examples: Examples,
) -> None:
    network.to(recipe.device)
    space, steps = examples.space, recipe.steps(phase.steps)

    def losses(step: int, rng: np.random.Generator) -> Losses:
        task = phase.tasks[step % len(phase.tasks)]
        short = phase.begins_short and step < _SHORT_SHARE * steps
        drawn = examples.batch(task, _BATCH, rng, longest=_SHORT if short else LONGEST, echoed=phase.echoed)
        batch = _Batch.of(drawn, space, rng).to(recipe.device)
        # Products in bfloat16 take two thirds of the time on a CPU that has them.
        with torch.autocast(torch.device(recipe.device).type, torch.bfloat16):
            hidden = network(batch.ids)[batch.rows, batch.positions]
            logits = network.logits(hidden, batch.vocabulary).float()
        plain = F.cross_entropy(logits, batch.targets)
        right = (logits.argmax(-1) == batch.targets).float().mean()
        loss = plain
        if task != "stt":
            loss = (plain + F.cross_entropy(batch.penalized(logits), batch.targets)) / 2
        return {"loss": loss, task: plain, f"{task}_right": right}

    optimization = Optimization(
        steps, _RATE, phase.schedule, betas=(0.9, 0.98), weight_decay=0.05, muon_rate=_MUON_RATE
    )
    train(recipe, name, network, optimization, losses, report)
    as_stored(network)
    recipe.save(name, network.state_dict())


@dataclass(frozen=True, slots=True)
class _Batch:
    """ids: int64 (B, T). The M ids of all answers: `targets` (M), as indices into `vocabulary` (R), each predicted at
    `rows`, `positions` (M). first: where each id of the vocabulary first stands in each row, (B, R).
    """

    ids: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    vocabulary: Tensor
    first: Tensor

    @classmethod
    def of(cls, examples: list[Example], space: TokenSpace, rng: np.random.Generator) -> _Batch:
        """Pad to the right; whatever stands there is never looked at."""
        lengths = [len(example.prompt) + len(example.answer) for example in examples]
        ids = np.zeros((len(examples), max(lengths)), np.int64)
        rows, positions, answers = [], [], []
        for row, example in enumerate(examples):
            ids[row, : lengths[row]] = [*example.prompt, *example.answer]
            places = np.arange(len(example.prompt) - 1, lengths[row] - 1)
            rows.append(np.full(len(places), row))
            positions.append(places)
            answers.append(example.answer)
        sampled = rng.choice(space.global_.size, _SAMPLED_GLOBALS, replace=False) + space.global_.offset
        others = [id_ for id_ in range(space.vocab_size) if id_ not in space.global_.range]
        vocabulary = np.concatenate((others, sampled))
        place = np.full(space.vocab_size, -1)
        place[vocabulary] = np.arange(len(vocabulary))
        first = np.full((len(examples), len(vocabulary)), ids.shape[1])
        for row, length in enumerate(lengths):
            seen = place[ids[row, :length]]
            known = seen >= 0
            np.minimum.at(first[row], seen[known], np.flatnonzero(known))
        arrays = ids, np.concatenate(rows), np.concatenate(positions), place[np.concatenate(answers)], vocabulary, first
        return cls(*(torch.from_numpy(array) for array in arrays))

    def to(self, device: str) -> _Batch:
        return _Batch(*(getattr(self, name).to(device) for name in self.__slots__))

    def penalized(self, logits: Tensor) -> Tensor:
        """Logits (M, R) after the repetition penalty (Keskar et al. 2019) over all ids up to each position."""
        seen = self.first[self.rows] <= self.positions[:, None]
        return torch.where(seen, torch.where(logits < 0, logits * _PENALTY, logits / _PENALTY), logits)
