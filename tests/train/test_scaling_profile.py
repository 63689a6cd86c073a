"""Where bench/scaling_profile.py says that a step's GPU does nothing, of made-up kernels."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

MS = 1_000_000


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("scaling_profile")


def test_the_innermost_range_is_what_the_host_does(profile: Any) -> None:
    ranges = profile.Ranges()
    ranges.found = [(30, 40, "reduce"), (10, 50, "backward"), (0, 60, "forward"), (70, 80, "data")]
    name_at = ranges.names()
    want = {0: "forward", 9: "forward", 10: "backward", 29: "backward", 30: "reduce"}
    want |= {39: "reduce", 40: "backward", 50: "forward", 59: "forward", 60: "loop", 69: "loop"}
    want |= {70: "data", 80: "loop", 1000: "loop"}
    assert {at: name_at(at) for at in want} == want


def test_calls_are_followed_and_errors_pass(profile: Any) -> None:
    class Owner:
        def half(self, n: int) -> float:
            return 1 / n

    ranges = profile.Ranges()
    ranges.around("data", Owner, "half")
    assert Owner().half(2) == 0.5
    with pytest.raises(ZeroDivisionError):
        Owner().half(0)
    assert [name for _, _, name in ranges.found] == ["data", "data"]
    assert all(begin <= end for begin, end, _ in ranges.found)


def test_idle_time_is_the_hosts_or_the_devices(profile: Any) -> None:
    """Two steps of 100 ms behind one that the profiler delayed. In each, 10 ms that a kernel waits
    for its launch, 5 ms that one launched long before waits, and a transfer half beside a kernel.
    """
    kernels, marks = [], []
    for at in (0, 100 * MS, 200 * MS):
        kernels += [
            profile.Kernel("mm", at + 10 * MS, at + 50 * MS, at + 9 * MS),
            profile.Kernel("add", at + 55 * MS, at + 75 * MS, at + 20 * MS),
            profile.Kernel("ncclReduce", at + 65 * MS, at + 85 * MS, at + 21 * MS),
            profile.Kernel("adam", at + 85 * MS, at + 100 * MS, at + 22 * MS),
        ]
        marks.append(at + 23 * MS)
    ends = profile.boundaries(kernels, marks)
    assert ends == [100 * MS, 200 * MS, 300 * MS]
    found = profile.figures(
        kernels, ends, lambda t: "forward" if t % (100 * MS) == 9 * MS else "update"
    )
    assert found["steps"] == 2
    assert found["launches"] == 1.0
    assert (found["wall"], found["compute"], found["communication"]) == (100.0, 75.0, 20.0)
    assert found["exposed"] == 10.0
    idle = found["idle"]
    assert (idle["ms"], idle["late"], idle["short"]) == (15.0, 10.0, 0.0)
    assert idle["by_range"] == {
        "forward": {"ms": 10.0, "late": 10.0},
        "update": {"ms": 5.0, "late": 0.0},
    }
    assert idle["longest"][0] == {
        "ms": 10.0, "range": "forward", "late": True, "after": "(begin)", "before": "mm",
    }  # fmt: skip
    assert [step["idle"] for step in found["each"]] == [5.0, 15.0, 15.0]
