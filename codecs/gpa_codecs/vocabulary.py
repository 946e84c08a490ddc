"""Where text, control tokens and each family of audio codes live in the language model's vocabulary.

Everything is found by name in `tokenizer.json`: checkpoints differ in their offsets, and it makes no difference whether
a token is an added one, a special one or an entry of the model's vocabulary.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gpa_codecs.errors import CheckpointError, TokenError


@dataclass(frozen=True, slots=True)
class TokenFamily:
    """The tokens of one codebook: code n is the token `<|name_n|>` with the id offset + n, for n in [0, size)."""

    name: str
    offset: int
    size: int

    @property
    def range(self) -> range:
        """The ids of the family."""
        return range(self.offset, self.offset + self.size)

    def ids(self, codes: Sequence[int] | NDArray[np.integer]) -> list[int]:
        """Codes -> token ids. Raises TokenError naming the first code that is outside [0, size)."""
        return (self._checked(codes, range(self.size), "code") + self.offset).tolist()

    def codes(self, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
        """Token ids -> codes, int64[T]. Raises TokenError naming the first id of another family."""
        return self._checked(ids, self.range, "id") - self.offset

    def _checked(self, values: Any, valid: range, kind: str) -> NDArray[np.int64]:
        array = np.asarray(values)
        if array.size == 0:
            return np.empty(0, np.int64)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise TokenError(f"{self.name} {kind}s are {array.dtype}{list(array.shape)}; expected integers [T]")
        outside = (array < valid.start) | (array >= valid.stop)
        if outside.any():
            position = int(np.argmax(outside))
            expected = f"{valid.start} to {valid.stop - 1}"
            raise TokenError(f"{self.name} {kind} {array[position]} at position {position}; expected {expected}")
        return array.astype(np.int64)


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Ids of the tokens that give a prompt its structure."""

    start_glm: int
    end_glm: int
    start_semantic: int
    end_semantic: int
    start_global: int
    end_global: int
    start_content: int
    end_content: int
    im_end: int


CONTROL_NAMES = {
    "start_glm": "<|start_glm_token|>",
    "end_glm": "<|end_glm_token|>",
    "start_semantic": "<|start_semantic_token|>",
    "end_semantic": "<|end_semantic_token|>",
    "start_global": "<|start_global_token|>",
    "end_global": "<|end_global_token|>",
    "start_content": "<|start_content|>",
    "end_content": "<|end_content|>",
    "im_end": "<|im_end|>",
}
"""Field of ControlTokens -> name in tokenizer.json."""


