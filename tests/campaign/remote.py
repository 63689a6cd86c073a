"""A dump, its verification, a recode, a merge and a training against an S3 server on loopback that
fails now and then, and the same on the local disk.

    python tests/campaign/remote.py [SEED]

The dump is killed (kill -9) three times and resumed. All results must be equal to the local ones.
Prints one JSON object with MB/s of both and reads per sample.
Server, proxy and we share this machine's cores, so the rate is of them together, a lower bound of
what a service gives.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from dump_runs import corpus, files

import dspark.cache
from dspark.cache.errors import IncompleteCacheError
from dspark.cache.files import bucket
from dspark.cache.files.place import place_of
from dspark.cache.parts.committed import scan_parts
from dspark.cache.stores.merge import merge
from dspark.cache.stores.recode import recode
from dspark.cache.stores.verify import verify
from dspark.dump.config import DumpConfig
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dump_targets import save_target
from s3_server import BUCKET, s3_server

FAULTS = 0.05


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def killed_dump(config: DumpConfig, parts: int) -> int:
    """The command in a process of its own, killed once ``parts`` parts are there; returns how many
    were.
    """
    flags = [
        "--model",
        config.model,
        "--data",
        str(config.data),
        "--output",
        str(config.output),
        "--part-tokens",
        "300",
    ]
    command = [
        sys.executable,
        "-m",
        "dspark.dump",
        *flags,
        "--aux-bits",
        "16",
        "--last-bits",
        "16",
        "--resume",
        "--break-lock",
    ]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    place = place_of(config.output)
    while child.poll() is None:
        if place.exists("zarr.json") and len(scan_parts(config.output)) >= parts:
            child.kill()
            child.wait()
        time.sleep(0.05)
    return len(scan_parts(config.output))


def train(cache: str, output: Path) -> list[float]:
    flags = [
        "--num-layers",
        "1",
        "--block-size",
        "3",
        "--max-anchors",
        "16",
        "--total-seq-len",
        "512",
        "--rows-per-step",
        "1",
    ]
    flags += [
        "--max-steps",
        "12",
        "--log-every",
        "1",
        "--val-fraction",
        "0",
        "--device",
        "cpu",
        "--workers",
        "2",
    ]
    command = [
        sys.executable,
        "-m",
        "dspark.train",
        "--cache",
        cache,
        "--output",
        str(output),
        *flags,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def same(local: Path, remote: str) -> bool:
    place = place_of(remote)
    return {name: place.read(name) for name in place.sizes("")} == files(local)


def campaign(folder: Path, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in corpus(60)))
    local = DumpConfig(
        model=str(save_target(folder / "target")),
        data=str(data),
        output=folder / "local.zarr",
        part_tokens=300,
        aux_bits=16,
        last_bits=16,
    )
    out: dict[str, Any] = {"equal": []}
    os.environ["DSPARK_CACHE_DIR"] = str(folder / "objects")
    os.chdir(folder)
    with s3_server() as proxy:
        proxy.faults = FAULTS
        base = f"s3://{BUCKET}/run"
        remote = dataclasses.replace(local, output=f"{base}/remote.zarr", resume=True)  # type: ignore[arg-type]
        dump(local, Display())
        out["parts when killed"] = []
        for parts in sorted(rng.sample(range(1, 14), 3)):
            out["parts when killed"].append(killed_dump(remote, parts))
            try:
                dspark.cache.open(remote.output)
                raise AssertionError("a store that was killed was opened")
            except IncompleteCacheError:
                pass
        dump(dataclasses.replace(remote, break_lock=True), Display())
        assert same(folder / "local.zarr", f"{base}/remote.zarr")
        out["equal"].append("dump")
        assert verify(f"{base}/remote.zarr").ok
        out["equal"].append("verify")
        for source, to in (
            (str(local.output), str(folder / "r.zarr")),
            (f"{base}/remote.zarr", f"{base}/r.zarr"),
        ):
            recode(source, to, aux_bits=4, last_bits=4)
        assert same(folder / "r.zarr", f"{base}/r.zarr")
        out["equal"].append("recode")
        merge(f"{base}/m.zarr", [f"{base}/remote.zarr"])
        assert same(folder / "local.zarr", f"{base}/m.zarr")
        out["equal"].append("merge")
        losses = (
            train(str(local.output), folder / "d1"),
            train(f"{base}/remote.zarr", folder / "d2"),
        )
        assert losses[0] == losses[1], losses
        out["equal"].append("train")
        out["faults"] = {k: proxy.count[k] for k in ("500", "503", "cut", "cut before the answer")}
        proxy.faults = 0.0
        os.environ["DSPARK_CACHE_GB"] = "0"

        bucket._pieces.cache_clear()  # which the training's reads may have filled
        here, there = (dspark.cache.open(s) for s in (local.output, f"{base}/remote.zarr"))
        samples = range(len(here))

        def read(store: dspark.cache.Cache) -> int:
            return sum(a.nbytes for i in samples for a in store.read(i).states.values())

        out["samples"] = len(there)
        out["MB"] = read(here) / 1e6
        out["local MB/s"] = round(out["MB"] / timed(lambda: read(here)), 1)
        proxy.count.clear()
        out["remote MB/s"] = round(out["MB"] / timed(lambda: read(there)), 1)
        out["requests per sample"] = round(proxy.count.total() / len(there), 2)
    return out


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(campaign(Path(made), int((sys.argv[1:] or ["0"])[0]))))
