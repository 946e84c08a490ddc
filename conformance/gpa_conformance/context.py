"""What a case is given to work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpa_codecs.codec import SpeechCodec
from gpa_codecs.vocabulary import TokenSpace
from gpa_conformance.baseline import Baseline
from gpa_conformance.cases import Case
from gpa_conformance.coverage import covered_ids
from gpa_conformance.limits import DtypeLimits, Limits
from gpa_conformance.prompts import Prompt
from gpa_conformance.rows import checked_logits, rows_at
from gpa_conformance.speech.material import SpeechMaterial
from gpa_engines.engine import Capability, Engine


class Skip(Exception):
    """The case cannot run on this engine or checkpoint; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Context:
    """The engine under test and what it is compared with.

    limits: of the engine's dtype; all_limits: those of codec, sampling and the Ascend report too. space: None without
    a tokenizer. make_codec: a fresh codec; None where there is none, `no_codec` says why. cases: all of the package by
    id. seed: added to the seeds of sampled cases; 0 repeats the recorded run. speech: what the family "speech" shares;
    None for a checkpoint that says nothing of what it can speak.
    """

    engine: Engine
    baseline: Baseline
    limits: DtypeLimits
    all_limits: Limits
    space: TokenSpace | None
    cases: Mapping[str, Case]
    make_codec: Callable[[], SpeechCodec] | None = None
    no_codec: str = "there is no codec"
    seed: int = 0
    speech: SpeechMaterial | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def need(self, capability: Capability) -> None:
        """Skip the case unless the engine says that it can do this."""
        if capability not in self.engine.info.capabilities:
            raise Skip(f"no {capability}")

    def prompt(self, case_id: str) -> Prompt:
        """The prompt of a case, as the baseline recorded it."""
        if reason := self.baseline.missing(self.cases[case_id]):
            raise Skip(reason)
        return self.baseline.prompt(case_id)

    def prompts(self, case: Case) -> dict[str, Prompt]:
        """The prompts that a case uses, by the id of their own case."""
        return {case_id: self.prompt(case_id) for case_id in case.prompts}

    async def rows(self, ids: Sequence[int], positions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """float32[P, V]: the engine's logits at some positions of a prompt. Raises WrongShape for other arrays."""
        return await rows_at(self.engine, ids, positions)

    @property
    def covered(self) -> NDArray[np.int64] | None:
        """The ids that the engine has logits of; None for all."""
        return covered_ids(self.engine.info)

    def cut(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows [.., V] without the columns of ids that the engine has no logits of."""
        covered = self.covered
        return rows if covered is None else rows[..., covered]

    async def whole(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32[T, V]: what the engine's `logits` gives. Raises WrongShape as :meth:`rows`."""
        return checked_logits(await self.engine.logits(ids), len(ids), len(ids), self.engine.info.vocab_size)

    async def last_row(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32[V]: what follows a prompt."""
        return (await self.rows(ids, [len(ids) - 1]))[0]
