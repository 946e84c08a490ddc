"""The cases that come with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from gpa_codecs.audio import load_audio
from gpa_codecs.codec import AudioTokens, Voice
from gpa_codecs.errors import GpaError
from gpa_codecs.prompts import stt_prompt, vc_prompt
from gpa_codecs.torch_codec import TorchCodec
from gpa_codecs.vocabulary import TokenSpace
from gpa_conformance.cases import CLIPS, FAMILIES, Case, clip_file, load_cases, select
from gpa_conformance.prompts import ClipCodes, Prompt, build_prompt, spread_ids
from gpa_engines.engine import SamplingParams

ASCEND = [
    "Hello, how are you doing today?",
    "The capital of France is Paris.",
    "Once upon a time in a land far away,",
    "Artificial intelligence is the future of",
    "The speed of light in vacuum is approx",
    "Machine learning models can be used for",
    "In recent years, deep learning has",
    "The most important thing in science is",
]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return load_cases()


@pytest.fixture(scope="module")
def space(tiny_checkpoint: Path) -> TokenSpace:
    return TokenSpace.from_file(tiny_checkpoint / "tokenizer.json")


@pytest.fixture(scope="module")
def prompts(tiny_checkpoint: Path, space: TokenSpace, cases: list[Case]) -> dict[str, Prompt]:
    """Every prompt, with codes of the tiny checkpoint's own codec."""
    codec = TorchCodec(tiny_checkpoint / "BiCodec", tiny_checkpoint / "glm-4-voice-tokenizer")
    codes = {name: ClipCodes(codec.encode(clip_file(name)), codec.voice(clip_file(name))) for name in CLIPS}
    return {
        case.id: build_prompt(case.prompt, space, codes.__getitem__, cases) for case in cases if case.prompt is not None
    }


def test_every_family_has_cases_and_every_case_says_why(cases: list[Case]) -> None:
    assert [family for family in FAMILIES if not any(case.family == family for case in cases)] == []
    assert len({case.id for case in cases}) == len(cases)
    for case in cases:
        assert case.id == f"{case.family}/{case.id.partition('/')[2]}"
        assert len(case.explanation.split()) > 5, case.id


def test_they_come_by_family_and_by_number(cases: list[Case]) -> None:
    order = [FAMILIES.index(case.family) for case in cases]
    assert order == sorted(order)
    ascend = [case.id for case in cases if "ascend" in case.spec]
    assert ascend == [f"logits/ascend-{n}" for n in range(1, 9)]


def test_the_eight_prompts_of_the_ascend_report(cases: list[Case]) -> None:
    found = {case.spec["ascend"]: case.prompt for case in cases if "ascend" in case.spec}
    assert [found[n] for n in sorted(found)] == [{"text": text} for text in ASCEND]


def test_at_least_300_positions_are_scored_in_full_prompts(cases: list[Case], prompts: dict[str, Prompt]) -> None:
    counts = {case.id: len(prompts[case.id].ids) for case in cases if case.family == "logits" and case.prompt}
    assert sum(counts.values()) >= 300
    text = sum(count for name, count in counts.items() if prompts[name].task == "text")
    assert text >= 300  # without a codec, too


def test_chinese_and_each_task_with_several_clips(cases: list[Case]) -> None:
    wanted = [case.prompt for case in cases if case.family == "logits" and case.prompt]
    chinese = [each for each in wanted if any("\u4e00" <= letter <= "\u9fff" for letter in each.get("text", ""))]
    assert len(chinese) >= 4
    for task, least in (("stt", 3), ("tts-a", 3), ("vc", 3)):
        assert len({str(each) for each in wanted if each.get("task") == task}) >= least, task
    assert len({each["clip"] for each in wanted if each.get("task") == "stt"}) >= 3


def test_a_prompt_goes_beyond_4096_positions(cases: list[Case], prompts: dict[str, Prompt]) -> None:
    assert max(len(prompts[case.id].ids) for case in cases if case.family == "long") > 4096


def test_every_prompt_is_valid_for_the_vocabulary(prompts: dict[str, Prompt], space: TokenSpace) -> None:
    for name, prompt in prompts.items():
        assert prompt.ids, name
        assert min(prompt.ids) >= 0, name
        assert max(prompt.ids) < space.vocab_size, name
        assert prompt.stop_ids, name


def test_a_task_restricts_the_answer_and_text_does_not(prompts: dict[str, Prompt], space: TokenSpace) -> None:
    assert prompts["logits/ascend-1"].candidates() is None
    spoken = prompts["logits/tts-english"].candidates()
    assert spoken is not None
    assert set(spoken.tolist()) == {*space.semantic.range, space.control.im_end}
    written = prompts["logits/stt-speech"].candidates()
    assert written is not None
    assert space.control.end_content in written


