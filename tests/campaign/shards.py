"""``make campaign``: 1, 2 and 4 shards of a tiny target's dump, into one store and into stores of
their own, also four at once; then one of four, killed (kill -9) at random moments.

    python tests/campaign/shards.py [KILLS] [SEED]

Each result must be that of a single writer, byte for byte; a merge that lacks a shard must name its
rows. Prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dump_runs import files
from dumps import attempt, begin, whole_dump

from dspark.cache.errors import MismatchError
from dspark.cache.parts.committed import scan_parts
from dspark.cache.stores.merge import merge
from dspark.cache.stores.verify import verify
from dspark.dump.config import DumpConfig

TIMES = 3


def killed_shard(config: DumpConfig, seconds: float, kills: int, rng: random.Random) -> list[int]:
    """Run a shard to its end, killed up to ``kills`` times, each 0.3 to 1 times ``seconds`` after
    its start; the parts of its store at each kill, -1 where there was no store.
    """
    parts: list[int] = []
    while code := attempt(config, rng.uniform(0.3, 1.0) * seconds if len(parts) < kills else None):
        assert code == -9, (config.output, code)
        parts.append(len(scan_parts(config.output)) if config.output.exists() else -1)
    return parts


def at_once(shards: list[DumpConfig], want: dict[str, bytes]) -> int:
    """Run the shards of a store side by side, ``TIMES`` times; how many stores were compared."""
    for time_ in range(TIMES):
        output = shards[0].output.with_name(f"at once {time_}.zarr")
        running = [begin(dataclasses.replace(s, output=output)) for s in shards]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running]
        assert codes == [0] * len(shards), codes
        assert files(output) == want, output
    return TIMES


def missing(folder: Path, own: list[Path], lacks: int) -> str:
    """What a merge without the store of one shard says; it must name rows of that shard alone."""
    try:
        merge(folder / "lacking.zarr", own[:lacks] + own[lacks + 1 :])
    except MismatchError as error:
        refused = str(error)
    else:
        raise AssertionError(f"a merge without shard {lacks} was not refused")
    attributes = json.loads((own[0] / "zarr.json").read_text())["attributes"]
    block = attributes["dspark"]["plan"]["run"]["block_rows"]
    rows = [int(n) for n in re.findall(r"(\d+)-\d+", refused)]
    assert rows, refused
    assert all(row // block % len(own) == lacks for row in rows), refused
    assert not (folder / "lacking.zarr").exists()
    return refused.removeprefix(f"{folder}/")


def campaign(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Every count of shards both ways. Then the first shard of four is killed ``kills`` times, half
    of them in a store that it shares, half in its own; a store that is whole is compared, and the
    next begun.
    """
    rng = random.Random(seed)
    whole = whole_dump(folder, 80)
    assert attempt(whole, None) == 0
    want = files(whole.output)
    out: dict[str, object] = {"parts": len(scan_parts(whole.output))}
    seconds: dict[str, float] = {}

    def shard(output: Path, i: int, count: int) -> DumpConfig:
        return dataclasses.replace(whole, output=output, shard=f"{i}/{count}")

    for count in (1, 2, 4):
        together = folder / f"together-{count}.zarr"
        own = [folder / f"own-{count}-{i}.zarr" for i in range(count)]
        for outputs in ([together] * count, own):
            for i, output in enumerate(outputs):
                began = time.monotonic()
                assert attempt(shard(output, i, count), None) == 0
                seconds["one shard of four"] = time.monotonic() - began
        assert files(together) == want, together
        began = time.monotonic()
        merge(folder / f"merged-{count}.zarr", own)
        seconds[f"merge of {count}"] = time.monotonic() - began
        assert files(folder / f"merged-{count}.zarr") == want
        assert verify(folder / f"merged-{count}.zarr").ok
    out["at once, stores"] = at_once([shard(folder / "at once.zarr", i, 4) for i in range(4)], want)
    out["a shard is missing"] = missing(folder, own, 1)
    for name, most in (("one store", kills - kills // 2), ("its own store", kills // 2)):
        found: list[int] = []
        stores = 0
        while len(found) < most:
            shared = name == "one store"
            output, joined = (folder / f"{name} {stores}{x}.zarr" for x in ("", " joined"))
            left, alone = most - len(found), seconds["one shard of four"]
            found += killed_shard(shard(output, 0, 4), alone, left, rng)
            if shared:
                for i in (1, 2, 3):
                    assert attempt(shard(output, i, 4), None) == 0
            else:
                merge(joined, [output, *own[1:]])
            assert files(output if shared else joined) == want, (output, found)
            stores += 1
        out[f"killed, {name}"] = len(found)
        out[f"parts when killed, {name}"] = found
        out[f"stores, {name}"] = stores
    return {
        **out,
        "identical": True,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


if __name__ == "__main__":
    given = [int(v) for v in sys.argv[1:]]
    kills, seed = (*given, *(20, 0)[len(given) :])
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(campaign(Path(made), kills, seed), indent=1))
