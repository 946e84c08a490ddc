"""The family "speech": a right model passes by words and voice, and each planted fault fails for its reason."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from demo_training.corpus import UNSEEN_VOICES, VOICES
from demo_training.domain import narrating, write_digit_domain
from gpa_conformance.baseline import Baseline, write_baseline
from gpa_conformance.cases import load_cases, select
from gpa_conformance.limits import load_limits
from gpa_conformance.report import html, markdown, matrix, speech
from gpa_conformance.results import CaseResult, RunReport
from gpa_conformance.runner import run_cases
from gpa_conformance.session import Setup
from gpa_conformance.speech import material as speech_material
from gpa_conformance.speech.material import NO_DOMAIN, choose
from gpa_conformance.target import Target
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.checkpoint.speech_domain import SpeechDomain
from gpa_engines.checkpoint.speech_domain_writing import Speak
from tests.conformance.spoken_words import WordCodec, WordEngine

UTTERANCES = 8
ALL = "speech"
GREEDY = "speech/stt,speech/tts,speech/vc"


@pytest.fixture(scope="session")
def speak() -> Speak:
    pytest.importorskip("espeakng_loader", reason="speech is synthesised with espeak-ng: pip install espeakng-loader")
    return narrating((*VOICES, UNSEEN))


UNSEEN = UNSEEN_VOICES[0]


@dataclass(frozen=True, slots=True)
class Studio:
    """A checkpoint with a domain, whose codec and engine speak words."""

    checkpoint: Checkpoint
    domain: SpeechDomain
    baseline: Baseline
    speak: Speak

    def run(
        self, engine: str, cases: str = ALL, *, dtype: str = "float32", codec: Any = None, **changes: Any
    ) -> RunReport:
        setup = Setup(
            target=Target(
                "factory", f"tests.conformance.spoken_words:{engine}", self.checkpoint.root, {"dtype": dtype}
            ),
            baseline=self.baseline,
            limits=load_limits(),
            cases={case.id: case for case in load_cases()},
            space=self.checkpoint.token_space(),
            make_codec=codec or (lambda: WordCodec(self.domain, self.speak)),
            isolate=False,
            domain=self.domain,
            utterances=UTTERANCES,
        )
        return asyncio.run(run_cases(replace(setup, **changes), self.checkpoint, select(load_cases(), cases)))


@pytest.fixture(scope="module")
def studio(speak: Speak, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("spoken") / "checkpoint"))
    domain = write_digit_domain(folder, speak, UTTERANCES, unseen=(UNSEEN,))
    checkpoint = Checkpoint.open(folder)
    cases = select(load_cases(), "speech")
    baseline = asyncio.run(
        write_baseline(
            checkpoint,
            folder.parent / "baseline",
            WordEngine(folder),
            lambda: WordCodec(domain, speak),
            cases,
            utterances=UTTERANCES,
        )
    )
    return Studio(checkpoint, domain, baseline, speak)


@pytest.fixture
def without_recogniser(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(speech_material, "find_recogniser", lambda words, language: (None, "no recogniser here"))
    return "no recogniser here"


@pytest.fixture(scope="module")
def healthy(studio: Studio) -> RunReport:
    """A right engine's report, judged by pocketsphinx too."""
    pytest.importorskip("pocketsphinx", reason="the independent recogniser is pocketsphinx")
    return studio.run("WordEngine")


def result(report: RunReport, case: str) -> CaseResult:
    return next(each for each in report.cases if each.case == case)


def figures(report: RunReport, case: str) -> dict[str, dict[str, Any]]:
    return {row["figure"]: row for row in result(report, case).tables["speech"]}


def failed(report: RunReport) -> dict[str, set[str]]:
    """Failed checks by case."""
    return {case.case: {check.metric for check in case.failed_checks} for case in report.cases if case.failed}


def test_a_right_engine_passes(healthy: RunReport) -> None:
    assert {case.case: case.reason for case in healthy.cases if not case.succeeded} == {}
    assert len(healthy.cases) == 6
    assert healthy.model["speech"].startswith("10 of 10 held-out utterances, 10 words of 'en'; pocketsphinx")


