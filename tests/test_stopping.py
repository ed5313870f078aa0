import signal

import pytest

from Util import stopping
from Util.stopping import StopRequest


@pytest.fixture
def at(monkeypatch):
    """Set the clock."""
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 100.0 + seconds)


@pytest.fixture
def forced():
    """What the handlers from before get."""
    got = []
    before = {n: signal.signal(n, lambda n, _: got.append(n)) for n in StopRequest.STOP}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_launchers_signals_are_one_request(at, forced):
    with StopRequest() as stop:
        for seconds, number in ((0, signal.SIGTERM), (0.1, signal.SIGTERM), (59, signal.SIGUSR1)):
            at(seconds)
            signal.raise_signal(number)
        assert stop()
        assert stop.signal == signal.SIGTERM
        assert not forced
        at(61)
        signal.raise_signal(signal.SIGTERM)
        assert forced == [signal.SIGTERM]


def test_a_signal_after_the_processes_agreed_on_the_end_is_an_echo(at, forced):
    with StopRequest() as stop:
        at(100)
        stop.agree(signal.SIGTERM)  # another process got it first
        at(101)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert not forced


def test_a_second_ctrl_c_forces(at, forced):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun's, beside the terminal's own
        assert stop()
        assert not forced
        at(2)
        signal.raise_signal(signal.SIGINT)
        assert forced == [signal.SIGINT]


def test_sigusr2_asks_for_a_checkpoint_alone():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR2)
        assert stop.save
        assert not stop()


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_from_before_come_back(forced):
    with StopRequest():
        pass
    signal.raise_signal(signal.SIGTERM)
    assert forced == [signal.SIGTERM]
