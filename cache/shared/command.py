"""What every command does alike: errors become one message on stderr and an exit code; ``--json`` puts one object on stdout."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

from dspark.cache.errors import DsparkError
from dspark.cache.settings import DEFAULT_PACKING, NAMED, NAMES, PACKINGS, choose_codec

# Of a click command: -h too, defaults shown, lines as long as a terminal of 120 columns.
SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}


class Progress(Protocol):
    """``progress(done, total, text)``."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a click callback: DsparkError -> its message and exit code, Ctrl-C -> exit 1. Other exceptions are bugs and keep their trace."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except DsparkError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            then = " What was committed is whole: the same command with --resume goes on from there."
            fail("interrupted." + (then if "resume" in kwargs else ""), 1)

    return run


def codec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--codec NAME``, ``--aux-bits N``, ``--last-bits N`` and ``--pack`` for a click callback, which gets ``codec`` (a full name) and ``pack``."""
    import click

    @functools.wraps(command)
    def run(*args: Any, codec: str | None, aux_bits: int | None, last_bits: int | None, **kwargs: Any) -> Any:
        try:
            chosen = choose_codec(codec, aux_bits, last_bits)
        except DsparkError as error:
            fail(str(error), error.exit_code)
        return command(*args, codec=chosen, **kwargs)

    named = click.option(
        "--codec",
        metavar="NAME",
        show_default="default",
        help=f"How states are coded: {', '.join(NAMED)} ({NAMES}), or a full name.",
    )
    aux = click.option("--aux-bits", type=int, help="16, 8, 4, 3 or 2: a rotated codec by its bits.")
    last = click.option("--last-bits", type=int, help="16, 8 or 4: the same for the last state.")
    pack = click.option(
        "--pack",
        type=click.Choice(PACKINGS),
        default=DEFAULT_PACKING,
        help="none: codes as they are, a quarter larger at 4 bits, read ten times as fast; 16, 8 and 4 bits only.",
    )
    out: Callable[..., Any] = named(aux(last(pack(run))))
    return out


@contextmanager
def bar(label: str) -> Iterator[Progress]:
    """A progress bar on stderr; yields ``progress(done, total, text)``."""
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn(label),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with rich.Progress(
        *columns, rich.TextColumn("{task.description}"), console=console, refresh_per_second=2
    ) as view:
        task = view.add_task("", total=None)
        yield lambda done, total, text="": view.update(task, completed=done, total=total, description=text)


def fail(message: str, code: int) -> NoReturn:
    """Print ``error: message`` to stderr and exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def emit(data: Any) -> None:
    """One JSON object on stdout. NaN never: it is not JSON."""
    print(json.dumps(data, allow_nan=False))
