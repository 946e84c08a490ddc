"""Ctrl-C that ends as Ctrl-C, also where native code was at work."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Generator[None, None, None]:
    """Within it, an error that comes after Ctrl-C is raised as KeyboardInterrupt. For the main thread.

    Native code that calls back into Python may lose the KeyboardInterrupt and report a failure of its own: torch says
    "could not determine the shape of object type 'torch.storage.UntypedStorage'".
    """
    asked = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
