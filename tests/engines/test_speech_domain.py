"""What a trained checkpoint says that it can speak: read strictly, written reproducibly, told to the user."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.audio import load_audio
from gpa_codecs.codec import Voice
from gpa_codecs.errors import AudioError, CheckpointError
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.checkpoint.speech_domain import FILE_NAME, SpeechDomain, find_speech_domain
from gpa_engines.checkpoint.speech_domain_writing import VoicePlan, ogg_opus, write_speech_domain
from gpa_engines.speech import SpeechModel
from gpa_engines.speech.loading import find_model

Change = Callable[[dict[str, Any]], object]


def tone(text: str, voice: str) -> np.ndarray:
    """Half a second per word, higher in the second voice."""
    time = np.arange(8000 * len(text.split())) / 16000
    return 0.5 * np.sin(2 * np.pi * (220 if voice == "low" else 330) * time)


def write(folder: Path) -> SpeechDomain:
    return write_speech_domain(
        folder,
        tone,
        language="en",
        words=("zero", "one", "two"),
        spellings={"1": "one"},
        max_words=3,
        limits=("It counts to two.",),
        voices=(VoicePlan("low", 220, True, "one two"), VoicePlan("high", 330, False, "two")),
        utterances=(("zero one", "low"), ("two two one", "high")),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    domain = SpeechDomain.open(folder)
    assert domain == write(folder)
    assert [(voice.name, voice.f0, voice.trained) for voice in domain.voices] == [
        ("low", 220, True),
        ("high", 330, False),
    ]
    assert [each.text for each in domain.utterances] == ["zero one", "two two one"]
    for clip in (*(voice.clip for voice in domain.voices), *(each.clip for each in domain.utterances)):
        audio = load_audio(domain.clip_file(clip))
        assert audio.duration == 0.5 * len(clip.text.split())
        assert np.sqrt(np.mean(audio.pcm**2)) == pytest.approx(0.5 / np.sqrt(2), abs=0.05)


def test_the_same_samples_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("a", "b")]
    assert files[0] == files[1]
    assert len(files[0]) == 5


def test_the_rewritten_ogg_is_whole() -> None:
    """libsndfile and libogg verify every page's checksum and skip what does not fit."""
    pcm = tone("one two zero", "low")
    assert len(load_audio(ogg_opus(pcm)).pcm) == len(pcm)
    broken = bytearray(ogg_opus(pcm))
    broken[-100] ^= 1
    try:
        length = len(load_audio(bytes(broken)).pcm)
    except AudioError:
        length = 0
    assert length != len(pcm), "a page that does not fit its checksum is skipped"


def test_a_checkpoint_without_one_has_none(tmp_path: Path) -> None:
    assert find_speech_domain(tmp_path) is None
    with pytest.raises(CheckpointError, match=rf"{FILE_NAME}: No such file"):
        SpeechDomain.open(tmp_path)


def put(**values: Any) -> Change:
    return lambda document: document.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(schema="gpa-speech-domain/2"), "has schema 'gpa-speech-domain/2'"),
        (lambda document: document.pop("limits"), "the document has no 'limits'"),
        (put(author="me"), "unknown keys 'author'"),
        (put(words=["zero", "one", "one"]), "words is .* distinct words"),
        (put(words=["zero", "One", "two"]), "in lower case"),
        (put(words="zero"), "words is 'zero'; expected a list"),
        (put(max_words=0), "max_words is 0; expected a whole number"),
        (put(max_words=True), "max_words is True"),
        (put(max_words=2), r"utterances\[1\].text is 'two two one'; expected 1 to 2 of its words"),
        (put(spellings={"3": "three"}), "spellings is .*; expected words of the domain"),
        (put(voices=[]), "at least one voice"),
        (lambda document: document["voices"][1].update(name="low"), "distinct names"),
        (lambda document: document["voices"][0].update(f0=0), r"voices\[0\].f0 is 0; expected a pitch"),
        (lambda document: document["voices"][0].update(f0=float("nan")), r"voices\[0\].f0 is nan"),
        (lambda document: document["voices"][0].update(trained="yes"), "trained is 'yes'"),
        (lambda document: document["voices"][0].pop("clip"), r"voices\[0\] has no 'clip'"),
        (lambda document: document["utterances"][0].update(voice="middle"), "is 'middle'; expected one of high, low"),
        (lambda document: document["utterances"][0].update(text="zero four"), "'zero four'; expected 1 to 3"),
        (lambda document: document["utterances"][0].update(text=""), r"utterances\[0\].text is ''"),
        (lambda document: document["utterances"][0].update(sha256="abc"), "64 hexadecimal digits"),
        (put(utterances={}), "utterances is {}; expected a list"),
        *(
            (lambda document, path=path: document["utterances"][0].update(clip=path), "a file below the checkpoint")
            for path in ("../x.ogg", "/x.ogg", "a/../../x.ogg", "C:\\x.ogg", "C:x.ogg", "~/x.ogg", "", "a\0b", 5)
        ),
    ],
)
def test_a_wrong_document_is_refused(folder: Path, change: Change, message: str) -> None:
    document = json.loads((folder / FILE_NAME).read_text())
    change(document)
    (folder / FILE_NAME).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        SpeechDomain.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", "null", "\udcff"])
