"""Simulate a dump of many nodes into one bucket: hours, objects, requests per second and the cost
of a lost node. Nothing is measured here but the sizes that the plan computes.

    python bench/cluster.py [--preset glm-5.2] [--nodes 8] [--samples 500000] [--mean-tokens 2000]
        [--node-rate 20000] [--lost 0.5] [--out cluster]

A node is one `dspark-dump --shard I/N` and makes its parts one after the other; a part's upload
runs beside the next part's capture, up to two parts behind.
A lost node loses the parts in its memory and comes back after `--restart` seconds with `--resume`'s
work: what has no record is made again.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import asdict, dataclass
from typing import Any

from common import write
from dspark.cache.codec import registry
from dspark.cache.files.layout import PartLayout, disk_bytes_per_token, stored_bytes_per_token
from dspark.dump.plan import BLOCK_ROWS, PART_BYTES, PART_TOKENS, nearest_power
from dspark.dump.target.presets import find

IN_MEMORY = 2  # parts of a node that are captured and not yet in the bucket
PIECE = 32 << 20  # bytes of one request of a large upload, as the writer cuts them
PER_PART = 3  # requests beside the objects: is there a record, and the beats of the lock
JITTER = 0.1  # of a part's time


@dataclass(frozen=True)
class Job:
    """What is dumped: parts, and of each its tokens, bytes, objects and requests."""

    parts: int
    part_tokens: float
    part_bytes: float
    objects: int
    requests: float


def job_of(
    preset: str, codec_name: str, samples: int, mean_tokens: float, last_share: float
) -> Job:
    """From the same formulas as a dump's plan on a GPU."""
    found = find(preset)
    assert found is not None, preset
    codec = registry.make(codec_name)
    layers, hidden = len(found.layers), found.shapes.hidden_size
    memory = stored_bytes_per_token(layers, hidden, codec)
    tokens = nearest_power(PART_BYTES / memory, PART_TOKENS)
    rows = nearest_power(tokens / mean_tokens, (1, BLOCK_ROWS))
    part_tokens = rows * mean_tokens
    size = part_tokens * disk_bytes_per_token(layers, hidden, codec, last_share)
    arrays = PartLayout(codec, layers, hidden).arrays(1, 1, 1, (1, 1))
    objects = 2 * len(arrays) + 1  # shard and metadata of each, and the record
    return Job(-(-samples // rows), part_tokens, size, objects, objects + size / PIECE + PER_PART)


def simulate(
    job: Job,
    nodes: int,
    rate: float,
    gigabits: float,
    lost: float | None,
    restart: float,
    seed: int,
) -> dict[str, Any]:
    """Seconds until all parts are there. ``lost``: the share of the time after which node 0
    dies.
    """
    rng = random.Random(seed)
    capture, upload = job.part_tokens / rate, job.part_bytes * 8 / (gigabits * 1e9)
    left = [len(range(i, job.parts, nodes)) for i in range(nodes)]
    expected = max(left) * max(capture, upload)
    dies = None if lost is None else lost * expected
    done: list[float] = []
    redone = 0.0
    queue = [(0.0, 0.0, node) for node in range(nodes)]  # when it is free, when its link is free
    heapq.heapify(queue)
    while queue:
        now, link, node = heapq.heappop(queue)
        if not left[node]:
            continue
        captured = max(now, link - IN_MEMORY * upload) + capture * rng.uniform(
            1 - JITTER, 1 + JITTER
        )
        there = max(captured, link) + upload
        if node == 0 and dies is not None and there > dies:
            redone += min(max(dies - now, 0.0), captured - now)
            now = link = dies + restart
            dies = None
            heapq.heappush(queue, (now, link, node))
            continue
        left[node] -= 1
        done.append(there)
        heapq.heappush(queue, (captured, there, node))
    hours = max(done) / 3600
    return {
        "hours": round(hours, 2),
        "requests_per_second": round(job.parts * job.requests / max(done), 2),
        "objects": job.parts * job.objects,
        "terabytes": round(job.parts * job.part_bytes / 1e12, 2),
        "node_gigabits_needed": round(job.part_bytes * 8 / capture / 1e9, 2),
        "redone_node_seconds": round(redone, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="zai-org/GLM-5.2-FP8")
    parser.add_argument("--codecs", default="lossless,rotated-4-4,klt-1-1")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--samples", type=int, default=500_000)
    parser.add_argument("--mean-tokens", type=float, default=2000)
    parser.add_argument("--last-share", type=float, default=0.5)
    parser.add_argument(
        "--node-rate", type=float, default=20_000, help="tokens per second of a node (assumed)"
    )
    parser.add_argument("--gigabits", type=float, default=25, help="of a node's way to the bucket")
    parser.add_argument("--lost", type=float, default=0.5)
    parser.add_argument(
        "--restart", type=float, default=1200, help="seconds until a lost node captures again"
    )
    parser.add_argument("--out", default="cluster")
    args = parser.parse_args()
    results = {}
    for name in args.codecs.split(","):
        job = job_of(args.preset, name, args.samples, args.mean_tokens, args.last_share)
        run = (args.nodes, args.node_rate, args.gigabits)
        results[name] = {
            "job": {k: round(v) for k, v in asdict(job).items()},
            "whole": simulate(job, *run, None, args.restart, 0),
            "one node lost": simulate(job, *run, args.lost, args.restart, 0),
        }
    write(args.out, vars(args), results)


if __name__ == "__main__":
    main()