def test_what_it_measures_is_told_with_the_recordings_figures(healthy: RunReport) -> None:
    assert figures(healthy, "speech/stt")["words wrong"]["value"] == 0
    assert figures(healthy, "speech/stt")["words wrong"]["high"] > 0.05
    for case in ("speech/tts", "speech/vc", "speech/tts-sampled", "speech/vc-sampled"):
        found = figures(healthy, case)
        heard = next(row for name, row in found.items() if name.startswith("words wrong, by pocketsphinx"))
        assert heard["value"] < 0.3
        assert heard["natural"] < 0.3, "the recogniser's own error"
        assert found["words wrong, by the engine itself"]["value"] == 0
        assert found["pitch within 10 % of the voice"]["value"] == 1
        assert found["pitch within 10 % of the voice"]["natural"] == 1
        assert found["seconds per word"]["value"] == pytest.approx(found["seconds per word"]["natural"], rel=0.2)
    assert figures(healthy, "speech/tts")["answers equal to the baseline's"]["value"] == 1
    assert "answers equal to the baseline's" not in figures(healthy, "speech/tts-sampled")


def test_voices_are_told_one_by_one_and_unknown_ones_have_no_limit(healthy: RunReport) -> None:
    rows = {row["voice"]: row for row in result(healthy, "speech/tts").tables["speech_voices"]}
    assert list(rows) == ["denis", "m1", "f1", "f2", "m3, not trained on"]
    assert {name: round(row["f0"] / 10) for name, row in rows.items()} == {
        "denis": 10,
        "m1": 15,
        "f1": 20,
        "f2": 25,
        "m3, not trained on": 12,
    }
    converted = [row["voice"] for row in result(healthy, "speech/vc").tables["speech_voices"]]
    assert any(name.endswith("from voices not trained on") for name in converted)
    assert result(healthy, "speech/tts").metrics["f0_share"] == 1


def test_every_form_of_the_report_shows_words(healthy: RunReport, tmp_path: Path) -> None:
    healthy.to_json(tmp_path / "report.json")
    read = RunReport.from_json(tmp_path / "report.json")
    assert speech.rows(read) == speech.rows(healthy)
    for document in (markdown.render(read), html.render(read), markdown_of_two(read)):
        assert "words wrong" in document
        assert "0.0 % (0.0 to" in document
    assert "speech/tts: pitch" in markdown_of_two(read)
    assert "words of &#39;en&#39;" in markdown.render(read) or "words of 'en'" in markdown.render(read)


def markdown_of_two(report: RunReport) -> str:
    other = replace(report, engine=dict(report.engine) | {"dtype": "q4_k_m"})
    return matrix.markdown([report, other])


@pytest.mark.usefixtures("without_recogniser")
@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        # The engine's own ear is wrong: what it hears of its right speech is as wrong as of the recordings.
        ("Misreader", {"speech/stt": {"stt_wer_low", "baseline_wer_excess_low"}}),
        (
            "Misspeaker",
            {
                "speech/tts": {"own_wer_excess_low", "baseline_wer_excess_low"},
                "speech/vc": {"own_wer_excess_low", "baseline_wer_excess_low"},
                "speech/tts-sampled": {"own_wer_excess_low"},
                "speech/vc-sampled": {"own_wer_excess_low"},
            },
        ),
        ("Unsampled", {"speech/tts-sampled": {"own_wer_excess_low"}, "speech/vc-sampled": {"own_wer_excess_low"}}),
    ],
)
def test_one_wrong_word_is_caught(studio: Studio, engine: str, expected: dict[str, set[str]]) -> None:
    report = studio.run(engine)
    assert failed(report) == expected
    assert report.exit_code == 1
    for case in expected:
        assert "8 utterances are not right, first " in result(report, case).reason
        assert result(report, case).tables["speech_wrong"]


def test_the_recogniser_catches_what_the_engine_does_not_hear(studio: Studio) -> None:
    """Both mouth and ear are wrong in the same way: only an independent listener can tell."""
    pytest.importorskip("pocketsphinx")
    report = studio.run("Misspeaker", "speech/tts")
    assert "recogniser_wer_excess_low" in failed(report)["speech/tts"]
    assert "heard by recogniser" in result(report, "speech/tts").reason


@pytest.mark.usefixtures("without_recogniser")
def test_another_speakers_voice_is_caught(studio: Studio) -> None:
    report = studio.run("WordEngine", codec=lambda: WordCodec(studio.domain, studio.speak, foreign_voice=True))
    assert failed(report) == {
        case: {"f0_share_high"} for case in ("speech/tts", "speech/tts-sampled", "speech/vc", "speech/vc-sampled")
    }
    assert result(report, "speech/tts").metrics["f0_share"] == 0


