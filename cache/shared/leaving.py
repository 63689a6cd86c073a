"""End the process of a command without taking apart what it has imported, which takes Python one to
three seconds where that is torch and transformers.

What must be done at an exit is done: threads have ended and every ``atexit`` function has run that
was registered after this module was imported. So ``__main__`` modules import it before all others.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable

_code: int | None = None


def run(command: Callable[[], object]) -> None:
    """Run ``command``, which raises SystemExit when it is done, as what this process is for."""
    global _code
    try:
        command()
    except SystemExit as done:
        _code = done.code if isinstance(done.code, int) else None
        raise


def _leave() -> None:
    if _code is None:  # not done by ``run``, or with an error whose trace Python prints
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return  # Python says so and chooses the exit code
    os._exit(_code)


atexit.register(_leave)
