"""Files beside a report: refused before the work where they cannot be written, and nothing is left
by the asking.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import dspark.tools.judge.calibrate
import dspark.tools.judge.eval
import dspark.tools.report.sources
from dspark.cache.errors import DataError
from dspark.tools.cli import main
from dspark.tools.outputs import OutputFile, refuse_unwritable, save

# None of these is there: a command that got as far would say so, and not speak of the flag.
NEEDED = {
    "eval": ["--model", "no-model", "--draft", "no-draft", "--data", "no.jsonl"],
    "calibrate": ["--cache", "no.zarr", "--draft", "no-draft"],
    "report": ["."],
}
FLAGS = [
    ("eval", "--output"), ("eval", "--markdown"), ("eval", "--answers"), ("calibrate", "--plot"),
    ("report", "--output"),
]  # fmt: skip
# A folder that takes no files even from root stands for one without permission.
UNWRITABLE = {
    "below a file": "notes/out.svg",
    "a folder": "folder.svg",
    "a device": "/dev/null",
    "no permission": "/proc/out.svg",
    "in a new folder there": "/proc/new/out.svg",
    "too long": f"{'x' * 250}.svg",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "folder.svg").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def left(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize(("command", "flag"), FLAGS)
@pytest.mark.parametrize("path", UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    here: Path, command: str, flag: str, path: str
) -> None:
    before = left(here)
    result = CliRunner().invoke(main, [command, *NEEDED[command], flag, path])
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Invalid value for '{flag}'" in result.stderr
    assert "Choose another path" in " ".join(result.stderr.split())
    assert left(here) == before


def test_every_flag_that_names_a_file_to_write_is_one_of_these() -> None:
    found = {
        (command, p.opts[0])
        for command in main.table
        for p in main.get_command(click.Context(main), command).params
        if isinstance(p.type, OutputFile) or (isinstance(p.type, click.Path) and not p.type.exists)
    }
    assert found == set(FLAGS)
    for command, flag in FLAGS:
        assert any(
            flag in p.opts and isinstance(p.type, OutputFile)
            for p in main.get_command(click.Context(main), command).params
        )


@pytest.mark.parametrize("path", ["out.svg", "new/folders/out.svg", "old.svg"])
def test_one_that_can_be_written_is_touched_only_at_the_end(
    here: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (here / "old.svg").write_text("old")
    before = left(here)

    def fails(*_: object, **__: object) -> None:
        raise DataError("the last prompt is malformed")

    monkeypatch.setattr(dspark.tools.judge.eval, "run", fails)
    monkeypatch.setattr(dspark.tools.judge.calibrate, "calibrate", fails)
    monkeypatch.setattr(dspark.tools.report.sources, "read", fails)
    for command, flag in FLAGS:
        result = CliRunner().invoke(main, [command, *NEEDED[command], flag, path])
        assert (result.exit_code, "malformed" in result.stderr) == (1, True), result.output
    assert left(here) == before
    refuse_unwritable(Path(path))
    save(Path(path), b"new")
    assert left(here) == before | {str(p): b"" for p in list(Path(path).parents)[:-1]} | {
        path: b"new"
    }


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = [*NEEDED["calibrate"], "--plot"]
    result = CliRunner().invoke(main, ["calibrate", *plot, "out.jpg"])
    assert (result.exit_code, "ends with .png or .svg" in result.stderr) == (2, True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(main, ["calibrate", *plot, "out.svg"])
    assert (result.exit_code, "matplotlib" in result.stderr) == (2, True)
