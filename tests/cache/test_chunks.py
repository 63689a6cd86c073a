"""Chunks of arrays, each read by itself."""

from __future__ import annotations

import subprocess
import sys


def test_reading_a_chunk_makes_no_semaphore() -> None:
    """Of which Python would warn where the process is killed."""
    code = """
import multiprocessing
from multiprocessing import resource_tracker
multiprocessing.set_start_method("spawn")
resource_tracker.register = lambda *what: print(what)
multiprocessing.Lock()
from dspark.cache.parts.chunks import Blosc
codec = Blosc()
assert codec.decode(codec.encode(b"12345678" * 9)) == b"12345678" * 9
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("semaphore") == 1, "the one that this test makes"
