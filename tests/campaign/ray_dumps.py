"""Dumps of a tiny target by ``--ray 2`` and ``--ray 3`` on this machine, whose processes are killed
(kill -9) at random moments. Each store must be that of one writer; more are made until KILLS have
been.

    python tests/campaign/ray_dumps.py [KILLS] [SEED]

Needs the package ray. Prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import ray
from dump_runs import files
from dumps import whole_dump

from dspark.dump import actors
from dspark.dump.progress import Display
from dspark.dump.run import dump

TASK = "ray::run_shard"


def working() -> list[int]:
    """Processes of this user's Ray that run a shard now, below this one's."""
    out = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(TASK.encode()):
                out.append(int(entry.name))
        except OSError:
            continue
    return out


class Killer(threading.Thread):
    """Kills a working process every now and then until ``left`` is 0."""

    def __init__(self, left: int, seconds: float, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.left, self.seconds, self.rng, self.killed = left, seconds, rng, 0

    def run(self) -> None:
        while self.killed < self.left:
            time.sleep(self.rng.uniform(0.2, 1.0) * self.seconds)
            if self.killed < self.left and (found := working()):
                os.kill(self.rng.choice(found), signal.SIGKILL)
                self.killed += 1


def campaign(folder: Path, kills: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    whole = whole_dump(folder, 60)
    dump(whole, Display())
    want = files(folder / "whole.zarr")
    out: dict[str, object] = {"ray": ray.__version__, "actors": [2, 3]}
    for count, most in ((2, kills // 2), (3, kills - kills // 2)):
        killed = stores = 0
        while killed < most:
            output = folder / f"ray-{count}-{stores}.zarr"
            killer = Killer(most - killed, 8.0, rng)
            killer.start()
            found = actors.dump(dataclasses.replace(whole, output=output, ray=count), Display())
            killer.left = 0
            killer.join()
            assert found["complete"]
            assert files(output) == want, output
            killed, stores = killed + killer.killed, stores + 1
        out[f"killed of {count}"], out[f"stores of {count}"] = killed, stores
    return {**out, "identical": True}


if __name__ == "__main__":
    given = [int(v) for v in sys.argv[1:]]
    kills, seed = (*given, *(10, 0)[len(given) :])
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(campaign(Path(made), kills, seed)))
