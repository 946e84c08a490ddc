"""`gpa-run` with servers, over a fake vLLM, and what it records of a model for them to be compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="needs httpx")

from gpa_engines.fingerprint import FILE, Fingerprint
from tests.cli.conftest import GpaRun
from tests.servers.fake_vllm import FakeVllm

STT = ("--task", "stt", "--model", "m", "--src-audio", "a.wav")


@pytest.fixture
def folder(tiny_checkpoint_copy: Path) -> Path:
    """The tiny checkpoint without its language model's weights, which are the servers'."""
    (tiny_checkpoint_copy / "model.safetensors").unlink()
    return tiny_checkpoint_copy


@pytest.fixture
def fake(folder: Path) -> Iterator[FakeVllm]:
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    names = {token["id"]: token["content"] for token in tokens}
    with FakeVllm(vocabulary=5141, room=2048, key="secret", names=names.__getitem__) as fake:
        yield fake


def text_task(folder: Path, *more: str) -> tuple[str, ...]:
    return ("--task", "text", "--model", str(folder), "--prompt", "Hello", "--max-new-tokens", "6", *more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*STT, "--url", "http://a"), "--url is for --backend remote; give that, or leave --url out"),
        ((*STT, "--backend", "torch", "--url", "http://a"), "--url is for --backend remote"),
        ((*STT, "--backend", "onnx", "--key-file", "k"), "--key-file is for --backend remote"),
        (
            (*STT, "--backend", "remote"),
            "--backend remote needs --url http://host:8000, once per server, or GPA_REMOTE_URL",
        ),
        ((*STT, "--backend", "remote", "--url", "http://a", "--option", "url=b"), "--url is the option for it"),
        ((*STT, "--backend", "remote", "--url", "http://a", "--option", "key=b"), "a key on a command line is seen by"),
        (("--task", "text", "--prompt", "x", "--model", "m", "--backend", "remote"), "--backend remote needs --url"),
    ],
)
def test_servers_are_for_the_backend_that_has_them(arguments: tuple[str, ...], message: str, gpa_run: GpaRun) -> None:
    outcome = gpa_run(*arguments)
    assert outcome.status == 2
    assert message in outcome.stderr


def test_a_text_is_continued_by_a_server(
    folder: Path, fake: FakeVllm, gpa_run: GpaRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPA_REMOTE_KEY", "secret")
    outcome = gpa_run(*text_task(folder, "--backend", "remote", "--url", fake.url, "--json"))
    assert outcome.status == 0, outcome.stderr
    report = json.loads(outcome.text)
    (sent,) = (asked.json for asked in fake.streams)
    assert report["engine"]["backend"] == "remote"
    assert report["engine"]["device"] == fake.url
    assert report["results"][0]["new_tokens"] == 6 or report["results"][0]["finish_reason"] == "stop"
    assert sent["prompt"]
    assert "secret" not in outcome.text + outcome.stderr


def test_the_key_comes_from_a_file_and_a_wrong_one_is_said(folder: Path, fake: FakeVllm, gpa_run: GpaRun) -> None:
    Path("key").write_text("secret\n")
    command = text_task(folder, "--backend", "remote", "--url", fake.url, "--key-file", "key")
    assert gpa_run(*command).status == 0
    Path("key").write_text("not-the-secret\n")
    outcome = gpa_run(*command)
    assert outcome.status == 2
    assert "the key that was sent is not the server's; set GPA_REMOTE_KEY" in outcome.stderr
    assert "not-the-secret" not in outcome.stderr


def test_a_server_that_is_not_there_is_one_line(folder: Path, gpa_run: GpaRun) -> None:
    outcome = gpa_run(*text_task(folder, "--backend", "remote", "--url", "http://127.0.0.1:9"))
    assert outcome.status == 2
    assert outcome.stderr.strip().splitlines()[-1].startswith("error: http://127.0.0.1:9 cannot be reached")


def test_a_fingerprint_is_recorded_for_servers_to_be_compared_with(
    tiny_checkpoint_copy: Path, gpa_run: GpaRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="needs torch")
    outcome = gpa_run("fingerprint", "--model", tiny_checkpoint_copy)
    assert outcome.status == 0, outcome.stderr
    assert outcome.text.strip() == str(tiny_checkpoint_copy / FILE)
    found = Fingerprint.read(tiny_checkpoint_copy / FILE)
    assert (found.dtype, found.vocab_size) == ("float32", 5141)
    coarse = gpa_run("fingerprint", "--model", tiny_checkpoint_copy, "--dtype", "bfloat16", "-o", "other.json")
    assert coarse.status == 0, coarse.stderr
    assert found.difference(Fingerprint.read(Path("other.json"))) is None
    assert gpa_run("fingerprint", "--model", tiny_checkpoint_copy, "-o", "no/such/folder.json").status == 2
    # A server of another model, which the fake is, is found out from the file alone.
    (tiny_checkpoint_copy / "model.safetensors").unlink()
    names = {
        t["id"]: t["content"] for t in json.loads((tiny_checkpoint_copy / "tokenizer.json").read_text())["added_tokens"]
    }
    with FakeVllm(vocabulary=5141, room=2048, names=names.__getitem__) as fake:
        outcome = gpa_run(*text_task(tiny_checkpoint_copy, "--backend", "remote", "--url", fake.url))
    assert outcome.status == 2
    assert f"{fake.url} does not hold the weights of" in outcome.stderr
