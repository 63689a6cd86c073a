"""Every numeric flag of every ``dspark-tools`` command: what is out of range is one sentence that
names the flag, exit code 2.
"""

from __future__ import annotations

import math

import click
import pytest
from click.testing import CliRunner

from dspark.cache.errors import UsageError
from dspark.cache.shared.process import choose_device
from dspark.tools.cli import main
from dspark.tools.flags import Finite

# Command -> arguments it cannot do without; none of the files is there, so a value that passed
# would be a sentence on them, not on the flag.
NEEDED = {
    "stats": ["no.zarr"],
    "show": ["no.zarr"],
    "estimate": ["--model", "no-model"],
    "score": ["--cache", "no.zarr", "--draft", "no-draft"],
    "recode": ["no.zarr", "to.zarr"],
    "import": ["no", "to.zarr", "--model", "no-model"],
    "compare": ["no.zarr", "no.zarr"],
    "eval": ["--model", "no-model", "--draft", "no-draft", "--data", "no.jsonl"],
    "check": ["no-draft", "--model", "no-model"],
    "calibrate": ["--cache", "no.zarr", "--draft", "no-draft"],
    "watch": ["no-draft"],
    "data": ["no.jsonl"],
}
NOT_FINITE = ("nan", "inf", "-inf")
# (command, flag) -> refused, taken: both at the edges of the range.
RANGES: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("stats", "--limit"): (("-1", "1.5", "x"), ("0", "1")),
    ("compare", "--limit"): (("-1",), ("0", "1")),
    ("show", "INDEX"): (("-1", "x"), ("0",)),
    ("estimate", "--samples"): (("0", "-10", str(10**12 + 1)), ("1", str(10**12))),
    ("estimate", "--mean-tokens"): (("0", "0.9", "-1", "1.1e9", *NOT_FINITE), ("1", "1e9")),
    ("estimate", "--last-share"): (("-0.1", "1.1", "5", *NOT_FINITE), ("0", "1")),
    ("estimate", "--tokens-per-second"): (
        ("0", "0.0009", "-5", "1.1e12", *NOT_FINITE),
        ("0.001", "1e12"),
    ),
    ("estimate", "--gpus"): (("0", "-1", str(10**6 + 1)), ("1", str(10**6))),
    ("estimate", "--trained-per-second"): (
        ("0", "0.0009", "-5", "1.1e12", *NOT_FINITE),
        ("0.001", "1e12"),
    ),
    ("estimate", "--answers"): (("0", "-1", str(10**6 + 1)), ("1", str(10**6))),
    ("estimate", "--max-tokens"): (("1", "-1", str(10**9 + 1)), ("2", str(10**9))),
    ("estimate", "--generated-per-second"): (
        ("0", "0.0009", "-5", "1.1e12", *NOT_FINITE),
        ("0.001", "1e12"),
    ),
    ("score", "--max-anchors"): (("-1",), ("0",)),
    ("score", "--total-seq-len"): (("0", "-1"), ("1",)),
    ("recode", "--workers"): (("0", "-1"), ("1",)),
    ("import", "--mask-token-id"): (("-1",), ("0",)),
    ("import", "--part-tokens"): (("0", "-1"), ("1",)),
    ("import", "--max-dropped"): (("-0.1", "1.1", *NOT_FINITE), ("0", "1")),
    ("eval", "--max-tokens"): (("0", "-1"), ("1",)),
    ("eval", "--temperature"): (("-0.1", "0.009", "1e-40", *NOT_FINITE), ("0", "0.01", "2")),
    ("eval", "--limit"): (("0", "-1"), ("1",)),
    ("eval", "--per-source"): (("0", "-1"), ("1",)),
    ("eval", "--alone"): (("-1",), ("0",)),
    ("eval", "--seed"): (("-1", str(2**32)), ("0", str(2**32 - 1))),
    ("check", "--num-speculative-tokens"): (("0", "-1"), ("1",)),
    ("check", "--limit"): (("0", "-1"), ("1",)),
    ("check", "--max-tokens"): (("0", "-1"), ("1",)),
    ("calibrate", "--max-anchors"): (("-1",), ("0",)),
    ("eval", "--show"): (("-1",), ("0",)),
    ("watch", "--interval"): (("0", "0.1", "4000", *NOT_FINITE), ("0.2", "3600")),
    ("data", "--limit"): (("-1",), ("0",)),
    ("data", "--seq-length"): (("0",), ("1",)),
    ("data", "--min-supervised"): (("0",), ("1",)),
}
DEVICES = [
    ("score", "--device"),
    ("eval", "--device"),
    ("check", "--device"),
    ("calibrate", "--device"),
]
ELSEWHERE = {
    "--aux-bits",
    "--last-bits",
}  # a few values, not a range: dspark.cache.shared.command judges them for every program


def said(command: str, flag: str, value: str) -> click.testing.Result:
    given = ["--", value] if flag == "INDEX" else [f"{flag}={value}"]
    return CliRunner().invoke(main, [command, *NEEDED[command], *given])


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [(*at, value) for at, (refused, _) in RANGES.items() for value in refused]
    + [
        (*at, value)
        for at in DEVICES
        for value in ("foo", "cuda:", "cuda:x", "CPU", "", "cuda:-1", "cpu:0")
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_flag(
    command: str, flag: str, value: str
) -> None:
    result = said(command, flag, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Invalid value for '{flag}'" in result.stderr
    assert "Traceback" not in result.stderr


def verb(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


def parameter(command: str, flag: str) -> click.Parameter:
    (found,) = (p for p in verb(command).params if flag in p.opts or flag == p.name.upper())
    return found


@pytest.mark.parametrize(
    ("command", "flag", "value"),
    [(*at, value) for at, (_, taken) in RANGES.items() for value in taken]
    + [(*at, value) for at in DEVICES for value in ("auto", "cpu", "cuda", "cuda:0", "cuda:15")],
)
def test_the_edges_of_a_range_belong_to_it(command: str, flag: str, value: str) -> None:
    taken = parameter(command, flag).type.convert(value, None, None)
    assert str(taken) == value or float(taken) == float(value)


def test_no_numeric_flag_and_no_device_is_without_a_range() -> None:
    """A flag that is added without one, or that the table above does not know, shows here."""
    numeric, devices = set(), set()
    for command in main.list_commands(click.Context(main)):
        for p in verb(command).params:
            name = p.opts[0] if isinstance(p, click.Option) else p.name.upper()
            if isinstance(p.type, click.types.IntParamType | click.types.FloatParamType):
                assert name in ELSEWHERE or isinstance(p.type, click.IntRange | Finite), (
                    f"{command} {name}"
                )
                numeric.add((command, name))
            if name == "--device" and not isinstance(p.type, click.Choice):
                devices.add((command, name))
    assert {n for n in numeric if n[1] not in ELSEWHERE} == set(RANGES)
    assert devices == set(DEVICES)


def test_a_default_is_in_its_range() -> None:
    for command, flag in RANGES:
        default = parameter(command, flag).default
        if isinstance(default, int | float):
            assert math.isfinite(parameter(command, flag).type.convert(default, None, None))


def test_coding_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: torch sees no CUDA device"):
        choose_device("cuda")
    result = CliRunner().invoke(main, ["recode", "no.zarr", "to.zarr", "--device", "cuda"])
    assert result.exit_code == 2
    assert "--device cuda" in result.stderr
