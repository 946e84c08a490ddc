"""What a conversion writes: files, their tensors and types, sizes, metadata; decided and checked before anything is."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpa_codecs.errors import BackendError, GpaError
from gpa_codecs.files import why_not_writable
from gpa_engines.backends.llama_cpp.gguf_file import BLOCKS, tensor_bytes
from gpa_engines.backends.llama_cpp.gguf_model import GpaMetadata, Vocabulary

from .metadata import Entry, entries, gpa_metadata, hub_repository
from .quantizing import K_TYPES, require_llama_cpp
from .source import EMBEDDINGS, HEAD, Source
from .table import Table, is_table_of
from .tensors import SIMPLE_TYPES, StoredTensor
from .vocabulary import TokenTable, token_table, vocabulary_ids


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to write. rows: ranges of the stored rows, empty for all of them. type: in the file, rows first."""

    name: str
    shape: tuple[int, ...]
    type: str
    source: StoredTensor
    rows: tuple[range, ...] = ()

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.shape, self.type)


@dataclass(frozen=True, slots=True)
class SimpleFile:
    """A GGUF whose tensors NumPy encodes. fell_back: weights whose rows do not divide into blocks of `file_type`."""

    path: Path
    file_type: str
    gpa: GpaMetadata
    metadata: tuple[Entry, ...]
    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        """About; the padding between tensors and the lengths of keys are left out."""
        arrays = [entry for entry in self.metadata if entry.is_array]
        texts = sum(12 + len(str(item)) for entry in arrays for item in _items(entry))
        return sum(tensor.nbytes for tensor in self.tensors) + texts

    @property
    def fell_back(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.tensors if _is_weight(each.shape) and each.type != self.file_type)


