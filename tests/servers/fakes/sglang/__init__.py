"""A fake of the package `sglang`, as far as `gpa_engines.backends.sglang.worker` uses it; see `fake_scheduler`.

It is found where a test puts this folder's parent on the module search path, in the worker's process too.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

from fake_scheduler import VERSION as __version__  # pyright: ignore[reportMissingImports]
from fake_scheduler import (  # pyright: ignore[reportMissingImports]
    DiedOfAnId,
    FakeArguments,
    FakeScheduler,
)

__all__ = ["Engine", "__version__"]


class Engine:
    """`sglang.Engine`."""

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("mem_fraction_static", 1) < 0.01:
            raise RuntimeError("Not enough memory. Please try to increase --mem-fraction-static.")
        known = FakeArguments.__dataclass_fields__
        self._scheduler = FakeScheduler(FakeArguments(**{name: kwargs[name] for name in kwargs if name in known}))
        self.tokenizer_manager = self
        self.loop = asyncio.new_event_loop()

    def get_server_info(self) -> dict[str, Any]:
        return self._scheduler.server_info()

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self._scheduler.abort(rid)

    async def async_generate(
        self,
        *,
        input_ids: list[int],
        sampling_params: dict[str, Any],
        rid: str,
        stream: bool = False,
        custom_logit_processor: str | None = None,
        return_hidden_states: bool = False,
        cache_salt: str | None = None,
    ) -> Any:
        body = {
            "input_ids": input_ids,
            "sampling_params": sampling_params,
            "rid": rid,
            "custom_logit_processor": custom_logit_processor,
            "return_hidden_states": return_hidden_states,
            "cache_salt": cache_salt,
        }
        chunks = self._chunks(body)
        if stream:
            return chunks
        last = None
        async for chunk in chunks:
            last = chunk
        return last

    async def _chunks(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            request = self._scheduler.admit(body)
        except DiedOfAnId:
            print("IndexError: index out of range in self", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        async for chunk in self._scheduler.run(request, body):
            yield chunk

    def shutdown(self) -> None:
        """The real one ends every child of the process, which the worker must be alone in."""
