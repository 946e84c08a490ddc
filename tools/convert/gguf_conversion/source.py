"""The language model that is converted: opened, checked against what GGUF's qwen3 can say, and hashed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gpa_codecs.errors import CheckpointError
from gpa_codecs.vocabulary import TokenSpace
from gpa_codecs.weights import read_header, weight_files
from gpa_engines.backends.llama_cpp.gguf_model import model_tensors
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.checkpoint.checks import key_prefix
from gpa_engines.lm_config import LMConfig

from .tensors import STORED_DTYPES, StoredTensor, row_blocks

EMBEDDINGS = "token_embd.weight"
HEAD = "output.weight"
_FIRST = "model.embed_tokens.weight"
# What older versions of transformers stored beside the weights; rope_theta says the same.
_DERIVED = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that can be converted.

    tensors: by GGUF name, in the order of the file; a tied output matrix is not among them. config_values,
    tokenizer_document: config.json and tokenizer.json, parsed. sha256: identifies the weights.
    """

    root: Path
    config: LMConfig
    config_values: Mapping[str, Any]
    space: TokenSpace
    tokenizer_document: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    sha256: str
    tokenizer_sha256: str

    @property
    def dtype(self) -> str:
        """What most of the weights are stored as: "BF16", "F16" or "F32"."""
        sizes = dict.fromkeys(STORED_DTYPES, 0)
        for tensor in self.tensors.values():
            sizes[tensor.dtype] += tensor.elements
        return max(sizes, key=lambda dtype: sizes[dtype])


def open_source(model_dir: str | Path) -> Source:
    """Check a checkpoint's language model and tokenizer.

    Raises CheckpointError for another architecture, rope scaling, sliding windows, attention biases, weights that are
    no safetensors or are truncated, tensors that are missing, stored twice or unknown, and a tokenizer that does not
    fit or names a token twice.
    """
    checkpoint = Checkpoint.open(model_dir, require=("lm", "tokenizer"))
    files = weight_files(checkpoint.root)
    if others := [file.name for file in files if file.suffix != ".safetensors"]:
        raise CheckpointError(
            f"{checkpoint.root}: the weights are {others[0]}, which only torch can read; expected model.safetensors: "
            "save the checkpoint with safe_serialization"
        )
    document = _unambiguous_json(checkpoint.tokenizer_file)
    space = checkpoint.token_space()
    _check_added_tokens(document, checkpoint.tokenizer_file)
    tensors = _named(checkpoint.config, _stored(files), checkpoint.root)
    digests = checkpoint.fingerprint()
    return Source(
        root=checkpoint.root,
        config=checkpoint.config,
        config_values=json.loads(checkpoint.config_file.read_text(encoding="utf-8")),
        space=space,
        tokenizer_document=document,
        tensors=tensors,
        sha256=_combined([digests[f"lm/{file.name}"] for file in files]),
        tokenizer_sha256=digests["tokenizer/tokenizer.json"],
    )


def _combined(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _stored(files: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """Every tensor of all shards by its stored name."""
    tensors: dict[str, StoredTensor] = {}
    for tensor in (each for file in files for each in _tensors_of(file)):
        if tensor.name in tensors:
            first, second = tensors[tensor.name].path.name, tensor.path.name
            raise CheckpointError(f"{tensor.path.parent}: {tensor.name} is stored twice, in {first} and {second}")
        tensors[tensor.name] = tensor
    return tensors


def _tensors_of(file: Path) -> Iterator[StoredTensor]:
    specs = read_header(file)
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        entries = json.loads(content.read(length), object_pairs_hook=lambda pairs: _without_twins(pairs, file))
    for name, spec in specs.items():
        yield StoredTensor(name, spec.dtype, spec.shape, file, 8 + length + entries[name]["data_offsets"][0])


def _without_twins(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    """A JSON object; of equal keys, which a parser would silently merge, the first is reported."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise CheckpointError(f"{file} has `{twin}` twice; download it again")
    return entries


def _named(config: LMConfig, stored: Mapping[str, StoredTensor], root: Path) -> dict[str, StoredTensor]:
    """GGUF name -> tensor, in llama.cpp's order: each known, there once, of the right shape and a readable dtype."""
    prefix = key_prefix(stored, _FIRST)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    expected = model_tensors(config, config.vocab_size)
    found: dict[str, StoredTensor] = {}
    unknown: list[str] = []
    for name, tensor in stored.items():
        if name.endswith(_DERIVED):
            continue
        known = name.startswith(prefix) and names.get_name(name.removeprefix(prefix), try_suffixes=(".weight",))
        mapped = known or ""
        if mapped not in expected and mapped != HEAD:
            unknown.append(name)
        elif mapped in found:
            raise CheckpointError(f"{root}: {found[mapped].name} and {name} are both {mapped}; expected one of them")
        else:
            found[mapped] = tensor
    if unknown:
        raise CheckpointError(
            f"{root}: {len(unknown)} tensors have no place in a Qwen3 model of {config.num_hidden_layers} layers "
            f"without biases: {_some(unknown)}"
        )
    if missing := [name for name in expected if name not in found]:
        raise CheckpointError(f"{root}: the weights lack {len(missing)} tensors: {_some(missing)}")
    for name, tensor in found.items():
        if tensor.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} is {tensor.dtype}; expected one of {', '.join(STORED_DTYPES)}: "
                "convert the unquantised checkpoint"
            )
        shape = expected.get(name, expected[EMBEDDINGS])  # a tied head is as large as the table
        if tensor.shape != shape:
            raise CheckpointError(f"{tensor.path}: {tensor.name} has shape {tensor.shape}; expected {shape}")
    if HEAD not in expected and HEAD in found:
        _check_tied(found[EMBEDDINGS], found.pop(HEAD))
    return {name: found[name] for name in expected}


def _check_tied(embeddings: StoredTensor, head: StoredTensor) -> None:
    for rows in row_blocks(embeddings.shape):
        if not np.array_equal(embeddings.read(rows), head.read(rows)):
            raise CheckpointError(
                f"{head.path}: {head.name} differs from {embeddings.name}, but config.json says tie_word_embeddings: "
                "which of them is the output matrix cannot be known; correct config.json"
            )


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _unambiguous_json(path: Path) -> dict[str, Any]:
    """tokenizer.json, where a token that is named twice with two ids would otherwise lose one of them."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _without_twins(pairs, path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _check_added_tokens(document: Mapping[str, Any], path: Path) -> None:
    ids: dict[str, int] = {}
    for entry in document.get("added_tokens") or []:
        name, token = entry["content"], entry["id"]
        if ids.setdefault(name, token) != token:
            raise CheckpointError(f"{path}: the added token `{name}` has the ids {ids[name]} and {token}")
