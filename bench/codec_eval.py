"""Accepted lengths of drafts on the same held-out prompts, decoded: the product's ``eval``, several
processes on shares of the prompts, and the paired difference per prompt.

    python bench/codec_eval.py --model DIR --prompts prompts.jsonl --out DIR
        --pairs DRAFT=BASE,DRAFT=BASE,... [--processes 8] [--gpus 0,1] [--max-tokens 256]
        [--limit 0] [--eval "--dtype float32"]

``--pairs``: folders of a draft and of the one it is compared with, such as one pair per seed. A
prompt's accepted length is tokens per verified block in its answer (1 + accepted / blocks). The
difference of a prompt is the mean over the pairs; the interval is of 95 %, from resampling whole
prompts. OUT/codec_eval.json holds totals and, per source, the same; OUT/answers.jsonl what every
draft did on every prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from common import write

RESAMPLED = 4000


def decoded(args: argparse.Namespace, drafts: list[Path], prompts: list[str]) -> list[Any]:
    """Return what ``dspark-tools eval`` says of each draft and prompt, with the prompt's number."""
    with tempfile.TemporaryDirectory() as work:
        running = []
        for share in range(min(args.processes, len(prompts))):
            mine, said = Path(work, f"{share}.jsonl"), Path(work, f"{share}.out")
            mine.write_text("".join(prompts[share :: args.processes]))
            call = [sys.executable, "-m", "dspark.tools", "eval", "--model", args.model]
            for draft in drafts:
                call += ["--draft", str(draft)]
            call += ["--data", str(mine), "--alone", "0", "--answers", str(said)]
            call += ["--max-tokens", str(args.max_tokens), *shlex.split(args.eval)]
            gpu = args.gpus[share % len(args.gpus)]
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
            log = open(args.out / f"eval.{share}.txt", "w")  # noqa: SIM115
            running.append((share, said, subprocess.Popen(call, stdout=log, stderr=log, env=env)))
        failed = [share for share, _, process in running if process.wait(args.seconds)]
        if failed:
            raise SystemExit(f"shares {failed} failed: see {args.out}/eval.*.txt")
        out = []
        for share, said, _ in running:
            seen: dict[str, int] = defaultdict(int)
            for line in said.read_text().splitlines():
                row = json.loads(line)
                row["prompt"] = share + args.processes * seen[row["draft"]]
                seen[row["draft"]] += 1
                out.append(row)
        return out


def length(row: dict[str, Any]) -> float:
    return 1 + sum(row["accepted_at"]) / row["drafts"] if row["drafts"] else float("nan")


def compared(
    rows: list[dict[str, Any]], pairs: list[tuple[str, ...]], prompts: list[int]
) -> dict[str, Any]:
    """Return lengths and paired differences over ``prompts``."""
    found = {(r["draft"], r["prompt"]): r for r in rows}
    own, base = (
        np.array([[length(found[pair[side], p]) for pair in pairs] for p in prompts])
        for side in (0, 1)
    )
    drafted = ~(np.isnan(own) | np.isnan(base)).any(1)
    own, base = own[drafted], base[drafted]
    out: dict[str, Any] = {"prompts": len(own)}
    if len(own) < 2:
        return out
    change, start = (own - base).mean(1), base.mean(1)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(own), (RESAMPLED, len(own)))
    low, high = np.quantile(change[picks].mean(1) / start[picks].mean(1), [0.025, 0.975])
    totals = [total(rows, draft, set(prompts)) for pair in pairs for draft in pair]
    return out | {
        "length": float(own.mean()),
        "length_base": float(base.mean()),
        "difference": float(change.mean()),
        "standard_error": float(change.std(ddof=1) / len(own) ** 0.5),
        "change": float(change.mean() / start.mean()),
        "interval_95": [float(low), float(high)],
        "tokens_per_block": totals[::2],
        "tokens_per_block_base": totals[1::2],
    }


def total(rows: list[dict[str, Any]], draft: str, prompts: set[int]) -> float:
    """All tokens by all blocks, as ``eval`` prints it."""
    mine = [r for r in rows if r["draft"] == draft and r["prompt"] in prompts]
    blocks = sum(r["drafts"] for r in mine)
    return 1 + sum(sum(r["accepted_at"]) for r in mine) / max(1, blocks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--gpus", default="", type=lambda s: s.split(","))
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="limit of a process")
    parser.add_argument("--eval", default="", help="more flags of dspark-tools eval")
    parser.add_argument("--name", default="codec_eval")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = args.prompts.read_text().splitlines(keepends=True)
    lines = lines[: args.limit or None]
    pairs = [
        (str(a), str(b)) for a, _, b in (pair.partition("=") for pair in args.pairs.split(","))
    ]
    drafts = list(dict.fromkeys(Path(d) for pair in pairs for d in pair))
    rows = decoded(args, drafts, lines)
    (args.out / "answers.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sources: dict[str, list[int]] = defaultdict(list)
    for i, line in enumerate(lines):
        sources[json.loads(line).get("source", "")].append(i)
    results = {"all": compared(rows, pairs, list(range(len(lines))))}
    results |= {source: compared(rows, pairs, some) for source, some in sorted(sources.items())}
    config = {"pairs": [[Path(p).name for p in pair] for pair in pairs], "prompts": len(lines)}
    write(args.name, config | {"max_tokens": args.max_tokens}, results, args.out)


if __name__ == "__main__":
    main()
