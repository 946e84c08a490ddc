"""Server-sent events (WHATWG HTML, 9.2), as far as inference servers use them: the data of each event."""

from __future__ import annotations

from collections.abc import Iterator

MAX_EVENT = 256 * 2**20
"""Bytes that one event may have; logits of the whole vocabulary take some ten million."""


class EventTooLong(ValueError):
    """An event of more than `MAX_EVENT` bytes, which no server sends that means to."""


class EventParser:
    """Bytes as they arrive to the data of whole events.

    Lines end with LF or CRLF and with nothing else: JSON strings hold U+2028 and U+0085 as they are, at which Python's
    `splitlines`, and readers that are built on it, would break an event in two.
    """

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._size = 0
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Data of the events that `chunk` completes. Raises EventTooLong."""
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            whole = b"".join((*self._rest, line)).removesuffix(b"\r")
            self._rest.clear()
            if whole.startswith(b"data:"):
                self._data.append(whole[5:].removeprefix(b" "))
            elif not whole:
                self._size = 0
                if self._data:
                    data, self._data = b"\n".join(self._data), []
                    yield data
        if rest:
            self._rest.append(rest)
            self._size += len(rest)
            if self._size > MAX_EVENT:
                raise EventTooLong(f"an event has more than {MAX_EVENT} bytes")

    @property
    def pending(self) -> bool:
        """Whether the bytes so far end inside an event."""
        return bool(self._rest or self._data)
