"""What all commands share: flags, config files, errors as one message and an exit code, one JSON
object with ``--json``.

Nothing heavy is imported here: ``--help`` pays for it.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Protocol

import click

from dspark import __version__
from dspark.cache.errors import DsparkError
from dspark.cache.settings import (
    DEFAULT_PACKING,
    FALLBACK,
    NAMED,
    NAMES,
    PACKINGS,
    choose_codec,
    is_asked,
    refuse_two_names,
)
from dspark.cache.shared import config_file, peers

# Of a click command: -h too, defaults shown, lines as long as a terminal of 120 columns.
SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 120}
INTERRUPTED = "interrupted."

CONTROL = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]"
)

_emitted = False  # whether this call has printed its object; a later error prints no second one


class Progress(Protocol):
    """``progress(done, total, text)``."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


def printable(text: str) -> str:
    """Escape ``text`` for a terminal: control characters other than newline and tab, and those that
    change the reading direction, become ``\\x1b`` or ``\\u202e``.

    Rows, ids and names come from files that others wrote; an escape sequence in them writes to the
    clipboard or hides text.
    """
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class Failed(click.ClickException):
    """A command that ended with a message for the user: ``error: message`` on stderr, then
    ``exit_code``.
    """

    def __init__(self, message: str, code: int, *, as_json: bool = False) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # click reads it from the instance too
        self.as_json = as_json

    def show(self, file: Any = None) -> None:
        print(f"error: {printable(self.message)}", file=sys.stderr)


def _main(run: Callable[..., Any], args: Sequence[str] | None, rest: dict[str, Any]) -> Any:
    """Run click's ``main`` and end the process as every command does.

    An error is a message on stderr and an exit code; with ``--json`` also ``{"error",
    "exit_code"}`` on stdout, so that a program that reads stdout always finds one object.
    """
    global _emitted
    _emitted = False
    given = list(sys.argv[1:] if args is None else args)
    if not rest.pop("standalone_mode", True):
        return run(given, standalone_mode=False, **rest)
    try:
        code = run(given, standalone_mode=False, **rest)
    except click.ClickException as error:
        error.show()
        if not _emitted and ("--json" in given or getattr(error, "as_json", False)):
            emit({"error": error.format_message(), "exit_code": error.exit_code})
        sys.exit(error.exit_code)
    except click.Abort:
        print("error: aborted", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `dspark-tools ... | head`
        sys.stdout = None  # else Python writes what is left of it at exit
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


class Command(peers.Command):
    """A click command with ``-h``, ``--config FILE.yaml``, answers to other projects' flags, and
    errors as in ``_main``.

    A DsparkError becomes its message and exit code, Ctrl-C exit code 1. Other exceptions are bugs
    and keep their trace.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--config"],
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                is_eager=True,
                expose_value=False,
                callback=_read_config,
                metavar="FILE.yaml",
                help=(
                    "Read flags from a file: keys are flag names; the command line takes "
                    "precedence."
                ),
            )
        )

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        return _main(super().main, args, _named(rest, extra))

    def invoke(self, ctx: click.Context) -> Any:
        as_json = bool(ctx.params.get("as_json"))
        try:
            return super().invoke(ctx)
        except DsparkError as error:
            raise Failed(str(error), error.exit_code, as_json=as_json) from error
        except KeyboardInterrupt as error:
            raise Failed(INTERRUPTED, 1, as_json=as_json) from error


class LazyGroup(click.Group):
    """A group whose commands are imported only when they run: ``table`` has name -> (module,
    callback, summary).
    """

    def __init__(self, *args: Any, table: dict[str, tuple[str, str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        return _main(super().main, args, _named(rest, extra))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        module, name, _ = self.table[cmd_name]
        found = getattr(import_module(module), name)
        assert isinstance(found, click.Command), f"{module}.{name} is not a command"
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the summaries of the table, without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in self.table.items()])


def _named(rest: Sequence[Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Name the positional arguments of click's ``main`` behind ``args``."""
    names = ("prog_name", "complete_var", "standalone_mode", "windows_expand_args")
    return {**dict(zip(names, rest, strict=False)), **extra}


def command(name: str | None = None, **attributes: Any) -> Callable[[Callable[..., Any]], Command]:
    """Make a click callback one of our commands; ``attributes`` go to click."""
    return click.command(name, cls=Command, context_settings=SETTINGS, **attributes)


json_flag = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object on stdout, everything else on stderr.",
)
break_lock_flag = click.option(
    "--break-lock",
    is_flag=True,
    help="Take over the lock of a process on another machine, only if that process shows no "
    "sign of life.",
)
version_flag = click.version_option(__version__, prog_name="dspark")


