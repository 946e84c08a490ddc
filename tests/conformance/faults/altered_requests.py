"""Factories of torch engines that misunderstand a request or spoil its answer; their model is right."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.vocabulary import TokenSpace
from gpa_engines.engine import Engine, EngineInfo, GenerationRequest, GenerationUsage, TokenDelta
from gpa_engines.registry import create_engine


class Altered:
    """The torch engine; subclasses override `read` or `tell`."""

    def __init__(self, model_dir: Path, *, dtype: str) -> None:
        self.engine: Engine = create_engine("torch", model_dir, dtype=dtype, threads=1)
        self.model_dir = model_dir

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        ids: list[int] = []
        async with aclosing(self.engine.generate(self.read(request))) as stream:
            async for delta in stream:
                told = self.tell(request, delta, ids)
                ids.extend(told)
                yield replace(delta, ids=told, usage=self.account(request, delta.usage, len(ids)))

    def read(self, request: GenerationRequest) -> GenerationRequest:
        """What is run instead of the request."""
        return request

    def tell(self, request: GenerationRequest, delta: TokenDelta, told: Sequence[int]) -> tuple[int, ...]:
        """What is streamed instead of a delta's ids. told: all ids before it."""
        return delta.ids

    def account(self, request: GenerationRequest, usage: GenerationUsage | None, count: int) -> GenerationUsage | None:
        """Figures that hide the fault: those of the request, and of the ids that were streamed."""
        if usage is None:
            return None
        seed = usage.seed if request.sampling.seed is None else request.sampling.seed
        return replace(usage, prompt_tokens=len(request.prompt_ids), new_tokens=count, seed=seed)

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return await self.engine.logits(ids)

    async def close(self) -> None:
        await self.engine.close()


class LastIdDropped(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, prompt_ids=request.prompt_ids[:-1] or request.prompt_ids)


class FirstIdDoubled(Altered):
    """A begin-of-sequence token that the model does not know; logits have lost the row that is too many."""

    def read(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, prompt_ids=(request.prompt_ids[0], *request.prompt_ids))

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return (await self.engine.logits([*list(ids)[:1], *ids]))[:-1]


class SpecialIdStripped(Altered):
    """One of the control ids of the prompt of tts-a never reaches the model; logits repeat a row instead of its own."""

    def __init__(self, model_dir: Path, *, dtype: str) -> None:
        super().__init__(model_dir, dtype=dtype)
        self.stripped = TokenSpace.from_file(model_dir / "tokenizer.json").control.start_content

    def read(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, prompt_ids=tuple(token for token in request.prompt_ids if token != self.stripped))

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        kept = [token for token in ids if token != self.stripped]
        rows = await self.engine.logits(kept)
        places = np.cumsum([token != self.stripped for token in ids]) - 1
        return rows[np.maximum(places, 0)]


class OneNaN(Altered):
    """A single NaN among all logits of a prompt of eight ids and more."""

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        rows = await self.engine.logits(ids)
        if len(rows) >= 8:
            rows[5, 7] = np.nan
        return rows


class DoubleRows(Altered):
    """Logits in float64."""

    async def logits(self, ids: Sequence[int]) -> NDArray[Any]:
        return (await self.engine.logits(ids)).astype(np.float64)


class LastRowOnly(Altered):
    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return (await self.engine.logits(ids))[-1:]


