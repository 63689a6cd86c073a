"""Compare several drafts in one table of what ``eval`` or ``score`` found for each on the same
prompts or samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Columns = Mapping[str, Callable[[Result], str]]


def names(drafts: Sequence[str]) -> list[str]:
    """Return short, distinct names of folders: the last part of each, or the whole path if two are
    the same.
    """
    short = [Path(draft).name or draft for draft in drafts]
    return [s if short.count(s) == 1 else draft for s, draft in zip(short, drafts, strict=True)]


def _number(name: str, digits: int = 3, unit: str = "") -> Callable[[Result], str]:
    return lambda result: "-" if result.get(name) is None else f"{result[name]:.{digits}f}{unit}"


def _with_error(result: Result) -> str:
    error = result["mean_accepted_length_se"]
    return _number("mean_accepted_length")(result) + ("" if error is None else f" ± {error:.3f}")


def _rates(result: Result) -> str:
    return " ".join(f"{x:.2f}" for x in result["accept_rate"] or []) or "-"


def _lossless(result: Result) -> str:
    return {True: "yes", False: "NO", None: "-"}[result["lossless"]]


def _type(result: Result) -> str:
    return str(result["speculator_type"])


EVAL: Columns = {
    "type": _type,
    "block": lambda r: str(r["block_size"]),
    "accepted length": _with_error,
    "accept rate by position": _rates,
    "tokens/s": _number("tokens_per_second", 1),
    "speed-up": _number("speedup", 2, "x"),
    "theoretical": lambda r: (
        _number("theoretical_gain", 2, "x")(r) if not r.get("stages") else _piped(r)
    ),
    "lossless": _lossless,
}
SCORE: Columns = {
    "type": _type,
    "walk, greedy": _number("walk_greedy"),
    "walk, T = 1": _number("walk"),
    "tau": _number("mean_accepted_length"),
    "accept rate by slot": _rates,
    "tokens per step x stages": _number("equivalent_accept_length"),
}


def _piped(result: Result) -> str:
    gain = result["theoretical_gain"]  # a share, of a head beside a pipeline
    return "-" if gain is None else f"{1 + gain:.2f}x of {result['stages']} stages"


def cells(
    drafts: Sequence[str], results: Sequence[Result], columns: Columns
) -> list[tuple[str, ...]]:
    """Return the header and a line per draft; columns in which no draft has a value are left
    out.
    """
    body = [
        [name, *(cell(r) for cell in columns.values())]
        for name, r in zip(names(drafts), results, strict=True)
    ]
    head = ["draft", *columns]
    used = [i for i in range(len(head)) if any(row[i] != "-" for row in body)]
    return [tuple(row[i] for i in used) for row in (head, *body)]


def markdown(rows: Sequence[Sequence[str]], said: str) -> str:
    """Format the table in Markdown, with a line on how it was measured."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + f"\n{said}\n"


def show(rows: Sequence[Sequence[str]], said: str) -> None:
    """Print the table on stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console, table = Console(), Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in rows[0]:
        table.add_column(name)
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    console.print(said, highlight=False)
