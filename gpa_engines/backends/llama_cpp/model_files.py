"""Which GGUF files of a folder make a model, and what each of them can serve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.errors import BackendError, CheckpointError
from gpa_engines.backends.llama_cpp.gguf_file import GgufHeader, gguf_files, read_header
from gpa_engines.backends.llama_cpp.gguf_model import ARCHITECTURE, FILE_TYPES, VOCABULARIES, GgufModel

PREFERENCE = ("q8_0", "float16", "bfloat16", "float32", "q6_k", "q5_k_m", "q4_k_m")
"""What dtype "auto" takes first: the type that is fast and near to the checkpoint, then the exact ones."""

CONVERT = "python tools/convert/to_gguf.py MODEL_DIR"
"""The command that makes such files."""

_LONG_NAMES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "half": "float16"}
_LONG_NAMES |= {"bf16": "bfloat16", "q8": "q8_0"}


@dataclass(frozen=True, slots=True)
class Found:
    """A GGUF file of a folder, not checked beyond its header. vocab: "full", "speech" or "text"."""

    path: Path
    dtype: str
    vocab: str


class VocabularyRows:
    """Between a model's ids and the rows of a file that has some of them.

    ids: ascending disjoint ranges, whose ids are the rows in order.
    """

    def __init__(self, ids: Sequence[range]) -> None:
        self.ids = tuple(ids)
        self._starts = np.array([part.start for part in ids], np.int64)
        self._stops = np.array([part.stop for part in ids], np.int64)
        self._first_rows = np.concatenate([[0], np.cumsum(self._stops - self._starts)[:-1]])

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Rows of these ids, or None when the file lacks one of them."""
        part = np.searchsorted(self._starts, ids, side="right") - 1
        if (part < 0).any() or (ids >= self._stops[part]).any():
            return None
        return ids - self._starts[part] + self._first_rows[part]


def choose_files(model: Path, dtype: str) -> list[GgufModel]:
    """The files to load: at most one of each vocabulary, all of one dtype and one checkpoint; see `create_engine`.

    Raises BackendError for a dtype that is unknown or not there, CheckpointError for everything wrong with the files.
    """
    wanted = dtype_name(dtype)
    if not model.is_dir():
        opened = GgufModel.open(model)
        if wanted not in ("auto", dtype_name(opened.file_type)):
            raise BackendError(
                f"{model} is {dtype_name(opened.file_type)}; expected dtype 'auto' or that, not {dtype!r}"
            )
        return [opened]
    found = find_files(model)
    if not found:
        raise CheckpointError(f"{model}: no GGUF file of a GPA model there or in its gguf folder; make one: {CONVERT}")
    if wanted == "auto":
        wanted = _best_dtype(found)
    chosen = [each for each in found if each.dtype == wanted]
    if not chosen:
        there = ", ".join(sorted({each.dtype for each in found}))
        raise BackendError(
            f"{model}: no GGUF file of dtype {dtype!r}; there are {there}; more: {CONVERT} --outtype TYPE"
        )
    for vocab in VOCABULARIES:
        equal = [each.path for each in chosen if each.vocab == vocab]
        if len(equal) > 1:
            listed = ", ".join(str(path) for path in equal)
            raise CheckpointError(
                f"{model}: {len(equal)} {vocab} files of dtype {wanted}: {listed}; give one by its path"
            )
    opened = [GgufModel.open(each.path) for each in sorted(chosen, key=lambda each: VOCABULARIES.index(each.vocab))]
    _check_same(opened)
    return opened


def find_files(folder: Path) -> list[Found]:
    """GGUF files of GPA models in a folder and its `gguf` subfolder; those of other architectures are passed over.

    Raises CheckpointError for a damaged file: to take another in its place would hide it.
    """
    headers = map(read_header, gguf_files(folder))
    return [_found(header) for header in headers if header.metadata.get("general.architecture") == ARCHITECTURE]


def dtype_name(name: str) -> str:
    """The name of a dtype as conformance's limits have it, "F16" as "float16"; "auto" stays."""
    short = name.lower().replace("-", "_")
    return _LONG_NAMES.get(short, short)


def _found(header: GgufHeader) -> Found:
    number = header.integer("general.file_type")
    vocab = header.text("gpa.vocab") if "gpa.vocab" in header.metadata else "full"
    return Found(header.path, dtype_name(FILE_TYPES.get(number, f"file type {number}")), vocab)


def _best_dtype(found: Iterable[Found]) -> str:
    """The most preferred dtype whose files serve every task; where there is none, the most preferred."""
    vocabularies: dict[str, set[str]] = {}
    for each in found:
        vocabularies.setdefault(each.dtype, set()).add(each.vocab)
    complete = [dtype for dtype, there in vocabularies.items() if "full" in there or there == {"speech", "text"}]
    known = {dtype: rank for rank, dtype in enumerate(PREFERENCE)}
    return min(complete or vocabularies, key=lambda dtype: (known.get(dtype, len(known)), dtype))


def _check_same(models: Sequence[GgufModel]) -> None:
    """Files of one folder must come from one checkpoint."""
    first = models[0]
    for other in models[1:]:
        for name, ours, its in (
            ("gpa.source.sha256", first.gpa.source_sha256, other.gpa.source_sha256),
            ("gpa.tokenizer.sha256", first.gpa.tokenizer_sha256, other.gpa.tokenizer_sha256),
            ("gpa.vocab_size", first.gpa.vocab_size, other.gpa.vocab_size),
        ):
            if ours != its:
                raise CheckpointError(
                    f"{other.path}: {name} is {its!r}, but {first.path.name} has {ours!r}: they are of different "
                    "checkpoints; remove one of them or give the other by its path"
                )
