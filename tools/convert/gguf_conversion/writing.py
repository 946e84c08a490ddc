"""Writing what was planned: a file grows beside its target, under another name, until it is whole."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np

from gpa_codecs.errors import GpaError
from gpa_codecs.files import replacing_path
from gpa_engines.backends.llama_cpp.gguf_model import ARCHITECTURE

from .plan import Plan, PlannedTensor, QuantizedFile, SimpleFile
from .quantizing import quantize
from .table import Table, write_table
from .tensors import encode, encoded_shape, row_blocks

Progress = Callable[[str, str, int, int], None]
"""Called as progress(file, tensor, bytes that are done, bytes in all); tensors, while llama.cpp quantises."""

Inspection = Callable[[SimpleFile | QuantizedFile | Table, Path], None]
"""Called with a target and the file that is about to take its name; what it raises keeps the file from being there."""


def write_plan(plan: Plan, progress: Progress, inspect: Inspection, log: Callable[[str], None]) -> Iterator[Path]:
    """Write every file of a plan, and yield its path once it has its name. log: told llama.cpp's lines.

    Raises GpaError, and whatever `inspect` raises; files that were finished before stay.
    """
    for target in (*plan.tables, *plan.files):
        counted = _counted(target.path.name, target.nbytes, progress)
        try:
            with replacing_path(target.path) as path:
                if isinstance(target, Table):
                    write_table(target, path, counted)
                elif isinstance(target, SimpleFile):
                    write_simple(target, path, counted)
                else:
                    _quantize(target, path, progress, log)
                inspect(target, path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise GpaError(f"{target.path} could not be written: {reason}; nothing is left of it") from error
        yield target.path


def write_simple(file: SimpleFile, path: Path, progress: Callable[[str, int], None]) -> None:
    """Write the file's content to `path`; progress is told each tensor's name and bytes. Raises OSError."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        for entry in file.metadata:
            if entry.is_array:
                writer.add_key_value(entry.key, entry.value, gguf.GGUFValueType.ARRAY, entry.type)
            elif entry.key != "general.architecture":  # the writer has added it
                writer.add_key_value(entry.key, entry.value, entry.type)
        for tensor in file.tensors:
            shape, dtype = encoded_shape(tensor.shape, tensor.type)
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in file.tensors:
            writer.write_tensor_data(_encoded(tensor))
            progress(tensor.name, tensor.nbytes)
    finally:
        writer.close()


def _encoded(tensor: PlannedTensor) -> np.ndarray:
    """A tensor as it stands in the file, made in blocks of rows: all of it in float32 would be far larger."""
    shape, dtype = encoded_shape(tensor.shape, tensor.type)
    content = np.empty(shape, dtype)
    at = 0
    for rows in row_blocks(tensor.source.shape, tensor.rows):
        content[at : at + len(rows)] = encode(tensor.source.read(rows), tensor.type, tensor.source.name)
        at += len(rows)
    return content


def _quantize(file: QuantizedFile, path: Path, progress: Progress, log: Callable[[str], None]) -> None:
    """By way of a file in the weights' own type, so that nothing is rounded twice."""
    simple = file.intermediate
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=file.path.parent) as folder:
        whole = Path(folder) / f"{simple.file_type}.gguf"
        write_simple(simple, whole, _counted(f"{file.path.name} ({simple.file_type})", simple.nbytes, progress))
        name = file.path.name
        quantize(whole, path, file.file_type, lambda tensor, done, total: progress(name, tensor, done, total), log)


def _counted(name: str, total: int, progress: Progress) -> Callable[[str, int], None]:
    done = 0

    def add(tensor: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(name, tensor, min(done, total), total)

    return add
