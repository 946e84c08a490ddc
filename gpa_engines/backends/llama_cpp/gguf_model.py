"""A GGUF file of a GPA model: its geometry, and the `gpa.*` metadata that says which ids its rows are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from gpa_codecs.errors import CheckpointError
from gpa_engines.backends.llama_cpp.gguf_file import GgufHeader, read_header
from gpa_engines.lm_config import LMConfig

FORMAT = 1
"""Value of `gpa.format`; raised when a key changes its meaning."""

VOCABULARIES = ("full", "speech", "text")
Vocabulary = Literal["full", "speech", "text"]
"""Which ids a file's rows are: all of them, those that tts-a and vc emit, or those that stt and plain text emit."""

ARCHITECTURE = "qwen3"

FILE_TYPES = {0: "F32", 1: "F16", 7: "Q8_0", 15: "Q4_K_M", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16"}
"""llama.cpp's number in `general.file_type` -> the name of what most of the weights are stored as."""


@dataclass(frozen=True, slots=True)
class GpaMetadata:
    """What `gpa.*` says; the converter writes `entries()`, the engine reads `from_header`.

    converter: program and version that wrote the file. vocab_size: ids of the whole model. ids: the whole model's ids
    that the file's rows are, in row order: ascending disjoint ranges. glm, global_, semantic: the ids of the families
    of audio codes. tokenizer_sha256: of tokenizer.json. source_sha256: of the language model's weights (of the one
    file, else of the shards' digests in order). embeddings_file: name of the embedding table beside the file, "" for a
    full vocabulary.
    """

    converter: str
    vocab: Vocabulary
    vocab_size: int
    ids: tuple[range, ...]
    glm: range
    global_: range
    semantic: range
    tokenizer_sha256: str
    source_sha256: str
    embeddings_file: str = ""

    @property
    def rows(self) -> int:
        """Ids that the file has."""
        return sum(len(ids) for ids in self.ids)

    def entries(self) -> dict[str, int | str | list[int]]:
        """Key -> value; integers and lists of them are 32-bit unsigned."""
        entries: dict[str, int | str | list[int]] = {
            "gpa.format": FORMAT,
            "gpa.converter": self.converter,
            "gpa.vocab": self.vocab,
            "gpa.vocab_size": self.vocab_size,
            "gpa.ids.starts": [ids.start for ids in self.ids],
            "gpa.ids.stops": [ids.stop for ids in self.ids],
        }
        for name, family in (("glm", self.glm), ("global", self.global_), ("semantic", self.semantic)):
            entries |= {f"gpa.{name}.first": family.start, f"gpa.{name}.size": len(family)}
        entries |= {"gpa.tokenizer.sha256": self.tokenizer_sha256, "gpa.source.sha256": self.source_sha256}
        if self.embeddings_file:
            entries["gpa.embeddings.file"] = self.embeddings_file
        return entries

    @classmethod
    def from_header(cls, header: GgufHeader) -> GpaMetadata:
        """Raises CheckpointError for a file that is not to_gguf.py's, or whose keys contradict one another."""
        if "gpa.format" not in header.metadata:
            raise CheckpointError(
                f"{header.path} has no gpa.* metadata, so nothing says which ids are audio codes; "
                "make it with tools/convert/to_gguf.py"
            )
        if (version := header.integer("gpa.format")) != FORMAT:
            raise CheckpointError(f"{header.path}: gpa.format is {version}; this version reads {FORMAT}; convert again")
        vocab = header.text("gpa.vocab")
        if vocab not in VOCABULARIES:
            raise CheckpointError(f"{header.path}: gpa.vocab is {vocab!r}; expected one of {', '.join(VOCABULARIES)}")
        metadata = cls(
            converter=header.text("gpa.converter"),
            vocab=cast(Vocabulary, vocab),
            vocab_size=header.integer("gpa.vocab_size"),
            ids=_ranges(header),
            glm=_family(header, "glm"),
            global_=_family(header, "global"),
            semantic=_family(header, "semantic"),
            tokenizer_sha256=header.text("gpa.tokenizer.sha256"),
            source_sha256=header.text("gpa.source.sha256"),
            embeddings_file="" if vocab == "full" else header.text("gpa.embeddings.file"),
        )
        metadata._check(header.path)
        return metadata

    @classmethod
    def assumed(cls, header: GgufHeader) -> GpaMetadata:
        """For a file of llama.cpp's own converter: the whole vocabulary, and nothing else is known ("" and no ids)."""
        table = header.tensors.get("token_embd.weight")
        if table is None:
            raise CheckpointError(f"{header.path} has no tensor token_embd.weight; convert again")
        ids, none = range(table.shape[0]), range(0)
        return cls("", "full", len(ids), (ids,), none, none, none, tokenizer_sha256="", source_sha256="")

    def _check(self, path: Path) -> None:
        end = 0
        for ids in self.ids:
            if not end <= ids.start < ids.stop <= self.vocab_size:
                raise CheckpointError(
                    f"{path}: gpa.ids has the ids {ids.start} to {ids.stop - 1}; expected non-empty, ascending, "
                    f"disjoint ranges below {self.vocab_size}; convert again"
                )
            end = ids.stop
        if self.vocab == "full" and self.ids != (range(self.vocab_size),):
            raise CheckpointError(f"{path}: gpa.ids of a full vocabulary must be 0 to {self.vocab_size - 1}")
        for name, family in (("glm", self.glm), ("global", self.global_), ("semantic", self.semantic)):
            if not family or family.stop > self.vocab_size:
                raise CheckpointError(
                    f"{path}: gpa.{name} has the ids {family.start} to {family.stop - 1}; "
                    f"the vocabulary has {self.vocab_size}; convert again"
                )
        # The name is joined to the file's folder.
        if self.embeddings_file and Path(self.embeddings_file).name != self.embeddings_file:
            raise CheckpointError(f"{path}: gpa.embeddings.file is {self.embeddings_file!r}; expected a plain name")


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A GGUF file that is fit to be loaded by llama.cpp.

    config: geometry; its vocab_size is the whole model's. file_type: "F16", "Q4_K_M"..., what most weights are.
    """

    header: GgufHeader
    config: LMConfig
    gpa: GpaMetadata
    file_type: str

    @classmethod
    def open(cls, path: str | Path) -> GgufModel:
        """Read and check a file without llama.cpp. Raises CheckpointError naming what is wrong."""
        header = read_header(path)
        architecture = header.text("general.architecture")
        if architecture != ARCHITECTURE:
            raise CheckpointError(f"{path}: the architecture is {architecture!r}; GPA is a {ARCHITECTURE!r} model")
        gpa = GpaMetadata.from_header(header) if "gpa.format" in header.metadata else GpaMetadata.assumed(header)
        number = header.integer("general.file_type")
        config = _config(header, gpa, FILE_TYPES.get(number, f"file type {number}"))
        _check_tensors(header, config, gpa.rows)
        _check_tokens(header, gpa.rows)
        return cls(header, config, gpa, config.dtype)

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def embeddings_path(self) -> Path | None:
        """Where the embedding table should be; None for a full vocabulary, which needs none."""
        return self.path.with_name(self.gpa.embeddings_file) if self.gpa.embeddings_file else None


def layer_tensors(config: LMConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer below `blk.N.` and their shapes, rows first."""
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    return {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (keys, hidden),
        "attn_v.weight": (keys, hidden),
        "attn_q_norm.weight": (width,),
        "attn_k_norm.weight": (width,),
        "attn_output.weight": (hidden, queries),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }


def model_tensors(config: LMConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file whose vocabulary has that many rows; a tied output matrix is not stored."""
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (rows, config.hidden_size)}
    tensors["output_norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        tensors["output.weight"] = (rows, config.hidden_size)
    for number in range(config.num_hidden_layers):
        tensors |= {f"blk.{number}.{name}": shape for name, shape in layer_tensors(config).items()}
    return tensors


def _ranges(header: GgufHeader) -> tuple[range, ...]:
    starts = [int(each) for each in header.numbers("gpa.ids.starts")]
    stops = [int(each) for each in header.numbers("gpa.ids.stops")]
    if len(starts) != len(stops) or not starts:
        raise CheckpointError(
            f"{header.path}: gpa.ids has {len(starts)} starts and {len(stops)} stops; expected as many, and some"
        )
    return tuple(range(start, stop) for start, stop in zip(starts, stops, strict=True))


def _family(header: GgufHeader, name: str) -> range:
    first = header.integer(f"gpa.{name}.first")
    return range(first, first + header.integer(f"gpa.{name}.size"))


def _config(header: GgufHeader, gpa: GpaMetadata, file_type: str) -> LMConfig:
    def integer(name: str) -> int:
        value = header.integer(f"{ARCHITECTURE}.{name}")
        if value < 1:
            raise CheckpointError(f"{header.path}: {ARCHITECTURE}.{name} is {value}; expected at least 1")
        return value

    if (keys := integer("attention.key_length")) != (values := integer("attention.value_length")):
        raise CheckpointError(f"{header.path}: keys have {keys} elements and values {values}; expected as many")
    if (heads := integer("attention.head_count")) % (groups := integer("attention.head_count_kv")):
        raise CheckpointError(f"{header.path}: {heads} attention heads are no multiple of {groups} key-value heads")
    return LMConfig(
        vocab_size=gpa.vocab_size,
        hidden_size=integer("embedding_length"),
        intermediate_size=integer("feed_forward_length"),
        num_hidden_layers=integer("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=keys,
        rms_norm_eps=header.number(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"),
        rope_theta=header.number(f"{ARCHITECTURE}.rope.freq_base"),
        max_position_embeddings=integer("context_length"),
        tie_word_embeddings="output.weight" not in header.tensors,
        dtype=file_type,
    )


def _check_tensors(header: GgufHeader, config: LMConfig, rows: int) -> None:
    # A damaged count would otherwise ask for a table of billions of names.
    if config.num_hidden_layers > len(header.tensors):
        raise CheckpointError(
            f"{header.path}: {ARCHITECTURE}.block_count is {config.num_hidden_layers}, but the file has "
            f"{len(header.tensors)} tensors; convert again"
        )
    expected = model_tensors(config, rows)
    for name, shape in expected.items():
        tensor = header.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{header.path} has no tensor {name}; convert again")
        if tensor.shape != shape:
            raise CheckpointError(
                f"{header.path}: {name} has shape {tensor.shape}; expected {shape} by the metadata; convert again"
            )
    if unknown := header.tensors.keys() - expected.keys():
        raise CheckpointError(f"{header.path}: {min(unknown)} is no tensor of a {ARCHITECTURE} model; convert again")


def _check_tokens(header: GgufHeader, rows: int) -> None:
    """llama.cpp stops the process at token texts that occur twice."""
    kind = header.text("tokenizer.ggml.model")
    if kind == "none":
        if (size := header.integer(f"{ARCHITECTURE}.vocab_size")) != rows:
            raise CheckpointError(f"{header.path}: {ARCHITECTURE}.vocab_size is {size}; gpa.ids has {rows} ids")
        return
    if kind != "gpt2":
        raise CheckpointError(f"{header.path}: the tokenizer is {kind!r}; expected 'gpt2', or 'none' for a part of it")
    tokens = header.byte_strings("tokenizer.ggml.tokens")
    if len(tokens) != rows:
        raise CheckpointError(f"{header.path} has {len(tokens)} token texts; expected {rows}; convert again")
    if len(set(tokens)) < rows:
        text = Counter(tokens).most_common(1)[0][0]
        raise CheckpointError(f"{header.path}: the token text {text!r} occurs twice; convert again")
    if (count := header.count("tokenizer.ggml.token_type")) != rows:
        raise CheckpointError(f"{header.path} has {count} token types; expected {rows}; convert again")