@pytest.mark.usefixtures("without_recogniser")
def test_answers_that_depend_on_the_neighbours_are_caught(studio: Studio) -> None:
    report = studio.run("Distracted", "speech/concurrent")
    reason = result(report, "speech/concurrent").reason
    assert failed(report) == {"speech/concurrent": {"differing_answers"}}
    assert result(report, "speech/concurrent").metrics["answers"] == 30
    assert "stt 1, '" in reason
    assert "as alone" in reason


@pytest.mark.usefixtures("without_recogniser")
def test_what_an_engine_did_not_answer_is_asked_again(studio: Studio) -> None:
    report = studio.run("Stumbler", "speech/tts,speech/vc")
    assert result(report, "speech/tts").status == "error"
    assert "stumbled" in result(report, "speech/tts").reason
    heard = figures(report, "speech/vc")["words wrong, by the engine itself"]
    assert (heard["value"], heard["natural"]) == (0, 0)


@pytest.mark.usefixtures("without_recogniser")
def test_silence_counts_every_word_as_wrong(studio: Studio) -> None:
    report = studio.run("Silent", "speech/tts")
    found = result(report, "speech/tts")
    assert found.status == "failed"
    assert found.metrics["own_wer"] == 1
    assert "10 of 10 answers hold no speech" in found.reason
    assert failed(report)["speech/tts"] >= {"f0_share_high", "duration_off", "own_wer_excess_low"}


@pytest.mark.usefixtures("without_recogniser")
def test_stuttering_is_wrong_in_words_and_in_pace(studio: Studio) -> None:
    report = studio.run("Stutterer", "speech/tts")
    assert failed(report)["speech/tts"] >= {"duration_off", "own_wer_excess_low"}
    assert result(report, "speech/tts").metrics["own_wer"] == 1  # as many words too many


@pytest.mark.usefixtures("without_recogniser")
def test_answers_of_other_ids_are_no_speech(studio: Studio) -> None:
    report = studio.run("Foreigner", "speech/tts,speech/stt")
    assert result(report, "speech/stt").status == "passed"
    assert "10 of 10 answers hold no speech" in result(report, "speech/tts").reason


def test_without_a_recogniser_the_engines_own_ear_remains(studio: Studio, without_recogniser: str) -> None:
    report = studio.run("WordEngine", GREEDY)
    assert report.failed == 0
    assert report.passed == 3
    for case in report.cases:
        assert without_recogniser in case.reason
    assert "words wrong, by the engine itself" in figures(report, "speech/tts")
    assert not [name for name in figures(report, "speech/tts") if "pocketsphinx" in name]
    assert without_recogniser in report.model["speech"]


@pytest.mark.usefixtures("without_recogniser")
def test_a_coarse_dtype_has_more_room_and_the_report_says_so(studio: Studio) -> None:
    limits = {}
    for dtype in ("float32", "q4_k_m"):
        report = studio.run("WordEngine", "speech/stt", dtype=dtype)
        check = next(check for check in result(report, "speech/stt").checks if check.metric == "stt_wer_low")
        limits[dtype] = check.limit
        assert dtype in check.source
    assert limits["q4_k_m"] > limits["float32"] >= 0.015


@pytest.mark.usefixtures("without_recogniser")
def test_a_bad_checkpoint_is_told_from_a_bad_engine(studio: Studio, tmp_path: Path) -> None:
    """An engine that answers as the baseline does fails the limits of the words all the same, and it is said why."""
    from tests.conformance.spoken_words import Misreader

    baseline = asyncio.run(
        write_baseline(
            studio.checkpoint,
            tmp_path / "bad",
            Misreader(studio.checkpoint.root),
            lambda: WordCodec(studio.domain, studio.speak),
            select(load_cases(), "speech/stt"),
            utterances=UTTERANCES,
        )
    )
    report = studio.run("Misreader", "speech/stt", baseline=baseline)
    assert failed(report) == {"speech/stt": {"stt_wer_low"}}
    assert "the checkpoint cannot do it, not the engine" in result(report, "speech/stt").reason


@pytest.mark.usefixtures("without_recogniser")
def test_a_baseline_without_the_utterances_is_no_obstacle(studio: Studio, text_baseline: Baseline) -> None:
    report = studio.run("WordEngine", "speech/stt", baseline=text_baseline)
    assert report.exit_code == 0
    assert "the baseline has no answers of these utterances" in result(report, "speech/stt").reason


