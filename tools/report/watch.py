"""``dspark-tools watch``: watch a dump or a training from its files alone. It opens nothing for
writing and loads no states.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspark.cache.errors import UsageError
from dspark.cache.files.urls import GIVEN, Where, beside
from dspark.cache.shared.command import command, duration, emit, json_flag
from dspark.tools.flags import Finite

if TYPE_CHECKING:
    from rich.console import Group

BLOCKS = "▁▂▃▄▅▆▇█"
LOG_LINES = 5


def look(path: Where) -> dict[str, Any]:
    """Read how far the dump or training at ``path`` is. Raises UsageError if there is neither."""
    from dspark.tools.report.sources import kind_of

    kind = kind_of(path)
    if kind == "store":
        return _dump(path)
    if kind == "run" and isinstance(path, Path):
        return _training(path)
    raise UsageError(
        f"{path}: neither a store nor a draft folder. Give the --output of dspark-dump or "
        "dspark-train."
    )


def _dump(path: Where) -> dict[str, Any]:
    from dspark.tools.stores.info import info

    facts = info(path)
    # Listing an object store for this alone is not worth its requests.
    parts = (path / "parts").iterdir() if isinstance(path, Path) else ()
    times = sorted(p.stat().st_mtime for p in parts if p.is_dir())
    spent = times[-1] - times[0] if len(times) > 1 else 0.0
    # the first part's own time is not known
    share = (len(times) - 1) / len(times) if times else 0.0
    return {
        "kind": "dump",
        "path": str(path),
        "complete": facts["complete"],
        "target": facts["target"],
        "codec": facts["codec"],
        "parts": facts["parts"],
        "samples": facts["samples"],
        "tokens": facts["tokens"],
        "bytes": facts["bytes_on_disk"],
        "tokens_per_second": facts["tokens"] * share / spent if spent else None,
        "seconds_since_last_part": time.time() - times[-1] if times else None,
        "log": _tail(beside(path, ".log")),
    }


def _training(path: Path) -> dict[str, Any]:
    from dspark.tools import records
    from dspark.tools.report.sources import metrics

    rows = list(metrics(path))
    steps = [r for r in rows if not r.get("validation")]
    held = [r for r in rows if r.get("validation")]
    last, judged = (steps or [{}])[-1], (held or [{}])[-1]
    total = records.training(path).get("max_steps")
    step = last.get("step", 0)
    left = None
    if total and last.get("step_ms"):
        left = (total - step) * last["step_ms"] / 1000
    return {
        "kind": "training",
        "path": str(path),
        "complete": bool(total) and step >= total,
        "step": step,
        "max_steps": total,
        "epoch": last.get("epoch"),
        "seconds_left": left,
        "loss": last.get("loss"),
        "tau": last.get("mean_accepted_length"),
        "accept_rate": last.get("accept_rate"),
        "tau_held_out": judged.get("mean_accepted_length"),
        "walk": judged.get("walk"),
        "tokens_per_second": last.get("tokens_per_second"),
        "data_wait_fraction": last.get("data_wait_fraction"),
        "losses": [r["loss"] for r in steps if "loss" in r],
        "taus": [r["mean_accepted_length"] for r in steps if r.get("mean_accepted_length")],
        "log": _tail(path / "train.log"),
    }


def _tail(path: Path) -> list[str]:
    """Return the last lines of a log, as many as a screen shows."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Draw ``values`` as blocks of eight heights, the newest at the right; means if there are more
    than ``width``.
    """
    if not values:
        return ""
    size = -(-len(values) // width)
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    means = [sum(g) / len(g) for g in groups]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] for v in means)


def drawn(data: dict[str, Any]) -> Group:
    """Format the result of ``look``."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(data):
        facts.add_row(Text(name, style="dim"), Text(value))
    state = "  done" if data["complete"] else ""  # before the path, which is cut on a narrow screen
    title = f"{data['kind']}{state}  {data['path']}"
    parts: list[Any] = [Panel(facts, title=title, title_align="left")]
    if data.get("max_steps"):
        bar = Table.grid()  # by itself a bar ends without a new line
        bar.add_row(ProgressBar(total=data["max_steps"], completed=data["step"], width=72))
        parts.append(bar)
    parts += [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in data["log"]]
    return Group(*parts)


def _facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    if data["kind"] == "dump":
        since = data["seconds_since_last_part"]
        return [
            ("target", f"{data['target']}, codec {data['codec']}"),
            (
                "written",
                f"{data['parts']:,} parts, {data['samples']:,} samples, {data['tokens']:,} tokens",
            ),
            ("bytes", f"{data['bytes'] / 1e9:.3f} GB"),
            ("rate", _known(data["tokens_per_second"], "{:,.0f} tokens per second")),
            ("last part", "-" if since is None else f"{duration(since)} ago"),
        ]
    total = f" of {data['max_steps']:,}" if data["max_steps"] else ""
    left = "" if not data["seconds_left"] else f", {duration(data['seconds_left'])} left"
    rates = " ".join(f"{v:.2f}" for v in data["accept_rate"] or [])
    wait = _known(data["data_wait_fraction"], ", {:.0%} of the time waiting for data")
    return [
        ("step", f"{data['step']:,}{total}{left}"),
        ("tau", f"{_known(data['tau'], '{:.2f}')}   {sparkline(data['taus'])}"),
        ("loss", f"{_known(data['loss'], '{:.3f}')}   {sparkline(data['losses'])}"),
        ("accept rate", rates or "-"),
        (
            "held out",
            f"tau {data['tau_held_out']:.2f}, walk {_known(data['walk'], '{:.2f}')}"
            if data["tau_held_out"] is not None
            else "-",
        ),
        (
            "rate",
            _known(data["tokens_per_second"], "{:,.0f} tokens per second") + wait.replace("-", ""),
        ),
    ]


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


@command(
    "watch",
    epilog="""\b
Examples:
  dspark-tools watch ./hs.zarr          a dump: parts, tokens, rate, the end of its log
  dspark-tools watch ./draft            a training: step, tau, losses, what is left
  dspark-tools watch ./draft --once --json
""",
)
@click.argument("path", type=GIVEN)
@click.option("--interval", type=Finite(0.2, 3600), default=2.0, help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Look once and stop, as without a terminal.")
@json_flag
def watch_command(path: Where, interval: float, once: bool, as_json: bool) -> None:
    """Watch a running dump or training from its files, without changing them. Ends with the run, or
    with Ctrl-C.
    """
    from rich.console import Console
    from rich.live import Live

    data = look(path)
    if as_json:
        emit(data)
        return
    console = Console()
    if once or not console.is_terminal:
        console.print(drawn(data))
        return
    try:
        with Live(drawn(data), console=console, auto_refresh=False) as live:
            while not data["complete"]:
                time.sleep(interval)
                data = look(path)
                live.update(drawn(data), refresh=True)
    except KeyboardInterrupt:
        return
