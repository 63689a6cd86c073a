"""``make campaign``: dumps of a tiny target are killed (kill -9) at random moments and resumed; the
store must be that of an unbroken run, byte for byte.

    python tests/campaign/dumps.py [KILLS] [SEED]

Every try is a fork of this process, so that it costs a dump and not the import of torch. Prints one
JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dump_runs import corpus, files

from dspark.cache.verify import verify
from dspark.cache.writer import scan_parts
from dspark.dump.config import DumpConfig
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dump_targets import save_target


def attempt(config: DumpConfig, seconds: float | None) -> int:
    """Dump in a process of its own, killed after ``seconds``; its exit code, -9 where it was
    killed.
    """
    child = os.fork()
    if not child:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        try:
            dump(config, Display())
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # it may have ended; nobody has waited for it yet
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_dump(folder: Path, rows: int) -> DumpConfig:
    """Make a target and a corpus of ``rows`` chats in ``folder``; the dump of them that others are
    compared with.
    """
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in corpus(rows)))
    return DumpConfig(
        model=str(save_target(folder / "target")),
        data=str(data),
        output=folder / "whole.zarr",
        part_tokens=150,
        aux_bits=4,
        last_bits=4,
    )


def campaign(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill dumps until ``kills`` of them have been; each store that is whole is compared, then the
    next one begun.
    """
    rng = random.Random(seed)
    whole = whole_dump(folder, 60)
    began = time.monotonic()
    assert attempt(whole, None) == 0
    unbroken = time.monotonic() - began
    want = files(whole.output)
    killed = stores = 0
    parts: list[int] = []  # there when a kill came; -1: no store yet
    while killed < kills:
        config = dataclasses.replace(whole, output=folder / f"{stores}.zarr", resume=True)
        code = -9
        while code == -9:
            left = kills - killed
            code = attempt(config, rng.random() * 1.1 * unbroken if left else None)
            if code == -9:
                killed += 1
                parts.append(len(scan_parts(config.output)) if config.output.exists() else -1)
        assert code == 0, config.output
        stores += 1
        found = files(config.output)
        differ = sorted(n for n in want | found if want.get(n) != found.get(n))
        assert not differ, differ
        assert verify(config.output).ok
    return {
        "seed": seed,
        "kills": killed,
        "stores": stores,
        "parts": len(scan_parts(whole.output)),
        "seconds_unbroken": round(unbroken, 2),
        "kills_before_the_store": parts.count(-1),
        "kills_between_parts": sum(p >= 0 for p in parts),
        "byte_equal": stores,
    }


if __name__ == "__main__":
    asked = [int(number) for number in sys.argv[1:]] + [40, 17][len(sys.argv) - 1 :]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(campaign(Path(folder), *asked)))
