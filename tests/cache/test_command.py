"""What every command does alike, seen from outside: the words and the exit code of an interrupt."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from dspark.cache.shared.command import guarded


@pytest.mark.parametrize("resumable", [True, False])
def test_an_interrupt_speaks_of_resume_only_where_there_is_one(resumable: bool) -> None:
    def body(**flags: bool) -> None:
        raise KeyboardInterrupt

    command = click.command()(guarded(body))
    if resumable:
        command = click.option("--resume", is_flag=True)(command)
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: interrupted.")
    assert ("--resume" in result.stderr) == resumable
