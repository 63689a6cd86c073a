"""Processes of our own: what ends them, and what does not."""

from __future__ import annotations

import os
import signal
import time

import pytest

from dspark.cache.shared.spawned import Spawning
from dspark.cache.shared.stopping import SIGNALS


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_group_is_left_to_the_parent_from_the_first_moment(
    number: signal.Signals,
) -> None:
    process = Spawning().Process(target=time.sleep, args=(0.2,))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    process.start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert process.pid is not None
    while process.is_alive():
        os.kill(process.pid, number)
        time.sleep(0.005)
    assert process.exitcode == 0


def test_it_is_ended_all_the_same() -> None:
    process = Spawning().Process(target=time.sleep, args=(600,))
    process.start()
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
