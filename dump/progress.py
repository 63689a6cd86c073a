"""What a dump prints while it runs: lines and a progress bar on stderr, and the same lines in a log
file beside the store.
"""

from __future__ import annotations

import datetime
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from dspark.cache.files.atomic import write_errors
from dspark.cache.shared.command import printable

log = logging.getLogger("dspark.dump")
QUIET_SECONDS = 30.0  # without a terminal, print a line this often


class Bar:
    """Progress over source rows, with the rate in tokens."""

    def __init__(self, bar: Progress, task: TaskID, say: Display, rows: int | None) -> None:
        self._bar, self._task, self._display, self._rows = bar, task, say, rows
        self._first: int | None = None
        self._first_at = 0.0
        self._tokens = 0
        self._began = self._said = time.monotonic()

    @property
    def rate(self) -> float:
        return self._tokens / max(time.monotonic() - self._began, 1e-9)

    def tokens(self, n: int) -> None:
        """Count ``n`` more captured tokens."""
        self._tokens += n
        self._bar.update(self._task, rate=f"{self._tokens:,} tokens, {self.rate:,.0f}/s")

    def _left(self, row_stop: int) -> str:
        """Say how long the rows after ``row_stop`` will take at the speed so far."""
        if self._first is None:
            self._first = (
                # a resumed dump begins in the middle; the first part of a run is not counted
                row_stop
            )
            self._first_at = time.monotonic()
            return ""
        done = row_stop - self._first
        if self._rows is None or done <= 0:
            return ""
        seconds = (self._rows - row_stop) * (time.monotonic() - self._first_at) / done
        return f", {datetime.timedelta(seconds=round(max(seconds, 0)))} left"

    def part(self, index: int, row_stop: int) -> None:
        """Report that part ``index``, up to row ``row_stop``, is with the writer."""
        self._bar.update(self._task, completed=row_stop)
        line = (
            f"part {index}: up to row {row_stop:,}; {self._tokens:,} tokens, {self.rate:,.0f} "
            f"per second{self._left(row_stop)}"
        )
        log.info(line)
        now = time.monotonic()
        if not self._display.console.is_terminal and now - self._said > QUIET_SECONDS:
            self._display.console.print(line)
            self._said = now


class Display:
    """Prints lines on stderr and in the log."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        line = printable(line)
        log.info(line)
        self.console.print(line, markup=False)

    @contextmanager
    def progress(self, rows: int | None) -> Iterator[Bar]:
        """Show a bar over ``rows`` rows (None = unknown)."""
        columns = (
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            yield Bar(bar, bar.add_task("rows", total=rows, rate=""), self, rows)


class _LogFile(logging.FileHandler):
    """A log that may be on the disk that has just become full: it is then incomplete, which is said
    once, and the store's own error is the one that ends the dump.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self._lost = False

    def handleError(self, record: logging.LogRecord) -> None:  # logging's name
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._note(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._note(error)

    def _note(self, error: OSError) -> None:
        if not self._lost:
            name = printable(self.baseFilename)
            sys.stderr.write(f"note: {name} is incomplete: {error.strerror or error}\n")
        self._lost = True


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append what the dump logs to ``path``."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    heard = {x: x.level for x in (log, logging.getLogger("dspark.cache"))}
    for one in heard:
        one.setLevel(logging.INFO)
        one.addHandler(handler)
    try:
        yield
    except BaseException as error:
        log.error("stopped by %s: %s", type(error).__name__, printable(str(error)))
        raise
    finally:
        for one, before in heard.items():
            one.removeHandler(handler)
            one.setLevel(before)
        handler.close()
