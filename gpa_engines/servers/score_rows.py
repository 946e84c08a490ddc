"""Rows of logits as servers write them, in JSON by id, and what can be read from them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gpa_engines.servers.http_server import MalformedAnswer

TOKEN = "token_id:"
"""What vLLM writes before the id with return_tokens_as_token_ids."""


def scores_by_id(written: object, url: str) -> dict[int, float]:
    """`{"token_id:5": 1.25}` by id. Raises MalformedAnswer for anything else."""
    try:
        if isinstance(written, Mapping):
            return {int(name.removeprefix(TOKEN)): float(value) for name, value in written.items()}
    except (AttributeError, TypeError, ValueError):
        pass
    raise MalformedAnswer(f"{url}: logprobs are {str(written)[:80]}; expected values by token id")


def full_row(scores: Mapping[int, float], vocab_size: int, url: str) -> NDArray[np.float32]:
    """float32[V]. Raises MalformedAnswer unless there is one value of every id."""
    ids = np.fromiter(scores, np.int64, len(scores))
    if len(ids) != vocab_size or ids.min() != 0 or ids.max() != vocab_size - 1:
        raise MalformedAnswer(f"{url}: {len(ids)} logits came; the vocabulary has {vocab_size} ids")
    row = np.empty(vocab_size, np.float32)
    row[ids] = np.fromiter(scores.values(), np.float32, len(scores))
    return row


def is_log_probabilities(row: NDArray[np.float32]) -> bool:
    """Whether the row is normalised already, so that the logits themselves are lost."""
    top = float(row.max())
    total = top + float(np.log(np.exp(row.astype(np.float64) - top).sum()))
    return abs(total) < 1e-2


def coarsest_dtype(row: NDArray[np.float32]) -> str:
    """The coarsest of the dtypes that models are run in, that holds every value of the row exactly."""
    bits = np.ascontiguousarray(row).view(np.uint32)
    if not (bits & 0xFFFF).any():
        return "bfloat16"
    with np.errstate(over="ignore"):
        return "float16" if (row.astype(np.float16).astype(np.float32) == row).all() else "float32"
