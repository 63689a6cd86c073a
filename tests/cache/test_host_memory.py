"""Host memory that may still be taken: the least that the machine and its control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest
from control_groups import system

from dspark.cache.shared.host_memory import available

GROUP2 = {"memory.max": "4000", "memory.current": "3000", "memory.stat": "inactive_file 500"}
GROUP1 = {
    "memory.limit_in_bytes": "4000",
    "memory.usage_in_bytes": "3000",
    "memory.stat": "inactive_file 7\ntotal_inactive_file 500\ntotal_active_file 200",
}
NONE1 = {**GROUP1, "memory.limit_in_bytes": str(2**63 - 4096)}
MACHINE = 9 * 1024


@pytest.mark.parametrize(
    ("own", "groups", "expected"),
    [
        pytest.param("0::/\n", {"": GROUP2}, 1500, id="a container"),
        pytest.param("0::/job/step\n", {"job": GROUP2, "job/step": {}}, 1500, id="a job's parent"),
        pytest.param("0::/../other\n", {"": GROUP2}, 1500, id="outside the namespace"),
        pytest.param("0::/\n", {"": {**GROUP2, "memory.max": "max"}}, MACHINE, id="no limit"),
        pytest.param("0::/\n", {"": {"memory.max": "4000"}}, MACHINE, id="files are missing"),
        pytest.param(
            "0::/\n",
            {"": {**GROUP2, "memory.stat": "active_file 1900\ninactive_file 1000"}},
            3900,
            id="full of cached files that were read twice",
        ),
        pytest.param("0::/\n", {"": {**GROUP2, "memory.current": "5000"}}, 0, id="above it"),
        pytest.param(
            "5:cpu,cpuacct:/a\n4:memory:/docker/a\n0::/\n", {"memory": GROUP1}, 1700, id="version 1"
        ),
        pytest.param(
            "4:memory:/slurm/job\n", {"memory": NONE1, "memory/slurm/job": GROUP1}, 1700,
            id="version 1, a job",
        ),
        pytest.param("4:memory:/\n", {"memory": NONE1}, MACHINE, id="version 1, no limit"),
    ],
)  # fmt: skip
def test_the_least_limit_counts(
    tmp_path: Path, own: str, groups: dict[str, dict[str, str]], expected: int
) -> None:
    assert available(system(tmp_path, own, groups)) == expected


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert available(tmp_path) is None
