"""Weight files: what they hold (without a framework) and their tensors (torch), whole or sharded, in any key style."""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gpa_codecs.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Module = TypeVar("Module", bound="torch.nn.Module")

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

# Bytes per element of the safetensors format's dtypes.
_DTYPE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_DTYPE_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}

# Two names under which torch's weight norm stores magnitude and direction, old and new.
_WEIGHT_NORM_NAMES = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A stored tensor: dtype as safetensors writes it ("F32", "BF16", "I64"...) and shape in elements."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: str | Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of a safetensors file, without reading a tensor or importing a framework.

    Raises CheckpointError for a file that is missing, empty, shorter or longer than its header says, or no safetensors.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            text = file.read(length) if 0 < length <= size - 8 else b""
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if len(prefix) < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file; download it again")
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes); download it again")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        specs = {name: _parse_spec(entry) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is damaged ({error!r}); download it again") from error
    expected = 8 + length + end
    if size != expected:
        raise CheckpointError(
            f"{path} has {size} bytes, but its header announces {expected}: it is truncated or damaged; "
            "download it again"
        )
    return specs


def weight_files(folder: str | Path) -> tuple[Path, ...]:
    """The files that hold a model's weights: one file, or every shard that the index names.

    Looked for in this order: model.safetensors, its index, pytorch_model.bin, its index. Raises CheckpointError when
    there is none, or when a shard is missing.
    """
    folder = Path(folder)
    for whole, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / whole).is_file():
            return (folder / whole,)
        if (folder / index).is_file():
            return _shards(folder / index)
    looked_for = ", ".join((SAFETENSORS, SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX))
    raise CheckpointError(f"{folder} has no weights; looked for {looked_for}; download the checkpoint again")


def load_weights(
    folder: str | Path, expected: Mapping[str, Sequence[int]], *, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The tensors named in `expected` (name -> shape), and no others, on the CPU.

    A stored name may carry any prefix (`wav2vec2.`, `model.`, `module.`...) as long as it is the same one for all. A
    weight that is stored as weight norm (Salimans & Kingma 2016), under torch's old or new names, is multiplied out.
    Tensors are mapped from the file, not copied, unless they are converted to `dtype` (default: as stored), so leave
    the file unchanged while they live. Raises CheckpointError naming the tensor, its shape and the file.
    """
    sources = {name: source for path in weight_files(folder) for name, source in _open(path).items()}
    prefix = _find_prefix(sources, expected, folder)
    return {name: _load(sources, prefix + name, tuple(shape), dtype) for name, shape in expected.items()}


def load_module(build: Callable[[], Module], folder: str | Path, device: torch.device) -> Module:
    """A network in float32 on `device`, ready for inference, with the weights that `folder` has for it.

    build: makes the network; every tensor of its state dict is read, under its name there, and nothing else is.
    Nothing is initialised first: the network is built without storage and takes the loaded tensors as they are.
    """
    import torch

    with torch.device("meta"):
        module = build()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    module.load_state_dict(load_weights(folder, expected, dtype=torch.float32), assign=True)
    return module.to(device).eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class _Source:
    """One stored tensor that has not been read yet."""

    path: Path
    read: Callable[[], torch.Tensor]


def _parse_spec(entry: dict[str, Any]) -> TensorSpec:
    spec = TensorSpec(entry["dtype"], tuple(entry["shape"]))
    start, end = entry["data_offsets"]
    if start < 0 or end - start != math.prod(spec.shape) * _DTYPE_BYTES[spec.dtype]:
        raise ValueError(f"{spec} does not fill bytes {start} to {end}")
    return spec


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = tuple(index.parent / name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); download it again") from error
    if not shards:
        raise CheckpointError(f"{index} names no file; download it again")
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, but {index.name} names it; download it")
    return shards


def _open(path: Path) -> dict[str, _Source]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> dict[str, _Source]:
    from safetensors import SafetensorError, safe_open

    names = read_header(path)
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
    return {name: _Source(path, partial(file.get_tensor, name)) for name in names}


def _open_pickle(path: Path) -> dict[str, _Source]:
    import torch

    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors, or is damaged, and is not loaded: {error}") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(tensors).__name__}")
    return {
        name: _Source(path, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


def _stored_as(sources: Mapping[str, _Source], name: str) -> tuple[str, ...] | None:
    """The stored name of a tensor, or the two of its weight norm; None when the file has neither."""
    if name in sources:
        return (name,)
    names = _weight_norm_names(name)
    pairs = zip(names[::2], names[1::2], strict=True)
    return next((pair for pair in pairs if all(part in sources for part in pair)), None)


def _weight_norm_names(name: str) -> tuple[str, ...]:
    """The names of a weight's magnitude and direction, in each of the styles; none for what is no weight."""
    stem, _, leaf = name.rpartition(".")
    return tuple(f"{stem}.{part}" for pair in _WEIGHT_NORM_NAMES for part in pair) if leaf == "weight" else ()


def _find_prefix(sources: Mapping[str, _Source], expected: Mapping[str, Sequence[int]], folder: str | Path) -> str:
    """The one prefix under which every expected tensor is stored; where none fits, say what the best one lacks."""
    names = list(expected)
    # Two names give it away, even if a damaged file lacks one of them.
    forms = [form for name in (*names[:1], *names[-1:]) for form in (name, *_weight_norm_names(name))]
    candidates = {"": None}
    candidates |= {name.removesuffix(form): None for name in sources for form in forms if name.endswith(f".{form}")}
    missing = {
        prefix: [name for name in expected if _stored_as(sources, prefix + name) is None] for prefix in candidates
    }
    best = min(missing, key=lambda prefix: len(missing[prefix]))
    if missing[best]:
        files = ", ".join(path.name for path in weight_files(folder))
        raise CheckpointError(
            f"{folder}: {files} lacks {len(missing[best])} of {len(expected)} tensors, "
            f"first {best + missing[best][0]}: the weights do not belong to this configuration, or are incomplete"
        )
    return best


def _load(sources: Mapping[str, _Source], name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
    stored = _stored_as(sources, name)
    assert stored is not None, name
    parts = [sources[part].read() for part in stored]
    if dtype is not None:
        parts = [part.to(dtype) for part in parts]
    tensor = parts[0] if len(parts) == 1 else _multiply_out(parts[0], parts[1], sources[stored[0]].path, stored[0])
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{sources[stored[0]].path}: {stored[-1]} has shape {tuple(tensor.shape)}; expected {shape}, "
            "which the configuration beside it asks for"
        )
    return tensor


def _multiply_out(magnitude: torch.Tensor, direction: torch.Tensor, path: Path, name: str) -> torch.Tensor:
    """Weight norm to a plain weight: each slice along the magnitude's own axis gets that magnitude as its L2 norm."""
    import torch

    shared = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    if magnitude.ndim != direction.ndim or any(
        size not in (1, direction.shape[axis]) for axis, size in enumerate(magnitude.shape)
    ):
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(magnitude.shape)}, which does not go with {tuple(direction.shape)}"
        )
    # In place, because the mapping is private: a page becomes a copy when it is written, and is never held twice.
    return direction.mul_(magnitude / torch.linalg.vector_norm(direction, dim=shared, keepdim=True))
