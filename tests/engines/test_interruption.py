import os
import signal

import pytest

from gpa_engines.interruption import interruptible


def _losing_the_interrupt() -> None:
    """As native code does that calls back into Python and reports a failure of its own."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 5)
    except KeyboardInterrupt:
        pass
    raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")


def test_an_error_that_swallowed_ctrl_c_is_the_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as raised, interruptible():
        _losing_the_interrupt()
    assert isinstance(raised.value.__cause__, ValueError)
    assert signal.getsignal(signal.SIGINT) is before


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="no interrupt"), interruptible():
        raise ValueError("no interrupt")