class RowsOneLater(Altered):
    """Asked for single rows, it gives those of the positions after them."""

    async def logits_at(self, ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        rows = await self.engine.logits(ids)
        return rows[[min(position + 1, len(ids) - 1) for position in positions]]


class AllowedIgnored(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, allowed=None)


class AllowedReachesFurther(Altered):
    """Every range holds one id too many."""

    def read(self, request: GenerationRequest) -> GenerationRequest:
        if request.allowed is None:
            return request
        size, ranges, end = self.info.vocab_size, [], 0
        for ids in request.allowed:
            ranges.append(range(max(ids.start, end), min(ids.stop + 1, size)))
            end = ranges[-1].stop
        return replace(request, allowed=tuple(ids for ids in ranges if ids))


class OneTokenMore(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, max_new_tokens=request.sampling.max_new_tokens + 1)


class OneTokenLess(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        most = max(1, request.sampling.max_new_tokens - 1)
        return _sampling(request, max_new_tokens=most, min_new_tokens=min(most, request.sampling.min_new_tokens))


class MinimumIgnored(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, min_new_tokens=0)


class StopIdEmitted(Altered):
    def tell(self, request: GenerationRequest, delta: TokenDelta, told: Sequence[int]) -> tuple[int, ...]:
        return (*delta.ids, request.stop_ids[0]) if delta.finish_reason == "stop" else delta.ids


class OnlyFirstStopId(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, stop_ids=request.stop_ids[:1])


class SeamRepeated(Altered):
    """The ninth id of an answer is the eighth again, and one more than there should be."""

    def tell(self, request: GenerationRequest, delta: TokenDelta, told: Sequence[int]) -> tuple[int, ...]:
        return (told[-1], *delta.ids) if len(told) == 8 and delta.ids else delta.ids


class SeamRepeatedQuietly(Altered):
    """The same, with the last id left out, so that the count is right."""

    def tell(self, request: GenerationRequest, delta: TokenDelta, told: Sequence[int]) -> tuple[int, ...]:
        ids = super().tell(request, delta, told)
        if len(told) == 8 and ids:
            self.late = ids[-1:]
            return (told[-1],)
        if len(told) > 8 and ids:
            ids, self.late = self.late, ids[-1:]
        return ids


class SeedIgnored(Altered):
    """Every draw is fresh, though the request's seed is reported."""

    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, seed=None)


class SameSeedAlways(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, seed=0)


class TemperatureIgnored(Altered):
    """Whatever is above 0 is 1."""

    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, temperature=1.0) if request.sampling.temperature else request


class AlwaysGreedy(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, temperature=0.0)


class DefaultTopK(Altered):
    """Fifty, the default of some runtimes, where the request has none."""

    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, top_k=request.sampling.top_k or 50)


class PenaltyIgnored(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, repetition_penalty=1.0)


class TopPIgnored(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, top_p=1.0)


class MinPIgnored(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, min_p=0.0)


class TopKOneMore(Altered):
    def read(self, request: GenerationRequest) -> GenerationRequest:
        return _sampling(request, top_k=request.sampling.top_k + 1) if request.sampling.top_k else request


class IdsWrapped(Altered):
    """Ids outside the vocabulary become others, as an index that is not checked."""

    def read(self, request: GenerationRequest) -> GenerationRequest:
        size = self.info.vocab_size
        allowed = request.allowed and tuple(range(ids.start, min(ids.stop, size)) for ids in request.allowed)
        return replace(
            request,
            prompt_ids=tuple(token % size for token in request.prompt_ids),
            stop_ids=tuple(token % size for token in request.stop_ids),
            allowed=allowed,
        )

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return await self.engine.logits([token % self.info.vocab_size for token in ids])


class PromptTruncated(Altered):
    """What does not fit is cut off without a word."""

    def read(self, request: GenerationRequest) -> GenerationRequest:
        room = 4096
        request = _sampling(request, max_new_tokens=min(request.sampling.max_new_tokens, 8))
        return replace(request, prompt_ids=request.prompt_ids[:room])

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return await self.engine.logits(list(ids)[:4096])


class EmptyPromptServed(Altered):
    """As if it were id 0."""

    def read(self, request: GenerationRequest) -> GenerationRequest:
        return request if request.prompt_ids else replace(request, prompt_ids=(0,))

    async def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return await self.engine.logits(list(ids) or [0])


class CloseDoesNothing(Altered):
    """Closed engines go on; the test's own engine thread ends with the process."""

    async def close(self) -> None:
        pass


class UsageMiscounted(Altered):
    def account(self, request: GenerationRequest, usage: GenerationUsage | None, count: int) -> GenerationUsage | None:
        return usage and replace(usage, prompt_tokens=usage.prompt_tokens + 1)


def _sampling(request: GenerationRequest, **changed: Any) -> GenerationRequest:
    return replace(request, sampling=replace(request.sampling, **changed))
