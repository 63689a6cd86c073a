"""Random reads of samples from real stores, side by side: samples and tokens per second of one
process with a warm page cache, codes alone and decoded on the device.

    python bench/random_reads.py --stores a.zarr,b.zarr [--samples 400] [--rounds 5]

Stores take turns, so that what else the machine does hits all alike; rates are medians of the
rounds. Writes NAME.json to ``--results``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import dspark.cache
from common import RESULTS, write
from dspark.cache.codec.base import join_states, tokens_of
from dspark.cache.reader import Cache


def read(cache: Cache, wanted: list[int], device: torch.device | None) -> float:
    """Seconds to read the samples ``wanted``, and to decode each on ``device``."""
    hidden = cache.manifest.target.hidden_size
    began = time.perf_counter()
    for i in wanted:
        sample = cache.read(i)
        if device is None:
            continue
        codes = {n: torch.from_numpy(x).to(device) for n, x in join_states([sample]).items()}
        tokens = None
        if cache.codec.needs_tokens:
            tokens = tokens_of([sample.tokens], cache.embedding_on(device))
        cache.codec.decode(codes, hidden, tokens, torch.bfloat16)
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stores", required=True, type=lambda s: list(map(Path, s.split(","))))
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="random_reads")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    caches = {path.stem: dspark.cache.open(path) for path in args.stores}
    rates: dict[tuple[str, str], list[float]] = {}
    tokens = 0.0
    for turn in range(args.rounds + 1):  # the first one warms up
        generator = np.random.default_rng(turn)
        count = len(next(iter(caches.values())))
        wanted = generator.integers(0, count, args.samples).tolist()
        for name, cache in caches.items():
            tokens = float(cache.lengths[wanted].mean())
            for kind, there in (("codes", None), ("decoded", device)):
                took = read(cache, wanted, there)
                if turn:
                    rates.setdefault((name, kind), []).append(len(wanted) / took)
    result: dict[str, Any] = {
        name: {kind: median(rates[name, kind]) for kind in ("codes", "decoded")} for name in caches
    }
    said = {"samples": args.samples, "rounds": args.rounds, "device": str(device)}
    write(args.name, said, {"samples_per_s": result, "tokens_per_sample": tokens}, args.results)


if __name__ == "__main__":
    main()
