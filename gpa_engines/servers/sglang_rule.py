"""The project's sampling rule inside SGLang's scheduler, as a custom logit processor.

SGLang hands a processor the last position's logits and the request they belong to. This one lets `gpa_engines.sampling`
choose the token and makes all others impossible, so that every step of the rule, its seed included, is that of the
engines which own their forward pass, whatever SGLang's sampler does and on which device.

It runs in SGLang's processes: nothing here imports more of this project than the rule, and an error ends the request it
belongs to and nothing else, since one that escapes would end the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from gpa_codecs.errors import GpaError, RequestError
from gpa_engines.engine import GenerationRequest, SamplingParams
from gpa_engines.sampling import Sampler, candidate_ids

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

MARK = "gpa_sampling"
"""Name of the attribute under which a request of SGLang keeps its sampler."""

_FIELDS = {*SamplingParams.__dataclass_fields__, "stop_ids", "prompt_tokens"}


@dataclass(frozen=True, slots=True)
class RuleParams:
    """What the rule needs of a request, as `custom_params` can carry it: numbers and flat lists.

    prompt_tokens: length of the prompt; ids behind it in what SGLang was sent are the start of the answer.
    """

    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    allowed: tuple[range, ...] | None
    prompt_tokens: int

    @classmethod
    def of(cls, request: GenerationRequest, seed: int) -> RuleParams:
        """Those of a request. seed: the one that is used, also where the request has none."""
        values = asdict(request.sampling) | {"seed": seed}
        return cls(SamplingParams(**values), request.stop_ids, request.allowed, len(request.prompt_ids))

    def to_wire(self) -> dict[str, Any]:
        """JSON's types."""
        ranges = None if self.allowed is None else [end for part in self.allowed for end in (part.start, part.stop)]
        return {
            **asdict(self.sampling),
            "stop_ids": list(self.stop_ids),
            "allowed": ranges,
            "prompt_tokens": self.prompt_tokens,
        }

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> RuleParams:
        """Raises RequestError for values that this module did not write."""
        # The seed too: every device that has a part of the model draws for itself, and all the same.
        if missing := sorted(_FIELDS - {name for name, value in values.items() if value is not None}):
            raise RequestError(f"custom_params lack {', '.join(missing)}, which {__name__} writes")
        fields: dict[str, Any] = {name: values[name] for name in SamplingParams.__dataclass_fields__}
        ends = values.get("allowed")
        pairs = None if ends is None else zip(ends[::2], ends[1::2], strict=True)
        allowed = None if pairs is None else tuple(range(first, last) for first, last in pairs)
        return cls(SamplingParams(**fields), tuple(values["stop_ids"]), allowed, values["prompt_tokens"])

    def sampler(self, sent: Sequence[int], drawn: Sequence[int]) -> Sampler:
        """The rule's sampler. sent: prompt, and the start of the answer; drawn: what SGLang has generated since."""
        sampler = Sampler(self.sampling, sent[: self.prompt_tokens], self.stop_ids, self.allowed)
        sampler.replay((*sent[self.prompt_tokens :], *drawn))
        return sampler


@dataclass(slots=True)
class _Remembered:
    """A request's sampler, and the tokens that SGLang must have generated for it to be up to date."""

    params: RuleParams
    sampler: Sampler
    drawn: list[int]


class SamplingRule:
    """What SGLang calls between the forward pass and its sampler."""

    def __call__(self, logits: torch.Tensor, custom_param_list: Sequence[dict[str, Any]] | None = None) -> torch.Tensor:
        """logits: float[R, V], one row per request; the same, with -inf for every token but the chosen ones.

        The parameters are those of :meth:`RuleParams.to_wire`, to which SGLang adds the request under `__req__`.
        """
        rows = list(custom_param_list or ())
        tokens = [0] * len(rows)
        remembered = [_guarded(values, partial(_recall, values)) for values in rows]
        for index, (row, found) in enumerate(zip(_on_host(logits, remembered), remembered, strict=True)):
            if found is not None:
                tokens[index] = _guarded(rows[index], partial(_choose, found, row)) or 0
        logits.fill_(float("-inf"))
        for index, token in enumerate(tokens):
            logits[index, token] = 0
        return logits


def _recall(values: dict[str, Any]) -> _Remembered:
    """The request's sampler, made anew where SGLang has generated something else than it chose.

    That is so at first, after the parts of a long prompt, for which SGLang samples too and drops what comes of it, and
    when a request was taken off the device and comes back.
    """
    request = values["__req__"]
    drawn = list(request.output_ids)
    found: _Remembered | None = getattr(request, MARK, None)
    if found is None or found.drawn != drawn:
        params = found.params if found is not None else RuleParams.from_wire(values)
        found = _Remembered(params, params.sampler(list(request.origin_input_ids), drawn), drawn)
        setattr(request, MARK, found)
    return found


def _choose(found: _Remembered, row: Any) -> int:
    token = found.sampler.next(row)
    found.drawn.append(token)
    return token


def _on_host(logits: torch.Tensor, remembered: Sequence[_Remembered | None]) -> list[Any]:
    """The candidates' logits of every row, float32 on the host, in one copy."""
    import torch

    parts = []
    for row, found in zip(logits, remembered, strict=True):
        if found is None:
            parts.append(row[:0])
        elif found.params.allowed is None:
            parts.append(row)
        else:
            parts.append(row.index_select(0, _columns(found.params.allowed, found.params.stop_ids, row.device)))
    if not parts:
        return []
    flat = torch.cat(parts).to(torch.float32).cpu()
    return [part.numpy() for part in flat.split([len(part) for part in parts])]


@lru_cache(maxsize=16)
def _columns(allowed: tuple[range, ...], stop_ids: tuple[int, ...], device: Any) -> torch.Tensor:
    import torch

    ids = candidate_ids(allowed, stop_ids)
    return torch.tensor(ids, device=device)


def _guarded(values: dict[str, Any], function: Callable[[], T]) -> T | None:
    """What the function returns; None where it fails, which ends the request with its message."""
    try:
        return function()
    except Exception as error:
        # A request of other hands may hold anything.
        message = str(error) if isinstance(error, GpaError) else f"{type(error).__name__}: {error}"
        _abort(values, message)
        return None


def _abort(values: dict[str, Any], message: str) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT  # pyright: ignore[reportMissingImports]

    request = values.get("__req__") if isinstance(values, dict) else None
    if request is not None:
        request.to_finish = FINISH_ABORT(f"sampling failed: {message}", status_code=400, err_type="BadRequestError")
