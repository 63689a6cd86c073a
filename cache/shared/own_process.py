"""What a command may do because it has a process of its own: import without looking for reference
cycles, and end without taking apart what it imported. With torch and transformers, Python takes
half a second for the one and one to three for the other.

What must be done at an exit is done: threads have ended and every ``atexit`` function has run that
was registered after this module was imported. So ``__main__`` modules import it before all others.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_own = False
_code: int | None = None


def run(command: Callable[[], object]) -> None:
    """Run ``command``, which raises SystemExit when it is done, as what this process is for."""
    global _own, _code
    _own = True
    try:
        command()
    except SystemExit as done:
        _code = done.code if isinstance(done.code, int) else None
        raise


@contextmanager
def starting() -> Iterator[None]:
    """Look for no cycles meanwhile, nor later among the objects that are there by then: imports
    make a million, all to stay. Does nothing in a process that others use too.
    """
    if not _own:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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
