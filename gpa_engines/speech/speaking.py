"""Text to speech and voice conversion: both continue a prompt with semantic codes and decode them in a voice."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

import numpy as np

from gpa_codecs.audio import AudioSource, Channel, Waveform, load_audio, remove_dc
from gpa_codecs.codec import SEMANTIC_RATE, Voice
from gpa_codecs.errors import RequestError
from gpa_codecs.prompts import Task, check_speakable, tts_prompt, vc_prompt
from gpa_codecs.silences import cut_at_silences
from gpa_codecs.text_splitting import split_text
from gpa_engines.engine import SamplingParams
from gpa_engines.speech.call import Call, shorten
from gpa_engines.speech.results import AudioPiece, ProgressCallback, Speech
from gpa_engines.speech.runtime import Runtime
from gpa_engines.speech.stream import ResultStream, in_order
from gpa_engines.speech.tasks import LONGEST_CLIP, SamplingOverrides, task_sampling

PartT = TypeVar("PartT")

ANSWER_MARGIN = 0.75
"""Share of max_new_tokens that a piece's expected length may fill: estimates of how long a text lasts are rough, and a
converted clip may come out longer than its source."""

LEAST_PART = 5.0
"""Seconds of speech: a lower max_new_tokens cuts the answer off, with a warning, rather than the text into crumbs."""


def synthesis(
    runtime: Runtime,
    text: str,
    voice: Voice | AudioSource,
    overrides: SamplingOverrides,
    progress: ProgressCallback | None,
    concurrency: int,
) -> ResultStream[AudioPiece, Speech]:
    """The stream behind `synthesize`; refuses an unspeakable text at once."""
    check_speakable(text)
    sampling = task_sampling("tts-a", overrides)
    budget = _longest_part(sampling.max_new_tokens)

    async def parts() -> Sequence[str]:
        return split_text(text, budget)

    async def prompt(part: str, speaker: Voice) -> tuple[list[int], SamplingParams]:
        return tts_prompt(runtime.space, part, speaker), sampling

    call = runtime.begin("tts-a", overrides, progress)
    if runtime.domain is not None and (warning := runtime.domain.warning(text)) is not None:
        call.remarks.append(warning)
    return _speak(runtime, call, "tts-a", voice, parts, lambda part: part, prompt, concurrency)


def conversion(
    runtime: Runtime,
    audio: AudioSource,
    voice: Voice | AudioSource,
    channel: Channel,
    overrides: SamplingOverrides,
    progress: ProgressCallback | None,
    concurrency: int,
) -> ResultStream[AudioPiece, Speech]:
    """The stream behind `convert`. A source is cut when it is longer than a prompt, or than the answer may be."""
    call = runtime.begin("vc", overrides, progress)
    longest = LONGEST_CLIP
    limit = overrides.get("max_new_tokens")
    if limit is not None:
        longest = min(longest, _longest_part(limit))

    async def parts() -> Sequence[tuple[float, Waveform]]:
        call.tell("encode")
        source = await runtime.in_codec(lambda: load_audio(audio, channel=channel))
        slices = cut_at_silences(source.pcm, longest)
        return [(part.start / source.sample_rate, Waveform(source.pcm[part], source.sample_rate)) for part in slices]

    def name(part: tuple[float, Waveform]) -> str:
        start, clip = part
        return f"{start:.2f}-{start + clip.duration:.2f} s"

    async def prompt(part: tuple[float, Waveform], speaker: Voice) -> tuple[list[int], SamplingParams]:
        tokens = await runtime.encode(call, part[1], "semantic")
        sampling = task_sampling("vc", overrides, source_tokens=len(tokens.semantic))
        return vc_prompt(runtime.space, tokens.semantic, speaker), sampling

    return _speak(runtime, call, "vc", voice, parts, name, prompt, concurrency)


def _longest_part(max_new_tokens: int) -> float:
    """Seconds of speech that one answer is expected to hold."""
    return max(ANSWER_MARGIN * max_new_tokens / SEMANTIC_RATE, LEAST_PART)


def _speak(
    runtime: Runtime,
    call: Call,
    task: Task,
    voice: Voice | AudioSource,
    parts: Callable[[], Awaitable[Sequence[PartT]]],
    name: Callable[[PartT], str],
    prompt: Callable[[PartT, Voice], Awaitable[tuple[list[int], SamplingParams]]],
    concurrency: int,
) -> ResultStream[AudioPiece, Speech]:
    done: list[AudioPiece] = []
    speakers: list[Voice] = []

    async def work(index: int, part: PartT, emit: Callable[[AudioPiece], None]) -> None:
        source, speaker = name(part), speakers[0]
        ids: list[int] = []
        prompt_ids, sampling = await prompt(part, speaker)
        await runtime.generate(call, index, source, task, prompt_ids, sampling, ids.extend)
        semantic = runtime.space.semantic.codes(ids)
        if not len(semantic):
            call.notes[index] = f"the model generated no speech for {shorten(source)}"
            return
        decoded = await runtime.decode(call, semantic, speaker)
        emit(AudioPiece(index, source, Waveform(remove_dc(decoded.pcm), decoded.sample_rate), semantic))

    async def pieces() -> AsyncGenerator[AudioPiece, None]:
        call.tell("encode")
        speakers.append(await runtime.speaker(call, voice))
        sources = await parts()
        call.pieces = len(sources)
        async with aclosing(in_order(sources, work, concurrency)) as finished:
            async for _, piece in finished:
                done.append(piece)
                yield piece
        call.finished = time.perf_counter()
        if not done:
            raise RequestError(
                f"no speech tokens were generated (the model ended its answer at once, seed {call.seed}); "
                f"try another seed, a higher temperature or min_new_tokens"
            )

    def result() -> Speech:
        waveform = Waveform(np.concatenate([piece.waveform.pcm for piece in done]), done[0].waveform.sample_rate)
        semantic = np.concatenate([piece.semantic for piece in done])
        return Speech(waveform, semantic, speakers[0], call.seed, call.piece_reports, call.warnings, call.timings)

    return ResultStream(pieces(), result)
