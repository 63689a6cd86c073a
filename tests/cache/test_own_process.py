"""A command's process: its start and its end, at once, but with all that is owed to threads,
``atexit`` functions and readers of its output, and with its exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

BEGIN = """
from dspark.cache.shared import own_process
import atexit, sys, threading, time

class Module:
    def __del__(self): print("taken apart")

kept = Module()
"""


def ended(code: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", BEGIN + textwrap.dedent(code)]
    around = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(call, capture_output=True, text=True, check=False, timeout=60, env=around)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_threads_and_atexit_functions_end_and_modules_stay(code: int) -> None:
    done = ended(f"""
        def slow():
            time.sleep(0.2)
            print("thread")

        def main():
            atexit.register(print, "atexit")
            threading.Thread(target=slow).start()
            print("error", file=sys.stderr, end="")
            sys.exit({code})

        own_process.run(main)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (code, "thread\natexit\n", "error")


@pytest.mark.parametrize(
    ("last", "code"), [("raise ValueError('bug')", 1), ("sys.exit('said')", 1), ("pass", 0)]
)
def test_what_is_no_command_s_end_is_left_to_python(last: str, code: int) -> None:
    done = ended(f"""
        def main():
            {last}

        own_process.run(main)
    """)
    assert (done.returncode, done.stdout) == (code, "taken apart\n")
    assert done.stderr.split()[-1:] == ([] if last == "pass" else [last.split("'")[1]])


def test_output_that_cannot_be_written_is_told() -> None:
    done = ended("""
        import os
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
        del kept
        own_process.run(lambda: (print("lost"), sys.exit(0)))
    """)
    assert done.returncode == 120
    assert "BrokenPipeError" in done.stderr


@pytest.mark.parametrize("tool", ["dump", "train", "tools"])
def test_commands_leave_so_when_all_else_is_done(tool: str) -> None:
    code = f"""
        import atexit, runpy, sys
        seen, register = [], atexit.register
        atexit.register = lambda f, *a, **k: seen.append(f) or register(f, *a, **k)
        sys.argv = ["x", "--version"]
        try:
            runpy.run_module("dspark.{tool}", run_name="__main__")
        finally:
            print(seen[0].__qualname__, seen[0].__globals__["_code"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "_leave 0", done.stderr


def test_cycles_are_looked_for_again_after_the_start() -> None:
    done = ended("""
        import gc

        class Ring:
            def __init__(self): self.own = self

        def main():
            with own_process.starting():
                assert not gc.isenabled()
            assert gc.isenabled() and gc.get_freeze_count()
            lost = weakref.ref(Ring())
            gc.collect()
            sys.exit(0 if lost() is None else 3)

        import weakref
        with own_process.starting():
            assert gc.isenabled()
        assert not gc.get_freeze_count()
        own_process.run(main)
    """)
    assert done.returncode == 0, done.stderr
