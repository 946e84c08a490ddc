"""The sampling rule inside vLLM's worker: a logits processor that stands where vLLM's own filters would.

vLLM imports this module in its worker processes and makes one `SamplingRule` in each. It sees the scores of a step
after the allowed ids, the repetition penalty and min_tokens, and leaves what vLLM draws from.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from gpa_engines.backends.vllm.filters import Filters
from gpa_engines.backends.vllm.sampling_fields import RULE


class SamplingRule(LogitsProcessor):
    """Applies the filters that sampled requests carry in their `extra_args`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._filters: dict[int, Filters] = {}

    def is_argmax_invariant(self) -> bool:
        """vLLM then leaves greedy steps alone, and calls `apply` behind its division by the temperature, which is 1."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._filters, batch_update, lambda params, _prompt, _output: _filters(params))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows: dict[Filters, list[int]] = defaultdict(list)
        for row, filters in self._filters.items():
            rows[filters].append(row)
        for filters, members in rows.items():
            logits[members] = filters.apply(logits[members])
        return logits


def _filters(params: SamplingParams) -> Filters | None:
    rule = (params.extra_args or {}).get(RULE)
    return None if rule is None else Filters(**rule)
