"""What a conversion will write, and every reason why it cannot, found before a tensor is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import CheckpointError, GpaError
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.backends.mlx.conversion import KEY as RECORD_KEY
from gpa_engines.backends.mlx.weights import FLOATS, TOKENIZER, WeightFolder
from gpa_engines.checkpoint import Layout
from gpa_engines.checkpoint.checks import check_sizes, lm_shapes, stored_tensors
from gpa_engines.checkpoint.mlx_quantization import BITS, GROUP_SIZES, Quantization
from gpa_engines.checkpoint.mlx_quantization import KEY as QUANTIZATION_KEY

GROUP_SIZE = 64
"""What --bits alone means, as in mlx-lm."""

COPIED = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)
"""Files that go along as they are, where the checkpoint has them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """source: the checkpoint. values: its config.json. space: its tokens. quantization: of every matrix, or None.
    dtype: of unquantised weights, as safetensors names it; None keeps each as it is stored."""

    source: WeightFolder
    values: dict[str, object]
    space: TokenSpace
    quantization: Quantization | None
    dtype: str | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the source that are converted, by transformers' names."""
        return lm_shapes(self.source.config)

    @property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that will be written: dtype as safetensors names it, and shape.

        Beside quantised matrices everything else is float32, which loses nothing and is little.
        """
        if self.quantization is None:
            kept = stored_tensors(self.source.path) or {}
            names = self.source.names
            return {name: (self.dtype or kept[names[name]].dtype, shape) for name, shape in self.shapes.items()}
        matrices = {name for name, shape in self.shapes.items() if len(shape) == 2}
        shapes = self.quantization.shapes(self.shapes)
        return {name: ("U32" if name in matrices else "F32", shape) for name, shape in shapes.items()}


def make_plan(model_dir: Path, bits: int | None, group_size: int | None, dtype: str | None) -> Plan:
    """Check a checkpoint and what was chosen. Raises GpaError naming the choice, the file or the tensor."""
    quantization = _choose_quantization(bits, group_size, dtype)
    layout = Layout.find(model_dir)
    config_file = ConfigFile.read(layout.root / "config.json")
    for key in (QUANTIZATION_KEY, RECORD_KEY, "quantization_config"):
        if config_file.values.get(key) is not None:
            raise CheckpointError(
                f"{config_file.source} has a section {key!r}: this folder was converted already; convert the "
                "checkpoint that it was made of"
            )
    source = WeightFolder.open(layout.root)
    _check_leftovers(source)
    space = TokenSpace.from_file(layout.root / TOKENIZER)
    check_sizes(space, lm=source.config)
    plan = Plan(source, config_file.values, space, quantization, _stored_dtype(dtype))
    if quantization is not None:
        _check_groups(plan, quantization)
    return plan


def _choose_quantization(bits: int | None, group_size: int | None, dtype: str | None) -> Quantization | None:
    if bits is None:
        if group_size is not None:
            raise GpaError(f"--group-size {group_size} says how --bits rounds; give --bits 8 or 4 too, or leave it out")
        return None
    if dtype is not None:
        raise GpaError(
            f"--dtype {dtype} is for weights that stay floating point, --bits {bits} for quantised ones: give one of "
            "them (the scales of quantised weights are float32)"
        )
    chosen = Quantization(bits, GROUP_SIZE if group_size is None else group_size)
    for option, value, known in (("--bits", chosen.bits, BITS), ("--group-size", chosen.group_size, GROUP_SIZES)):
        if value not in known:
            raise GpaError(f"{option} is {value}; expected one of {', '.join(map(str, known))}")
    return chosen


def _stored_dtype(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    for stored, name in FLOATS.items():
        if name == dtype:
            return stored
    raise GpaError(f"--dtype is {dtype!r}; expected one of {', '.join(FLOATS.values())}")


def _check_leftovers(source: WeightFolder) -> None:
    """Refuse a tensor that the model has no place for; a stored copy of a tied head is one that it has."""
    table = "model.embed_tokens.weight"
    prefix = source.names[table].removesuffix(table)
    known = {*source.names.values(), f"{prefix}lm_head.weight"}
    if foreign := sorted((stored_tensors(source.path) or {}).keys() - known):
        raise CheckpointError(
            f"{source.path}: the weights hold {foreign[0]}, which GPA's Qwen3 has no place for: this is another "
            "architecture, or its configuration is not the one beside it"
        )


def _check_groups(plan: Plan, chosen: Quantization) -> None:
    """Every matrix must be cut into full groups: MLX computes with nothing else."""
    matrices = {name: shape for name, shape in plan.shapes.items() if len(shape) == 2}
    broken = [name for name, shape in matrices.items() if not chosen.divides(shape)]
    if not broken:
        return
    fitting = [
        str(size)
        for size in GROUP_SIZES
        if all(replace(chosen, group_size=size).divides(shape) for shape in matrices.values())
    ]
    kinds = dict.fromkeys(f"{_kind(name)} ({matrices[name][-1]} values in a row)" for name in broken)
    remedy = f"--group-size {' or '.join(fitting)} fits" if fitting else "no group size of MLX fits; use --dtype"
    raise GpaError(
        f"--group-size {chosen.group_size} does not divide the rows of {len(broken)} tensors: {', '.join(kinds)}; "
        f"{remedy}"
    )


def _kind(name: str) -> str:
    """A tensor's name with * for the number of its layer."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
