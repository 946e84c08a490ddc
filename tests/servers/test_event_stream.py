"""Bytes to events, however they are cut."""

from __future__ import annotations

import json

import pytest

from gpa_engines.servers import event_stream
from gpa_engines.servers.event_stream import EventParser, EventTooLong

TEXT = "\u2028 \x85 \x0b \x0c \u2029 你好"
STREAM = (
    b": a comment\r\n\r\n"
    + f"data: {json.dumps({'text': TEXT}, ensure_ascii=False)}\n\n".encode()
    + b"event: named\ndata:1\n\n"
    + b"data: [1,\r\ndata: 2]\r\n\r\n"
    + b"id: 7\n\n"
    + b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_do_not_depend_on_how_the_bytes_arrive(size: int) -> None:
    parser = EventParser()
    events = [event for start in range(0, len(STREAM), size) for event in parser.feed(STREAM[start : start + size])]
    assert json.loads(events[0]) == {"text": TEXT}, "only LF and CRLF end a line"
    assert events[1:] == [b"1", b"[1,\n2]", b"[DONE]"]
    assert not parser.pending


def test_an_event_that_is_not_finished_is_pending() -> None:
    parser = EventParser()
    assert list(parser.feed(b"data: 1\n")) == []
    assert parser.pending


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_EVENT", 100)
    parser = EventParser()
    for _ in range(14):
        assert list(parser.feed(b"data: x")) == []
    with pytest.raises(EventTooLong, match="more than 100 bytes"):
        list(parser.feed(b"data: x"))
