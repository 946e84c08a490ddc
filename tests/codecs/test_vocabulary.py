"""The token families and the text of a vocabulary."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gpa_codecs.errors import CheckpointError, TokenError
from gpa_codecs.vocabulary import CONTROL_NAMES, TextStream, TokenFamily, TokenSpace

Edit = Callable[[dict[str, Any]], None]
TEXTS = [
    "Hello world, this is Major Tom speaking.",
    "你好，世界。今天是 2026 年 5 月 16 日。",
    "  two  spaces\tand\n\nlines\r\n",
    "naïve café, e\u0301, ﬁ, 😀👩‍👩‍👧, \u200b, \x00",
    "",
]


@pytest.fixture(scope="module")
def document(tiny_checkpoint: Path) -> str:
    return (tiny_checkpoint / "tokenizer.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def space(tiny_checkpoint: Path) -> TokenSpace:
    return TokenSpace.from_file(tiny_checkpoint / "tokenizer.json")


@pytest.fixture
def edited(document: str, tmp_path: Path) -> Callable[[Edit], Path]:
    """Writes the tiny tokenizer after a change."""

    def write(edit: Edit) -> Path:
        changed = json.loads(document)
        edit(changed)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(changed), encoding="utf-8")
        return path

    return write


def entry(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(token for token in document["added_tokens"] if token["content"] == name)


def flag_everything_special(document: dict[str, Any]) -> None:
    for token in document["added_tokens"]:
        token["special"] = True


def move_added_tokens_into_the_vocabulary(document: dict[str, Any]) -> None:
    for token in document["added_tokens"]:
        document["model"]["vocab"][token["content"]] = token["id"]
    document["added_tokens"] = []


def move_one_family_into_the_vocabulary(document: dict[str, Any]) -> None:
    moved = [token for token in document["added_tokens"] if "semantic_" in token["content"]]
    document["model"]["vocab"].update({token["content"]: token["id"] for token in moved})
    document["added_tokens"] = [token for token in document["added_tokens"] if token not in moved]


# --- families and control tokens --------------------------------------------------------------------------------------


def test_families_are_found_by_name(space: TokenSpace) -> None:
    assert space.glm == TokenFamily("glm_semantic", 560, 160)
    assert space.global_ == TokenFamily("bicodec_global", 720, 4096)
    assert space.semantic == TokenFamily("bicodec_semantic", 4816, 320)
    assert space.vocab_size == 5141
    assert space.text_ranges == (range(512),)


def test_control_tokens_are_found_by_name(space: TokenSpace, tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    assert asdict(space.control) == {field: tokenizer.token_to_id(name) for field, name in CONTROL_NAMES.items()}


@pytest.mark.parametrize(
    "edit", [flag_everything_special, move_added_tokens_into_the_vocabulary, move_one_family_into_the_vocabulary]
)
def test_it_does_not_matter_how_audio_tokens_are_stored(
    edit: Edit, edited: Callable[[Edit], Path], space: TokenSpace
) -> None:
    other = TokenSpace.from_file(edited(edit))
    for attribute in ("glm", "global_", "semantic", "control", "vocab_size", "text_ranges"):
        assert getattr(other, attribute) == getattr(space, attribute)
    for text in [*TEXTS, "<|im_end|> <|bicodec_semantic_5|>"]:
        assert other.encode_text(text) == space.encode_text(text)


def test_codes_and_ids_are_inverse(space: TokenSpace) -> None:
    codes = np.array([0, 5, 319])
    ids = space.semantic.ids(codes)
    assert ids == [4816, 4821, 5135]
    assert all(type(token) is int for token in ids)
    assert np.array_equal(space.semantic.codes(ids), codes)
    assert space.semantic.codes(ids).dtype == np.int64
    assert space.semantic.ids([]) == []
    assert space.semantic.codes([]).dtype == np.int64
    assert space.semantic.range == range(4816, 5136)


@pytest.mark.parametrize("code", [-1, 320])
def test_a_code_outside_its_family_is_named(space: TokenSpace, code: int) -> None:
    with pytest.raises(TokenError, match=f"bicodec_semantic code {code} at position 2; expected 0 to 319"):
        space.semantic.ids([0, 1, code])


@pytest.mark.parametrize("token", [4815, 5136])
def test_an_id_outside_its_family_is_named(space: TokenSpace, token: int) -> None:
    with pytest.raises(TokenError, match=f"bicodec_semantic id {token} at position 1; expected 4816 to 5135"):
        space.semantic.codes([4816, token])


def test_codes_are_integers_in_one_row(space: TokenSpace) -> None:
    with pytest.raises(TokenError, match="float64"):
        space.semantic.ids(np.array([0.5]))
    with pytest.raises(TokenError, match="int64"):
        space.semantic.ids(np.array([[1]]))


# --- refused vocabularies ---------------------------------------------------------------------------------------------


def remove(name: str) -> Edit:
    return lambda document: document["added_tokens"].remove(entry(document, name))


def renumber(name: str, token: int) -> Edit:
    return lambda document: entry(document, name).update(id=token)


def rename_family(document: dict[str, Any]) -> None:
    for token in document["added_tokens"]:
        token["content"] = token["content"].replace("glm_semantic_", "glm_audio_")


def swap_neighbours(document: dict[str, Any]) -> None:
    first, second = entry(document, "<|bicodec_global_7|>"), entry(document, "<|bicodec_global_8|>")
    first["id"], second["id"] = second["id"], first["id"]


def collide(document: dict[str, Any]) -> None:
    entry(document, "<|reserved_523|>")["id"] = 515


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (rename_family, "no token `<|glm_semantic_0|>`; looked for `<|glm_semantic_N|>`"),
        (remove("<|bicodec_semantic_17|>"), "no token `<|bicodec_semantic_17|>`, though the family goes on to"),
        (remove("<|bicodec_semantic_0|>"), "no token `<|bicodec_semantic_0|>`, though the family goes on to"),
        (swap_neighbours, "`<|bicodec_global_7|>` has id 728; expected 727"),
        (renumber("<|glm_semantic_159|>", 6000), "`<|glm_semantic_159|>` has id 6000; expected 719"),
        (remove("<|end_content|>"), "no token `<|end_content|>`; looked for `<|start_glm_token|>`"),
        (collide, "`<|start_content|>` and `<|reserved_523|>` have the same id 515"),
        (lambda d: d["model"]["vocab"].pop("a"), "no token for the byte 0x61"),
        (lambda d: d["model"]["vocab"].update({"字": 9000}), "'字' of model.vocab is not in the byte-level alphabet"),
        (
            lambda d: d["model"]["vocab"].update({"<|im_end|>": 9000}),
            "`<|im_end|>` has id 9000 in the vocabulary and 514",
        ),
        (lambda d: d.update(decoder={"type": "Metaspace"}), "decoder 'Metaspace'"),
        (lambda d: d["added_tokens"].append({"id": 3}), "is {'id': 3}; expected 'content' and 'id'"),
        (lambda d: d.pop("model"), "a 'model'"),
        (lambda d: d["model"].update(merges=["x y z"]), "the tokenizers library cannot read it"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused_with_the_reason(
    edit: Edit, reason: str, edited: Callable[[Edit], Path]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        TokenSpace.from_file(edited(edit))
    assert reason in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        TokenSpace.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        TokenSpace.from_file(tmp_path / "tokenizer.json")


SIZES = {"semantic_size": 320, "global_size": 4096, "glm_size": 160, "vocab_size": 5141}


def test_matching_sizes_pass_and_the_model_may_have_padding_rows(space: TokenSpace) -> None:
    space.check(**SIZES)
    space.check(**{**SIZES, "vocab_size": 5184})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"semantic_size": 512},
            "BiCodec/config.yaml: codebook_size 512, but the tokenizer has 320 `<|bicodec_semantic_N|>` tokens: "
            "this BiCodec does not belong to this checkpoint",
        ),
        ({"global_size": 1024}, "4096 `<|bicodec_global_N|>` tokens: this BiCodec does not belong"),
        (
            {"glm_size": 16384},
            "glm-4-voice-tokenizer/config.json: quantize_vocab_size 16384, but the tokenizer has 160 `<|glm_",
        ),
        ({"vocab_size": 5140}, "config.json: vocab_size 5140, but the tokenizer has ids up to 5140"),
    ],
)
def test_sizes_that_disagree_are_refused(space: TokenSpace, change: dict[str, int], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        space.check(**{**SIZES, **change})
    assert message in str(caught.value)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text_has_the_ids_of_the_full_tokenizer(text: str, space: TokenSpace, tiny_checkpoint: Path) -> None:
    full = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    ids = full.encode(text, add_special_tokens=False).ids
    assert space.encode_text(text) == ids
    assert space.decode_text(ids) == full.decode(ids, skip_special_tokens=False) == text


def test_merges_and_normalisation_are_kept(edited: Callable[[Edit], Path]) -> None:
    def learn(document: dict[str, Any]) -> None:
        document["normalizer"] = {"type": "NFC"}
        document["model"]["merges"] = [["h", "e"], ["l", "l"]]
        document["model"]["vocab"].update({"he": 6000, "ll": 6001})
        document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}

    path = edited(learn)
    space = TokenSpace.from_file(path)
    full = Tokenizer.from_file(str(path))
    full.no_truncation()
    assert space.encode_text("hello e\u0301") == full.encode("hello e\u0301", add_special_tokens=False).ids
    assert space.encode_text("hello")[:2] == [6000, 6001]
    assert space.encode_text("e\u0301") == space.encode_text("é")
    assert space.text_ranges == (range(512), range(6000, 6002))
    assert space.vocab_size == 6002


@pytest.mark.parametrize("name", ["<|im_end|>", "<|bicodec_semantic_5|>", "<|endoftext|>", "<|start_content|>"])
def test_the_name_of_a_control_token_is_ordinary_text(name: str, space: TokenSpace) -> None:
    ids = space.encode_text(f"say {name} now")
    assert all(token < 512 for token in ids)
    assert space.decode_text(ids) == f"say {name} now"


def test_text_that_would_become_a_control_token_is_refused(edited: Callable[[Edit], Path]) -> None:
    def whole_words(document: dict[str, Any]) -> None:
        move_added_tokens_into_the_vocabulary(document)
        document["model"]["ignore_merges"] = True
        document["pre_tokenizer"]["use_regex"] = False

    space = TokenSpace.from_file(edited(whole_words))
    with pytest.raises(TokenError, match=r"the text holds id 514 \(`<\|im_end\|>`\)"):
        space.encode_text("<|im_end|>")


def test_text_that_is_not_unicode_is_refused(space: TokenSpace) -> None:
    with pytest.raises(TokenError, match="cannot be encoded"):
        space.encode_text("half a pair \ud800")


@pytest.mark.parametrize("token", [514, 4816, 5141, -1])
def test_only_text_ids_are_decoded(token: int, space: TokenSpace) -> None:
    with pytest.raises(TokenError, match=f"cannot decode id {token}"):
        space.decode_text([3, token])


def test_a_stream_never_splits_a_character(space: TokenSpace) -> None:
    text = "é你好😀!"
    stream = TextStream(space)
    pieces = [stream.push([token]) for token in space.encode_text(text)]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.finish() == ""


def test_a_stream_that_ends_within_a_character_says_so(space: TokenSpace) -> None:
    stream = TextStream(space)
    assert stream.push(space.encode_text("你")[:2]) == ""
    assert stream.finish() == "\ufffd"


@given(ids=st.lists(st.integers(0, 511), max_size=40), cut=st.integers(0, 40))
def test_streamed_text_is_the_decoded_text(space: TokenSpace, ids: list[int], cut: int) -> None:
    stream = TextStream(space)
    pieces = stream.push(ids[:cut]) + stream.push(ids[cut:]) + stream.finish()
    assert pieces == space.decode_text(ids)


@given(text=st.text(max_size=60))
def test_any_text_comes_back(space: TokenSpace, text: str) -> None:
    assert space.decode_text(space.encode_text(text)) == text


@given(ids=st.lists(st.integers(0, 255), max_size=20))
def test_broken_utf8_decodes_as_the_library_decodes_it(
    space: TokenSpace, tiny_checkpoint: Path, ids: list[int]
) -> None:
    full = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    assert space.decode_text(ids) == full.decode(ids, skip_special_tokens=False)
