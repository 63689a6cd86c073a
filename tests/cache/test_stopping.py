"""SIGINT, SIGTERM, SIGHUP: a line at once, even inside one long call; a stop at a safe point; a
second signal ends the process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dspark.cache.files.urls import where
from dspark.cache.shared.stopping import parts_of

BEGIN = """
import ctypes, os, signal, sys, time
from dspark.cache.errors import Stopped
from dspark.cache.shared.stopping import Stopping, stoppable
def long_call(seconds):  # one call of C that leaves Python's lock, as a backward pass does
    ctypes.CDLL(None).usleep(int(seconds * 1e6))
def busy(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end: long_call(0.2)
"""
RAISES = """
try:
    with stoppable("committing", lambda: "2 parts are safe."):
        print("ready", flush=True); busy(30)
except Stopped as error:
    print("error:", error, file=sys.stderr)
    sys.exit(1)
"""
ASKED = """
with Stopping(lambda: "saving after this step", lambda: "No step is saved.", raises=False) as stop:
    print("ready", flush=True)
    busy(SECONDS)  # also if the signal has come by now
    while not stop.asked: busy(SECONDS)
print("saved", file=sys.stderr)
"""


# A suite that is run under nohup hands on an ignored SIGHUP.
FRESH = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"


def start(code: str, **more: Any) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", ("" if "preexec_fn" in more else FRESH) + BEGIN + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_answered_and_ends_in_what_is_safe(number: signal.Signals) -> None:
    process = start(RAISES)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert said.splitlines() == [
        f"{number.name}: committing. A second signal stops at once.",
        "error: stopped. 2 parts are safe.",
    ]


def test_the_line_comes_at_once_from_within_a_call_of_seconds() -> None:
    process = start(ASKED.replace("busy(SECONDS)", "long_call(3)"))
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("SIGTERM: saving after this step.")
    assert time.monotonic() - began < 2
    assert process.stderr.read() == "saved\n"  # communicate would miss what readline has read ahead
    process.communicate(timeout=20)


def test_a_second_signal_ends_the_process_and_says_what_is_safe() -> None:
    process = start(ASKED.replace("SECONDS", "60"))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert said.splitlines()[1] == "SIGINT: stopped at once. No step is saved."
    assert process.returncode == 128 + signal.SIGINT


def test_what_nohup_ignores_stays_ignored() -> None:
    process = start(
        RAISES.replace("busy(30)", "busy(1)"),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (0, "")


def test_a_forked_child_does_not_count_for_its_parent() -> None:
    """A scheduler's SIGTERM reaches the whole group."""
    process = start(
        "child = 0\n" + RAISES.replace("busy(30)", "child = os.fork(); busy(30)"),
        start_new_session=True,
    )
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert "error: stopped. 2 parts are safe." in said
    assert "stopped at once" not in said


def test_what_is_safe_is_told_from_an_older_store(tmp_path: Path) -> None:
    output = tmp_path / "hs.zarr"
    assert parts_of(output)() == "Nothing was written."
    (output / "parts" / "000000000000").mkdir(parents=True)
    assert parts_of(output, resume=False)() == f"The store at {output} is unchanged."
    assert parts_of(output)().startswith(f"1 finished parts in {output} are safe.")
    (output / "parts" / "000000000000").rmdir()
    assert parts_of(output)().startswith("No part was finished")


def test_a_store_by_url_is_asked_nothing() -> None:
    assert "s3://bucket/hs.zarr are safe" in parts_of(where("s3://bucket/hs.zarr"))()
