"""The commands and their flags as click knows them, for tests of prose and tables that name
them.
"""

from __future__ import annotations

from collections.abc import Iterator

import click


def commands() -> dict[str, click.Command]:
    """Every command by the words that start it: ``dspark-dump``, ``dspark-tools score``, ..."""
    from dspark.dump.cli import main as dump
    from dspark.tools.cli import main as tools
    from dspark.train.cli import main as train

    found: dict[str, click.Command] = {
        "dspark-dump": dump,
        "dspark-train": train,
        "dspark-tools": tools,
    }
    ctx = click.Context(tools)
    for name in tools.list_commands(ctx):
        command = tools.get_command(ctx, name)
        assert command is not None
        found[f"dspark-tools {name}"] = command
    return found


def flags(command: click.Command) -> dict[str, click.Parameter]:
    """Every flag of ``command``, with the parameter behind it."""
    return dict(pairs(command))


def pairs(command: click.Command) -> Iterator[tuple[str, click.Parameter]]:
    # With its settings: click keeps the help option that it makes here.
    for parameter in command.get_params(click.Context(command, **command.context_settings)):
        for flag in (*parameter.opts, *parameter.secondary_opts):
            if flag.startswith("-"):
                yield flag, parameter
