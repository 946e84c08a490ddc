"""The three tasks on the tiny checkpoint, as they are typed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from gpa_codecs.codec import Voice
from gpa_engines.checkpoint.speech_domain_writing import VoicePlan, write_speech_domain
from gpa_engines.speech import SpeechModel
from tests.cli.conftest import GpaRun, Outcome

SHORT = ("--max-new-tokens", "20", "--min-new-tokens", "20", "--seed", "7", "--dtype", "float32")
SENTENCE = "Here is a sentence that is long enough to fill a piece of its own, for it takes five seconds."
LONG_TEXT = f"{SENTENCE} {SENTENCE} {SENTENCE}"
IN_PIECES = ("--max-new-tokens", "120", "--seed", "5", "--text", LONG_TEXT)


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.status == 0, outcome.stderr
    return outcome


@pytest.fixture
def stt(tiny_checkpoint: Path, audio_dir: Path) -> tuple[str | Path, ...]:
    return "--task", "stt", "--model", tiny_checkpoint, "--src-audio", audio_dir / "en_male_16k.wav", *SHORT


@pytest.fixture
def tts(tiny_checkpoint: Path, audio_dir: Path) -> tuple[str | Path, ...]:
    return "--task", "tts-a", "--model", tiny_checkpoint, "--ref-audio", audio_dir / "en_female.flac", *SHORT


@pytest.fixture
def vc(tiny_checkpoint: Path, audio_dir: Path) -> tuple[str | Path, ...]:
    source, reference = audio_dir / "en_male.ogg", audio_dir / "en_female.flac"
    return "--task", "vc", "--model", tiny_checkpoint, "--src-audio", source, "--ref-audio", reference, *SHORT


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path):
    with SpeechModel.load(tiny_checkpoint, dtype="float32") as model:
        yield model


def samples(path: Path | str | io.BytesIO) -> np.ndarray:
    with soundfile.SoundFile(path) as file:
        assert (file.samplerate, file.channels, file.subtype) == (16000, 1, "PCM_16")
        return file.read(dtype="int16")


def test_stt_prints_the_text(gpa_run: GpaRun, stt, model: SpeechModel, audio_dir: Path) -> None:
    text = model.transcribe(audio_dir / "en_male_16k.wav", max_new_tokens=20, min_new_tokens=20).text
    outcome = succeeded(gpa_run(*stt))
    assert outcome.text == text + "\n"
    assert outcome.stderr.splitlines() == [
        "warning: '0.00-1.99 s' was cut off at max_new_tokens 20 before the model had finished; raise max_new_tokens"
    ]
    assert list(Path.cwd().iterdir()) == []


def test_stt_also_writes_the_text_where_asked(gpa_run: GpaRun, stt) -> None:
    outcome = succeeded(gpa_run(*stt, "--output", "text.txt"))
    assert Path("text.txt").read_bytes() == outcome.stdout


def test_stt_to_standard_output_is_printed_once(gpa_run: GpaRun, stt) -> None:
    assert succeeded(gpa_run(*stt, "-o", "-")).stdout == succeeded(gpa_run(*stt)).stdout


def test_tts_writes_audio_and_prints_its_path(gpa_run: GpaRun, tts, model: SpeechModel, audio_dir: Path) -> None:
    outcome = succeeded(gpa_run(*tts, "--text", "Hello world."))
    assert outcome.text == "gpa-output.wav\n"
    speech = model.synthesize(
        "Hello world.", audio_dir / "en_female.flac", max_new_tokens=20, min_new_tokens=20, seed=7
    )
    assert np.array_equal(samples("gpa-output.wav"), np.rint(speech.waveform.pcm.astype(np.float64) * 32768))
    assert len(samples("gpa-output.wav")) == 20 * 320
    assert [path.name for path in Path.cwd().iterdir()] == ["gpa-output.wav"]


def test_vc_writes_audio(gpa_run: GpaRun, vc, model: SpeechModel, audio_dir: Path) -> None:
    assert succeeded(gpa_run(*vc, "-o", "converted.wav")).text == "converted.wav\n"
    source, reference = audio_dir / "en_male.ogg", audio_dir / "en_female.flac"
    speech = model.convert(source, reference, max_new_tokens=20, min_new_tokens=20, seed=7)
    assert np.array_equal(samples("converted.wav"), np.rint(speech.waveform.pcm.astype(np.float64) * 32768))


def test_a_seed_repeats_a_run_and_another_does_not(gpa_run: GpaRun, tts) -> None:
    for name, seed in (("a.wav", "1"), ("b.wav", "1"), ("c.wav", "2")):
        succeeded(gpa_run(*tts, "--text", "Hello world.", "--seed", seed, "--temperature", "1", "-o", name))
    assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()
    assert Path("a.wav").read_bytes() != Path("c.wav").read_bytes()


def test_an_existing_file_is_replaced(gpa_run: GpaRun, tts) -> None:
    Path("out.wav").write_bytes(b"old")
    succeeded(gpa_run(*tts, "--text", "Hello world.", "-o", "out.wav"))
    assert len(samples("out.wav")) == 6400


def test_a_failed_run_keeps_an_existing_file(gpa_run: GpaRun, tts) -> None:
    Path("out.wav").write_bytes(b"old")
    for stream in ((), ("--stream",)):
        outcome = gpa_run(*tts, "--text", "Hello.", "-o", "out.wav", "--max-tokens-in-flight", "10", *stream)
        assert outcome.status == 2, outcome.stderr
        assert Path("out.wav").read_bytes() == b"old"
        assert [path.name for path in Path.cwd().iterdir()] == ["out.wav"]


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["whole", "stream"])
def test_no_speech_is_an_error_and_no_file(gpa_run: GpaRun, tts, stream: tuple[str, ...]) -> None:
    """Every id is as likely as any other at this temperature, and seed 416 draws the end first."""
    uniform = ("--temperature", "1e6", "--top-k", "0", "--repetition-penalty", "1", "--min-new-tokens", "0")
    outcome = gpa_run(*tts, "--text", "Hello.", *uniform, "--seed", "416", *stream)
    assert outcome.status == 2
    assert outcome.stdout == b""
    assert "error: no speech tokens were generated" in outcome.stderr
    assert list(Path.cwd().iterdir()) == []


def test_text_from_a_file_and_from_standard_input(gpa_run: GpaRun, tts, monkeypatch: pytest.MonkeyPatch) -> None:
    succeeded(gpa_run(*tts, "--text", "Schöne Grüße, 你好。", "-o", "argument.wav"))
    Path("text.txt").write_text("Schöne Grüße, 你好。", encoding="utf-8-sig")
    succeeded(gpa_run(*tts, "--text-file", "text.txt", "-o", "file.wav"))
    for name, source in (("text", ("--text", "-")), ("text-file", ("--text-file", "-")), ("bare", ("-",))):
        stdin = io.TextIOWrapper(io.BytesIO("Schöne Grüße, 你好。".encode()))
        monkeypatch.setattr("sys.stdin", stdin)
        succeeded(gpa_run(*tts, *source, "-o", f"{name}.wav"))
    first, *others = (path.read_bytes() for path in Path.cwd().glob("*.wav"))
    assert len(others) == 4
    assert all(other == first for other in others)


def test_audio_to_and_from_pipes(gpa_run: GpaRun, stt, tts, monkeypatch: pytest.MonkeyPatch, audio_dir: Path) -> None:
    succeeded(gpa_run(*tts, "--text", "Hello.", "-o", "file.wav"))
    piped = succeeded(gpa_run(*tts, "--text", "Hello.", "-o", "-"))
    assert piped.stdout == Path("file.wav").read_bytes()
    clip = (audio_dir / "en_male_16k.wav").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(clip)))
    assert gpa_run(*stt, "--src-audio", "-").stdout == gpa_run(*stt).stdout


def test_a_kept_voice_speaks_like_its_clip(gpa_run: GpaRun, tts, tiny_checkpoint: Path, audio_dir: Path) -> None:
    clip = audio_dir / "en_female.flac"
    outcome = succeeded(gpa_run("--ref-audio", clip, "--save-voice", "ann.json", "--model", tiny_checkpoint))
    assert outcome.text == "ann.json\n"
    assert Voice.load("ann.json").origin == "en_female.flac"
    succeeded(gpa_run(*tts, "--text", "Hello.", "-o", "clip.wav", "--save-voice", "again.json"))
    assert Path("again.json").read_bytes() == Path("ann.json").read_bytes()
    by_voice = [argument for argument in tts if argument not in ("--ref-audio", clip)]
    succeeded(gpa_run(*by_voice, "--voice", "ann.json", "--text", "Hello.", "-o", "voice.wav"))
    assert Path("voice.wav").read_bytes() == Path("clip.wav").read_bytes()


def test_a_channel_is_chosen_for_every_clip(gpa_run: GpaRun, tiny_checkpoint: Path, audio_dir: Path) -> None:
    clip = audio_dir / "stereo_44k1.wav"
    for channel in ("first", "0", "1", "mean"):
        keep = ("--save-voice", f"{channel}.json", "--model", tiny_checkpoint, "--channel", channel)
        succeeded(gpa_run("--ref-audio", clip, *keep))
    voices = {channel: Voice.load(f"{channel}.json").codes for channel in ("first", "0", "1", "mean")}
    assert voices["first"] == voices["0"]
    assert len({voices["first"], voices["1"], voices["mean"]}) > 1


def test_what_was_split_is_said(gpa_run: GpaRun, tts) -> None:
    outcome = succeeded(gpa_run(*tts, *IN_PIECES, "--min-new-tokens", "0", "--json"))
    pieces = json.loads(outcome.stdout)["pieces"]
    assert " ".join(piece["source"] for piece in pieces) == LONG_TEXT
    assert f"note: the text was split into {len(pieces)} pieces\n" in outcome.stderr


@pytest.mark.parametrize("task", ["tts", "vc"])
def test_streamed_audio_is_the_whole(gpa_run: GpaRun, tts, vc, task: str) -> None:
    arguments = (*tts, *IN_PIECES) if task == "tts" else (*vc, "--max-new-tokens", "60")
    arguments = (*arguments, "--min-new-tokens", "0")
    succeeded(gpa_run(*arguments, "-o", "whole.wav"))
    assert succeeded(gpa_run(*arguments, "-o", "streamed.wav", "--stream")).text == "streamed.wav\n"
    assert Path("streamed.wav").read_bytes() == Path("whole.wav").read_bytes()
    piped = succeeded(gpa_run(*arguments, "-o", "-", "--stream"))
    assert np.array_equal(samples(io.BytesIO(piped.stdout)), samples("whole.wav"))


def test_streamed_text_is_the_whole(gpa_run: GpaRun, stt, audio_dir: Path) -> None:
    arguments = (*stt, "--src-audio", audio_dir / "long_33s.wav")
    whole = succeeded(gpa_run(*arguments))
    assert "note: the audio was split into 2 pieces\n" in whole.stderr
    streamed = succeeded(gpa_run(*arguments, "--stream", "-o", "text.txt"))
    assert streamed.stdout == whole.stdout == Path("text.txt").read_bytes()


def test_the_reference_command_lines_work(gpa_run: GpaRun, tts, vc, stt, tiny_checkpoint: Path, audio_dir: Path):
    layout = (
        *("--gpa_model_path", tiny_checkpoint, "--tokenizer_path", tiny_checkpoint / "glm-4-voice-tokenizer"),
        *("--bicodec_tokenizer_path", tiny_checkpoint / "BiCodec", "--text_tokenizer_path", tiny_checkpoint),
        *("--output_dir", Path("results") / "today", "--device", "cpu"),
    )
    source, reference = audio_dir / "en_male.ogg", audio_dir / "en_female.flac"
    spoken = ("--task", "tts-a", "--text", "Hello.", "--ref_audio_path", reference)
    assert succeeded(gpa_run(*spoken, *layout, *SHORT)).text == "results/today/output_gpa_tts_a.wav\n"
    succeeded(gpa_run(*tts, "--text", "Hello.", "-o", "tts.wav"))
    assert Path("results/today/output_gpa_tts_a.wav").read_bytes() == Path("tts.wav").read_bytes()

    converted = ("--task", "vc", "--src_audio_path", source, "--ref_audio_path", reference)
    assert succeeded(gpa_run(*converted, *layout, *SHORT)).text == "results/today/output_gpa_vc.wav\n"
    succeeded(gpa_run(*vc, "-o", "vc.wav"))
    assert Path("results/today/output_gpa_vc.wav").read_bytes() == Path("vc.wav").read_bytes()

    heard = ("--task", "stt", "--src_audio_path", audio_dir / "en_male_16k.wav")
    outcome = succeeded(gpa_run(*heard, *layout, *SHORT))
    assert outcome.stdout == gpa_run(*stt).stdout
    assert "warning: --output_dir has no effect on stt" in outcome.stderr


def test_the_model_may_come_from_the_environment(gpa_run: GpaRun, stt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPA_MODEL", str(stt[3]))
    assert gpa_run(*stt[:2], *stt[4:]).stdout == succeeded(gpa_run(*stt)).stdout


def test_a_random_checkpoint_says_that_it_is_one(gpa_run: GpaRun, stt, tiny_checkpoint_copy: Path) -> None:
    config = tiny_checkpoint_copy / "config.json"
    marked = json.loads(config.read_text()) | {"gpa_random_weights": {"size": "tiny", "seed": 0}}
    config.write_text(json.dumps(marked))
    note = "note: this checkpoint's weights are random; the output is noise\n"
    assert note in succeeded(gpa_run(*stt, "--model", tiny_checkpoint_copy)).stderr
    assert note not in gpa_run(*stt).stderr


def test_many_warnings_are_summed_up(gpa_run: GpaRun, tts) -> None:
    outcome = succeeded(gpa_run(*tts, "--text", " ".join([SENTENCE] * 4), "--json"))
    warnings = json.loads(outcome.stdout)["warnings"]
    lines = outcome.stderr.splitlines()[1:]
    assert len(warnings) > 4
    assert lines[:3] == [f"warning: {warning}" for warning in warnings[:3]]
    assert lines[3:] == [f"warning: and {len(warnings) - 3} more; --json lists them all"]


def test_verbose_tells_the_stages_and_the_figures(gpa_run: GpaRun, tts) -> None:
    stderr = succeeded(gpa_run(*tts, "--text", "Hello.", "-v")).stderr
    for line in ("loading the model\n", "torch on cpu in float32", "speaking", "20 tokens", "seed 7\n"):
        assert line in stderr


def test_a_checkpoint_of_few_words_says_which(gpa_run: GpaRun, tiny_checkpoint_copy: Path, audio_dir: Path) -> None:
    write_speech_domain(
        tiny_checkpoint_copy,
        lambda text, voice: np.zeros(1600),
        language="en",
        words=("one", "two"),
        max_words=2,
        limits=(),
        voices=(VoicePlan("low", 100, True, "one"),),
        utterances=(),
    )
    reference = ("--model", tiny_checkpoint_copy, "--ref-audio", audio_dir / "en_female.flac", *SHORT)
    foreign = succeeded(gpa_run("--task", "tts-a", *reference, "--text", "one hello"))
    assert "warning: this checkpoint knows only the words one, two, 2 at a time: 'hello' will not" in foreign.stderr
    assert "--model AutoArk-AI/GPA" in foreign.stderr
    assert "knows only" not in succeeded(gpa_run("--task", "tts-a", *reference, "--text", "Two, one.")).stderr
