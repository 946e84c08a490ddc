"""A checkpoint's language model as ONNX files that `gpa_engines.backends.onnx` runs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpa_engines
from gpa_codecs.errors import CheckpointError, GpaError
from gpa_codecs.files import write_atomically
from gpa_codecs.weights import weight_files
from gpa_engines.backends.onnx.exported import FORMAT, MANIFEST, PRECISIONS, VERSION, describe_geometry, sha256
from gpa_engines.lm_config import LMConfig

from .lm_graph import IR_VERSION, OPSET, build_body, build_float_head, build_head
from .lm_weights import BLOCK, DataFile, FloatLinears, Int8Linears, Placed, SourceWeights, quantize, to_half

Progress = Callable[[str, int, int], None]

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a checkpoint, as far as it has them, that make the output a model folder by itself."""

_METADATA = {"gpa.format": FORMAT, "gpa.version": str(VERSION)}


def export_lm(model_dir: Path, out_dir: Path, precisions: Sequence[str], progress: Progress) -> None:
    """Write the language model of the checkpoint `model_dir` into `out_dir`/lm, and its small files into `out_dir`.

    precisions: of "fp32", "fp16" and "int8"; `gpa_engines.backends.onnx.exported` describes the files. progress: called
    with what is written ("lm fp32"), the weights done and the weights in all. `out_dir`/lm appears once it is whole; an
    earlier export there is replaced as a whole, anything else is not. Raises CheckpointError for a checkpoint that
    cannot be exported, GpaError for a folder that cannot be written.
    """
    unknown = [each for each in precisions if each not in PRECISIONS]
    if unknown or not precisions:
        raise GpaError(f"precisions are {list(precisions)}; expected one or more of {', '.join(PRECISIONS)}")
    model_dir, out_dir = Path(model_dir), Path(os.path.abspath(out_dir))
    config = LMConfig.from_file(model_dir / "config.json")
    weights = SourceWeights(model_dir, config)
    source = _describe_source(model_dir)
    try:
        with _new_folder(out_dir / "lm") as folder:
            exported = {}
            for precision in (each for each in PRECISIONS if each in precisions):
                writer = _Writer(folder, config, weights, precision, progress)
                exported[precision] = writer.write()
            _write_manifest(folder, config, source, exported)
            for name in COMPANIONS:
                _copy(model_dir / name, out_dir / name)
    except OSError as error:
        raise GpaError(f"{out_dir}: cannot write the ONNX files: {error.strerror or error}") from error