def test_a_random_checkpoint_is_no_speaker(studio: Studio, tmp_path: Path) -> None:
    """By the command line, with the checkpoint's own engine in a process of its own, and its codec in torch."""
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "gpa_conformance.cli", "run", "--model", str(studio.checkpoint.root)]
    command += ["--backend", "torch", "--dtype", "float32", "--threads", "1", "--cases", "speech/stt,speech/vc"]
    command += ["--utterances", "2", "--json", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    report = RunReport.from_json(tmp_path / "report.json")
    assert failed(report).keys() == {"speech/stt", "speech/vc"}
    assert "stt_wer_low" in failed(report)["speech/stt"]
    assert failed(report)["speech/vc"] & {"f0_share_high", "duration_off"}
    assert figures(report, "speech/vc")["answers equal to the baseline's"]["value"] == 1
    assert "the checkpoint cannot do it, not the engine" in result(report, "speech/stt").reason
    assert "words wrong" in done.stdout
    assert "3 of 10 held-out utterances" in done.stdout


def test_without_a_domain_every_case_is_skipped(studio: Studio) -> None:
    report = studio.run("WordEngine", domain=None)
    assert {case.status for case in report.cases} == {"skipped"}
    assert {case.reason for case in report.cases} == {NO_DOMAIN}


def test_without_a_codec_every_case_is_skipped(studio: Studio) -> None:
    report = studio.run("WordEngine", GREEDY, make_codec=None, no_codec="no codec in this test")
    assert {(case.status, case.reason) for case in report.cases} == {("skipped", "no codec in this test")}


def test_without_a_trained_voice_every_case_is_skipped(studio: Studio) -> None:
    strangers = tuple(replace(voice, trained=False) for voice in studio.domain.voices)
    report = studio.run("WordEngine", GREEDY, domain=replace(studio.domain, voices=strangers))
    assert {case.status for case in report.cases} == {"skipped"}
    assert "no held-out utterance of a trained voice" in report.cases[0].reason


def test_a_damaged_clip_is_an_error_of_the_case(studio: Studio, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(studio.checkpoint.root, tmp_path / "damaged"))
    clip = SpeechDomain.open(folder).utterances[0].clip
    (folder / clip.path).write_bytes(b"no audio")
    report = studio.run("WordEngine", "speech/stt", domain=SpeechDomain.open(folder))
    assert result(report, "speech/stt").status == "error"
    assert "it is damaged, or of another checkpoint" in result(report, "speech/stt").reason


def test_a_baseline_of_a_checkpoint_without_a_domain_leaves_the_family_out(text_baseline: Baseline) -> None:
    assert text_baseline.document["omitted"]["speech/tts"] == NO_DOMAIN


def test_the_baseline_holds_the_answers(studio: Studio) -> None:
    cases = {case.id: case for case in load_cases()}
    answered = studio.baseline.spoken(cases["speech/stt"])
    space = studio.checkpoint.token_space()
    for utterance in studio.domain.utterances:
        assert space.decode_text(answered[utterance.clip.path]) == utterance.text
    assert studio.baseline.spoken(cases["speech/tts-sampled"]) == {}
    assert studio.baseline.document["omitted"] == {}


def test_a_smaller_run_is_the_start_of_a_larger(studio: Studio) -> None:
    everything = choose(studio.domain, 100)
    assert len(everything) == 10
    some = choose(studio.domain, 4)
    assert [item.source.name for item in some] == ["denis", "m1", "f1", "f2", "m3"]
    assert set(some) <= set(everything)
    for item in everything:
        assert item.target.trained
        assert item.target != item.source


def test_clips_have_the_pitch_of_their_voice(studio: Studio) -> None:
    from gpa_codecs.audio import load_audio
    from gpa_conformance.speech.pitch import median_f0

    for utterance in studio.domain.utterances:
        found = median_f0(load_audio(studio.domain.clip_file(utterance.clip)).pcm)
        assert found == pytest.approx(studio.domain.voice(utterance.voice).f0, rel=0.02), utterance


def test_the_recogniser_hears_the_recordings_in_any_order(studio: Studio) -> None:
    pytest.importorskip("pocketsphinx")
    from gpa_codecs.audio import load_audio
    from gpa_conformance.speech.recogniser import find_recogniser

    clips = [load_audio(studio.domain.clip_file(each.clip)).pcm for each in studio.domain.utterances[:4]]
    first, again = (find_recogniser(studio.domain.words, "en")[0] for _ in range(2))
    assert first is not None
    assert again is not None
    heard = [first.hear(clip) for clip in clips]
    assert [again.hear(clip) for clip in clips[::-1]] == heard[::-1]
    assert first.hear(clips[0] * 0) == ()
