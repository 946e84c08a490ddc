"""How SGLang says that a request was given up."""

from __future__ import annotations

from typing import Any


class FINISH_ABORT:
    """`sglang.srt.managers.schedule_batch.FINISH_ABORT`."""

    def __init__(self, message: str | None = None, status_code: Any = None, err_type: str | None = None) -> None:
        self.message = message or "Aborted"
        self.status_code = status_code
        self.err_type = err_type

    def to_json(self) -> dict[str, Any]:
        return {
            "type": "abort",
            "message": self.message,
            "status_code": self.status_code,
            "err_type": self.err_type,
        }
