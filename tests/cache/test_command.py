"""What every command does alike, seen from outside: config files, JSON errors, interrupts,
versions, progress without a terminal.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from dspark import __version__
from dspark.cache.errors import DataError, UsageError
from dspark.cache.shared import config_file
from dspark.cache.shared.command import _Lines, command, duration, emit, json_flag
from dspark.dump.cli import main as dump
from dspark.tools.cli import VERBS
from dspark.tools.cli import main as tools
from dspark.train.cli import config_of
from dspark.train.cli import main as train


def echo() -> click.Command:
    """A command that prints what it was called with."""

    @command("echo")
    @click.argument("name", required=True)
    @click.option("--count", type=click.IntRange(1, 9), default=1)
    @click.option("--ids")
    @click.option("--spec")
    @click.option("--pair", nargs=2, type=float)
    @click.option("--data", multiple=True)
    @click.option("--think/--no-think", default=None)
    @json_flag
    def body(as_json: bool, **flags: Any) -> None:
        emit(flags)

    return body


def called(tmp_path: Path, text: str, *args: str) -> Any:
    (tmp_path / "c.yaml").write_text(text)
    return CliRunner().invoke(echo(), ["--config", str(tmp_path / "c.yaml"), *args])


def test_a_config_file_is_typed_like_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    text = (
        "name: a\ncount: 3\nids: [7, 22]\nspec: {ce: 0.1}\npair: [0.9, 0.95]\ndata: [x, "
        "y]\nthink: false\n"
    )
    expected = {
        "name": "a",
        "count": 3,
        "ids": "7,22",
        "spec": '{"ce": 0.1}',
        "pair": [0.9, 0.95],
        "data": ["x", "y"],
        "think": False,
    }
    assert json.loads(called(tmp_path, text).stdout) == expected
    over = json.loads(called(tmp_path, text, "b", "--count", "4", "--data", "z", "--think").stdout)
    assert over == expected | {"name": "b", "count": 4, "data": ["z"], "think": True}
    assert json.loads(called(tmp_path, "name: a\ncount: null\n").stdout)["count"] == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\ncuont: 3", "unknown key 'cuont'; did you mean count?"),
        ("name: a\nzzz: 3", "known: count, data"),
        ("name: a\ncount: 10", "Invalid value for '--count'"),
        ("name: a\ncount: {a: 1}", "Invalid value for '--count'"),
        ("name: a\nthink: maybe", "think is a switch: expected true or false"),
        ("name: a\ncount: true", "expected text or a number"),
        ("- a", "expected flag names with their values, found a list"),
        ("a: [", "not YAML"),
        ("count: 2", "Missing argument 'NAME'"),
        ("name: a\nconfig: b.yaml", "unknown key 'config'"),
    ],
)
def test_a_wrong_config_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    result = called(tmp_path, text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    told = called(tmp_path, text, "--json")
    assert says in json.loads(told.stdout)["error"]
    assert json.loads(told.stdout)["exit_code"] == told.exit_code == 2


def test_a_key_of_another_project_is_answered(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("cache: x\ntraining.num_epochs: 3\n")
    call = ["--config", str(tmp_path / "c.yaml")]
    result = CliRunner().invoke(train, call, prog_name="dspark-train")
    assert result.exit_code == 2
    assert "dspark-train --epochs" in result.stderr


def test_what_a_dump_saves_is_accepted_back(tmp_path: Path) -> None:
    from dspark.dump.config import DumpConfig

    config = DumpConfig(
        model="m", output=tmp_path / "x.zarr", layers=(1, 4), limit=3, overwrite=True
    )
    (tmp_path / "d.yaml").write_bytes(config_file.resolved(_fields(config), "dspark-dump"))
    context = dump.make_context("dspark-dump", ["--config", str(tmp_path / "d.yaml")])
    for name in ("model", "layers", "output", "limit", "aux_bits", "seq_length", "max_dropped"):
        assert context.params[name] == getattr(config, name), name
    assert context.params["overwrite"] is False  # of one call, not of the dump
    saved = yaml.safe_load((tmp_path / "d.yaml").read_text())
    assert {"resume", "overwrite", "dry-run"}.isdisjoint(saved)


def _fields(config: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(config)


def test_what_a_training_saves_is_accepted_back(tmp_path: Path) -> None:
    words = [
        "--cache",
        "x.zarr",
        "--recipe",
        "none",
        "--betas",
        "0.8",
        "0.9",
        "--no-compile",
        "--lr",
        "1e-4",
    ]
    config = config_of([*words, "--loss-fn", '{"ce":1}', "--max-steps", "7"])
    (tmp_path / "t.yaml").write_bytes(
        config_file.resolved(config.flags() | {"recipe": "none"}, "x")
    )
    assert config_of(["--config", str(tmp_path / "t.yaml")]) == config


def test_errors_with_json_are_an_object_on_stdout(tmp_path: Path) -> None:
    for name, call, code in (
        (tools, ["info", str(tmp_path / "none.zarr")], 2),
        (tools, ["info"], 2),
        (tools, ["inf"], 2),
        (tools, ["stats", "x", "--limit", "-1"], 2),
        (dump, ["--data", "x"], 2),
        (train, ["--cache", str(tmp_path / "none.zarr")], 2),
        (train, ["--cache", "x", "--resume", "--overwrite"], 2),
    ):
        result = CliRunner().invoke(name, [*call, "--json"])
        found = json.loads(result.stdout)
        assert set(found) == {"error", "exit_code"}, call
        assert found["exit_code"] == result.exit_code == code, call
        assert found["error"], call
        assert found["error"].splitlines()[0] in result.stderr, call
        assert CliRunner().invoke(name, call).stdout == ""


def test_a_failure_of_the_work_has_its_own_code() -> None:
    for error, code in ((DataError("row 3"), 1), (UsageError("flag"), 2)):

        @command("x")
        @json_flag
        def body(as_json: bool, error: Exception = error) -> None:
            raise error

        result = CliRunner().invoke(body, ["--json"])
        assert json.loads(result.stdout) == {"error": str(error), "exit_code": code}
        assert (result.exit_code, result.stderr) == (code, f"error: {error}\n")


def test_an_interrupt_is_a_line_and_an_exit_code() -> None:
    def body(**flags: bool) -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(command("x")(body), [])
    assert (result.exit_code, result.stderr) == (1, "error: interrupted.\n")


@pytest.mark.parametrize("name", [dump, train, tools])
def test_version_and_short_help(name: click.Command) -> None:
    assert __version__ in CliRunner().invoke(name, ["--version"]).stdout
    short = CliRunner().invoke(name, ["-h"])
    assert (short.exit_code, short.stdout) == (0, CliRunner().invoke(name, ["--help"]).stdout)


def test_every_verb_explains_itself_without_torch() -> None:
    """In one process of its own: what a verb's help imports, every later one has too."""
    code = (
        "import sys; from click.testing import CliRunner; from dspark.tools.cli import main, "
        "VERBS\n"
        "for verb in VERBS:\n"
        "    out = CliRunner().invoke(main, [verb, '-h'])\n"
        "    heavy = [m for m in ('torch', 'zarr', 'transformers', 'matplotlib') if m in "
        "sys.modules]\n"
        "    assert out.exit_code == 0 and '--config' in out.stdout and not heavy, (verb, heavy, "
        "out.output)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    help_of_all = CliRunner().invoke(tools, ["-h"]).stdout
    assert all(verb in help_of_all for verb in VERBS)


@pytest.mark.parametrize("package", ["dump", "train", "tools"])
def test_packages_run_as_modules(package: str) -> None:
    call = [sys.executable, "-m", f"dspark.{package}", "--version"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert __version__ in done.stdout


def test_progress_without_a_terminal_is_a_line_when_there_is_news() -> None:
    said: list[str] = []
    progress = _Lines("train", said.append)
    for step in range(1, 101):
        progress(step, 100, f"loss {step // 50}")
    assert [line.split("  ")[-1] for line in said] == ["loss 0", "loss 1", "loss 2"]
    assert said[1].startswith("train 50/100 (50%), ")
    assert " left" in said[1]


def test_durations_have_the_unit_a_person_would_use() -> None:
    assert [duration(s) for s in (3.11, 42, 200, 8000, 200000)] == [
        "3.1 seconds", "42 seconds", "3.3 minutes", "2.2 hours", "2.3 days",
    ]  # fmt: skip
