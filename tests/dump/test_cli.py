"""The command: flags, exit codes, what goes to stdout, and how little --help imports."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dspark.dump.cli import main
from dump_targets import CHATML, chat, save_target


def run(*words: str) -> Any:
    return CliRunner().invoke(main, list(words))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom dspark.dump.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'zarr', 'transformers', 'vllm', 'rich'} & "
        "set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "HEAVY []" in out
    for flag in (
        "--model",
        "--target-layer-ids",
        "--assistant-pattern",
        "--dry-run",
        "Examples:",
        "default: 32768 on cpu",
    ):
        assert flag in out


def test_the_plan_of_a_preset_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    out = run("--model", "zai-org/GLM-5.2-FP8", "--dry-run", "--json", "--aux-bits", "16")
    assert out.exit_code == 0, out.output
    plan = json.loads(out.stdout)
    assert plan["layers"] == [7, 22, 38, 54, 69]
    assert plan["target_layer_ids"] == [8, 23, 39, 55, 70]
    assert (plan["seq_length"], plan["data"]) == (8192, "mgoin/GLM-5.2-FP8-magpie-ultrachat")
    assert "<\\|assistant\\|>" in plan["assistant_pattern"]
    assert 0 < plan["bytes_per_token"] <= 5 + 2 * 6144 * 6
    assert "--target-layer-ids 8,23,39,55,70" in out.stderr


def test_for_picks_layers_that_serve_all_named_types() -> None:
    out = run("--model", "zai-org/GLM-5.2-FP8", "--dry-run", "--json", "--for", "spd,dspark,eagle3")
    assert out.exit_code == 0, out.output
    plan = json.loads(out.stdout)
    assert plan["layers"] == [7, 22, 25, 38, 51, 54, 69, 77]
    assert plan["drafts"] == {
        "spd": [25, 51, 77],
        "dspark": [7, 22, 38, 54, 69],
        "eagle3": [7, 38, 69],
    }
    assert "dspark: 7,22,38,54,69 (dspark-train --layers 7,22,38,54,69)" in out.stderr
    wrong = run(
        "--model", "zai-org/GLM-5.2-FP8", "--dry-run", "--layers", "3,9", "--for", "dspark,peagle"
    )
    assert wrong.exit_code == 2
    assert "lacks [1, 38, 74]" in wrong.stderr
    assert "eagle4: expected some of" in run("--model", "m", "--for", "eagle4").stderr


def test_dry_run_estimates_and_writes_nothing(
    tiny: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    data = write_rows([chat("u: hi", "a: yes it is")] * 9)
    out = run(
        "--model",
        str(tiny),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "o"),
        "--dry-run",
        "--json",
        "--target-layer-ids",
        "1 3",
    )
    assert out.exit_code == 0, out.output
    plan = json.loads(out.stdout)
    assert (plan["rows"], plan["layers"]) == (9, [0, 2])
    assert plan["fixed_bytes"] > 2 * 4 * 64 * 304 + plan["file_bytes"]  # F32, and a head
    assert 0 < plan["bytes"] - plan["fixed_bytes"] <= plan["tokens"] * plan["bytes_per_token"]
    assert plan["fits"]
    assert "scaled from SmolLM2's" in out.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_json_is_all_that_is_on_stdout(
    tiny: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    data = write_rows([chat("u: hi", "a: yes it is")] * 3)
    out = run("--model", str(tiny), "--data", str(data), "--output", str(tmp_path / "o"), "--json")
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["samples"] == 3
    again = run(
        "--model",
        str(tiny),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "o"),
        "--json",
        "--resume",
    )
    assert again.exit_code == 0
    assert json.loads(again.stdout)["new_tokens"] == 0
    assert "nothing to resume" in again.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--data", "none.jsonl"], 2, "--data none.jsonl: no such file"),
        (["--data", "ROWS", "--layers", "1", "--target-layer-ids", "2"], 2, "not both"),
        (["--data", "ROWS", "--layers", "9"], 2, "9 is out of range"),
        (["--data", "ROWS", "--layers", "x"], 2, "expected layer numbers"),
        (["--data", "ROWS", "--aux-bits", "5"], 2, "no codec stores 5 bits"),
        (["--data", "ROWS", "--aux-bits", "4", "--codec", "rotated-2-4"], 2, "one or the other"),
        (["--data", "ROWS", "--last-bits", "4", "--codec", "default"], 2, "one or the other"),
        (["--data", "ROWS", "--codec", ""], 2, "no such codec"),
        (["--data", "ROWS", "--codec", "klt-\u0661-1"], 2, "expected klt-A-L"),
        (["--data", "ROWS", "--seq-length", "9999"], 2, "takes at most 512 tokens"),
        (["--data", "ROWS", "--mask-token-id", "99999"], 2, "outside the target's vocabulary"),
        (["--data", "ROWS", "--assistant-pattern", "x"], 2, "has no group"),
        ([], 2, "--data is needed"),
        (["--data", "BAD"], 1, "bad.jsonl:1: not JSON"),
    ],
)
def test_errors_are_one_message_and_a_code(
    words: list[str],
    code: int,
    message: str,
    tiny: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
) -> None:
    rows = {
        "ROWS": write_rows([chat("u: hi", "a: yes it is")]),
        "BAD": write_rows(["{"], "bad.jsonl"),
    }
    out = run(
        "--model", str(tiny), "--output", str(tmp_path / "o"), *[str(rows.get(w, w)) for w in words]
    )
    assert out.exit_code == code
    assert message in out.stderr.replace("\n", " ")
    assert "Traceback" not in out.output
    assert out.stdout == ""
    assert not (tmp_path / "o").exists()


def test_no_config_no_template(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    data = str(write_rows([chat("u: hi", "a: yes it is")]))
    (tmp_path / "empty").mkdir()
    out = run("--model", str(tmp_path / "empty"), "--data", data, "--output", str(tmp_path / "o"))
    assert out.exit_code == 2
    assert "no config could be read" in out.stderr
    save_target(tmp_path / "base", template=None, layers=1)
    out = run("--model", str(tmp_path / "base"), "--data", data, "--output", str(tmp_path / "o"))
    assert out.exit_code == 2
    assert "has no chat template" in out.stderr
    assert CHATML
