"""Answer a flag or a configuration key of another project with the one that does the same here.

``peer_flags.json`` beside this file is the table: for each program of speculators, SpecForge,
DeepSpec, AutoModel and TorchSpec, what its flags are called here. docs/migrate.md is made from the
same table. A command takes part by its class ``Command``, and the table is read only when an option
is unknown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

TABLE = Path(__file__).with_name("peer_flags.json")
SHOWN = 2  # programs named in one answer


def table() -> dict[str, Any]:
    """``{program: {"command": ours, "flags": {theirs: [ours, note]}}}``; ours is "" where there is
    none.
    """
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


def as_flag(name: str) -> str:
    """``training.num_anchors``, ``--num_anchors`` and ``--no-num-anchors`` as ``--num-anchors``."""
    bare = name.rsplit(".", 1)[-1].lstrip("-").replace("_", "-")
    return "--" + bare.removeprefix("no-")


def sentence(ours: str, note: str) -> str:
    """Say what replaces a flag: the command with its flags, the note, or both."""
    return f"{ours} ({note})" if ours and note else ours or note


def answer(name: str, command: str) -> str | None:
    """Say what ``name``, a flag or a configuration key of another project, is called here.

    ``command`` is our command that received it, such as ``dspark-train``: programs that do the same
    job come first. None if no project in the table knows the name.
    """
    wanted = as_flag(name)
    found: list[tuple[bool, str, str]] = []
    for program, entry in table().items():
        for theirs, (ours, note) in entry["flags"].items():
            if as_flag(theirs) == wanted:
                found.append((entry["command"] != command, program, sentence(ours, note)))
    if not found:
        return None
    # stable sort: keeps the order of the table within each half
    found.sort(key=lambda each: each[0])
    best = [(program, text) for other, program, text in found if other == found[0][0]]
    by_text: dict[str, list[str]] = {}
    for program, text in best:
        by_text.setdefault(text, []).append(program)
    lines = [f"{', '.join(programs)}: {text}" for text, programs in list(by_text.items())[:SHOWN]]
    return f"{name} is a flag of\n  " + "\n  ".join(lines) + "\nMore: docs/migrate.md."


def explained(error: click.NoSuchOption) -> click.NoSuchOption:
    """Return ``error`` with the answer as its text, or unchanged if there is none."""
    started = error.ctx.command_path if error.ctx else ""
    known = answer(error.option_name, started.replace("python -m dspark.", "dspark-"))
    if known is None:
        return error
    return click.NoSuchOption(
        error.option_name, f"No such option: {error.option_name}\n{known}", ctx=error.ctx
    )


class Command(click.Command):
    """A command that recognises flags of other projects."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            error.ctx = error.ctx or ctx
            raise explained(error) from None
