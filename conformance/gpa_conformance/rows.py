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
        rows = await engine.logits_at(ids, wanted.tolist())
        expected = (len(wanted), engine.info.vocab_size)
    else:
        rows = await engine.logits(ids)
        expected = (len(ids), engine.info.vocab_size)
    found = np.asarray(rows)
    if found.shape != expected or found.dtype != np.float32:
        raise WrongShape(
            f"the logits of {len(ids)} ids are {found.dtype}{list(found.shape)}; expected float32{list(expected)}"
        )
    return found if isinstance(engine, GivesRows) else found[wanted]