@dataclass(frozen=True, eq=False)
class TokenSpace:
    """The vocabulary of one checkpoint.

    glm, global_, semantic: the families of audio codes. control: the structure tokens. vocab_size: ids that the
    tokenizer knows; the model may have more rows. text_ranges: the ids that are text, ascending and disjoint: the
    vocabulary of the BPE model without added tokens, holes and whatever is named `<|...|>`.
    """

    glm: TokenFamily
    global_: TokenFamily
    semantic: TokenFamily
    control: ControlTokens
    vocab_size: int
    text_ranges: tuple[range, ...]
    _names: Mapping[int, str]
    _text_tokenizer: Tokenizer

    @classmethod
    def from_file(cls, path: str | Path) -> TokenSpace:
        """Read `tokenizer.json`. Raises CheckpointError naming the token that is missing or out of place."""
        path = Path(path)
        document = _read_json(path)
        vocab, added = _token_tables(document, path)
        ids = {**vocab, **added}
        names = {token: name for name, token in ids.items()}
        if len(names) < len(ids):
            name = next(name for name, token in ids.items() if names[token] != name)
            raise CheckpointError(f"{path}: `{name}` and `{names[ids[name]]}` have the same id {ids[name]}")
        marked = {name: token for name, token in ids.items() if name.startswith("<|") and name.endswith("|>")}
        text = vocab.keys() - marked.keys() - added.keys()
        if foreign := set().union(*text) - _BYTES.keys():
            name = min(name for name in text if foreign & set(name))
            raise CheckpointError(f"{path}: the token {name!r} of model.vocab is not in the byte-level alphabet")
        return cls(
            glm=_find_family("glm_semantic", marked, path),
            global_=_find_family("bicodec_global", marked, path),
            semantic=_find_family("bicodec_semantic", marked, path),
            control=_find_control_tokens(marked, path),
            vocab_size=max(names) + 1,
            text_ranges=_ranges(vocab[name] for name in text),
            _names=names,
            _text_tokenizer=_text_tokenizer(document, path),
        )

    def check(self, *, semantic_size: int, global_size: int, glm_size: int, vocab_size: int) -> None:
        """Raise CheckpointError unless the families have the sizes of the codecs' codebooks and the model has every id.

        vocab_size: rows of the language model's embedding, which may be padded beyond the tokenizer's ids.
        """
        for family, size, thing, codec in (
            (self.semantic, semantic_size, "BiCodec/config.yaml: codebook_size", "BiCodec"),
            (self.global_, global_size, "BiCodec/config.yaml: number of global codes (fsq_levels)", "BiCodec"),
            (self.glm, glm_size, "glm-4-voice-tokenizer/config.json: quantize_vocab_size", "GLM tokenizer"),
        ):
            if size != family.size:
                raise CheckpointError(
                    f"{thing} {size}, but the tokenizer has {family.size} `<|{family.name}_N|>` tokens: "
                    f"this {codec} does not belong to this checkpoint"
                )
        if vocab_size < self.vocab_size:
            raise CheckpointError(
                f"config.json: vocab_size {vocab_size}, but the tokenizer has ids up to {self.vocab_size - 1}: "
                "this tokenizer does not belong to this language model"
            )

    def find(self, name: str) -> int | None:
        """Id of the token of that name, such as `<|endoftext|>`; None if the tokenizer has none."""
        return next((token for token, known in self._names.items() if known == name), None)

    def encode_text(self, text: str) -> list[int]:
        """Text -> ids, all of them text: a literal `<|im_end|>` is spelled out, not obeyed.

        Raises TokenError for text that cannot be encoded or that would become a control or audio token all the same.
        """
        try:
            ids = self._text_tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise TokenError(f"text {text[:40]!r} cannot be encoded: {error}") from error
        for token in ids:
            if not self._is_text(token):
                raise TokenError(f"the text holds {self._describe(token)}; only plain text can be spoken")
        return ids

    def decode_text(self, ids: Iterable[int]) -> str:
        """Ids -> text; bytes that are not UTF-8 become U+FFFD. Raises TokenError for an id that is not text."""
        return self.text_bytes(ids).decode("utf-8", errors="replace")

    def text_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> the bytes of their text; a token may end within a character. Raises TokenError as `decode_text`."""
        content = bytearray()
        for token in ids:
            if not self._is_text(token):
                raise TokenError(f"cannot decode {self._describe(token)}: it is not a text token")
            for character in self._names[token]:
                content.append(_BYTES[character])
        return bytes(content)

    def _is_text(self, token: int) -> bool:
        return any(token in ids for ids in self.text_ranges)

    def _describe(self, token: int) -> str:
        return f"id {token} (`{self._names[token]}`)" if token in self._names else f"id {token} (no token has it)"


class TextStream:
    """Text ids to text piece by piece: the pieces join to `decode_text` of all ids, and no character is ever split."""

    def __init__(self, space: TokenSpace) -> None:
        self._space = space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete, possibly none. Raises TokenError as `decode_text`."""
        return self._decoder.decode(self._space.text_bytes(ids))

    def finish(self) -> str:
        """What is left: U+FFFD if the ids ended within a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (GPT-2, Radford et al. 2019): visible ones stand for
    themselves, the others are moved, in order, to U+0100 and up.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(moved)}


_BYTES = _byte_alphabet()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise CheckpointError(f"{path}: expected the JSON object of a tokenizer with a 'model'")
    return document


def _token_tables(document: dict[str, Any], path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Name -> id of the model's vocabulary and of the added tokens."""
    vocab = document["model"].get("vocab")
    decoder = (document.get("decoder") or {}).get("type")
    if not isinstance(vocab, dict) or decoder != "ByteLevel":
        raise CheckpointError(
            f"{path}: decoder {decoder!r}; GPA's tokenizer is a byte-level BPE with decoder 'ByteLevel'"
        )
    missing = [character for character in _BYTES if character not in vocab]
    if missing:
        raise CheckpointError(f"{path}: no token for the byte 0x{_BYTES[missing[0]]:02x}: some text would be lost")
    added: dict[str, int] = {}
    for position, entry in enumerate(document.get("added_tokens") or []):
        try:
            added[str(entry["content"])] = int(entry["id"])
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path}: added_tokens[{position}] is {entry!r}; expected 'content' and 'id'"
            ) from error
    for name, token in added.items():
        if vocab.get(name, token) != token:
            raise CheckpointError(
                f"{path}: `{name}` has id {vocab[name]} in the vocabulary and {token} in added_tokens"
            )
    return vocab, added


def _find_control_tokens(ids: Mapping[str, int], path: Path) -> ControlTokens:
    missing = [name for name in CONTROL_NAMES.values() if name not in ids]
    if missing:
        raise CheckpointError(
            f"{path}: no token `{missing[0]}`; looked for {', '.join(f'`{name}`' for name in CONTROL_NAMES.values())}"
        )
    return ControlTokens(**{field: ids[name] for field, name in CONTROL_NAMES.items()})


def _find_family(name: str, ids: Mapping[str, int], path: Path) -> TokenFamily:
    pattern = re.compile(rf"<\|{name}_(0|[1-9][0-9]*)\|>")
    found: dict[int, int] = {}
    for token_name, token in ids.items():
        if match := pattern.fullmatch(token_name):
            found[int(match[1])] = token
    if not found:
        raise CheckpointError(f"{path}: no token `<|{name}_0|>`; looked for `<|{name}_N|>` with N from 0")
    offset = found.get(0, 0)
    for number in range(max(found) + 1):
        if number not in found:
            raise CheckpointError(
                f"{path}: no token `<|{name}_{number}|>`, though the family goes on to `<|{name}_{max(found)}|>`; "
                "every number from 0 must be there"
            )
        if found[number] != offset + number:
            raise CheckpointError(
                f"{path}: `<|{name}_{number}|>` has id {found[number]}; expected {offset + number}: the family begins "
                f"with id {offset} and must be contiguous"
            )
    return TokenFamily(name, offset, len(found))


def _ranges(ids: Iterable[int]) -> tuple[range, ...]:
    """Distinct ids -> the fewest ascending ranges that hold exactly them."""
    ordered = np.sort(np.fromiter(ids, np.int64))
    runs = np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1)
    return tuple(range(int(run[0]), int(run[-1]) + 1) for run in runs if len(run))


def _text_tokenizer(document: dict[str, Any], path: Path) -> Tokenizer:
    """The same tokenizer without its added tokens, which is how it encodes what stands between them."""
    plain = {**document, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    try:
        return Tokenizer.from_str(json.dumps(plain, ensure_ascii=False))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path}: the tokenizers library cannot read it: {error}") from error