@dataclass(frozen=True, slots=True)
class QuantizedFile:
    """A GGUF that llama.cpp makes of `intermediate`, which is removed. fell_back: as llama.cpp will report."""

    path: Path
    file_type: str
    intermediate: SimpleFile

    @property
    def gpa(self) -> GpaMetadata:
        return self.intermediate.gpa

    @property
    def nbytes(self) -> int:
        """At most: llama.cpp chooses the types, none of them with more bits than Q6_K unless rows do not divide."""
        weights = [each for each in self.intermediate.tensors if _is_weight(each.shape)]
        return self.intermediate.nbytes - sum(
            each.nbytes - tensor_bytes(each.shape, "Q6_K") for each in weights if each.shape[-1] % _K_ROW == 0
        )

    @property
    def fell_back(self) -> tuple[str, ...]:
        return tuple(
            each.name for each in self.intermediate.tensors if _is_weight(each.shape) and each.shape[-1] % _K_ROW
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that one call writes, tables before the files that need them.

    kept: tables that are there already and hold these embeddings. notes: what to tell the user.
    """

    source: Source
    tables: tuple[Table, ...]
    kept: tuple[Table, ...]
    files: tuple[SimpleFile | QuantizedFile, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Most that is on the disk at a time."""
        intermediates = [each.intermediate.nbytes for each in self.files if isinstance(each, QuantizedFile)]
        return sum(each.nbytes for each in (*self.tables, *self.files)) + max(intermediates, default=0)


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user asked for. outtype: one of SIMPLE_TYPES, "auto", or None for auto unless `quantize` is given."""

    outfile: Path | None = None
    outtype: str | None = None
    quantize: str | None = None
    vocabularies: tuple[Vocabulary, ...] = ("full",)
    overwrite: bool = False
    model_name: str | None = None


_K_ROW = BLOCKS["Q6_K"][0]


def make_plan(source: Source, choices: Choices) -> Plan:
    """Decide what to write. Raises GpaError for a choice that cannot be, a file that exists, a disk that is full.

    A K-quant of a model of which no row divides into llama.cpp's blocks is refused, naming the rows.
    """
    model_name = _model_name(source, choices)
    types = _types(source, choices)
    folder, name = _target(source, choices, len(types) * len(choices.vocabularies))
    tokens = token_table(source) if "full" in choices.vocabularies else None
    tables: dict[Path, Table] = {}
    files: list[SimpleFile | QuantizedFile] = []
    for file_type in types:
        for vocab in choices.vocabularies:
            part = "" if vocab == "full" else f"-{vocab}"
            path = folder / (name or f"{model_name}{part}-{file_type}.gguf")
            table = None if vocab == "full" else _table(source, folder, model_name, file_type)
            if table is not None:
                tables[table.path] = table
            files.append(_file(source, path, file_type, vocab, model_name, table, tokens if vocab == "full" else None))
    for file in files:
        if isinstance(file, QuantizedFile):
            _check_rows(file, source)
    kept = tuple(each for each in tables.values() if not choices.overwrite and is_table_of(each))
    new = tuple(each for each in tables.values() if each not in kept)
    notes = [tokens.note] if tokens and tokens.note else []
    notes += [_fallback_note(file) for file in files if file.fell_back]
    notes += [f"{each.path.name} is there already and holds these embeddings; it is kept" for each in kept]
    plan = Plan(source, new, kept, tuple(files), tuple(notes))
    _check_targets((*new, *files), choices.overwrite)
    _check_disk(plan, folder)
    return plan


def _model_name(source: Source, choices: Choices) -> str:
    name = choices.model_name
    if name is None:
        hub = hub_repository(source.root)
        name = hub[1] if hub else source.root.resolve().name
    if not name or set(name) & set("/\\\0"):
        raise GpaError(f"the model name is {name!r}; expected something that can begin a file name: --model-name")
    return name


def _types(source: Source, choices: Choices) -> list[str]:
    types = []
    if choices.outtype is not None or choices.quantize is None:
        simple = choices.outtype or "auto"
        types.append(source.dtype if simple == "auto" else simple.upper())
    if choices.quantize is not None:
        types.append(choices.quantize)
        require_llama_cpp(choices.quantize)
    for each in types:
        if each not in (*SIMPLE_TYPES, *K_TYPES):
            raise GpaError(f"the type is {each!r}; expected one of {', '.join((*SIMPLE_TYPES, *K_TYPES))}")
    return types


def _target(source: Source, choices: Choices, count: int) -> tuple[Path, str | None]:
    """The folder, and the file's name where one was given."""
    if choices.outfile is None:
        return source.root, None
    path = choices.outfile.expanduser()
    if path.suffix != ".gguf" or path.is_dir():
        if not path.is_dir():
            raise GpaError(f"{path}: no such folder; create it, or name a file that ends in .gguf")
        return path, None
    if count > 1:
        raise GpaError(f"{path} is one file, but {count} are to be written; name a folder")
    return path.parent, path.name


def _table(source: Source, folder: Path, model_name: str, file_type: str) -> Table:
    """The embedding table: float16 holds what 16-bit weights do; float32 only where the file itself is exact."""
    dtype = "F32" if file_type == "F32" else "F16"
    path = folder / f"{model_name}-embeddings-{dtype.lower()}.safetensors"
    return Table(path, dtype, source.tensors[EMBEDDINGS], source.sha256, source.tokenizer_sha256)


def _file(
    source: Source,
    path: Path,
    file_type: str,
    vocab: Vocabulary,
    model_name: str,
    table: Table | None,
    tokens: TokenTable | None,
) -> SimpleFile | QuantizedFile:
    simple = source.dtype if file_type in K_TYPES else file_type
    ids = vocabulary_ids(source.space, vocab, source.config.vocab_size)
    gpa = gpa_metadata(source, vocab, ids, table.path.name if table else "")
    file = SimpleFile(
        path=path,
        file_type=simple,
        gpa=gpa,
        metadata=tuple(entries(source, model_name, simple, gpa, tokens)),
        tensors=tuple(_planned(name, tensor, simple, gpa) for name, tensor in source.tensors.items()),
    )
    return QuantizedFile(path, file_type, file) if file_type in K_TYPES else file


def _planned(name: str, tensor: StoredTensor, file_type: str, gpa: GpaMetadata) -> PlannedTensor:
    rows = gpa.ids if name in (EMBEDDINGS, HEAD) else ()
    shape = (gpa.rows, *tensor.shape[1:]) if rows else tensor.shape
    kind = file_type if _is_weight(shape) else "F32"
    if shape[-1] % BLOCKS[kind][0]:
        kind = "F16"  # llama.cpp's converter does the same
    return PlannedTensor(name, shape, kind, tensor, rows)


def _is_weight(shape: Sequence[int]) -> bool:
    """Matrices are encoded; vectors (the norms) stay float32."""
    return len(shape) > 1


def _items(entry: Entry) -> Iterator[object]:
    assert not isinstance(entry.value, bool | int | float)
    return iter(entry.value)


def _fallback_note(file: SimpleFile | QuantizedFile) -> str:
    block = _K_ROW if isinstance(file, QuantizedFile) else BLOCKS[file.file_type][0]
    return (
        f"{file.path.name}: the rows of {len(file.fell_back)} tensors are no multiple of {block}; they take "
        f"more bits than {file.file_type}: {', '.join(_kinds(file.fell_back))}"
    )


def _kinds(names: Sequence[str]) -> list[str]:
    """Tensor names with those of equal layers taken together."""
    counts = Counter(name.split(".", 2)[2] if name.startswith("blk.") else name for name in names)
    return [
        f"blk.*.{kind} ({count})" if count > 1 or f"blk.0.{kind}" in names else kind for kind, count in counts.items()
    ]


def _check_rows(file: QuantizedFile, source: Source) -> None:
    """Refuse a K-quant in which not one tensor would be stored as such."""
    weights = [each for each in file.intermediate.tensors if _is_weight(each.shape)]
    if len(file.fell_back) == len(weights):
        raise BackendError(
            f"{file.file_type} stores rows in blocks of {_K_ROW}, and no tensor of {source.root} has such rows: "
            f"{', '.join(_kinds(file.fell_back))} (hidden_size {source.config.hidden_size}, intermediate_size "
            f"{source.config.intermediate_size}); use --outtype q8_0"
        )


def _check_targets(targets: Sequence[Table | SimpleFile | QuantizedFile], overwrite: bool) -> None:
    for target in targets:
        if (problem := why_not_writable(target.path)) is not None:
            raise GpaError(f"{target.path} cannot be written: {problem}")
    existing = [str(target.path) for target in targets if target.path.exists()]
    if existing and not overwrite:
        raise GpaError(f"{', '.join(existing)}: there already; --overwrite replaces what is there")


def _check_disk(plan: Plan, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if plan.nbytes > free:
        raise GpaError(
            f"{folder}: {plan.nbytes / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB free; make room, or name "
            "another place with --outfile"
        )
