"""``make campaign``: 1, 2 and 4 shards of a tiny target's dump, into one store and into stores of
their own, one of them killed (kill -9) at random moments.

    python tests/campaign/shards.py [KILLS] [SEED]

Each result must be that of a single writer, byte for byte; a merge that lacks a shard must name its
rows. Prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from dump_runs import files
from dumps import attempt, whole_dump

from dspark.cache.errors import MismatchError
from dspark.cache.merge import merge
from dspark.cache.verify import verify


def campaign(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Every count of shards both ways; the first shard of four is killed ``kills`` times."""
    rng = random.Random(seed)
    whole = whole_dump(folder, 80)
    began = time.monotonic()
    assert attempt(whole, None) == 0
    unbroken = time.monotonic() - began
    want = files(whole.output)
    killed = 0
    seconds: dict[str, float] = {}
    refused = ""
    for count in (1, 2, 4):
        together = folder / f"together-{count}.zarr"
        own = [folder / f"own-{count}-{i}.zarr" for i in range(count)]
        for outputs in ([together] * count, own):
            for i, output in enumerate(outputs):
                config = dataclasses.replace(whole, output=output, shard=f"{i}/{count}")
                left = kills // 2 if (count, i) == (4, 0) else 0
                while True:
                    code = attempt(config, rng.random() * unbroken if left else None)
                    if code == 0:
                        break
                    assert code == -9, (output, code)
                    killed, left = killed + 1, left - 1
        assert files(together) == want, together
        if count == 4:
            try:
                merge(folder / "lacking.zarr", own[:1] + own[2:])
            except MismatchError as error:
                refused = str(error)
            rows = [int(n) for n in re.findall(r"(\d+)-\d+", refused)]
            block = json.loads((own[0] / "zarr.json").read_text())["attributes"]["dspark"]["plan"][
                "run"
            ]["block_rows"]
            assert rows, refused
            assert all(row // block % 4 == 1 for row in rows), refused
            assert not (folder / "lacking.zarr").exists()
        began = time.monotonic()
        merge(folder / f"merged-{count}.zarr", own)
        seconds[f"merge of {count}"] = round(time.monotonic() - began, 2)
        assert files(folder / f"merged-{count}.zarr") == want
        assert verify(folder / f"merged-{count}.zarr").ok
    return {
        "parts": len({n.split("/")[1] for n in want if n.startswith("parts/0")}),
        "killed": killed,
        "identical": True,
        "refused": refused,
        "seconds": seconds,
    }


if __name__ == "__main__":
    given = [int(v) for v in sys.argv[1:]]
    kills, seed = (*given, *(20, 0)[len(given) :])
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(campaign(Path(made), kills, seed), indent=1))
