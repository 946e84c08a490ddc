"""The sampling rule inside vLLM's worker: a logits processor that stands where vLLM's own filters would, and draws.

vLLM imports this module in its worker processes and makes one `SamplingRule` in each. It sees the scores of a step
after the allowed ids, the repetition penalty and min_tokens, and leaves one id for vLLM to draw from.
"""

# vllm has an environment of its own, which is not that of the type checker.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from gpa_engines.backends.vllm.draws import Filters, draw, uniform
from gpa_engines.backends.vllm.sampling_fields import RULE, SEED


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A sampled request. answer: vLLM's own list of what it has generated, which grows."""

    filters: Filters
    seed: int
    answer: Sequence[int]


class SamplingRule(LogitsProcessor):
    """Applies the rule to requests that carry it in their `extra_args`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, _Sampled] = {}

    def is_argmax_invariant(self) -> bool:
        """vLLM then leaves greedy steps alone, and calls `apply` behind its division by the temperature, which is 1."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._requests, batch_update, _sampled)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        alike: dict[Filters, list[int]] = defaultdict(list)
        for row, request in self._requests.items():
            alike[request.filters].append(row)
        for filters, rows in alike.items():
            requests = [self._requests[row] for row in rows]
            uniforms = [uniform(request.seed, len(request.answer)) for request in requests]
            drawn = draw(filters.weights(logits[rows]), uniforms)
            logits[rows] = -torch.inf
            logits[rows, drawn] = 0.0
        return logits


def _sampled(params: SamplingParams, _prompt: list[int] | None, answer: list[int]) -> _Sampled | None:
    if RULE not in (params.extra_args or {}):
        return None
    rule = dict(params.extra_args[RULE])
    return _Sampled(seed=rule.pop(SEED), filters=Filters(**rule), answer=answer)