def _read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    """Callback of ``--config``: the file's values become the command's defaults, above recipe and
    preset.
    """
    if value is None:
        return
    try:
        ctx.default_map = config_file.read(value, ctx.command.params, ctx.command_path)
    except DsparkError as error:
        raise click.UsageError(str(error), ctx) from error


def codec_options(callback: Callable[..., Any]) -> Callable[..., Any]:
    """``--codec NAME``, ``--aux-bits N``, ``--last-bits N`` and ``--pack`` for a click callback,
    which receives ``codec`` (a full name; None if none was requested) and ``pack``.
    """

    @functools.wraps(callback)
    def run(
        *args: Any, codec: str | None, aux_bits: int | None, last_bits: int | None, **kwargs: Any
    ) -> Any:
        refuse_two_names(codec, aux_bits, last_bits)
        asked = is_asked(codec, aux_bits, last_bits)
        full = choose_codec(codec, aux_bits, last_bits) if asked else None
        return callback(*args, codec=full, **kwargs)

    named = click.option(
        "--codec",
        metavar="NAME",
        show_default="default",
        help=f"How states are coded: {', '.join(NAMED)} ({NAMES}), or a full name such as "
        "rotated-4-4, rotated-3-4 or rotated-2-4. A corpus too small to calibrate the "
        f"default on gets {FALLBACK}.",
    )
    aux = click.option(
        "--aux-bits",
        type=int,
        help="Bits per value of the aux layers: 16, 8, 4, 3 or 2. Selects a rotated codec.",
    )
    last = click.option(
        "--last-bits",
        type=int,
        help="Bits per value of the last state: 16, 8, 4, 3 or 2. Selects a rotated codec.",
    )
    pack = click.option(
        "--pack",
        type=click.Choice(PACKINGS),
        default=DEFAULT_PACKING,
        help="zstd compresses the codes; none does not: a quarter larger at 4 bits, read ten "
        "times as fast; for 16, 8 and 4 bits only.",
    )
    out: Callable[..., Any] = named(aux(last(pack(run))))
    return out


QUIET_SECONDS = 30.0  # without a terminal: a line this often, and whenever the text changes


@contextmanager
def bar(label: str) -> Iterator[Progress]:
    """Show a progress bar on stderr; yields ``progress(done, total, text)``.

    The bar opens at the first call of ``progress``, so that a refusal is not printed below an empty
    bar. Without a terminal it prints a line now and then.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _Lines(label, console.print)
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn(label),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.description}"),
    )
    view = rich.Progress(*columns, console=console, refresh_per_second=2)
    task = view.add_task("", total=None)

    def progress(done: int, total: int, text: str = "") -> None:
        view.start()
        view.update(task, completed=done, total=total, description=text)

    try:
        yield progress
    finally:
        view.stop()


class _Lines:
    """Progress as lines, for a log: done of total, percentage, time left, text."""

    def __init__(self, label: str, say: Callable[[str], None]) -> None:
        self._label, self._say = label, say
        self._began = self._said = time.monotonic()
        self._first: int | None = None
        self._text = ""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        if self._first is None:  # a resumed run starts in the middle
            self._first, self._began = done, now
        if text == self._text and done < total and now - self._said < QUIET_SECONDS:
            return
        left = ""
        if total > done > self._first:
            seconds = (now - self._began) * (total - done) / (done - self._first)
            left = f", {duration(seconds)} left"
        share = f" ({done / total:.0%})" if total else ""
        self._say(f"{self._label} {done:,}/{total:,}{share}{left}  {text}".rstrip())
        self._said, self._text = now, text


def duration(seconds: float) -> str:
    """Format ``seconds`` in a readable unit: seconds, minutes, hours or days."""
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.1f} seconds"


def fail(message: str, code: int) -> NoReturn:
    """Print ``error: message`` to stderr and exit."""
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def warn(message: str) -> None:
    """Print ``warning: message`` to stderr."""
    print(f"warning: {printable(message)}", file=sys.stderr)


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Print two columns on stdout."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {printable(value)}")


def emit(data: Any) -> None:
    """Print one JSON object on stdout. NaN is refused, since it is not JSON."""
    global _emitted
    _emitted = True
    print(json.dumps(data, allow_nan=False))
