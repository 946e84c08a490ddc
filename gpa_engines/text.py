"""Plain text generation: a prompt is continued with text, on any engine.

No layout and no chat template: the prompt's own ids are what the model sees. Only text can come out; the answer ends
where the model emits `<|im_end|>` or `<|endoftext|>`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Unpack

from gpa_codecs.errors import RequestError, TokenError
from gpa_codecs.vocabulary import TextStream, TokenSpace
from gpa_engines.engine import Engine, FinishReason, GenerationRequest, GenerationUsage, SamplingParams
from gpa_engines.speech.stream import ResultStream
from gpa_engines.speech.tasks import SamplingOverrides

TEXT_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=128)
"""Greedy, and as long as the Ascend report's benchmark."""

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what the model made of it.

    text: without the prompt. ids: what `text` was decoded from, the stop id left out. total: seconds from submission
    to the last token.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: GenerationUsage
    total: float

    def as_dict(self) -> dict[str, Any]:
        """As an entry of `results` in results_text.json."""
        usage = self.usage
        return {
            "prompt": self.prompt,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_ids": list(self.prompt_ids),
            "ids": list(self.ids),
            "prompt_tokens": usage.prompt_tokens,
            "new_tokens": usage.new_tokens,
            "seed": usage.seed,
            "timings": {
                "queue": usage.queue,
                "prefill": usage.prefill,
                "decode": usage.decode,
                "total": self.total,
            },
        }


def text_sampling(overrides: SamplingOverrides) -> SamplingParams:
    """How text is sampled when nothing else is asked, with the caller's choices."""
    return replace(TEXT_SAMPLING, **overrides)


def text_request(space: TokenSpace, prompt: str, **overrides: Unpack[SamplingOverrides]) -> GenerationRequest:
    """The request that continues `prompt` with text. Raises TokenError for an empty prompt.

    What looks like a special token in the prompt is spelled out, not obeyed.
    """
    if not prompt:
        raise TokenError("the prompt is empty; expected at least one character")
    ids = tuple(space.encode_text(prompt))
    stop_ids, ranges = text_tokens(space)
    return GenerationRequest(ids, text_sampling(overrides), stop_ids, ranges)


def text_tokens(space: TokenSpace) -> tuple[tuple[int, ...], tuple[range, ...]]:
    """What a completion consists of: (stop ids, ranges of the ids that it may hold)."""
    end = space.find(END_OF_TEXT)
    return (space.control.im_end,) if end is None else (space.control.im_end, end), space.text_ranges


def complete(
    engine: Engine,
    space: TokenSpace,
    prompt: str,
    *,
    progress: Callable[[int], None] | None = None,
    **overrides: Unpack[SamplingOverrides],
) -> ResultStream[str, Completion]:
    """Text as it is generated, and the completion once it has ended; the parts joined are its text.

    progress: told how many tokens there are. Further keyword arguments are the fields of SamplingParams. Raises
    TokenError for an empty prompt at once.
    """
    request = text_request(space, prompt, **overrides)
    ids: list[int] = []
    parts: list[str] = []
    ended: list[tuple[FinishReason, GenerationUsage, float]] = []

    async def generate() -> AsyncGenerator[str, None]:
        decoder = TextStream(space)
        started = time.perf_counter()
        async with aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                ids.extend(delta.ids)
                if progress is not None and delta.ids:
                    progress(len(ids))
                new = decoder.push(delta.ids)
                if delta.finish_reason == "cancelled":
                    raise RequestError("the engine was closed while it was generating")
                if delta.finish_reason is not None and delta.usage is not None:
                    ended.append((delta.finish_reason, delta.usage, time.perf_counter() - started))
                    new += decoder.finish()
                if new:
                    parts.append(new)
                    yield new

    def result() -> Completion:
        reason, usage, total = ended[0]
        return Completion(prompt, request.prompt_ids, "".join(parts), tuple(ids), reason, usage, total)

    return ResultStream(generate(), result)