class _Writer:
    """Writes the files of one precision."""

    def __init__(
        self, folder: Path, config: LMConfig, weights: SourceWeights, precision: str, progress: Progress
    ) -> None:
        self.folder, self.config, self.weights, self.precision = folder, config, weights, precision
        self._progress = progress
        self._written = 0
        tables = 1 if config.tie_word_embeddings else 2
        self._total = 4 * config.num_hidden_layers + tables

    def write(self) -> dict[str, Any]:
        """The precision's entry in the manifest."""
        body = f"model.{self.precision}.onnx"
        self._write_body(body)
        files = [body, f"{body}.data", "head.onnx"]
        # The same file in every precision.
        build_float_head(self.config.hidden_size).save(self.folder / "head.onnx", _METADATA)
        for table in ["embed_tokens"] + ([] if self.config.tie_word_embeddings else ["lm_head"]):
            files += self._write_table(table)
        if self.precision == "int8":
            files.append(self._write_int8_head())
        described = {
            name: {"bytes": (self.folder / name).stat().st_size, "sha256": sha256(self.folder / name)} for name in files
        }
        storage = {
            "fp32": "float32 weights, float32 arithmetic",
            "fp16": "float16 weights, expanded to float32 when they are loaded; float32 arithmetic",
            "int8": f"int8 weights with a float32 scale per {BLOCK}; ONNX Runtime's CPU kernels also round the inputs "
            f"of these products to 8 bits per {BLOCK}",
        }
        return {"dtype": PRECISIONS[self.precision], "stored": storage[self.precision], "files": described}

    def _write_body(self, name: str) -> None:
        with (self.folder / f"{name}.data").open("wb") as file:
            data = DataFile(Path(file.name), file)
            if self.precision == "int8":
                linears = Int8Linears(self.weights, data, self._advance)
            else:
                linears = FloatLinears(self.weights, data, self.precision == "fp16", self._advance)
            graph = build_body(self.config, linears, self.weights.norms(), _rotary_angles(self.config))
            _sync(file)
        graph.save(self.folder / name, self._metadata())

    def _write_table(self, stored: str) -> list[str]:
        """A table of one row per id: [V, hidden]; in int8 [hidden, V], as the head's product wants it."""
        name = "embedding" if stored == "embed_tokens" else stored
        matrix = self.weights.matrix(stored)
        arrays: dict[str, NDArray[Any]] = {}
        if self.precision == "int8":
            quantized, scales = quantize(matrix, stored)
            arrays = {f"{name}.int8.npy": quantized, f"{name}.int8.scales.npy": scales}
        else:
            values = to_half(matrix, stored) if self.precision == "fp16" else matrix.float().numpy()
            arrays = {f"{name}.{self.precision}.npy": values}
        for file_name, array in arrays.items():
            with (self.folder / file_name).open("wb") as file:
                np.save(file, array)
                _sync(file)
        self._advance()
        return list(arrays)

    def _write_int8_head(self) -> str:
        table = "embedding" if self.config.tie_word_embeddings else "lm_head"
        linears = _TableLinears(self.folder, f"{table}.int8.npy", f"{table}.int8.scales.npy")
        build_head(self.config, linears, table).save(self.folder / "head.int8.onnx", self._metadata())
        return "head.int8.onnx"

    def _metadata(self) -> dict[str, str]:
        return _METADATA | {"gpa.precision": self.precision}

    def _advance(self) -> None:
        self._written += 1
        self._progress(f"lm {self.precision}", self._written, self._total)


class _TableLinears:
    """A product with a quantised table where it lies, in its .npy files."""

    def __init__(self, folder: Path, weight: str, scales: str) -> None:
        self._folder, self._weight, self._scales = folder, weight, scales

    def product(self, graph: Any, x: str, name: str, residual: str | None = None) -> str:
        assert residual is None
        shape, weight = self._place(self._weight)
        _, scales = self._place(self._scales)
        return Int8Linears.expand(graph, x, name, shape, self._weight, weight, self._scales, scales)

    def _place(self, name: str) -> tuple[tuple[int, ...], Placed]:
        array = np.load(self._folder / name, mmap_mode="r")
        return array.shape, Placed((self._folder / name).stat().st_size - array.nbytes, array.nbytes)


def _rotary_angles(config: LMConfig) -> NDArray[np.float32]:
    """float32[D / 2]: the angle of one position, by transformers' arithmetic and so by torch's power function."""
    import torch

    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    return (1.0 / config.rope_theta**exponents).numpy()


def _describe_source(model_dir: Path) -> dict[str, Any]:
    tokenizer = model_dir / "tokenizer.json"
    return {
        "weights": {path.name: sha256(path) for path in weight_files(model_dir)},
        "tokenizer_sha256": sha256(tokenizer) if tokenizer.is_file() else "",
    }


def _write_manifest(folder: Path, config: LMConfig, source: dict[str, Any], exported: dict[str, Any]) -> None:
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "converter": f"gpa-engines {gpa_engines.__version__}",
        "source": source,
        "geometry": describe_geometry(config),
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "precisions": exported,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name once the block has ended well, and is gone otherwise."""
    if os.path.lexists(target) and not (target / MANIFEST).is_file():
        raise CheckpointError(f"{target} exists and is not an earlier export (it has no {MANIFEST}); not replaced")
    created = [each for each in (target.parent, *target.parent.parents) if not each.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        folder = temporary / target.name
        folder.mkdir()
        yield folder
        if target.exists():
            target.rename(temporary / "replaced")
        folder.rename(target)
    except BaseException:
        if (temporary / "replaced").exists():
            (temporary / "replaced").rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        for each in created:
            if each.exists() and not any(each.iterdir()):
                each.rmdir()
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    if source.is_file() and not (target.exists() and source.samefile(target)):
        write_atomically(target, source.read_bytes())


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
