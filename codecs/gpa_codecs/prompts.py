"""The three prompt layouts, as id lists; there is no token before them.

stt    start_glm GLM end_glm start_semantic SEMANTIC end_semantic start_content -> text
tts-a  start_global VOICE end_global start_content TEXT end_content             -> semantic
vc     start_global VOICE end_global start_semantic SEMANTIC end_semantic end_content -> semantic
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.codec import AudioTokens, Voice
from gpa_codecs.errors import TokenError
from gpa_codecs.text_splitting import is_speakable
from gpa_codecs.vocabulary import TokenSpace

Task = Literal["stt", "tts-a", "vc"]
"""Speech to text, text to speech in a reference voice, voice conversion; named as the reference names them."""


def stt_prompt(space: TokenSpace, tokens: AudioTokens) -> list[int]:
    """Ids that ask for the text of a clip. Raises TokenError if either family of its codes is empty or out of range."""
    control = space.control
    return [
        control.start_glm,
        *space.glm.ids(_not_empty("GLM", tokens.glm)),
        control.end_glm,
        control.start_semantic,
        *space.semantic.ids(_not_empty("semantic", tokens.semantic)),
        control.end_semantic,
        control.start_content,
    ]


def tts_prompt(space: TokenSpace, text: str, voice: Voice) -> list[int]:
    """Ids that ask for `text` spoken in `voice`. Raises TokenError for text without a letter or digit."""
    check_speakable(text)
    control = space.control
    return [*_voice(space, voice), control.start_content, *space.encode_text(text), control.end_content]


def check_speakable(text: str) -> None:
    """Raise TokenError for text that is empty or holds neither a letter nor a digit."""
    if not is_speakable(text):
        raise TokenError(f"the text {text[:40]!r} has nothing to speak; expected at least one letter or digit")


def vc_prompt(space: TokenSpace, semantic: Sequence[int] | NDArray[np.integer], voice: Voice) -> list[int]:
    """Ids that ask for a clip's semantic codes anew in `voice`. Raises TokenError if there are none."""
    control = space.control
    return [
        *_voice(space, voice),
        control.start_semantic,
        *space.semantic.ids(_not_empty("semantic", semantic)),
        control.end_semantic,
        control.end_content,
    ]


def task_tokens(space: TokenSpace, task: Task) -> tuple[tuple[int, ...], tuple[range, ...]]:
    """What the answer to a prompt consists of: (stop ids, ranges of the ids that it may hold)."""
    match task:
        case "stt":
            return (space.control.end_content, space.control.im_end), space.text_ranges
        case "tts-a" | "vc":
            return (space.control.im_end,), (space.semantic.range,)
        case _:
            raise TokenError(f"task {task!r}; expected 'stt', 'tts-a' or 'vc'")


def _voice(space: TokenSpace, voice: Voice) -> list[int]:
    return [space.control.start_global, *space.global_.ids(voice.codes), space.control.end_global]


def _not_empty(family: str, codes: Sequence[int] | NDArray[np.integer]) -> Sequence[int] | NDArray[np.integer]:
    if len(codes) == 0:
        raise TokenError(f"there are no {family} codes; the prompt needs at least one")
    return codes
