"""Speech and text files: the same model with a part of its ids, chosen by what a request may answer."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")

from gpa_codecs.errors import RequestError
from gpa_engines.backends.llama_cpp import create_engine
from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.sampling import candidate_ids
from gpa_engines.step_model import CandidateSet
from tests.backends.llama_cpp.asking import (
    IM_END,
    SEMANTIC,
    allocate,
    answer,
    answers,
    load,
    relative_l2,
    request,
    speech_request,
)

TEXT = range(512)
BY_VOCABULARY = {"full": "tiny", "speech": "tiny-speech", "text": "tiny-text"}


def text_request(prompt_ids: Sequence[int], max_new_tokens: int = 16) -> GenerationRequest:
    return GenerationRequest(tuple(prompt_ids), SamplingParams(max_new_tokens=max_new_tokens), (IM_END,), (TEXT,))


@pytest.fixture
def folder_of(gguf_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with the files of these vocabularies and their table, of the type "F32" unless another is given."""

    def make(*vocabularies: str, kind: str = "F32") -> Path:
        folder = tmp_path / "-".join((*vocabularies, kind))
        folder.mkdir()
        for vocabulary in vocabularies:
            shutil.copy(gguf_folder / f"{BY_VOCABULARY[vocabulary]}-{kind}.gguf", folder)
        for table in gguf_folder.glob("*.safetensors"):
            shutil.copy(table, folder)
        return folder

    return make


def rows_of(ids: tuple[range, ...]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(part.start, part.stop) for part in ids])


@pytest.mark.parametrize(("kind", "limit"), [("F32", 1e-5), ("F16", 3e-3), ("Q8_0", 0.06)])
@pytest.mark.parametrize("vocabularies", [("speech",), ("text",), ("speech", "text")], ids="+".join)
def test_logits_are_the_full_ones_where_there_are_ids(
    folder_of: Callable[..., Path],
    golden_arrays: Callable[[str], dict[str, NDArray[Any]]],
    vocabularies: tuple[str, ...],
    kind: str,
    limit: float,
) -> None:
    expected = golden_arrays("prompt1_logits")

    async def main() -> None:
        engine = create_engine(folder_of(*vocabularies, kind=kind), threads=1, prefill_chunk=48)
        ids = engine.info.logit_ids
        assert ids is not None
        known = rows_of(ids)
        assert ("speech" in vocabularies) == (SEMANTIC.start in known)
        assert ("text" in vocabularies) == (TEXT.stop - 1 in known)
        logits = await engine.logits(expected["input_ids"].tolist())
        assert logits.shape == (len(expected["input_ids"]), 5141)
        assert relative_l2(logits[::8][:, known], expected["logits_every8"][:, known]) < limit
        unknown = np.setdiff1d(np.arange(5141), known)
        assert np.isneginf(logits[:, unknown]).all()
        await engine.close()

    asyncio.run(main())


def test_speech_and_text_files_answer_like_the_full_one(
    folder_of: Callable[..., Path], prompts: list[dict[str, Any]]
) -> None:
    asked = [build(prompt["input_ids"], 16) for prompt in prompts for build in (speech_request, text_request)]

    async def main(folder: Path) -> list[tuple[int, ...]]:
        engine = create_engine(folder, threads=1)
        alone = [(await answer(engine, each)).ids for each in asked]
        together = [each.ids for each in await answers(engine, asked)]
        assert together == alone
        await engine.close()
        return alone

    assert asyncio.run(main(folder_of("speech", "text"))) == asyncio.run(main(folder_of("full")))


def test_a_request_goes_to_the_smallest_file_that_has_its_ids(
    folder_of: Callable[..., Path], prompts: list[dict[str, Any]]
) -> None:
    model = load(folder_of("full", "speech", kind="Q8_0"))
    speech, full = model.lanes
    assert (speech.model.gpa.vocab, full.model.gpa.vocab) == ("speech", "full")

    def busy(allowed: tuple[range, ...] | None) -> tuple[bool, bool]:
        ids = candidate_ids(allowed, (IM_END,))
        slot = allocate(model, prompts[0]["input_ids"], candidates=None if ids is None else CandidateSet(ids))
        state = not speech.idle, not full.idle
        model.release(slot.number)
        assert speech.idle
        assert full.idle
        return state

    assert busy((SEMANTIC,)) == (True, False)
    assert busy((range(SEMANTIC.start, SEMANTIC.start + 10),)) == (True, False)
    assert busy((TEXT,)) == (False, True)
    assert busy(None) == (False, True)


def test_what_no_file_can_serve_is_refused_with_the_way_out(
    folder_of: Callable[..., Path], prompts: list[dict[str, Any]]
) -> None:
    ids = prompts[0]["input_ids"]

    async def main() -> None:
        speech = create_engine(folder_of("speech"), threads=1)
        for wrong in (text_request(ids), request(ids)):
            with pytest.raises(RequestError, match=r"tiny-speech-F32.gguf \(speech\).*to_gguf.py MODEL_DIR --vocab"):
                await answer(speech, wrong)
        assert len((await answer(speech, speech_request(ids, 4))).ids) <= 4
        await speech.close()

        both = create_engine(folder_of("speech", "text"), threads=1)
        params = SamplingParams(max_new_tokens=4)
        across = GenerationRequest(tuple(ids), params, (IM_END,), (TEXT, SEMANTIC))
        with pytest.raises(RequestError, match=r"no loaded file has all 833 ids.*--vocab full"):
            await answer(both, across)
        assert len((await answer(both, speech_request(ids, 4))).ids) <= 4
        await both.close()

    asyncio.run(main())


def test_a_prompt_may_hold_any_id(folder_of: Callable[..., Path]) -> None:
    """The embedding table has all ids, and refuses what is outside of it like the vocabulary does."""

    async def main() -> None:
        engine = create_engine(folder_of("speech"), threads=1)
        assert len((await answer(engine, speech_request([0, 511, 600, 5140], 4))).ids) <= 4
        with pytest.raises(RequestError, match="is 5141; the vocabulary has ids 0 to 5140"):
            await answer(engine, speech_request([0, 5141], 4))
        await engine.close()

    asyncio.run(main())
