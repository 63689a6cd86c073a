"""A training as two nodes of torchrun on loopback (gloo, float32): its loss curve is one process's;
a node is killed and the run is resumed with another count.

    python tests/campaign/nodes.py

Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from stores import write_store

STEPS = 24


def flags(store: Path, output: Path) -> list[str]:
    return [
        *(
            "-m",
            "dspark.train",
            "--cache",
            str(store),
            "--output",
            str(output),
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ),
        *(
            "--num-layers",
            "1",
            "--block-size",
            "3",
            "--markov-rank",
            "4",
            "--max-anchors",
            "16",
            "--total-seq-len",
            "256",
        ),
        *(
            "--rows-per-step",
            "2",
            "--max-steps",
            str(STEPS),
            "--log-every",
            "1",
            "--val-fraction",
            "0",
            "--epochs",
            "50",
        ),
        *("--checkpoint-freq", "0.5", "--workers", "0"),
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def nodes(
    count: int, per_node: int, args: list[str], folder: Path
) -> list[subprocess.Popen[bytes]]:
    """Start the nodes; each has its own torchrun."""
    port = free_port()
    out = []
    for rank in range(count):
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            str(count),
            "--node-rank",
            str(rank),
        ]
        launcher += [
            "--nproc-per-node",
            str(per_node),
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            str(port),
        ]
        log = open(folder / f"node-{rank}.log", "ab")  # noqa: SIM115  # the child's
        out.append(
            subprocess.Popen([*launcher, *args], stdout=log, stderr=log, start_new_session=True)
        )
    return out


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def worst(a: dict[int, float], b: dict[int, float]) -> float:
    assert sorted(a) == sorted(b) == list(range(1, STEPS + 1)), (sorted(a), sorted(b))
    return max(abs(a[step] - b[step]) / abs(a[step]) for step in a)


def killed(running: list[subprocess.Popen[bytes]], output: Path) -> int:
    """Kill all of the second node once a checkpoint is there; returns the first node's exit
    code.
    """
    while not list((output / "checkpoints").glob("[!.]*")):
        assert all(node.poll() is None for node in running), "ended before its first checkpoint"
        time.sleep(0.05)
    own = subprocess.run(
        ["pgrep", "-P", str(running[1].pid)], capture_output=True, text=True, check=False
    )
    for pid in (running[1].pid, *map(int, own.stdout.split())):
        os.kill(pid, signal.SIGKILL)
    running[1].wait()
    return running[0].wait(180)


def main() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        store = folder / "hs.zarr"
        write_store(store, [60, 80, 100, 120, 90, 70, 110, 130, 50, 75] * 2)
        one = folder / "one"
        subprocess.run([sys.executable, *flags(store, one)], check=True, capture_output=True)
        out: dict[str, Any] = {}
        two = folder / "two"
        for node in nodes(2, 1, flags(store, two), folder):
            assert node.wait(300) == 0, (folder / "node-0.log").read_text()[-2000:]
        out["two nodes against one process, worst relative difference"] = worst(
            losses(one), losses(two)
        )
        log = next(two.glob("*.log")).read_text()
        out["log"] = next(line for line in log.splitlines() if "rank 0" in line)[-80:]
        cut = folder / "cut"
        out["first node's exit code when the second is killed"] = killed(
            nodes(2, 1, flags(store, cut), folder), cut
        )
        out["steps before"] = len(losses(cut))
        subprocess.run(
            [sys.executable, *flags(store, cut), "--resume"], check=True, capture_output=True
        )
        out["resumed on one process, worst relative difference"] = worst(losses(one), losses(cut))
        return out


if __name__ == "__main__":
    print(json.dumps(main()))
