"""Which ids a file's rows are, and the token texts that llama.cpp wants for a full vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import TokenType

from gpa_codecs.errors import CheckpointError
from gpa_codecs.prompts import Task, task_tokens
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.backends.llama_cpp.gguf_model import Vocabulary
from gpa_engines.text import text_tokens

from .source import Source

_SPEECH: tuple[Task, ...] = ("tts-a", "vc")

# How Qwen2 and Qwen3 split text before byte pairs are merged (transformers' Qwen2Tokenizer): llama.cpp's "qwen2".
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """What `tokenizer.ggml.*` holds. types: gguf.TokenType's numbers. pre: how text is split before merging.

    note: how llama.cpp's own programs would tokenize otherwise than tokenizer.json, "" where they do not.
    """

    texts: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    pre: str
    note: str


def vocabulary_ids(space: TokenSpace, vocab: Vocabulary, vocab_size: int) -> tuple[range, ...]:
    """The ids that a file's rows are, ascending: all, or those that the tasks of that vocabulary may emit."""
    if vocab == "full":
        return (range(vocab_size),)
    tokens = [task_tokens(space, task) for task in _SPEECH]
    if vocab == "text":
        tokens = [task_tokens(space, "stt"), text_tokens(space)]
    ids = {token for stops, ranges in tokens for group in (stops, *ranges) for token in group}
    ordered = np.sort(np.fromiter(ids, np.int64))
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1)
    return tuple(range(int(run[0]), int(run[-1]) + 1) for run in runs)


def token_table(source: Source) -> TokenTable:
    """One text for every row of the model; ids that no token has are unused fillers.

    Raises CheckpointError when two ids would have the same text, at which llama.cpp would stop the process.
    """
    document = source.tokenizer_document
    model = document["model"]
    texts = [f"[PAD{token}]" for token in range(source.config.vocab_size)]
    types = [int(TokenType.UNUSED)] * len(texts)
    for text, token in model["vocab"].items():
        texts[token], types[token] = text, int(TokenType.NORMAL)
    for entry in document.get("added_tokens") or []:
        text, token = entry["content"], entry["id"]
        # As llama.cpp's converter: what is written like a control token is one, marked special or not.
        control = entry.get("special") or (text.startswith("<|") and text.endswith("|>"))
        texts[token], types[token] = text, int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    text, count = Counter(texts).most_common(1)[0]
    if count > 1:
        ids = [token for token, each in enumerate(texts) if each == text]
        raise CheckpointError(
            f"{source.root}: the token text {text!r} would stand for the ids {', '.join(map(str, ids[:5]))}; llama.cpp "
            "needs a text of its own for every id: rename one in tokenizer.json"
        )
    pre, note = _pre_tokenizer(document)
    merges = tuple(each if isinstance(each, str) else " ".join(each) for each in model.get("merges") or [])
    return TokenTable(tuple(texts), tuple(types), merges or (_idle_merge(model["vocab"]),), pre, note)


def token_id(source: Source, key: str) -> int | None:
    """An id of config.json (the first of a list), None when it has none within the vocabulary."""
    value = source.config_values.get(key)
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and 0 <= value < source.config.vocab_size else None


def _pre_tokenizer(document: Mapping[str, Any]) -> tuple[str, str]:
    """llama.cpp's name for how the text is split, and what to know about it."""
    steps = document.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    whole = [step for step in steps if step.get("type") == "ByteLevel" and step.get("use_regex", True)]
    if patterns == [_QWEN2_SPLIT] and not whole:
        return "qwen2", ""
    if not patterns and len(whole) == len(steps) == 1:
        return "gpt-2", ""
    # llama.cpp does not load a name that it does not know.
    return "default", (
        "tokenizer.json splits text in a way that llama.cpp has no known name for: its own programs would tokenize "
        "text differently (gpa-engines does not use llama.cpp's tokenizer)"
    )


def _idle_merge(vocab: Mapping[str, int]) -> str:
    """A merge that changes nothing, as llama.cpp refuses to have none; what is no token it splits into bytes again."""
    letters = [text for text in vocab if len(text.encode()) == 1]
    return next(f"{left} {right}" for left in letters for right in letters if left + right not in vocab)
