"""An engine's logits at some positions of a prompt, with no more rows in memory than are wanted where it can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpa_conformance.wire import WrongShape
from gpa_engines.engine import Engine, GivesRows


async def rows_at(
    engine: Engine, ids: Sequence[int], positions: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.float32]:
    """float32[P, V]: the engine's logits at `positions`, strictly ascending. Raises WrongShape for other arrays."""
    wanted = np.asarray(positions, np.int64)
    if isinstance(engine, GivesRows):
        return checked_logits(
            await engine.logits_at(ids, wanted.tolist()), len(ids), len(wanted), engine.info.vocab_size
        )
    return checked_logits(await engine.logits(ids), len(ids), len(ids), engine.info.vocab_size)[wanted]


def checked_logits(logits: object, ids: int, rows: int, vocab_size: int) -> NDArray[np.float32]:
    """The array, if it is float32[rows, vocab_size]; else WrongShape. ids: of the prompt, for the message."""
    found = np.asarray(logits)
    if found.shape != (rows, vocab_size) or found.dtype != np.float32:
        raise WrongShape(
            f"the logits of {ids} ids are {found.dtype}{list(found.shape)}; expected float32[{rows}, {vocab_size}]"
        )
    return found
