"""A fake of SGLang 0.5.23: its shapes, its errors and its peculiarities, as recorded, around a real small model.

The model is the checkpoint's own in NumPy, so answers are real token ids and hidden states are real ones. What it has
of SGLang: chunks of either style, the ends of an answer, the sampler and its differences from the project's
rule, custom logit processors, parts of long prompts, the prefix cache that swallows hidden states, and errors.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpa_engines.step_model import SlotRequest, StepRow
from tests.conformance.numpy_engine import NumpyModel

Array = NDArray[np.floating]

VERSION = "0.5.23+fake"

SAMPLING_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 128,
    "stop": None,
    "stop_token_ids": None,
    "stop_regex": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "n": 1,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "no_stop_trim": False,
    "stream_interval": None,
    "logit_bias": None,
    "sampling_seed": None,
    "custom_params": None,
}


class DiedOfAnId(BaseException):
    """The real one ends its process, and the one that started it, where an id is outside the vocabulary."""


@dataclass(frozen=True)
class FakeArguments:
    """The ServerArgs that bear on what the fake does."""

    model_path: str
    context_length: int | None = None
    max_total_tokens: int | None = None
    chunked_prefill_size: int = 4096
    disable_radix_cache: bool = False
    disable_overlap_schedule: bool = False
    skip_tokenizer_init: bool = True
    enable_return_hidden_states: bool = False
    enable_custom_logit_processor: bool = False
    incremental_streaming_output: bool = False
    enable_deterministic_inference: bool = False
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(eq=False)
class FakeRequest:
    """What a custom logit processor sees of a request."""

    rid: str
    origin_input_ids: list[int]
    params: dict[str, Any]
    processor: Any
    output_ids: list[int] = field(default_factory=list)
    to_finish: dict[str, Any] | None = None


class FakeScheduler:
    def __init__(self, arguments: FakeArguments) -> None:
        self.arguments = arguments
        config = json.loads(Path(arguments.model_path, "config.json").read_text())
        generation = Path(arguments.model_path, "generation_config.json")
        ends = [config, json.loads(generation.read_text()) if generation.exists() else {}]
        self.end_ids = {token for each in ends for token in _listed(each.get("eos_token_id"))}
        self.vocab_size = config["vocab_size"]
        self.context = arguments.context_length or config["max_position_embeddings"]
        self.running: dict[str, FakeRequest] = {}
        self.aborts: list[str] = []
        self.seen: list[Mapping[str, Any]] = []
        self._cached: set[tuple[str, tuple[int, ...]]] = set()
        self._random = np.random.default_rng(0)

    @cached_property
    def model(self) -> NumpyModel:
        """Loaded when the first request comes: many tests send none."""
        return NumpyModel(Path(self.arguments.model_path))

    def server_info(self) -> dict[str, Any]:
        room = min(self.context, self.arguments.max_total_tokens or self.context)
        return {
            "version": VERSION,
            "model_path": self.arguments.model_path,
            "device": self.arguments.device,
            "dtype": self.arguments.dtype,
            "max_req_input_len": room - 1 - 5,
            "max_total_num_tokens": self.arguments.max_total_tokens,
            "enable_return_hidden_states": self.arguments.enable_return_hidden_states,
            "return_hidden_states_mode": "full" if self.arguments.enable_return_hidden_states else None,
            "enable_custom_logit_processor": self.arguments.enable_custom_logit_processor,
            "disable_overlap_schedule": self.arguments.disable_overlap_schedule,
            "enable_deterministic_inference": self.arguments.enable_deterministic_inference,
        }

    def abort(self, rid: str) -> None:
        """Every request whose id begins so, as SGLang does."""
        self.aborts.append(rid)
        for request in self.running.values():
            if rid and request.rid.startswith(rid):
                request.to_finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}

    def admit(self, body: Mapping[str, Any]) -> FakeRequest:
        """Raises ValueError and TypeError with SGLang's words."""
        self.seen.append(body)
        ids, given = list(body["input_ids"]), dict(body.get("sampling_params") or {})
        if unknown := set(given) - set(SAMPLING_DEFAULTS):
            raise TypeError(f"Unexpected keyword argument {min(unknown)!r}")
        params = SAMPLING_DEFAULTS | given
        self._validate(ids, params, body)
        processor = body.get("custom_logit_processor")
        request = FakeRequest(body["rid"], ids, params, processor and _load(processor))
        if request.processor is not None and isinstance(params["custom_params"], dict):
            params["custom_params"] = params["custom_params"] | {"__req__": weakref.proxy(request)}
        if any(not 0 <= token < self.vocab_size for token in ids):
            raise DiedOfAnId
        self.running[request.rid] = request
        return request

    async def run(self, request: FakeRequest, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """A chunk per token; the last has the reason."""
        slot = self.model.allocate(SlotRequest(self.context, request.origin_input_ids))
        assert slot is not None
        try:
            hidden, logits, cached = self._prefill(request, slot.number, body.get("cache_salt") or "")
            rows = [hidden.tolist()] if body.get("return_hidden_states") else None
            while True:
                # SGLang reads the scheduler's messages between two steps.
                await asyncio.sleep(0)
                token = self._sample(request, logits)
                request.output_ids.append(token)
                finish = self._finish(request)
                yield self._chunk(request, finish, cached, rows)
                if finish is not None:
                    return
                position = len(request.origin_input_ids) + len(request.output_ids) - 1
                logits = self.model.logits(self._read([token], slot.number, position))[-1]
        finally:
            del self.running[request.rid]
            self.model.release(slot.number)

    def _validate(self, ids: Sequence[int], params: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        total = len(ids) + params["max_new_tokens"]
        if len(ids) >= self.context:
            raise ValueError(
                f"The input ({len(ids)} tokens) is longer than the model's context length ({self.context} tokens)."
            )
        if total > self.context:
            raise ValueError(
                f"Requested token count exceeds the model's maximum context length of {self.context} tokens. You "
                f"requested a total of {total} tokens"
            )
        if body.get("return_hidden_states") and not self.arguments.enable_return_hidden_states:
            raise ValueError("The server is not configured to return hidden states.")
        if body.get("custom_logit_processor") and not self.arguments.enable_custom_logit_processor:
            raise ValueError("The server is not configured to enable custom logit processor.")
        if params["temperature"] < 0:
            raise ValueError(f"temperature must be a non-negative finite number, got {params['temperature']}.")
        if not 0.0 < params["repetition_penalty"] <= 2.0:
            raise ValueError("repetition_penalty must be in (0, 2] (1.0 = no penalty)")
        for token in params["logit_bias"] or {}:
            if not 0 <= int(token) < self.vocab_size:
                raise ValueError(f"logit_bias must has keys in [0, {self.vocab_size - 1}], got {token}.")
        if params["min_new_tokens"] and self.arguments.skip_tokenizer_init:
            raise ValueError("min_new_tokens is unavailable when skip_tokenizer_init=True")

    def _prefill(self, request: FakeRequest, slot: int, salt: str) -> tuple[Array, Array, int]:
        """Hidden states of the last part that was read, the last logits, and how many ids were found in the cache."""
        ids = request.origin_input_ids
        cached = 0 if self.arguments.disable_radix_cache else self._longest_cached(salt, ids)
        if cached:
            self._read(ids[:cached], slot, 0)
        self._cached |= {(salt, tuple(ids[:end])) for end in range(1, len(ids) + 1)}
        size = self.arguments.chunked_prefill_size
        for start in range(cached, len(ids), size):
            hidden = self._read(ids[start : start + size], slot, start)
            logits = self.model.logits(hidden[-1:])[0]
            if start + size < len(ids):
                self._sample(request, logits)  # of a part that is not the last SGLang samples too, for nothing
        return hidden, logits, cached

    def _longest_cached(self, salt: str, ids: Sequence[int]) -> int:
        return next((end for end in range(len(ids) - 1, 0, -1) if (salt, tuple(ids[:end])) in self._cached), 0)

    def _read(self, ids: Sequence[int], slot: int, start: int) -> Array:
        return self.model.hidden(StepRow(slot, ids, start, "none"))

    def _sample(self, request: FakeRequest, logits: Array) -> int:
        """SGLang's sampler: penalty of the answer's ids alone, bias, processor, then both filters at once."""
        params, scores = request.params, np.array(logits, np.float32)
        known = request.output_ids
        if known and not self.arguments.disable_overlap_schedule:
            known = [request.origin_input_ids[-1], *known[:-1]]
        seen = sorted(set(known))
        penalty = np.float32(params["repetition_penalty"])
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        for token, bias in (params["logit_bias"] or {}).items():
            scores[int(token)] += np.float32(bias)
        if request.processor is not None:
            import torch

            scores = request.processor(torch.from_numpy(scores[None]), [params["custom_params"]])[0].numpy()
        if params["temperature"] < 1e-6 or params["top_k"] == 1:
            return int(scores.argmax())
        weights = np.exp((scores.astype(np.float64) - scores.max()) / params["temperature"])
        order = np.argsort(-weights, kind="stable")
        probabilities = weights[order] / weights.sum()
        before = probabilities.cumsum() - probabilities
        if params["top_k"] > 0:
            probabilities[params["top_k"] :] = 0
        probabilities[before > params["top_p"]] = 0
        probabilities[probabilities < probabilities[0] * params["min_p"]] = 0
        return int(self._random.choice(order, p=probabilities / probabilities.sum()))

    def _finish(self, request: FakeRequest) -> dict[str, Any] | None:
        if request.to_finish is not None:
            reason = request.to_finish
            return reason if isinstance(reason, dict) else reason.to_json()
        token, params = request.output_ids[-1], request.params
        stops = set(params["stop_token_ids"] or ()) | self.end_ids
        if token in stops and not params["ignore_eos"]:
            return {"type": "stop", "matched": token}
        most = params["max_new_tokens"]
        return {"type": "length", "length": most} if len(request.output_ids) >= most else None

    def _chunk(
        self, request: FakeRequest, finish: dict[str, Any] | None, cached: int, rows: list[Any] | None
    ) -> dict[str, Any]:
        ids = request.output_ids
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": finish,
            "prompt_tokens": len(request.origin_input_ids),
            "weight_version": "default",
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": len(ids),
            "cached_tokens": cached,
            "cached_tokens_details": None,
            "dp_rank": None,
        }
        if rows is not None:
            meta["hidden_states"] = rows
        if self.arguments.incremental_streaming_output:
            return {"output_ids": ids[-1:], "meta_info": meta}
        # One list for all chunks but the last.
        return {"output_ids": ids if finish is None else list(ids), "meta_info": meta}


def _load(processor: str) -> Any:
    return pickle.loads(bytes.fromhex(json.loads(processor)["callable"]))()


def _listed(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
