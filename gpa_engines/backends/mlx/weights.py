"""Model folders that MLX loads: a checkpoint as released, or a converted one; checked before a tensor is read."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import CheckpointError
from gpa_codecs.weights import TensorSpec, weight_files
from gpa_engines.backends.mlx.conversion import ConversionRecord
from gpa_engines.backends.mlx.linear import StoredWeight
from gpa_engines.checkpoint.checks import check_lm_tensors, stored_tensors
from gpa_engines.checkpoint.mlx_quantization import Quantization, companions
from gpa_engines.lm_config import LMConfig

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""dtypes of safetensors that a weight may have, and MLX's names for them."""

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class WeightFolder:
    """A folder whose weights fit its configuration.

    quantization, record: None where config.json has no such section. names: transformers' name (and MLX's companions)
    -> stored name. float_dtype: of the embedding table, or of its scales where it is quantised.
    """

    path: Path
    config: LMConfig
    quantization: Quantization | None
    record: ConversionRecord | None
    names: dict[str, str]
    float_dtype: str

    @classmethod
    def open(cls, path: str | Path) -> WeightFolder:
        """Read config.json and the headers of the weights. Raises CheckpointError naming the file and the tensor."""
        path = Path(path)
        config_file = ConfigFile.read(path / "config.json")
        config = LMConfig.from_dict(config_file.values, config_file.source)
        quantization = Quantization.from_config(config_file)
        record = ConversionRecord.from_config(config_file)
        tensors = stored_tensors(path)
        if tensors is None:
            raise CheckpointError(
                f"{path} holds {weight_files(path)[0].name}, which only torch can read; MLX needs model.safetensors: "
                "save the model as safetensors first"
            )
        names = check_lm_tensors(tensors, config, quantization, path)
        if record is not None:
            record.check_families(config.vocab_size, config_file.source)
            _check_tokenizer(path, record)
        _check_dtypes(path, names, tensors, quantization)
        table = "model.embed_tokens.weight"
        scales, _ = companions(table)
        spec = tensors[names.get(scales, names[table])]
        return cls(path, config, quantization, record, names, FLOATS[spec.dtype])

    def read(self) -> Tensors:
        """The tensors, each to be taken once; MLX reads a tensor when it is first needed."""
        stored = dict[str, mx.array]()
        for file in weight_files(self.path):
            arrays = mx.load(str(file))
            assert isinstance(arrays, dict)
            stored |= arrays
        return Tensors({name: stored[at] for name, at in self.names.items()})


class Tensors:
    """Tensors of a model by transformers' names. What has been taken is not held any more."""

    def __init__(self, arrays: dict[str, mx.array]) -> None:
        self._arrays = arrays

    def vector(self, name: str) -> mx.array:
        """A norm's weight in float32."""
        return self._arrays.pop(name).astype(mx.float32)

    def matrix(self, name: str) -> StoredWeight:
        """A weight as stored."""
        scales, biases = companions(name)
        return StoredWeight(self._arrays.pop(name), self._arrays.pop(scales, None), self._arrays.pop(biases, None))


def check_origin(converted: WeightFolder, checkpoint: Path) -> None:
    """Raise CheckpointError unless `converted` was made of this very checkpoint, to the byte."""
    record = converted.record
    if record is None:
        raise CheckpointError(
            f"{converted.path} does not say what it was made of; expected a folder of tools/convert/to_mlx.py"
        )
    expected = {TOKENIZER: record.tokenizer_sha256, **record.weights_sha256}
    for file in (checkpoint / TOKENIZER, *weight_files(checkpoint)):
        if expected.get(file.name) != file_sha256(file):
            raise CheckpointError(f"{converted.path} was not made of {file} as it is now; convert the checkpoint again")


def file_sha256(path: Path) -> str:
    """sha256 of a file's content. Raises CheckpointError for one that cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def _check_tokenizer(path: Path, record: ConversionRecord) -> None:
    """The tokenizer.json in a converted folder must be the one that it was made with; it may be missing."""
    file = path / TOKENIZER
    if file.exists() and file_sha256(file) != record.tokenizer_sha256:
        raise CheckpointError(
            f"{file} is not the tokenizer.json that this model was converted with; convert the checkpoint again"
        )


def _check_dtypes(
    path: Path, names: dict[str, str], tensors: dict[str, TensorSpec], quantization: Quantization | None
) -> None:
    packed = {name for name in names if companions(name)[0] in names and name.endswith(".weight")}
    if quantization is not None and not packed:
        raise CheckpointError(f"{path}/config.json: quantization is given, but no weight has scales")
    for name, at in names.items():
        dtype = tensors[at].dtype
        if (name in packed) != (dtype == "U32") or (name not in packed and dtype not in FLOATS):
            expected = "U32" if name in packed else ", ".join(FLOATS)
            raise CheckpointError(f"{path}: {at} is stored as {dtype}; expected {expected}")
    kinds = Counter(tensors[names[companions(name)[0]]].dtype for name in packed)
    if len(kinds) > 1:
        raise CheckpointError(f"{path}: the scales are stored as {', '.join(sorted(kinds))}; expected one type")
