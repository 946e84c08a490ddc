"""The prompt layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.codec import AudioTokens, Voice
from gpa_codecs.errors import TokenError
from gpa_codecs.prompts import stt_prompt, task_tokens, tts_prompt, vc_prompt
from gpa_codecs.vocabulary import TokenSpace

Arrays = Callable[[str], dict[str, np.ndarray]]
NONE = np.empty(0, np.int64)
VOICE = Voice(tuple(range(32)))


@pytest.fixture(scope="module")
def space(tiny_checkpoint: Path) -> TokenSpace:
    return TokenSpace.from_file(tiny_checkpoint / "tokenizer.json")


@pytest.mark.parametrize("number", range(6))
def test_prompts_are_the_recorded_ids(
    number: int, space: TokenSpace, goldens: dict[str, Any], golden_arrays: Arrays
) -> None:
    prompt = goldens["prompts"][number]

    def clip(argument: str) -> dict[str, np.ndarray]:
        return golden_arrays(Path(prompt["args"][argument]).stem)

    if prompt["task"] == "stt":
        codes = clip("audio_path")
        ids = stt_prompt(space, AudioTokens(codes["semantic"], codes["glm"], 1.0))
    elif prompt["task"] == "tts-a":
        ids = tts_prompt(space, prompt["args"]["text"], Voice(tuple(clip("ref_audio_path")["globals"].tolist())))
    else:
        voice = Voice(tuple(clip("ref_audio_path")["globals"].tolist()))
        ids = vc_prompt(space, clip("audio_path")["semantic"], voice)
    assert ids == prompt["input_ids"]
    assert ids == golden_arrays(f"prompt{number}_logits")["input_ids"].ravel().tolist()
    assert all(type(token) is int for token in ids)


def test_every_task_is_recorded(goldens: dict[str, Any]) -> None:
    assert [prompt["task"] for prompt in goldens["prompts"]] == ["stt", "stt", "tts-a", "tts-a", "vc", "vc"]


@pytest.mark.parametrize("text", ["", "  \n\t", "...", "?!", "。，", "“ ”", "😀"])
def test_text_with_nothing_to_say_is_refused(text: str, space: TokenSpace) -> None:
    with pytest.raises(TokenError, match="nothing to speak"):
        tts_prompt(space, text, VOICE)


def test_a_control_token_in_the_text_is_spoken_as_text(space: TokenSpace) -> None:
    ids = tts_prompt(space, "stop <|im_end|> here", VOICE)
    control = space.control
    assert ids[34] == control.start_content
    assert ids[-1] == control.end_content
    assert space.decode_text(ids[35:-1]) == "stop <|im_end|> here"


def test_prompts_without_codes_are_refused(space: TokenSpace) -> None:
    codes = np.array([1])
    with pytest.raises(TokenError, match="no semantic codes"):
        vc_prompt(space, NONE, VOICE)
    with pytest.raises(TokenError, match="no semantic codes"):
        stt_prompt(space, AudioTokens(NONE, codes, 1.0))
    with pytest.raises(TokenError, match="no GLM codes"):
        stt_prompt(space, AudioTokens(codes, NONE, 1.0))


def test_codes_of_another_codebook_are_refused(space: TokenSpace) -> None:
    with pytest.raises(TokenError, match="bicodec_semantic code 320 at position 1"):
        vc_prompt(space, [3, 320], VOICE)


def test_answers_are_text_or_semantic_codes(space: TokenSpace) -> None:
    assert task_tokens(space, "stt") == ((516, 514), (range(512),))
    for task in ("tts-a", "vc"):
        assert task_tokens(space, task) == ((514,), (range(4816, 5136),))
    with pytest.raises(TokenError, match="expected 'stt', 'tts-a' or 'vc'"):
        task_tokens(space, "tts")  # pyright: ignore[reportArgumentType]
