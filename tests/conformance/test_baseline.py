"""Baselines on the tiny checkpoint: written whole or not at all, verified, refused when damaged or foreign."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpa_codecs.errors import GpaError
from gpa_codecs.torch_codec import TorchCodec
from gpa_conformance.baseline import Baseline, BaselineError, write_baseline
from gpa_conformance.baseline.answers import penalised
from gpa_conformance.baseline.reading import checksum
from gpa_conformance.cases import Case, clip_file, load_cases, select
from gpa_conformance.reference_rows import FullRows, TopRows
from gpa_engines.checkpoint import Checkpoint
from gpa_engines.engine import Engine, GenerationRequest, SamplingParams
from gpa_engines.registry import create_engine
from gpa_engines.sampling import Sampler

SELECTION = ",".join(
    (
        *("logits/ascend-1", "logits/tts-english", "logits/stt-short", "generate/vc-penalty", "generate/tts"),
        *("long/prefill", "codec/decode-short"),
    )
)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(tiny_checkpoint)


def open_engine(checkpoint: Checkpoint) -> Engine:
    return create_engine("torch", checkpoint.root, device="cpu", dtype="float32", threads=1)


def write(
    checkpoint: Checkpoint,
    out: Path,
    selection: str = SELECTION,
    *,
    codec: bool = True,
    wrap: Callable[[Engine], Any] = lambda engine: engine,
    progress: Callable[[str, int, int], None] | None = None,
) -> Baseline:
    async def make() -> Baseline:
        engine = open_engine(checkpoint)
        open_codec = (lambda: TorchCodec(checkpoint.bicodec_dir, checkpoint.glm_dir)) if codec else None
        try:
            cases = select(load_cases(), selection)
            return await write_baseline(checkpoint, out, wrap(engine), open_codec, cases, progress)
        finally:
            await engine.close()

    return asyncio.run(make())


@pytest.fixture(scope="module")
def baseline(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    return write(checkpoint, tmp_path_factory.mktemp("baseline") / "base")


@pytest.fixture
def copy(baseline: Baseline, tmp_path: Path) -> Path:
    return Path(shutil.copytree(baseline.path, tmp_path / "copy"))


def logits_of(checkpoint: Checkpoint, ids: tuple[int, ...]) -> np.ndarray:
    async def ask() -> np.ndarray:
        engine = open_engine(checkpoint)
        try:
            return await engine.logits(ids)
        finally:
            await engine.close()

    return asyncio.run(ask())


def test_it_holds_what_was_selected_and_what_that_refers_to(baseline: Baseline) -> None:
    assert set(baseline.document["cases"]) == {*SELECTION.split(","), "logits/vc-speech-as-voice"}
    assert set(baseline.document["clips"]) == {"voice", "speech", "short"}
    assert baseline.document["omitted"] == {}


def test_short_prompts_have_whole_rows(baseline: Baseline, checkpoint: Checkpoint) -> None:
    reference = baseline.logits("logits/ascend-1")
    assert reference.kind == "full"
    blocks = list(reference.blocks(rows=7))
    assert all(isinstance(block, FullRows) and len(block.positions) <= 7 for block in blocks)
    assert np.array_equal(np.concatenate([block.positions for block in blocks]), np.arange(len(reference.prompt.ids)))
    rows = np.concatenate([block.logits for block in blocks if isinstance(block, FullRows)])
    assert np.array_equal(rows, logits_of(checkpoint, reference.prompt.ids))


def test_long_prompts_have_the_top_of_chosen_rows(baseline: Baseline, checkpoint: Checkpoint) -> None:
    reference = baseline.logits("long/prefill")
    assert reference.kind == "top"
    length = len(reference.prompt.ids)
    assert length > 4096
    wanted = sorted({*range(0, length, 64), *range(length - 64, length)})
    assert reference.positions.tolist() == wanted
    logits = logits_of(checkpoint, reference.prompt.ids)
    seen = []
    for block in reference.blocks(rows=50):
        assert isinstance(block, TopRows)
        seen += block.positions.tolist()
        for index, position in enumerate(block.positions.tolist()):
            row = logits[position]
            order = np.argsort(-row, kind="stable")[:256]
            assert np.array_equal(block.top.ids[index], order)
            assert np.array_equal(block.top.logits[index], row[order])
            assert np.array_equal(block.top.sample[index], row[block.top.sample_ids])
            assert block.norm[index] == pytest.approx(np.linalg.norm(row.astype(np.float64)))
    assert seen == wanted


@pytest.mark.parametrize("name", ["generate/tts", "generate/vc-penalty"])
def test_greedy_ids_follow_the_shared_rule_and_carry_margins(
    baseline: Baseline, checkpoint: Checkpoint, name: str
) -> None:
    greedy = baseline.greedy(name)
    case = next(each for each in load_cases() if each.id == name)
    prompt, penalty = greedy.prompt, case.spec["sampling"].get("repetition_penalty", 1.0)
    assert len(greedy.ids) == case.spec["new_tokens"] == len(greedy.margins) == len(greedy.top5)
    assert greedy.finish_reason == "length"
    logits = logits_of(checkpoint, (*prompt.ids, *greedy.ids.tolist()))[len(prompt.ids) - 1 : -1]
    params = SamplingParams(max_new_tokens=len(greedy.ids), repetition_penalty=penalty)
    sampler = Sampler(params, prompt.ids, prompt.stop_ids, prompt.allowed)
    assert sampler.candidate_ids is not None
    for step, row in enumerate(logits):
        scores = penalised(row, (*prompt.ids, *greedy.ids[:step].tolist()), penalty)[sampler.candidate_ids]
        order = np.argsort(-scores, kind="stable")
        assert sampler.next(row[sampler.candidate_ids]) == greedy.ids[step] == greedy.top5[step, 0]
        assert greedy.top5[step].tolist() == sampler.candidate_ids[order[:5]].tolist()
        assert greedy.margins[step] == pytest.approx(scores[order[0]] - scores[order[1]], abs=1e-4)


def test_codes_and_audio_are_the_codecs(baseline: Baseline, checkpoint: Checkpoint) -> None:
    codec = TorchCodec(checkpoint.bicodec_dir, checkpoint.glm_dir)
    reference = baseline.codec("short")
    tokens = codec.encode(clip_file("short"))
    assert np.array_equal(reference.tokens.semantic, tokens.semantic)
    assert np.array_equal(reference.tokens.glm, tokens.glm)
    assert reference.tokens.duration == tokens.duration
    assert reference.voice == codec.voice(clip_file("short"))
    assert len(reference.semantic_stable) == len(tokens.semantic)
    assert len(reference.voice_stable) == 32
    assert reference.waveform.pcm.shape == (320 * len(tokens.semantic),)
    assert np.array_equal(reference.waveform.pcm, codec.decode(tokens.semantic, reference.voice).pcm)


def test_it_says_who_made_it_and_when(baseline: Baseline, checkpoint: Checkpoint) -> None:
    made, model = baseline.document["made"], baseline.document["model"]
    assert made["engine"]["backend"] == "torch"
    assert made["engine"]["dtype"] == "float32"
    assert made["machine"]["packages"]["torch"]
    assert made["started"].startswith("20")
    assert model["files"] == checkpoint.fingerprint()
    assert model["vocab_size"] == checkpoint.config.vocab_size
    assert str(checkpoint.root) not in json.dumps(baseline.document)


def test_it_can_be_moved(copy: Path, baseline: Baseline) -> None:
    assert np.array_equal(Baseline.open(copy).ids("generate/tts"), baseline.ids("generate/tts"))


def test_reading_needs_no_torch(copy: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from gpa_conformance.baseline import Baseline\n"
        f"base = Baseline.open({str(copy)!r})\n"
        "rows = [block for block in base.logits('logits/ascend-1').blocks()]\n"
        "base.codec('short'), base.greedy('generate/tts'), base.prompt('long/prefill')\n"
        "print(sum(len(block.positions) for block in rows))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5


def test_its_own_checkpoint_is_accepted_also_without_the_codec(baseline: Baseline, tiny_checkpoint: Path) -> None:
    baseline.check_model(Checkpoint.open(tiny_checkpoint))
    baseline.check_model(Checkpoint.open(tiny_checkpoint, require=("lm", "tokenizer")))


def test_another_checkpoint_is_refused_with_both_hashes(baseline: Baseline, tiny_checkpoint_copy: Path) -> None:
    weights = tiny_checkpoint_copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = Checkpoint.open(tiny_checkpoint_copy)
    with pytest.raises(BaselineError) as raised:
        baseline.check_model(other)
    message = str(raised.value)
    assert "lm/model.safetensors" in message
    assert other.fingerprint()["lm/model.safetensors"] in message
    assert baseline.document["model"]["files"]["lm/model.safetensors"] in message


@pytest.mark.parametrize(
    "name", ["cases/logits/ascend-1/logits.npy", "clips/short.npz", "cases/generate/tts/prompt.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named(copy: Path, name: str, damage: str) -> None:
    file = copy / name
    content = bytearray(file.read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "truncate":
            file.write_bytes(content[:-1])
        case "remove":
            file.unlink()
    with pytest.raises(BaselineError, match="missing" if damage == "remove" else "damaged") as raised:
        Baseline.open(copy)
    assert name in str(raised.value)
    assert "gpa-conformance baseline" in str(raised.value)


def test_a_damaged_document_is_named(copy: Path) -> None:
    file = copy / "baseline.json"
    document = json.loads(file.read_text())
    document["model"]["vocab_size"] += 1
    file.write_text(json.dumps(document))
    with pytest.raises(BaselineError, match=r"baseline\.json is damaged.*checksum"):
        Baseline.open(copy)
    file.write_text(json.dumps(document)[:-100])
    with pytest.raises(BaselineError, match="not JSON"):
        Baseline.open(copy)
    file.write_text(json.dumps({"schema": "gpa-conformance-baseline/9"}))
    with pytest.raises(BaselineError, match="gpa-conformance-baseline/9"):
        Baseline.open(copy)
    file.unlink()
    with pytest.raises(BaselineError, match="is not a baseline"):
        Baseline.open(copy)


def test_the_order_of_keys_is_no_damage(copy: Path) -> None:
    file = copy / "baseline.json"
    document = json.loads(file.read_text())
    assert document["checksum"] == checksum(document)
    file.write_text(json.dumps(dict(reversed(document.items()))))
    Baseline.open(copy)


def test_what_it_does_not_have_is_said(baseline: Baseline) -> None:
    with pytest.raises(BaselineError, match="no logits of the case 'generate/tts'"):
        baseline.logits("generate/tts")
    with pytest.raises(BaselineError, match="no greedy of the case 'logits/ascend-1'"):
        baseline.greedy("logits/ascend-1")
    with pytest.raises(BaselineError, match="no prompt of the case 'logits/ascend-2'"):
        baseline.prompt("logits/ascend-2")
    with pytest.raises(BaselineError, match="no codes of the clip 'chinese'"):
        baseline.codec("chinese")


def test_a_case_that_it_cannot_serve_is_told(baseline: Baseline) -> None:
    cases = {case.id: case for case in load_cases()}
    assert baseline.missing(cases["logits/ascend-1"]) is None
    assert baseline.missing(cases["logits/ascend-2"]) == "the baseline was made without it"
    known = cases["logits/ascend-1"]
    changed = Case(known.id, known.family, known.title, known.explanation, {**known.spec, "prompt": {"text": "x"}})
    assert "another version" in str(baseline.missing(changed))


def test_without_a_codec_the_text_cases_are_recorded_and_the_others_told(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    made = write(checkpoint, tmp_path / "base", "logits/ascend-1,logits/tts-english,generate/tts", codec=False)
    assert list(made.document["cases"]) == ["logits/ascend-1"]
    assert set(made.document["omitted"]) == {"logits/tts-english", "generate/tts"}
    case = next(each for each in load_cases() if each.id == "generate/tts")
    assert "no codec for the clip" in str(made.missing(case))


def test_progress_counts_up_to_the_total(checkpoint: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    write(checkpoint, tmp_path / "base", "logits/stt-short", progress=lambda *each: seen.append(each))
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    assert {total for *_, total in seen} == {len(seen) - 1}
    assert seen[0][0] == "clip short"


def test_a_folder_with_content_is_not_touched(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "precious.txt").write_text("x")
    with pytest.raises(BaselineError, match="exists already"):
        write(checkpoint, tmp_path / "base", "logits/ascend-1")
    assert [each.name for each in tmp_path.rglob("*")] == ["base", "precious.txt"]


def test_an_empty_folder_is_filled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert write(checkpoint, tmp_path / "base", "logits/ascend-1").path == tmp_path / "base"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, asyncio.CancelledError, RuntimeError])
def test_an_interrupted_baseline_leaves_nothing(
    checkpoint: Checkpoint, tmp_path: Path, stop: type[BaseException]
) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "logits/ascend-2":
            raise stop

    with pytest.raises(stop):
        write(checkpoint, tmp_path / "base", "logits/ascend-1,logits/ascend-2", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails with an OSError, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_reported_and_leaves_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with files_of_at_most(100_000), pytest.raises(BaselineError, match=r"base.*nothing was kept"):
        write(checkpoint, tmp_path / "base", "logits/ascend-1")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_reported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GpaError, match="file"):
        write(checkpoint, tmp_path / "file" / "base", "logits/ascend-1")


class _Altered:
    """An engine whose logits someone spoils."""

    def __init__(self, engine: Engine, alter: Callable[[np.ndarray], np.ndarray]) -> None:
        self.engine, self.alter = engine, alter

    @property
    def info(self) -> Any:
        return self.engine.info

    async def logits(self, ids: tuple[int, ...]) -> np.ndarray:
        return self.alter(await self.engine.logits(ids))

    def generate(self, request: GenerationRequest) -> Any:
        return self.engine.generate(request)


def _with_nan(logits: np.ndarray) -> np.ndarray:
    logits[3, 17] = np.nan
    return logits


@pytest.mark.parametrize(
    ("selection", "alter", "message"),
    [
        ("logits/ascend-1", _with_nan, "not finite at position 3"),
        ("logits/ascend-1", lambda logits: logits[:, :-1], r"float32\[\d+, 5140\]; expected float32\[\d+, 5141\]"),
        ("logits/ascend-1", lambda logits: logits.astype(np.float64), "float64"),
        ("generate/ascend-1", lambda logits: -logits, "cannot be a reference"),
    ],
)
def test_an_engine_that_cannot_be_a_reference_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, selection: str, alter: Callable, message: str
) -> None:
    with pytest.raises(BaselineError, match=message):
        write(checkpoint, tmp_path / "base", selection, wrap=lambda engine: _Altered(engine, alter))
    assert list(tmp_path.iterdir()) == []
