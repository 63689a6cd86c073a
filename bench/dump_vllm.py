"""The same ratio with real vLLM: its plain prefill (no extraction, no connector) against a whole dump through our connector.

    python bench/dump_vllm.py --target DIR --data FILE.jsonl [--rows 24] [--bits 4/4]

Plain vLLM runs in a process of its own first, the best of three passes, each on an empty prefix cache. Prefix caching and chunked prefill are on in both. Writes bench/results/dump_vllm.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import write
from dspark.dump.capture import Captured, Engine
from dspark.dump.config import DumpConfig
from dspark.dump.engine_vllm import ENVIRONMENT, VllmEngine
from dspark.dump.plan import Plan
from dspark.dump.progress import Display
from dspark.dump.run import dump, load_engine, part_reader, prepare

PASSES = 3  # of plain prefill; the best counts, since the dump's engine is warm from self-check and calibration too


def plain(target: str, prompts: list[list[int]], dtype: str, seq_length: int) -> float:
    """Tokens a second of a vLLM that extracts nothing; in this process."""
    import torch
    from vllm import LLM, SamplingParams

    gpus = torch.cuda.device_count()
    options: dict[str, Any] = {"tensor_parallel_size": gpus} if gpus else {"enforce_eager": True}
    llm = LLM(
        model=target, dtype=dtype, max_model_len=seq_length + 1, skip_tokenizer_init=True, seed=0, **options
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    best = 0.0
    for _ in range(PASSES):
        if not llm.reset_prefix_cache():
            raise SystemExit("vLLM did not empty its prefix cache")
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        best = max(best, sum(map(len, prompts)) / (time.perf_counter() - began))
    return best


def uncached(plan: Plan, batch_tokens: int | None) -> Engine:
    """The engine, its prefix cache emptied before the dump: self-check and calibration have run many of these few rows already."""
    engine = load_engine(plan, batch_tokens)
    assert isinstance(engine, VllmEngine)
    stream = engine.stream

    def from_nothing(*args: Any) -> Iterator[Captured]:
        if not engine.llm.reset_prefix_cache():
            raise SystemExit("vLLM did not empty its prefix cache")
        yield from stream(*args)

    engine.stream = from_nothing  # type: ignore[method-assign]
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--bits", default="4/4")
    parser.add_argument("--plain", help="internal: file of prompts")
    args = parser.parse_args()
    aux_bits, last_bits = map(int, args.bits.split("/"))
    with tempfile.TemporaryDirectory() as scratch:
        config = DumpConfig(
            model=args.target, data=args.data, output=Path(scratch) / "hs.zarr", engine="vllm", limit=args.rows, aux_bits=aux_bits,
            last_bits=last_bits, seq_length=1024,
        )  # fmt: skip
        if args.plain:
            given = json.loads(Path(args.plain).read_text())
            print(json.dumps(plain(args.target, given["prompts"], given["dtype"], 1024)))
            return
        job = prepare(config)
        parts = list(part_reader(job, 1 << 30, lambda line: None).parts({}))
        prompts = [s.input_ids.tolist() for p in parts for s in p.samples]
        asked = Path(scratch) / "prompts.json"
        asked.write_text(json.dumps({"prompts": prompts, "dtype": job.plan.dtype}))
        done = subprocess.run(
            [sys.executable, __file__, "--target", args.target, "--data", args.data, "--plain", str(asked)],
            stdout=subprocess.PIPE, text=True, check=True, env={**ENVIRONMENT, **os.environ},
        )  # fmt: skip
        bare = float(done.stdout.strip().splitlines()[-1])
        report = dump(config, Display(), uncached)
    rate = report["new_tokens"] / report["capture_seconds"]
    results = {
        "engine": "vllm", "aux_bits": aux_bits, "last_bits": last_bits, "tokens_per_s": rate, "prefill_tokens_per_s": bare, "ratio": rate / bare,
        "tokens": report["new_tokens"], "seconds": report["capture_seconds"], "stages_s": report["stages"],
    }  # fmt: skip
    write(
        "dump_vllm", {"rows": args.rows, "target": Path(args.target).name, "dtype": job.plan.dtype}, results
    )


if __name__ == "__main__":
    main()
