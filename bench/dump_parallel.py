"""Several vLLM engines into one store against one engine, and against plain prefill: rate, and what differs.

    python bench/dump_parallel.py --target DIR --data FILE.jsonl [--rows 1500] [--copies 4] [--sizes 1,2]

On two GPUs, ``--sizes 1,2`` compares one engine on one GPU with two on two (issue: >= 1.9 times). On one GPU, size 2 runs
two engines there, for targets so small that Python limits one. Each size is a whole ``dspark-dump`` of its own;
size 1 runs twice, so that an engine's own run-to-run noise is known. Ids, masks and order must be equal in all stores;
``difference`` is that of states, relative to a token's state. Writes bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dump_vllm import copied

import dspark.cache
from common import write
from dspark.dump.checks.coded import by_state
from dspark.dump.config import DumpConfig
from dspark.dump.job import part_reader, prepare


def run(args: argparse.Namespace, data: str, output: Path, size: int) -> dict[str, Any]:
    """One dump with ``size`` engines of one GPU each; the report of ``--json``."""
    parallel = (
        [] if args.engine != "vllm" else ["--data-parallel-size", str(size), "--tensor-parallel-size", "1"]
    )
    done = subprocess.run(
        [sys.executable, "-m", "dspark.dump", "--model", args.target, "--data", data, "--output", str(output),
         "--engine", args.engine, "--seq-length", str(args.seq_length), "--json", *parallel],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    return {
        "engines": size,
        "tokens_per_s": report["new_tokens"] / report["capture_seconds"],
        "tokens": report["new_tokens"],
        "seconds": report["capture_seconds"],
        "stages_s": report["stages"],
    }


def difference(one: Path, other: Path) -> dict[str, float]:
    """Of stored states of two dumps; raises where ids, masks or order differ."""
    a, b = dspark.cache.open(one), dspark.cache.open(other)
    assert len(a) == len(b)
    assert a.manifest.layers == b.manifest.layers
    assert a.manifest.dump.part_tokens == b.manifest.dump.part_tokens
    found = []
    for i in range(0, len(a), max(len(a) // 500, 1)):
        x, y = a[i], b[i]
        assert np.array_equal(x.input_ids, y.input_ids), f"sample {i}: ids differ"
        assert np.array_equal(x.loss_mask, y.loss_mask), f"sample {i}: masks differ"
        found.append(by_state(torch.from_numpy(x.aux), torch.from_numpy(y.aux)).flatten())
    every = torch.cat(found)
    return {"largest": float(every.max()), "mean": float(every.mean())}


def plain(args: argparse.Namespace, data: str, scratch: Path) -> float:
    """Tokens a second of a vLLM on one GPU that extracts nothing."""
    job = prepare(
        DumpConfig(
            model=args.target, data=data, output=scratch / "p.zarr", engine="vllm", seq_length=args.seq_length
        )
    )
    parts = part_reader(job, 1 << 30, lambda line: None).parts({})
    prompts = [s.input_ids.tolist() for p in parts for s in p.samples if s.row < args.rows]
    asked = scratch / "prompts.json"
    asked.write_text(json.dumps({"prompts": prompts, "dtype": job.plan.dtype}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("dump_vllm.py")), "--target", args.target, "--data", args.data,
         "--plain", str(asked), "--gpus", "1", "--seq-length", str(args.seq_length)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--sizes", default="1,2")
    parser.add_argument("--engine", default="vllm", help="transformers: a dry run without parallelism")
    parser.add_argument("--name", default="dump_parallel")
    args = parser.parse_args()
    sizes = [int(n) for n in args.sizes.split(",")]
    results: dict[str, Any] = {}
    about = {
        "target": Path(args.target).name,
        "rows": args.rows,
        "copies": args.copies,
        "gpus": torch.cuda.device_count(),
    }
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = copied(args.data, args.rows, args.copies, scratch / "rows.jsonl")
        if args.engine == "vllm":
            results["prefill_tokens_per_s"] = plain(args, data, scratch)
        runs = []
        for k, size in enumerate([sizes[0], *sizes]):
            runs.append(run(args, data, scratch / f"{k}.zarr", size))
            if k:
                runs[-1]["difference"] = difference(scratch / "0.zarr", scratch / f"{k}.zarr")
                runs[-1]["times_one_engine"] = runs[-1]["tokens_per_s"] / runs[0]["tokens_per_s"]
            if "prefill_tokens_per_s" in results:
                runs[-1]["ratio_to_prefill"] = runs[-1]["tokens_per_s"] / results["prefill_tokens_per_s"]
            results["runs"] = runs
            write(args.name, about, results, show=False)
    write(args.name, about, results)


if __name__ == "__main__":
    main()
