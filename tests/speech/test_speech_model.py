"""The three tasks on a real engine: exact, repeatable, the same as a stream, and nothing lost in silence."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.audio import Waveform, load_audio
from gpa_codecs.codec import Voice
from gpa_codecs.errors import AudioError, BackendError, CheckpointError, GpaError, RequestError, TokenError
from gpa_codecs.prompts import task_tokens, tts_prompt
from gpa_engines.engine import EngineInfo, GenerationRequest, GenerationUsage, SamplingParams, TokenDelta
from gpa_engines.speech import AsyncSpeechModel, Progress, SpeechModel, task_sampling

VOICE = Voice(tuple(range(0, 4096, 128)))
LONG_TEXT = (
    "The first sentence is here. The second one follows it at once! "
    "Does a third one come? It does, and with it the text ends."
)


def ids_of(model: AsyncSpeechModel, request: GenerationRequest) -> list[int]:
    async def run() -> list[int]:
        return [token async for delta in model.engine.generate(request) for token in delta.ids]

    return asyncio.run(run())


def test_speech_is_the_codec_of_what_the_engine_generates(tiny_checkpoint: Path) -> None:
    async def run() -> None:
        model = await AsyncSpeechModel.load(tiny_checkpoint, dtype="float32")
        speech = await model.synthesize("Hello world.", VOICE, seed=7, max_new_tokens=40)
        stop_ids, allowed = task_tokens(model.space, "tts-a")
        sampling = task_sampling("tts-a", {"seed": 7, "max_new_tokens": 40})
        request = GenerationRequest(tuple(tts_prompt(model.space, "Hello world.", VOICE)), sampling, stop_ids, allowed)
        ids = [token async for delta in model.engine.generate(request) for token in delta.ids]
        assert list(speech.semantic) == list(model.space.semantic.codes(ids))
        raw = model.codec.decode(speech.semantic, VOICE).pcm
        np.testing.assert_allclose(speech.waveform.pcm, raw - raw.mean(), atol=1e-6)
        assert len(speech.waveform.pcm) == 320 * len(ids)
        assert (speech.new_tokens, speech.seed) == (len(ids), 7)
        await model.close()

    asyncio.run(run())


def test_the_reference_settings_are_the_defaults() -> None:
    stt, tts, vc = task_sampling("stt", {}), task_sampling("tts-a", {}), task_sampling("vc", {})
    assert (stt.temperature, stt.repetition_penalty, stt.max_new_tokens) == (0.0, 1.0, 512)
    assert (tts.temperature, tts.repetition_penalty, tts.max_new_tokens) == (0.2, 1.2, 512)
    assert tts == vc


def test_converted_speech_may_be_as_long_as_its_source() -> None:
    assert task_sampling("vc", {}, source_tokens=1500).max_new_tokens == 1875
    assert task_sampling("vc", {"max_new_tokens": 64}, source_tokens=1500).max_new_tokens == 64


def test_the_same_seed_gives_the_same_speech(model: SpeechModel, audio_dir: Path) -> None:
    source = audio_dir / "short_1600.wav"
    first = model.convert(source, VOICE, seed=3, max_new_tokens=30)
    again = model.convert(source, VOICE, seed=3, max_new_tokens=30)
    other = model.convert(source, VOICE, seed=4, max_new_tokens=30)
    assert np.array_equal(first.semantic, again.semantic)
    assert np.array_equal(first.waveform.pcm, again.waveform.pcm)
    assert not np.array_equal(first.semantic, other.semantic)


def test_a_fresh_seed_is_reported_and_repeats_the_run(model: SpeechModel) -> None:
    fresh = model.synthesize("Hello.", VOICE, max_new_tokens=30, min_new_tokens=30)
    again = model.synthesize("Hello.", VOICE, max_new_tokens=30, min_new_tokens=30, seed=fresh.seed)
    assert np.array_equal(fresh.semantic, again.semantic)


def test_a_clip_serves_as_a_voice(model: SpeechModel, audio_dir: Path, goldens: dict) -> None:
    clip = audio_dir / "en_female_16k.wav"
    by_clip = model.synthesize("Hello.", clip, seed=1, max_new_tokens=20)
    by_voice = model.synthesize("Hello.", model.voice(clip), seed=1, max_new_tokens=20)
    assert by_clip.voice == by_voice.voice
    assert np.array_equal(by_clip.waveform.pcm, by_voice.waveform.pcm)


def test_long_text_is_spoken_in_pieces_and_joined(model: SpeechModel) -> None:
    whole = model.synthesize(LONG_TEXT, VOICE, seed=5, max_new_tokens=120)
    assert len(whole.pieces) > 1
    assert " ".join(piece.source for piece in whole.pieces) == LONG_TEXT
    stream = model.stream_synthesize(LONG_TEXT, VOICE, seed=5, max_new_tokens=120)
    pieces = list(stream)
    assert [piece.source for piece in pieces] == [piece.source for piece in whole.pieces]
    assert np.array_equal(np.concatenate([piece.waveform.pcm for piece in pieces]), whole.waveform.pcm)
    assert np.array_equal(stream.result.waveform.pcm, whole.waveform.pcm)
    assert whole.new_tokens == sum(piece.usage.new_tokens for piece in whole.pieces) == len(whole.semantic)


def test_running_into_the_limit_is_a_warning(model: SpeechModel) -> None:
    speech = model.synthesize("Hello world.", VOICE, seed=5, max_new_tokens=50, min_new_tokens=50)
    assert speech.pieces[0].finish_reason == "length"
    assert speech.warnings == (
        "'Hello world.' was cut off at max_new_tokens 50 before the model had finished; raise max_new_tokens",
    )


def test_a_clip_of_33_seconds_is_cut_and_joined(model: SpeechModel, audio_dir: Path) -> None:
    clip = audio_dir / "long_33s.wav"
    whole = model.transcribe(clip, max_new_tokens=24)
    assert whole.duration == pytest.approx(33.0)
    assert len(whole.pieces) == 2
    spans = [piece.source.removesuffix(" s").split("-") for piece in whole.pieces]
    assert (spans[0][0], spans[0][1], spans[1][1]) == ("0.00", spans[1][0], "33.00")
    stream = model.stream_transcribe(clip, max_new_tokens=24)
    deltas = list(stream)
    assert len(deltas) > 2
    assert "".join(delta.text for delta in deltas) == whole.text == stream.result.text
    assert {delta.piece for delta in deltas} == {0, 1}


def test_a_short_limit_cuts_the_source_of_a_conversion(model: SpeechModel, audio_dir: Path) -> None:
    clip = audio_dir / "zh_female_16k.wav"
    assert len(model.convert(clip, VOICE, seed=1).pieces) == 1
    cut = model.convert(clip, VOICE, seed=1, max_new_tokens=100)
    assert len(cut.pieces) == 2
    assert cut.pieces[-1].source.endswith(f"-{load_audio(clip).duration:.2f} s")


def test_a_transcription_holds_only_text(model: SpeechModel, audio_dir: Path) -> None:
    result = model.transcribe(audio_dir / "en_male_16k.wav", max_new_tokens=40)
    assert "<|" not in result.text
    assert result.prompt_tokens == 129
    assert result.timings.total >= result.timings.encode > 0


def test_channels_are_a_choice(model: SpeechModel, audio_dir: Path) -> None:
    clip = audio_dir / "stereo_44k1.wav"
    assert model.voice(clip) == model.voice(clip, channel=0)
    assert model.voice(clip) != model.voice(clip, channel=1)


def test_progress_is_told_in_order(model: SpeechModel) -> None:
    seen: list[Progress] = []
    speech = model.synthesize("Hello.", VOICE, seed=1, max_new_tokens=10, progress=seen.append)
    assert seen[0].stage == "encode"
    assert seen[-1].stage == "codec"
    assert seen[-1].tokens == speech.new_tokens
    counts = [progress.tokens for progress in seen]
    assert counts == sorted(counts)


def test_concurrent_calls_give_what_each_gives_alone(tiny_checkpoint: Path, audio_dir: Path) -> None:
    texts = ["One.", "Two and three.", LONG_TEXT, "Four."]

    async def run() -> None:
        model = await AsyncSpeechModel.load(tiny_checkpoint, dtype="float32")
        alone = [await model.synthesize(text, VOICE, seed=9, max_new_tokens=60) for text in texts]
        speaking = [model.synthesize(text, VOICE, seed=9, max_new_tokens=60) for text in texts]
        listening = asyncio.create_task(model.transcribe(audio_dir / "en_male_16k.wav", max_new_tokens=20))
        together = await asyncio.gather(*speaking)
        heard = await listening
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one.semantic, other.semantic)
        assert heard.text == (await model.transcribe(audio_dir / "en_male_16k.wav", max_new_tokens=20)).text
        await model.close()

    asyncio.run(run())


def test_a_stream_that_is_left_early_frees_the_engine(model: SpeechModel) -> None:
    stream = model.stream_synthesize(LONG_TEXT, VOICE, seed=5, max_new_tokens=120)
    next(iter(stream))
    stream.close()
    with pytest.raises(RuntimeError, match="not been read to its end"):
        _ = stream.result
    assert len(model.synthesize("Hello.", VOICE, seed=1, max_new_tokens=10).semantic) > 0


class SilentEngine:
    """An engine of a model that ends every answer at once."""

    info = EngineInfo("silent", "cpu", "float32", 5141, 4096, frozenset())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        yield TokenDelta((), "stop", GenerationUsage(len(request.prompt_ids), 0, 0, 0.0, 0.0, 0.0))

    async def logits(self, ids: Sequence[int]) -> np.ndarray:
        raise RequestError("this engine has no logits")

    async def close(self) -> None:
        pass


def test_a_seed_for_an_engine_that_has_none_is_a_warning(model: SpeechModel, audio_dir: Path) -> None:
    inner = model._model
    silent = AsyncSpeechModel(SilentEngine(), inner.codec, inner.space)
    clip = audio_dir / "zh_female_16k.wav"

    async def warnings(**sampling: Any) -> tuple[str, ...]:
        return (await silent.transcribe(clip, **sampling)).warnings

    assert asyncio.run(warnings(seed=3, temperature=0.5)) == (
        "silent on cpu draws without seeds: seed 3 repeats nothing",
    )
    assert asyncio.run(warnings(seed=3, temperature=0.0)) == asyncio.run(warnings(temperature=0.5)) == ()


@pytest.mark.parametrize(
    ("sampling", "warned"),
    [
        (SamplingParams(temperature=0.5, seed=0), True),
        (SamplingParams(temperature=0.5), False),
        (SamplingParams(temperature=0.0, seed=0), False),
    ],
)
def test_what_a_seed_is_worth_is_known_of_every_engine(sampling: SamplingParams, warned: bool) -> None:
    assert (SilentEngine.info.seed_warning(sampling) is not None) == warned
    assert replace(SilentEngine.info, capabilities=frozenset(("seed",))).seed_warning(sampling) is None


def test_no_speech_tokens_is_an_error_and_not_an_empty_file(model: SpeechModel) -> None:
    inner = model._model
    silent = AsyncSpeechModel(SilentEngine(), inner.codec, inner.space)
    with pytest.raises(RequestError, match=r"no speech tokens were generated .*seed 11.*min_new_tokens"):
        asyncio.run(silent.synthesize("Hello.", VOICE, seed=11))


@pytest.mark.parametrize("text", ["", "  \n", "...", "?!", "。！"])
def test_text_without_words_is_refused(model: SpeechModel, text: str) -> None:
    with pytest.raises(TokenError, match="text"):
        model.synthesize(text, VOICE)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ("missing.wav", "missing.wav"),
        (b"", "empty"),
        (b"not audio at all", "bytes"),
        (Waveform(np.zeros(399)), "399"),
        (Waveform(np.full(16000, np.nan)), "(?i)nan|finite"),
    ],
)
def test_unusable_audio_is_refused_by_every_task(model: SpeechModel, audio: object, message: str) -> None:
    for call in (
        lambda: model.transcribe(audio),  # type: ignore[arg-type]
        lambda: model.convert(audio, VOICE),  # type: ignore[arg-type]
        lambda: model.voice(audio),  # type: ignore[arg-type]
    ):
        with pytest.raises(AudioError, match=message):
            call()


def test_a_wrong_sampling_value_is_refused(model: SpeechModel) -> None:
    with pytest.raises(RequestError, match=r"top_p is 2\.0"):
        model.synthesize("Hello.", VOICE, top_p=2.0)


def test_a_wrong_backend_or_option_is_refused_before_loading(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'none'"):
        SpeechModel.load(tiny_checkpoint, backend="none")
    with pytest.raises(GpaError, match="missing"):
        SpeechModel.load(tmp_path / "missing")


def test_a_checkpoint_needs_only_what_its_tasks_read(tiny_checkpoint_copy: Path) -> None:
    shutil.rmtree(tiny_checkpoint_copy / "glm-4-voice-tokenizer")
    shutil.rmtree(tiny_checkpoint_copy / "BiCodec" / "wav2vec2-large-xlsr-53")
    with SpeechModel.load(tiny_checkpoint_copy, tasks=["tts-a"], dtype="float32") as speaker:
        clip = Path(__file__).parents[1] / "data" / "audio" / "en_female_16k.wav"
        assert speaker.synthesize("Hello.", clip, seed=1, max_new_tokens=10).duration > 0
    with pytest.raises(CheckpointError, match="wav2vec2-large-xlsr-53"):
        SpeechModel.load(tiny_checkpoint_copy, tasks=["tts-a", "vc"])


def test_a_script_that_does_not_close_its_model_ends(tiny_checkpoint: Path) -> None:
    script = (
        "import sys; from gpa_engines import SpeechModel; from gpa_codecs.codec import Voice\n"
        "model = SpeechModel.load(sys.argv[1]); voice = Voice((0,) * 32)\n"
        "stream = model.stream_synthesize('One. Two.', voice, seed=1, max_new_tokens=20); next(stream)\n"
        "print(model.synthesize('Hello.', voice, seed=1, max_new_tokens=5).duration)"
    )
    command = [sys.executable, "-c", script, str(tiny_checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert float(result.stdout) > 0
    assert result.stderr == ""


def test_closing_twice_is_harmless(tiny_checkpoint: Path) -> None:
    model = SpeechModel.load(tiny_checkpoint, dtype="float32")
    model.close()
    model.close()
    with pytest.raises(RequestError, match="the model is closed"):
        model.synthesize("Hello.", VOICE)