def test_a_damaged_document_is_refused(folder: Path, text: str) -> None:
    (folder / FILE_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"is not JSON|has schema"):
        SpeechDomain.open(folder)


def test_missing_and_changed_clips_are_noticed_when_they_are_used(folder: Path) -> None:
    domain = SpeechDomain.open(folder)
    first, second = (each.clip for each in domain.utterances)
    (folder / first.path).unlink()
    (folder / second.path).write_bytes(b"other")
    domain = SpeechDomain.open(folder)
    with pytest.raises(CheckpointError, match=rf"0000.ogg: No such file.*{FILE_NAME} names it"):
        domain.clip_file(first)
    with pytest.raises(CheckpointError, match=rf"has sha256 {hashlib.sha256(b'other').hexdigest()}"):
        domain.clip_file(second)


def test_a_writer_refuses_what_a_reader_would(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'four'"):
        write_speech_domain(
            tmp_path,
            tone,
            language="en",
            words=("one",),
            max_words=1,
            limits=(),
            voices=(VoicePlan("low", 220, True, "one"),),
            utterances=(("four", "low"),),
        )
    assert not (tmp_path / FILE_NAME).exists()


def test_words_are_found_however_they_are_written(folder: Path) -> None:
    domain = SpeechDomain.open(folder)
    assert domain.words_of("One, 1: TWO-zero.") == ("one", "one", "two", "zero")
    assert domain.unknown_words("one 1 two") == ()
    assert domain.unknown_words("Don’t say 11 or two, or 11!") == ("don’t", "say", "11", "or")
    assert domain.unknown_words("") == ()


def test_the_warning_says_what_is_known_what_is_not_and_what_to_do(folder: Path) -> None:
    domain = SpeechDomain.open(folder)
    assert domain.warning("One, two.") is None
    assert domain.warning("Hello one") == (
        "this checkpoint knows only the words zero, one, two, 3 at a time: 'hello' will not be spoken rightly; "
        "for any text use --model AutoArk-AI/GPA"
    )
    assert "a text of 4 may not be spoken rightly" in (domain.warning("one one one one") or "")
    assert "'a', 'b', 'c', 'd', 'e', 'f' and 2 more will not" in (domain.warning("a b c d e f g h") or "")


def test_the_fingerprint_of_a_checkpoint_holds_it(tiny_checkpoint_copy: Path) -> None:
    before = Checkpoint.open(tiny_checkpoint_copy).fingerprint()
    write(tiny_checkpoint_copy)
    after = Checkpoint.open(tiny_checkpoint_copy).fingerprint()
    assert after.keys() - before.keys() == {FILE_NAME}
    assert after[FILE_NAME] == hashlib.sha256((tiny_checkpoint_copy / FILE_NAME).read_bytes()).hexdigest()


def test_a_speech_of_foreign_words_carries_the_warning(tiny_checkpoint_copy: Path) -> None:
    pytest.importorskip("torch")
    write(tiny_checkpoint_copy)
    voice = Voice(tuple(range(0, 4096, 128)))
    with SpeechModel.load(tiny_checkpoint_copy, backend="torch", dtype="float32") as model:
        foreign = model.synthesize("Hello one.", voice, max_new_tokens=4, min_new_tokens=4)
        known = model.synthesize("One.", voice, max_new_tokens=4, min_new_tokens=4)
    assert "knows only the words zero, one, two" in foreign.warnings[0]
    assert len(foreign.warnings) == 2  # cut off, too
    assert not [warning for warning in known.warnings if "knows only" in warning]


def test_the_domain_is_found_beside_the_codec_of_a_converted_model(tiny_checkpoint_copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    write(tiny_checkpoint_copy)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).symlink_to(tiny_checkpoint_copy / name)
    assert find_model(model, backend="torch", parts=("lm", "tokenizer")).domain is None
    found = find_model(model, backend="torch", codec=tiny_checkpoint_copy)
    assert found.domain is not None
    assert found.domain.folder == tiny_checkpoint_copy


def test_reading_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; import gpa_engines.checkpoint.speech_domain; "
        "print([name for name in ('torch', 'scipy', 'pocketsphinx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
