"""What every command does alike: errors become one message on stderr and an exit code; ``--json`` puts one object on stdout."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from dspark.cache.errors import DsparkError


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a click callback: DsparkError -> its message and exit code, Ctrl-C -> exit 1. Other exceptions are bugs and keep their trace."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except DsparkError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail(
                "interrupted. What was committed is whole: the same command with --resume goes on from there.",
                1,
            )

    return run


def fail(message: str, code: int) -> NoReturn:
    """Print ``error: message`` to stderr and exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def emit(data: Any) -> None:
    """One JSON object on stdout. NaN never: it is not JSON."""
    print(json.dumps(data, allow_nan=False))