def test_a_prompt_may_be_that_of_another_case(prompts: dict[str, Prompt]) -> None:
    assert prompts["generate/tts"] == prompts["logits/tts-english"]


def test_sampling_options_are_fields_of_sampling_params(cases: list[Case]) -> None:
    for case in cases:
        SamplingParams(**case.spec.get("sampling", {}))


def test_greedy_cases_ask_for_nothing_that_a_margin_does_not_know(cases: list[Case]) -> None:
    for case in cases:
        if case.kind == "greedy":
            assert set(case.spec["sampling"]) <= {"repetition_penalty"}, case.id


@pytest.mark.parametrize("name", CLIPS)
def test_clips_are_there_at_16_khz_mono(name: str) -> None:
    info = soundfile.info(clip_file(name))
    assert (info.samplerate, info.channels) == (16000, 1)
    assert 0.1 <= info.duration <= 5


@pytest.mark.parametrize(("name", "original"), [("voice", "en_female_16k.wav"), ("speech", "en_male_16k.wav")])
def test_clips_of_the_reference_are_as_recorded(name: str, original: str, audio_dir: Path) -> None:
    assert np.array_equal(load_audio(clip_file(name)).pcm, load_audio(audio_dir / original).pcm)


def test_an_unknown_clip_is_refused() -> None:
    with pytest.raises(GpaError, match="no clip 'song'; the suite has voice"):
        clip_file("song")


def test_selecting(cases: list[Case]) -> None:
    assert select(cases, None) == cases
    assert select(cases, "all") == cases
    assert {case.family for case in select(cases, "logits, cache")} == {"logits", "cache"}
    chosen = select(cases, "contract/cancel,logits")
    assert [case.id for case in chosen if case.family == "contract"] == ["contract/cancel"]
    assert chosen[0].family == "logits"  # the order of the cases, not of the words


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("speed", "'speed'; families: logits, cache"),
        ("logits/ascend-9", "cases of logits: logits/ascend-1"),
        ("speed/fast", "families: logits"),
        ("logits,,nope", "'nope'"),
        ("", "selects nothing"),
        (" , ", "selects nothing"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(cases: list[Case], selection: str, message: str) -> None:
    with pytest.raises(GpaError) as raised:
        select(cases, selection)
    assert message in str(raised.value)


def test_the_digest_is_that_of_the_definition() -> None:
    one = Case("logits/a", "logits", "title", "why", {"kind": "prefill", "prompt": {"text": "a"}})
    reworded = Case("logits/a", "logits", "another title", "another why", one.spec)
    changed = Case("logits/a", "logits", "title", "why", {"kind": "prefill", "prompt": {"text": "b"}})
    assert one.digest == reworded.digest
    assert one.digest != changed.digest


@pytest.mark.parametrize("vocab_size", [2, 7, 5141, 180_445])
def test_spread_ids_reach_all_of_any_vocabulary(vocab_size: int) -> None:
    ids = spread_ids(64, 11, vocab_size)
    assert min(ids) >= 0
    assert max(ids) < vocab_size
    assert len(set(ids)) >= min(60, vocab_size)
    tenths = {10 * each // vocab_size for each in ids}
    assert len(tenths) == min(10, vocab_size)
    assert ids == spread_ids(64, 11, vocab_size)
    assert ids != spread_ids(64, 12, vocab_size)


def test_spread_ids_are_these() -> None:
    """Recorded: baselines of other machines hold them."""
    assert spread_ids(5, 17, 180_445) == spread_ids(4160, 17, 180_445)[:5]
    assert spread_ids(5, 17, 180_445) == [98156, 29232, 140753, 71829, 2905]


def test_an_unknown_prompt_is_a_defect(space: TokenSpace) -> None:
    def no_clip(name: str) -> ClipCodes:
        raise AssertionError(name)

    with pytest.raises(ValueError, match="none of those"):
        build_prompt({"task": "sing"}, space, no_clip)


def test_codes_of_a_clip_become_the_tasks_prompt(space: TokenSpace) -> None:
    tokens = AudioTokens(np.arange(5), np.arange(3), duration=0.1)
    codes = ClipCodes(tokens, Voice(tuple(range(32))))
    built = build_prompt({"task": "stt", "clip": "any"}, space, lambda name: codes)
    assert list(built.ids) == stt_prompt(space, tokens)
    built = build_prompt({"task": "vc", "clip": "any", "voice": "other"}, space, lambda name: codes)
    assert list(built.ids) == vc_prompt(space, tokens.semantic, codes.voice)
