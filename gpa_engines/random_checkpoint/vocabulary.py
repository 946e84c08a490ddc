"""Tokenizer files of a random checkpoint: byte-level BPE in Qwen's form plus GPA's audio and control tokens.

The merges are made up (letter pairs, then pairs of pairs), so that text of any language round-trips and English text
comes out at a few letters per token, but the split is not that of the released tokenizer.
"""

from __future__ import annotations

import itertools
import json
import string
from dataclasses import dataclass

# Qwen2's split pattern (also llama.cpp's pre-tokenizer "qwen2").
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LONGEST = 10**30  # "no limit" in tokenizer_config.json

_CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN = (
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
_CONTROL = (
    *("<|start_content|>", "<|end_content|>", "<|start_global_token|>", "<|end_global_token|>"),
    *("<|start_semantic_token|>", "<|end_semantic_token|>", "<|start_glm_token|>", "<|end_glm_token|>"),
)


@dataclass(frozen=True, slots=True)
class VocabularyLayout:
    """Where the token families lie: `base` BPE tokens from 0, then specials and control tokens, then audio tokens.

    The families follow one another without a gap from `glm`; `named` ids have a token, the rest up to the LM's
    vocabulary size has none (a padded embedding matrix, as Qwen's).
    """

    base: int
    glm: int
    glm_size: int
    global_size: int
    semantic_size: int
    named: int

    @property
    def global_(self) -> int:
        """Id of `<|bicodec_global_0|>`."""
        return self.glm + self.glm_size

    @property
    def semantic(self) -> int:
        """Id of `<|bicodec_semantic_0|>`."""
        return self.global_ + self.global_size


def tokenizer_files(layout: VocabularyLayout) -> dict[str, str]:
    """Text of every tokenizer file by its name in the folder."""
    vocabulary, merges = _byte_pairs(layout.base)
    added = _added_tokens(layout)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    entries = {index: {"content": content, **flags, "special": content in _SPECIAL} for content, index in added.items()}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **entry} for index, entry in entries.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in merges],
        },
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): entry for index, entry in entries.items()},
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": _LONGEST,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return {
        "tokenizer.json": _json(tokenizer, compact=True),
        "tokenizer_config.json": _json(tokenizer_config),
        "special_tokens_map.json": _json(special),
        "added_tokens.json": _json(added),
        "vocab.json": _json(vocabulary, compact=True),
        "merges.txt": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
        "chat_template.jinja": _CHATML,
    }


def control_id(layout: VocabularyLayout, content: str) -> int:
    """Id of one of the special or control tokens."""
    return _added_tokens(layout)[content]


def _added_tokens(layout: VocabularyLayout) -> dict[str, int]:
    wanted = [*_SPECIAL, *_QWEN, *_CONTROL]
    room = layout.glm - layout.base
    if room < len(wanted):
        raise ValueError(f"{room} ids below the audio tokens cannot hold {len(wanted)} control tokens")
    names = wanted + [f"<|reserved_{layout.base + index}|>" for index in range(len(wanted), room)]
    names += [f"<|glm_semantic_{code}|>" for code in range(layout.glm_size)]
    names += [f"<|bicodec_global_{code}|>" for code in range(layout.global_size)]
    names += [f"<|bicodec_semantic_{code}|>" for code in range(layout.semantic_size)]
    names += [f"<|reserved_{index}|>" for index in range(layout.base + len(names), layout.named)]
    return {content: layout.base + index for index, content in enumerate(names)}


def _byte_pairs(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of `size` tokens: the 256 bytes, then one token per merge; every merge joins earlier tokens."""
    vocabulary = {symbol: index for index, symbol in enumerate(_byte_symbols())}
    merges: list[tuple[str, str]] = []
    for left, right in _pairs():
        if len(vocabulary) == size:
            return vocabulary, merges
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    raise ValueError(f"the made-up merges end at {len(vocabulary)} tokens; {size} were asked for")


def _pairs() -> itertools.chain[tuple[str, str]]:
    """Merges in their order of rank: frequent English pairs, letter pairs, space + pair, pair + pair."""
    space = "Ġ"
    frequent = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "st", "or", "te", "es", "is", "it", "ou")
    letters = string.ascii_lowercase
    pairs = [left + right for left, right in itertools.product(letters, letters)]
    return itertools.chain(
        ((pair[0], pair[1]) for pair in frequent),
        ((space, letter) for letter in letters),
        ((pair[0], pair[1]) for pair in pairs),
        ((space, letter) for letter in string.ascii_uppercase),
        itertools.product(string.ascii_uppercase, letters),
        ((space, pair) for pair in pairs),
        itertools.product(pairs, pairs),
    )


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of its vocabulary (printable bytes first)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(hidden))]


def _json(value: object, *, compact: bool = False) -> str:
    if compact:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
