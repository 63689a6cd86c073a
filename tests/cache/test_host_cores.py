"""Cores that a process may use: the fewest that its binding and its control groups leave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from control_groups import system

from dspark.cache.parts import shard_writer
from dspark.cache.shared import host_cores
from dspark.cache.shared.host_cores import cores
from dspark.dump import workers
from dspark.train.distributed import share_of_cores

V1 = {"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("own", "groups", "expected"),
    [
        pytest.param("0::/\n", {"": {"cpu.max": "600000 100000"}}, 6, id="a container"),
        pytest.param("0::/\n", {"": {"cpu.max": "50000 100000"}}, 1, id="half a core"),
        pytest.param("0::/\n", {"": {"cpu.max": "max 100000"}}, 16, id="no limit"),
        pytest.param("0::/\n", {"": {}}, 16, id="files are missing"),
        pytest.param("0::/\n", {"": {"cpu.max": "9900000 100000"}}, 16, id="more than there are"),
        pytest.param(
            "0::/job/step\n",
            {"job": {"cpu.max": "310000 100000"}, "job/step": {"cpu.max": "max 100000"}},
            4,
            id="a job's parent",
        ),
        pytest.param("5:cpu,cpuacct:/docker/a\n4:memory:/\n", {"cpu": V1}, 3, id="version 1"),
        pytest.param(
            "5:cpu,cpuacct:/\n", {"cpu": V1 | {"cpu.cfs_quota_us": "-1"}}, 16,
            id="version 1, no limit",
        ),
        pytest.param("4:memory:/\n", {"cpu": V1}, 16, id="not in that group"),
    ],
)  # fmt: skip
def test_the_fewest_count(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    groups: dict[str, dict[str, str]],
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    for name in host_cores.OPENMP:
        monkeypatch.delenv(name, raising=False)
    assert cores(root=system(tmp_path, own, groups)) == expected


def test_processes_and_threads_are_as_many_as_the_cores_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight cores of a large machine: two writers of four threads each, not eight of thirty-two."""
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(shard_writer, "_processes", 1)
    found = workers.default_workers("cuda")
    try:
        shard_writer.share_cores(found)
        assert (found, shard_writer._threads()) == (2, 4)
    finally:
        shard_writer.share_cores(1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="nothing is bound to cores here")
def test_a_bound_process_uses_its_cores() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_thread_that_openmp_binds_says_nothing_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_cores, "groups", lambda controller, root: iter([]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert cores() == 1
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    assert cores() == 16


def test_ranks_share_the_cores_of_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bound to the same ones (torchrun), or each to its own (a scheduler's tasks)."""
    monkeypatch.setattr(host_cores, "groups", lambda controller, root: iter([]))
    same, a, b = (frozenset(range(i, j)) for i, j in ((0, 16), (0, 8), (8, 16)))
    assert share_of_cores("one", 2, [("one", same), ("one", same), ("two", a)]) == 8
    assert share_of_cores("one", 2, [("one", a), ("one", b)]) == 8
    assert share_of_cores("two", 1, [("one", same), ("one", same), ("two", a)]) == 8
    assert share_of_cores("name of many", 2, [("name of many", same)] * 4) == 8
    assert share_of_cores("one", 4, [("one", frozenset({3}))] * 4) == 1
