"""The metadata of a GGUF file: where it comes from, the geometry, the tokenizer, and the gpa.* keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGUFValueType

from gpa_engines import __version__
from gpa_engines.backends.llama_cpp.gguf_model import ARCHITECTURE, FILE_TYPES, GpaMetadata, Vocabulary
from gpa_engines.random_checkpoint import MARKER

from .source import Source
from .vocabulary import TokenTable, token_id

CONVERTER = f"gpa-engines {__version__} to_gguf"

# Beginnings of licence texts, and how licences are written in a model card's header -> SPDX identifiers.
_LICENSE_TEXTS = {"apache license version 2.0": "Apache-2.0", "mit license": "MIT"}
_CARD_LICENSES = {"apache-2.0": "Apache-2.0", "mit": "MIT"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One key with its value; `type` is the format's, of the elements where the value is a sequence."""

    key: str
    value: bool | int | float | str | Sequence[int] | Sequence[str]
    type: GGUFValueType

    @property
    def is_array(self) -> bool:
        return not isinstance(self.value, bool | int | float | str)


def gpa_metadata(source: Source, vocab: Vocabulary, ids: tuple[range, ...], embeddings_file: str) -> GpaMetadata:
    """What the engine checks at load."""
    return GpaMetadata(
        converter=CONVERTER,
        vocab=vocab,
        vocab_size=source.config.vocab_size,
        ids=ids,
        glm=source.space.glm.range,
        global_=source.space.global_.range,
        semantic=source.space.semantic.range,
        tokenizer_sha256=source.tokenizer_sha256,
        source_sha256=source.sha256,
        embeddings_file=embeddings_file,
    )


def entries(
    source: Source, model_name: str, file_type: str, gpa: GpaMetadata, tokens: TokenTable | None
) -> list[Entry]:
    """All of a file's metadata. tokens: of a full vocabulary; None where the rows are only some of the ids."""
    own = [
        Entry(key, value, GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT32)
        for key, value in gpa.entries().items()
    ]
    return [
        *_general(source, model_name, file_type),
        *_geometry(source, gpa.rows),
        *_tokenizer(source, tokens),
        *own,
    ]


def license_of(root: Path) -> str:
    """The SPDX identifier that the checkpoint's README.md or LICENSE states, "" where none is recognised."""
    card = _beginning(root / "README.md")
    if (header := re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)) and (
        found := re.search(r"^license:\s*['\"]?([\w.+-]+)", header[1], re.MULTILINE)
    ):
        return _CARD_LICENSES.get(found[1].lower(), found[1])
    for file in sorted(root.glob("LICENSE*")):
        text = " ".join(re.sub(r"[^\w.]", " ", _beginning(file)).lower().split())
        for beginning, name in _LICENSE_TEXTS.items():
            if text.startswith(beginning):
                return name
    return ""


def hub_repository(root: Path) -> tuple[str, str, str] | None:
    """Owner, name and revision where the folder is a download of huggingface_hub: models--OWNER--NAME/snapshots/REV."""
    parts = root.resolve().parts
    if len(parts) < 3 or parts[-2] != "snapshots":
        return None
    match = re.fullmatch(r"models--(.+?)--(.+)", parts[-3])
    return (match[1], match[2], parts[-1]) if match else None


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(4000)
    except OSError:
        return ""


def _general(source: Source, model_name: str, file_type: str) -> list[Entry]:
    number = next(number for number, name in FILE_TYPES.items() if name == file_type)
    texts = {"architecture": ARCHITECTURE, "type": "model", "name": model_name, "license": license_of(source.root)}
    random = source.config_values.get(MARKER)
    if isinstance(random, dict):
        made = ", ".join(f"{key} {value}" for key, value in random.items())
        texts["description"] = f"random weights ({made}): whatever comes out is noise"
    if hub := hub_repository(source.root):
        texts["source.url"] = f"https://huggingface.co/{hub[0]}/{hub[1]}"
        texts["source.repo_url"] = f"{texts['source.url']}/tree/{hub[2]}"
    return [
        *(Entry(f"general.{key}", text, GGUFValueType.STRING) for key, text in texts.items() if text),
        Entry("general.file_type", number, GGUFValueType.UINT32),
        Entry("general.quantization_version", gguf.GGML_QUANT_VERSION, GGUFValueType.UINT32),
    ]


def _geometry(source: Source, rows: int) -> list[Entry]:
    config = source.config
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "vocab_size": rows,
    }
    numbers = {"rope.freq_base": config.rope_theta, "attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    return [
        *(Entry(f"{ARCHITECTURE}.{key}", size, GGUFValueType.UINT32) for key, size in sizes.items()),
        *(Entry(f"{ARCHITECTURE}.{key}", number, GGUFValueType.FLOAT32) for key, number in numbers.items()),
    ]


def _tokenizer(source: Source, tokens: TokenTable | None) -> list[Entry]:
    def entry(key: str, value: bool | int | str | Sequence[int] | Sequence[str], kind: GGUFValueType) -> Entry:
        return Entry(f"tokenizer.ggml.{key}", value, kind)

    if tokens is None:
        return [entry("model", "none", GGUFValueType.STRING)]
    end = token_id(source, "eos_token_id")
    ids = {
        "bos_token_id": token_id(source, "bos_token_id"),
        "eos_token_id": source.space.control.im_end if end is None else end,
        "padding_token_id": token_id(source, "pad_token_id"),
    }
    return [
        entry("model", "gpt2", GGUFValueType.STRING),
        entry("pre", tokens.pre, GGUFValueType.STRING),
        entry("tokens", tokens.texts, GGUFValueType.STRING),
        entry("token_type", tokens.types, GGUFValueType.INT32),
        entry("merges", tokens.merges, GGUFValueType.STRING),
        *(entry(key, token, GGUFValueType.UINT32) for key, token in ids.items() if token is not None),
        entry("add_bos_token", False, GGUFValueType.BOOL),
    ]
