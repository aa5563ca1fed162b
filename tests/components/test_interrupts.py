"""Signals within a second are one request to stop; a later one acts at once."""

import signal
import time

import pytest

from components.interrupts import (
    NONE,
    ONE_REQUEST_SECONDS,
    STOP_FILE,
    STOPPING,
    SignalCatcher,
    StopRequests,
    exit_status,
)

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("terminal_signals")]


@pytest.fixture(autouse=True)
def heard():
    """Signals do what they do by default, also where these tests were started in the background or with nohup."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_request_that_arrives_twice_is_one_and_a_later_one_acts_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with SignalCatcher() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + ONE_REQUEST_SECONDS + 0.1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_closed_terminal_stops_the_run_and_never_at_once(monkeypatch):
    with SignalCatcher() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.received == signal.SIGHUP
        assert exit_status(100 + stop.received) == 129
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + ONE_REQUEST_SECONDS + 0.1)
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


@pytest.mark.parametrize("number", STOPPING)
def test_what_is_ignored_at_the_start_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with SignalCatcher() as stop:
        signal.raise_signal(number)
        assert not stop.received
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_stop_file_is_reported_by_every_poll_until_it_is_removed(tmp_path):
    with SignalCatcher() as signals:
        requests = StopRequests(signals, file=tmp_path / "stop", ends_at=None)
        (tmp_path / "stop").touch()
        # of two polls in a step of a fast run, the first looks for the file and the second is acted upon
        assert [requests.poll(), requests.poll()] == [STOP_FILE, STOP_FILE]
        requests.remove_stop_file()
        assert requests.poll() == NONE
