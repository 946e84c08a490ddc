"""The training loop that all networks share: resumable to the bit, because a step depends on its number alone."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from demo_training.recipe import Recipe, Report
from gpa_codecs.files import replacing

Losses = dict[str, Tensor]
Schedule = Callable[[float], float]

_SAVE_EVERY = 60.0  # seconds
_REPORT_EVERY = 20  # steps
_RISE = 0.02  # share of the steps


@dataclass(frozen=True, slots=True)
class Optimization:
    """AdamW (Loshchilov & Hutter 2019) for a number of steps; schedule: share of the steps done -> factor on the rates.

    muon_rate: that of Muon (Jordan et al. 2024), which then trains the matrices of linear layers instead; rate holds
    for the rest. clip: largest norm of the gradient.
    """

    steps: int
    rate: float
    schedule: Schedule
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    muon_rate: float | None = None


def train(
    recipe: Recipe,
    name: str,
    network: nn.Module,
    optimization: Optimization,
    losses: Callable[[int, np.random.Generator], Losses],
    report: Report,
) -> None:
    """Train `network` in place; what is not trained has `requires_grad` off.

    losses: (step, the step's own random numbers) -> named losses, of which "loss" is minimised. They may depend on
    nothing else that changes, so that a run which was interrupted, and goes on from `work/NAME.pt`, ends with the same
    weights as one that was not.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizers = _optimizers(network, trained, optimization)
    saves = _Saves(recipe, name, network, [optimizer for optimizer, _ in optimizers])
    network.train()
    figures: defaultdict[str, list[float]] = defaultdict(list)
    for step in range(saves.restore(), optimization.steps):
        found = losses(step, recipe.rng(name, "step", step))
        network.zero_grad(set_to_none=True)
        found["loss"].backward()
        nn.utils.clip_grad_norm_(trained, optimization.clip)
        factor = optimization.schedule(step / optimization.steps)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        for key, value in found.items():
            figures[key].append(float(value.detach()))
        if (step + 1) % _REPORT_EVERY == 0 or step + 1 == optimization.steps:
            report(step + 1, optimization.steps, {key: float(np.mean(values)) for key, values in figures.items()})
            figures.clear()
            saves.save(step + 1)
    network.eval()


def _optimizers(
    network: nn.Module, trained: list[nn.Parameter], optimization: Optimization
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each with its rate."""
    linear = {id(module.weight) for module in network.modules() if isinstance(module, nn.Linear)}
    by_muon = [parameter for parameter in trained if optimization.muon_rate and id(parameter) in linear]
    taken = {id(parameter) for parameter in by_muon}
    rest = [parameter for parameter in trained if id(parameter) not in taken]
    adamw = torch.optim.AdamW(
        [
            {"params": [parameter for parameter in rest if parameter.ndim > 1]},
            {"params": [parameter for parameter in rest if parameter.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=optimization.rate,
        betas=optimization.betas,
        weight_decay=optimization.weight_decay,
    )
    found: list[tuple[torch.optim.Optimizer, float]] = [(adamw, optimization.rate)]
    if optimization.muon_rate:
        # Scaled so that its steps are as long as AdamW's (Liu et al. 2025).
        muon = torch.optim.Muon(
            by_muon,
            lr=optimization.muon_rate,
            weight_decay=optimization.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        found.append((muon, optimization.muon_rate))
    return found


def one_cycle(share: float) -> float:
    """Up for a quarter of the steps, then down to nothing, both as a cosine (Smith & Topin 2019)."""
    rise = 0.25
    return _half_cosine(1 - share / rise) if share < rise else _half_cosine((share - rise) / (1 - rise))


def plateau(share: float) -> float:
    """A short linear rise, then level: for a training that another one goes on with."""
    return min(1.0, (share + 1e-3) / (_RISE + 1e-3))


def cosine(share: float) -> float:
    """A short linear rise, then down to a hundredth as a cosine."""
    return plateau(share) if share < _RISE else 0.01 + 0.99 * _half_cosine((share - _RISE) / (1 - _RISE))


def _half_cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


class _Saves:
    """The state of a training in `work/NAME.pt`, from time to time."""

    def __init__(self, recipe: Recipe, name: str, network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self._path = recipe.out / "work" / f"{name}.pt"
        self._parts: dict[str, Any] = {"network": network}
        self._parts |= {f"optimizer {number}": optimizer for number, optimizer in enumerate(optimizers)}
        self._device = recipe.device
        self._saved = time.monotonic()

    def restore(self) -> int:
        """The step to go on with."""
        if not self._path.is_file():
            return 0
        state = torch.load(self._path, map_location=self._device, weights_only=True)
        for key, part in self._parts.items():
            part.load_state_dict(state[key])
        return int(state["step"])

    def save(self, step: int) -> None:
        if time.monotonic() - self._saved < _SAVE_EVERY:
            return
        state = {key: part.state_dict() for key, part in self._parts.items()}
        with replacing(self._path) as file:
            torch.save({**state, "step": step}, file)
        self._saved = time.monotonic()
