"""MLX's quantised weights as config.json and the safetensors headers describe them; needs no MLX.

A row of a matrix is cut into groups; a value of a group is `scale * q + bias` with q an unsigned integer of so many
bits, packed from the low end into 32-bit words ("affine" in MLX's words).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import CheckpointError

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
KEY = "quantization"
"""The section of config.json, as mlx-lm names it."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """bits of a value, and how many values share a scale and a bias."""

    bits: int
    group_size: int

    @classmethod
    def from_config(cls, config: ConfigFile) -> Quantization | None:
        """What a config.json says, None where it says nothing. Raises CheckpointError for another scheme than ours."""
        if config.values.get(KEY) is None:
            return None
        section = config.section(KEY)
        section.require("mode", "affine", default="affine")
        bits, group_size = section.integer("bits"), section.integer("group_size")
        for name, value, known in (("bits", bits, BITS), ("group_size", group_size, GROUP_SIZES)):
            if value not in known:
                expected = ", ".join(map(str, known))
                raise CheckpointError(f"{section.source}: {name} is {value}; this version reads {expected}")
        if own := sorted(section.values.keys() - {"mode", "bits", "group_size"}):
            raise CheckpointError(
                f"{section.source} has settings of its own for {own[0]}; this version reads one setting for all tensors"
            )
        return cls(bits, group_size)

    def to_config(self) -> dict[str, int | str]:
        """The section as mlx-lm writes it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether every group of a matrix of that shape is full."""
        return shape[-1] % self.group_size == 0

    def shapes(
        self, plain: Mapping[str, tuple[int, ...]], stored: Collection[str] | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that stand for the `plain` ones: vectors stay, a matrix becomes three.

        stored: names in the file; a matrix without scales there stays as it is (mlx-lm leaves out what it cannot
        divide). None: every matrix is quantised.
        """
        shapes = dict[str, tuple[int, ...]]()
        for name, shape in plain.items():
            scales, biases = companions(name)
            if len(shape) != 2 or (stored is not None and scales not in stored):
                shapes[name] = shape
                continue
            rows, width = shape
            shapes[name] = (rows, width * self.bits // 32)
            shapes[scales] = shapes[biases] = (rows, width // self.group_size)
        return shapes


def companions(name: str) -> tuple[str, str]:
    """Names of a weight's scales and biases: "x.weight" -> "x.scales", "x.biases"."""
    stem = name.removesuffix(".weight")
    return f"{stem}.scales", f"{stem}.biases"
