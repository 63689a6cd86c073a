"""Stores of format versions 1 and 2 side by side: bytes on disk, and dump and read in turns, from
one corpus and target.

    python bench/format.py OLD [--codecs 16/16,4/4] [--rows 300] [--rounds 3] [--work DIR]

``OLD``: a folder with the last release of version 1 as ``dspark`` (``git archive c2a06e9 | tar x -C
OLD/dspark``). The target is a random Qwen3 of hidden size 256, the corpus random words. Each
process dumps and reads one store; releases and codecs take turns. ``dump`` and ``read`` are tokens
per second, ``dump_cpu`` and ``read_cpu`` microseconds of this process's CPU time per token, which
other work on the machine hardly moves; medians over the rounds.
``bytes`` are those of ``parts/`` and ``index/``, without the target. Writes
bench/results/format.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common import write

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("dump", "dump_cpu", "read", "read_cpu", "bytes", "tokens")
# What each release runs: a dump through its command, then every sample, decoded, in a random order.
ONE = """
import json, os, random, sys, time
from pathlib import Path
from click.testing import CliRunner
from dspark.dump.cli import main
import dspark.cache
import torch
torch.set_num_threads(1)
words, store = sys.argv[1:], Path(sys.argv[sys.argv.index("--output") + 1])
cpu = time.process_time()
done = CliRunner().invoke(main, [*words, "--json"], catch_exceptions=False)
assert done.exit_code == 0, done.output
out = json.loads(done.stdout.strip().splitlines()[-1])
dump_cpu = time.process_time() - cpu
cache = dspark.cache.open(store)
order = random.Random(0).sample(range(len(cache)), len(cache))
cache[0]
wall, cpu = time.monotonic(), time.process_time()
for i in order:
    cache[i]
wall, cpu = time.monotonic() - wall, time.process_time() - cpu
files = [f for d in ("parts", "index") for f in (store / d).rglob("*") if f.is_file()]
size = sum(f.stat().st_size for f in files)
n = out["tokens"]
print(json.dumps({
    "dump": n / out["capture_seconds"], "dump_cpu": 1e6 * dump_cpu / n, "read": n / wall,
    "read_cpu": 1e6 * cpu / n, "bytes": size, "tokens": n,
}))
"""


def prepare(folder: Path, rows: int) -> list[str]:
    """Target and corpus; returns the flags that name them."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from dump_runs import WORDS

    from dump_targets import save_target

    save_target(folder / "target", hidden_size=256, intermediate_size=512)
    rng = random.Random(1)
    with open(folder / "rows.jsonl", "w") as file:
        for _ in range(rows):
            said = [" ".join(rng.choices(WORDS, k=rng.randint(10, 90))) for _ in range(2)]
            chat = [
                {"role": r, "content": c} for r, c in zip(("user", "assistant"), said, strict=True)
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    return [
        "--model",
        str(folder / "target"),
        "--data",
        str(folder / "rows.jsonl"),
        "--layers",
        "0,2,3",
        "--device",
        "cpu",
    ]


def one(code: Path, flags: list[str]) -> dict[str, Any]:
    """Dump and read a store with the release that lies at ``code``."""
    env = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ONE, *flags], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("old", type=Path)
    parser.add_argument("--codecs", default="16/16,4/4")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    codes = {"1": args.old.resolve(), "2": ROOT}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        given = prepare(Path(folder), args.rows)
        for turn in range(args.rounds):
            for codec in args.codecs.split(","):
                aux, last = codec.split("/")
                for version in ("1", "2") if turn % 2 == 0 else ("2", "1"):
                    store = str(Path(folder) / f"{turn}-{aux}-{last}-{version}.zarr")
                    flags = [*given, "--aux-bits", aux, "--last-bits", last, "--output", store]
                    found.setdefault((codec, version), []).append(one(codes[version], flags))
                    print(codec, version, found[codec, version][-1], file=sys.stderr)
    rows = {}
    for codec in args.codecs.split(","):
        old, new = ({n: median(r[n] for r in found[codec, v]) for n in FIELDS} for v in ("1", "2"))
        assert old["tokens"] == new["tokens"]
        ratio = {n: round(new[n] / old[n], 4) for n in FIELDS if n != "tokens"}
        rows[codec] = {
            v: {n: round(x, 2) for n, x in r.items()} for v, r in (("1", old), ("2", new))
        } | {"2 / 1": ratio}
    write("format", {"rows": args.rows, "rounds": args.rounds}, rows)


if __name__ == "__main__":
    main()
