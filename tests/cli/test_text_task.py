"""`gpa-run --task text`: a prompt goes on as text, on standard output, with its report in results_text.json."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from gpa_codecs.errors import TokenError
from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.registry import create_engine
from gpa_engines.text import complete, text_request
from tests.cli.conftest import GpaRun, Outcome, command

PROMPT = "Once upon a time in a land far away,"
SHORT = ("--max-new-tokens", "24", "--seed", "7", "--dtype", "float32")

LAYOUT = {
    "schema": str,
    "created": str,
    "model": str,
    "model_dir": str,
    "random_weights": bool,
    "engine": dict,
    "options": dict,
    "sampling": dict,
    "machine": dict,
    "versions": dict,
    "timings": dict,
    "results": list,
    "failed": type(None),
    "warnings": list,
}


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.status == 0, outcome.stderr
    return outcome


@pytest.fixture
def text(tiny_checkpoint: Path) -> tuple[str | Path, ...]:
    return "--task", "text", "--model", tiny_checkpoint, "--prompt", PROMPT, *SHORT


@pytest.fixture(scope="module")
def space(tiny_checkpoint: Path) -> TokenSpace:
    return Checkpoint.open(tiny_checkpoint).token_space()


def report(path: str = "results_text.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def run_engine(folder: Path, work: Any) -> Any:
    """What a coroutine function makes of the torch engine."""

    async def run() -> Any:
        engine = create_engine("torch", folder, dtype="float32", threads=1)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def test_the_text_that_the_engine_chooses_is_printed(
    gpa_run: GpaRun, text, tiny_checkpoint: Path, space: TokenSpace
) -> None:
    request = GenerationRequest(
        tuple(space.encode_text(PROMPT)), SamplingParams(max_new_tokens=24), (512, 514), space.text_ranges
    )

    async def ids(engine: Engine) -> list[int]:
        return [token async for delta in engine.generate(request) for token in delta.ids]

    outcome = succeeded(gpa_run(*text))
    assert outcome.text == space.decode_text(run_engine(tiny_checkpoint, ids)) + "\n"
    assert outcome.stderr == ""
    assert [path.name for path in Path.cwd().iterdir()] == ["results_text.json"]


def test_the_report_has_its_documented_layout(gpa_run: GpaRun, text, space: TokenSpace) -> None:
    outcome = succeeded(gpa_run(*text))
    document = report()
    assert set(document) == set(LAYOUT)
    for key, kind in LAYOUT.items():
        assert isinstance(document[key], kind), key
    assert document["schema"] == "gpa-text/1"
    assert document["engine"]["backend"] == "torch"
    assert document["options"] == {"dtype": "float32"}
    assert document["sampling"]["max_new_tokens"] == 24
    assert {"gpa-engines", "python", "torch"} <= set(document["versions"])
    (result,) = document["results"]
    assert set(result) == {
        *("prompt", "text", "finish_reason", "prompt_ids", "ids"),
        *("prompt_tokens", "new_tokens", "seed", "timings"),
    }
    assert (result["prompt"], result["text"] + "\n") == (PROMPT, outcome.text)
    assert result["prompt_ids"] == space.encode_text(PROMPT)
    assert space.decode_text(result["ids"]) == result["text"]
    assert (result["prompt_tokens"], result["new_tokens"], result["seed"]) == (len(result["prompt_ids"]), 24, 7)
    assert result["finish_reason"] == "length"
    assert set(result["timings"]) == {"queue", "prefill", "decode", "total"}
    assert 0 < result["timings"]["prefill"] + result["timings"]["decode"] <= result["timings"]["total"]


def test_json_prints_the_report_that_is_written(gpa_run: GpaRun, text) -> None:
    outcome = succeeded(gpa_run(*text, "--json", "-o", "other.json"))
    assert json.loads(outcome.stdout) == report("other.json")
    assert not Path("results_text.json").exists()


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1")], ids=["greedy", "drawn"])
def test_streamed_text_is_the_whole(gpa_run: GpaRun, text, sampling: tuple[str, ...]) -> None:
    whole = succeeded(gpa_run(*text, *sampling))
    assert succeeded(gpa_run(*text, *sampling, "--stream")).stdout == whole.stdout
    events = [json.loads(line) for line in gpa_run(*text, *sampling, "--stream", "--json").stdout.splitlines()]
    *parts, result = events
    assert len(parts) > 1
    assert {part["event"] for part in parts} == {"text"}
    assert "".join(part["text"] for part in parts) + "\n" == whole.text
    assert result.pop("event") == "result"
    assert result == report()


def test_a_seed_repeats_a_run_and_another_does_not(gpa_run: GpaRun, text) -> None:
    drawn = (*text, "--temperature", "1")
    assert gpa_run(*drawn).stdout == gpa_run(*drawn).stdout != gpa_run(*drawn, "--seed", "8").stdout


def test_the_reported_seed_repeats_the_run(gpa_run: GpaRun, tiny_checkpoint: Path) -> None:
    drawn = ("--task", "text", "--model", tiny_checkpoint, "--prompt", PROMPT, "--temperature", "1")
    first = succeeded(gpa_run(*drawn, "--max-new-tokens", "24"))
    seed = report()["results"][0]["seed"]
    assert gpa_run(*drawn, "--max-new-tokens", "24", "--seed", str(seed)).stdout == first.stdout


def test_the_answer_ends_at_an_end_token_and_holds_text_alone(gpa_run: GpaRun, text, space: TokenSpace) -> None:
    # So hot that all 514 possible ids are about equally likely.
    succeeded(gpa_run(*text, "--temperature", "1000", "--max-new-tokens", "4000"))
    (result,) = report()["results"]
    assert result["finish_reason"] == "stop"
    assert 0 < result["new_tokens"] < 4000
    assert all(any(token in ids for ids in space.text_ranges) for token in result["ids"])


def test_both_end_tokens_end_the_answer(space: TokenSpace) -> None:
    request = text_request(space, PROMPT)
    assert request.stop_ids == (space.find("<|endoftext|>"), space.control.im_end) == (512, 514)
    assert request.allowed == space.text_ranges
    assert (request.sampling.temperature, request.sampling.max_new_tokens) == (0, 128)


def test_special_tokens_in_a_prompt_are_spelled_out(space: TokenSpace) -> None:
    ids = text_request(space, "<|im_end|>").prompt_ids
    assert len(ids) > 1
    assert space.decode_text(ids) == "<|im_end|>"


def test_an_empty_prompt_is_refused(space: TokenSpace) -> None:
    with pytest.raises(TokenError, match="prompt is empty"):
        text_request(space, "")


def test_characters_are_never_split(tiny_checkpoint: Path, space: TokenSpace) -> None:
    async def parts(engine: Engine) -> tuple[list[str], str]:
        stream = complete(engine, space, "你好", temperature=1.0, seed=3, max_new_tokens=200)
        seen = [part async for part in stream]
        return seen, space.decode_text(stream.result.ids)

    seen, whole = run_engine(tiny_checkpoint, parts)
    assert "".join(seen) == whole


def test_a_closed_stream_leaves_the_engine_free(tiny_checkpoint: Path, space: TokenSpace) -> None:
    async def close_early(engine: Engine) -> str:
        stream = complete(engine, space, PROMPT, max_new_tokens=2000, min_new_tokens=2000)
        await anext(stream)
        await stream.aclose()
        with pytest.raises(RuntimeError, match="not been read to its end"):
            _ = stream.result
        return (await complete(engine, space, PROMPT, max_new_tokens=4).drain()).finish_reason

    assert run_engine(tiny_checkpoint, close_early) == "length"


def test_a_prompt_from_a_file_and_from_standard_input(gpa_run: GpaRun, text, monkeypatch: pytest.MonkeyPatch) -> None:
    at = text.index("--prompt")
    bare = (*text[:at], *text[at + 2 :])
    expected = succeeded(gpa_run(*text)).stdout
    Path("prompt.txt").write_text(PROMPT, encoding="utf-8-sig")
    assert succeeded(gpa_run(*bare, "--text-file", "prompt.txt")).stdout == expected
    for source in (("--prompt", "-"), ("-",)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
        assert succeeded(gpa_run(*bare, *source)).stdout == expected


def test_a_folder_of_the_language_model_alone_is_enough(gpa_run: GpaRun, text, tiny_checkpoint_copy: Path) -> None:
    shutil.rmtree(tiny_checkpoint_copy / "BiCodec")
    shutil.rmtree(tiny_checkpoint_copy / "glm-4-voice-tokenizer")
    assert gpa_run(*text, "--model", tiny_checkpoint_copy).stdout == succeeded(gpa_run(*text)).stdout


def test_a_random_checkpoint_says_that_it_is_one(gpa_run: GpaRun, text, tiny_checkpoint_copy: Path) -> None:
    config = tiny_checkpoint_copy / "config.json"
    marked = json.loads(config.read_text()) | {"gpa_random_weights": {"size": "tiny", "seed": 0}}
    config.write_text(json.dumps(marked))
    outcome = succeeded(gpa_run(*text, "--model", tiny_checkpoint_copy))
    assert "the output is noise" in outcome.stderr
    assert report()["random_weights"] is True


def test_verbose_tells_the_stages_and_the_figures(gpa_run: GpaRun, text) -> None:
    stderr = succeeded(gpa_run(*text, "-v")).stderr
    for said in (
        "loading the model\n",
        "torch on cpu in float32",
        "writing",
        "24 tokens at ",
        "ended by length, seed 7",
    ):
        assert said in stderr


def test_a_failed_run_keeps_an_existing_report(gpa_run: GpaRun, text) -> None:
    Path("results_text.json").write_text("old")
    outcome = gpa_run(*text, "--max-tokens-in-flight", "10")
    assert outcome.status == 2
    assert "max_tokens_in_flight is 10" in outcome.stderr
    assert Path("results_text.json").read_text() == "old"
    assert [path.name for path in Path.cwd().iterdir()] == ["results_text.json"]


TEXT = ("--task", "text", "--model", "m", "--prompt", "Hello")

REFUSED = {
    "no prompt": (TEXT[:4], "--task text needs a prompt: --prompt TEXT or --text-file FILE"),
    "empty prompt": ((*TEXT[:4], "--prompt", ""), "--prompt is empty; expected a prompt"),
    "two prompts": ((*TEXT, "--text-file", "t.txt"), "both --prompt and --text-file were given"),
    "missing file": ((*TEXT[:4], "--text-file", "nowhere.txt"), "nowhere.txt"),
    "text to speak": ((*TEXT, "--text", "x"), "--text means nothing with --task text; the prompt is --prompt"),
    "a clip": ((*TEXT, "--src-audio", "a.wav"), "--src-audio means nothing with --task text"),
    "a voice": ((*TEXT, "--voice", "v.json"), "--voice means nothing with --task text"),
    "a codec": ((*TEXT, "--bicodec", "d"), "--bicodec means nothing with --task text"),
    "report to standard output": ((*TEXT, "-o", "-"), "--json prints the report instead"),
    "no such folder": ((*TEXT, "-o", "no/such/report.json"), "--output: "),
    "no such model": (("--task", "text", "--model", "./nowhere", "--prompt", "x"), "nowhere"),
    "unknown backend": ((*TEXT, "--backend", "tpu"), "unknown backend 'tpu'"),
    "missing backend": ((*TEXT, "--backend", "ascend"), "backend 'ascend' needs torch_npu: pip install"),
    "temperature": ((*TEXT, "--temperature", "-1"), "temperature is -1.0; expected"),
    "max new tokens": ((*TEXT, "--max-new-tokens", "0"), "max_new_tokens is 0; expected"),
    "min new tokens": ((*TEXT, "--min-new-tokens", "200"), "min_new_tokens is 200; expected 0 to max_new_tokens (128)"),
    "tokenizer": ((*TEXT, "--tokenizer", "nowhere"), "--tokenizer: nowhere: there is no such file or folder"),
    "prompt of another task": (("--task", "stt", "--model", "m", "--prompt", "x"), "--prompt means nothing"),
    "prompt without a task": (("--model", "m", "--save-voice", "v", "--prompt", "x"), "--prompt needs --task"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(gpa_run: GpaRun, arguments: tuple[str, ...], message: str) -> None:
    outcome = gpa_run(*arguments)
    assert outcome.status == 2
    assert outcome.stdout == b""
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1, "one message, on one line"
    assert list(Path.cwd().iterdir()) == []


def test_ctrl_c_leaves_no_report(text) -> None:
    endless = (*text, "--max-new-tokens", "8000", "--min-new-tokens", "8000", "--stream")
    with subprocess.Popen(command(*endless), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error.decode()) == (130, "interrupted\n")
    assert time.monotonic() - started < 10
    assert list(Path.cwd().iterdir()) == []
