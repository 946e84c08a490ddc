"""One run of the recipe: its folder, its seed and how much of it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from gpa_codecs.files import write_atomically

Report = Callable[[int, int, dict[str, float]], None]
"""Called as report(done, total, figures) by a stage as it goes on."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a stage needs to know of the run.

    out: the run's folder. seed: of everything random. scale: factor on numbers of steps and sizes of corpora; 1 is the
    recipe, less tries it out. device: torch's, for the training.
    """

    out: Path
    seed: int = 0
    scale: float = 1.0
    device: str = "cpu"

    @property
    def layout(self) -> Path:
        """The checkpoint's text files, in the released layout."""
        return self.out / "stages" / "layout"

    def steps(self, count: int) -> int:
        """`count` scaled, at least 4."""
        return max(4, round(count * self.scale))

    def rng(self, *subject: str | int) -> np.random.Generator:
        """The random numbers of one subject: the same for the same seed, whatever else was drawn before."""
        key = [self.seed, *(int.from_bytes(str(part).encode(), "big") for part in subject)]
        return np.random.default_rng(key)

    def seed_torch(self, *subject: str | int) -> None:
        """Seed torch, whose defaults initialise the networks, for one subject."""
        torch.manual_seed(int(self.rng(*subject).integers(2**62)))

    def file(self, name: str) -> Path:
        """A stage's result."""
        return self.out / "stages" / name

    def save(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Write a stage's result, `stages/NAME.safetensors`, in one go. facts: kept as strings beside it."""
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        content = save(contiguous, metadata={key: str(value) for key, value in facts.items()} or None)
        write_atomically(self.file(f"{name}.safetensors"), content)

    def load(self, name: str, prefix: str = "") -> dict[str, Tensor]:
        """A stage's tensors whose names begin with `prefix`, without it."""
        stored = load_file(self.file(f"{name}.safetensors"))
        return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}


def as_stored(module: torch.nn.Module) -> None:
    """Round a network's weights to bfloat16, in place: what comes after learns from what the checkpoint will hold."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())
