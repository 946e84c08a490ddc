"""Speech to text: cut where the clip is too long, encode, continue the prompt, decode the text."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from gpa_codecs.audio import AudioSource, Channel, Waveform, load_audio
from gpa_codecs.prompts import stt_prompt
from gpa_codecs.silences import cut_at_silences
from gpa_codecs.vocabulary import TextStream
from gpa_engines.speech.results import ProgressCallback, TextDelta, Transcription
from gpa_engines.speech.runtime import Runtime
from gpa_engines.speech.stream import ResultStream, in_order
from gpa_engines.speech.tasks import LONGEST_CLIP, SamplingOverrides, task_sampling


def transcription(
    runtime: Runtime,
    audio: AudioSource,
    channel: Channel,
    overrides: SamplingOverrides,
    progress: ProgressCallback | None,
    concurrency: int,
) -> ResultStream[TextDelta, Transcription]:
    """The stream behind `transcribe`; `concurrency` parts of a long clip run side by side."""
    call = runtime.begin("stt", overrides, progress)
    sampling = task_sampling("stt", overrides)
    text = ""
    duration = 0.0

    async def work(index: int, part: Waveform, emit: Callable[[str], None]) -> None:
        start = offsets[index]
        source = f"{start:.2f}-{start + part.duration:.2f} s"
        prompt = stt_prompt(runtime.space, await runtime.encode(call, part, "semantic", "glm"))
        decoder = TextStream(runtime.space)

        def deliver(ids: Sequence[int]) -> None:
            emit(decoder.push(ids))

        await runtime.generate(call, index, source, "stt", prompt, sampling, deliver)
        emit(decoder.finish())

    offsets: list[float] = []

    async def deltas() -> AsyncGenerator[TextDelta, None]:
        nonlocal text, duration
        call.tell("encode")
        waveform = await runtime.in_codec(lambda: load_audio(audio, channel=channel))
        duration = waveform.duration
        slices = cut_at_silences(waveform.pcm, LONGEST_CLIP)
        offsets.extend(part.start / waveform.sample_rate for part in slices)
        call.pieces = len(slices)
        parts = [Waveform(waveform.pcm[part], waveform.sample_rate) for part in slices]
        spoken_by = 0
        async with aclosing(in_order(parts, work, concurrency)) as pieces:
            async for index, new in pieces:
                if not new:
                    continue
                if index != spoken_by:
                    new = text_seam(text, new) + new
                    spoken_by = index
                text += new
                yield TextDelta(index, new)
        call.finished = time.perf_counter()

    def result() -> Transcription:
        return Transcription(text, duration, call.seed, call.piece_reports, call.warnings, call.timings)

    return ResultStream(deltas(), result)


def text_seam(before: str, after: str) -> str:
    """What stands between the texts of two parts: a space, except beside Chinese, Japanese or existing white space."""
    if not before or before[-1].isspace() or after[0].isspace():
        return ""
    return "" if _is_cjk(before[-1]) and _is_cjk(after[0]) else " "


def _is_cjk(character: str) -> bool:
    return any(first <= character <= last for first, last in CJK_BLOCKS)


CJK_BLOCKS = (("\u3000", "\u30ff"), ("\u3400", "\u9fff"), ("\uf900", "\ufaff"), ("\uff00", "\uffef"))
"""Punctuation and kana, ideographs, compatibility ideographs, full-width forms (Unicode blocks)."""
