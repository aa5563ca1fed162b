"""One request to stop is one, however often it arrives; the next acts at once."""

import signal
import time

import pytest

from components.stop_signal import ONE_REQUEST_SECONDS, StopSignal

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("terminal_signals")]


def test_a_request_that_arrives_twice_is_one_and_a_later_one_acts_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + ONE_REQUEST_SECONDS + 0.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
