"""The folder that `tools/convert/to_onnx.py --what lm` writes: its layout, its manifest, and what is wrong with it.

lm/manifest.json              format, version, source, geometry, and the files of every precision
   model.PRECISION.onnx       all between embedding and head; its weights are in model.PRECISION.onnx.data
   head.onnx                  the head in float32, which is given the rows that are wanted
   head.int8.onnx             the whole head in 8 bits
   embedding.PRECISION.npy    the embedding table, in int8 with embedding.int8.scales.npy
   lm_head.PRECISION.npy      the same of the head, where it is not tied to the embedding
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpa_codecs.config_file import ConfigFile
from gpa_codecs.errors import BackendError, CheckpointError
from gpa_engines.lm_config import LMConfig

FORMAT = "gpa-onnx-lm"
VERSION = 1
MANIFEST = "manifest.json"

PRECISIONS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
"""Names of precisions in file names, with the dtypes that engines report; the most exact first."""

# Graphs are hashed when they are opened; weights, which are large, only measured.
_HASHED_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class ExportedLM:
    """One precision of an exported language model whose files are all there.

    config: its geometry; `dtype` is the checkpoint's. tokenizer_sha256: of the tokenizer.json beside the weights.
    """

    folder: Path
    precision: str
    config: LMConfig
    tokenizer_sha256: str

    @classmethod
    def open(cls, model_dir: str | Path, dtype: str = "auto") -> ExportedLM:
        """Find and check the export in a model folder: `lm/` in it or in its `onnx/`.

        dtype: "float32", "float16", "int8", or "auto", the most exact one there is. Raises CheckpointError for files
        that are missing, damaged or of another version, BackendError for a precision that was not exported.
        """
        root = Path(model_dir)
        folder = next((each for each in (root / "lm", root / "onnx" / "lm") if (each / MANIFEST).is_file()), None)
        if folder is None:
            raise CheckpointError(
                f"{root} has no ONNX language model (looked for lm/{MANIFEST} and onnx/lm/{MANIFEST}): "
                f"{command(root, None)}"
            )
        manifest = _read_manifest(folder, root)
        exported = manifest.section("precisions")
        precision = _choose(dtype, exported, root)
        config = LMConfig.from_dict(
            {"model_type": "qwen3"} | manifest.section("geometry").values, f"{manifest.source}: geometry"
        )
        _check_same_model(config, root, folder)
        _check_files(folder, exported.section(precision).section("files"), root, precision)
        tokenizer = str(manifest.section("source").values.get("tokenizer_sha256", ""))
        return cls(folder, precision, config, tokenizer)

    @property
    def dtype(self) -> str:
        """As engines report it."""
        return PRECISIONS[self.precision]

    @property
    def body(self) -> Path:
        return self.folder / f"model.{self.precision}.onnx"

    @property
    def float_head(self) -> Path:
        """The head that is given its rows."""
        return self.folder / "head.onnx"

    @property
    def int8_head(self) -> Path | None:
        """The head with its weight, where it is quantised."""
        return self.folder / "head.int8.onnx" if self.precision == "int8" else None

    def table(self, name: str) -> Path:
        """The array of the table "embedding" or "lm_head"."""
        return self.folder / f"{name}.{self.precision}.npy"

    def scales(self, name: str) -> Path | None:
        """The scales of that table, where it is quantised."""
        return self.folder / f"{name}.{self.precision}.scales.npy" if self.precision == "int8" else None

    @property
    def head_table(self) -> str:
        """The name of the head's table."""
        return "embedding" if self.config.tie_word_embeddings else "lm_head"


def command(model_dir: Path, precision: str | None) -> str:
    """What to type to export a checkpoint."""
    option = "" if precision is None else f" --precision {precision}"
    # The checkpoint's own folder, if this is the one in it that was exported into.
    nested = model_dir.name == "onnx" and (model_dir.parent / "config.json").is_file()
    source = model_dir.parent if nested else model_dir
    return f"python tools/convert/to_onnx.py {source} --what lm{option}"


def _read_manifest(folder: Path, root: Path) -> ConfigFile:
    manifest = ConfigFile.read(folder / MANIFEST)
    found = (manifest.values.get("format"), manifest.values.get("version"))
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{manifest.source}: format and version are {found[0]!r} and {found[1]!r}; this version of gpa-engines "
            f"reads {FORMAT!r} and {VERSION}: convert again ({command(root, None)})"
        )
    return manifest


def _choose(dtype: str, exported: ConfigFile, root: Path) -> str:
    """The precision for a dtype: its key in `exported`."""
    names = {name: key for key, name in PRECISIONS.items()}
    there = [key for key in PRECISIONS if key in exported.values]
    if not there:
        raise CheckpointError(f"{exported.source}: names none of {', '.join(PRECISIONS)}; {command(root, None)}")
    if dtype == "auto":
        return there[0]
    if dtype not in names:
        raise BackendError(f"dtype {dtype!r} is unknown; expected auto, {', '.join(names)}")
    precision = names[dtype]
    if precision not in there:
        raise BackendError(
            f"{dtype} was not exported; {exported.source} has {', '.join(PRECISIONS[key] for key in there)}. "
            f"To export it: {command(root, precision)}"
        )
    return precision


def _check_same_model(config: LMConfig, root: Path, folder: Path) -> None:
    """Refuse an export that does not belong to the checkpoint that it lies in."""
    path = root / "config.json"
    if not path.is_file():
        return
    beside = LMConfig.from_file(path)
    for field in dataclasses.fields(LMConfig):
        ours, theirs = getattr(config, field.name), getattr(beside, field.name)
        if ours != theirs and field.name != "dtype":
            raise CheckpointError(
                f"{folder / MANIFEST}: {field.name} is {ours}, but {path} has {theirs}: this export is of another "
                f"checkpoint; convert again ({command(root, None)})"
            )


def _check_files(folder: Path, files: ConfigFile, root: Path, precision: str) -> None:
    for name in files.values:
        entry = files.section(name)
        if Path(name).name != name:
            raise CheckpointError(f"{files.source}: {name!r} is not the name of a file")
        expected, path = entry.integer("bytes"), folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, but {MANIFEST} names it: {command(root, precision)}")
        size = path.stat().st_size
        if size != expected:
            raise CheckpointError(
                f"{path} has {size} bytes; {MANIFEST} says {expected}: it is truncated or damaged; copy it again or "
                f"convert again ({command(root, precision)})"
            )
        if size <= _HASHED_BYTES and sha256(path) != entry.values.get("sha256"):
            raise CheckpointError(
                f"{path} is not the file that {MANIFEST} describes (its sha256 differs): copy it again or convert "
                f"again ({command(root, precision)})"
            )


def sha256(path: Path) -> str:
    """Hash of a file. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def describe_geometry(config: LMConfig) -> dict[str, Any]:
    """A configuration as the manifest holds it."""
    return dataclasses.asdict(config)
