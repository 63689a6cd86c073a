"""The same ratio with real vLLM: its plain prefill (no extraction, no connector) against a whole
dump through our connector.

    python bench/dump_vllm.py --target DIR --data FILE.jsonl [--rows 24] [--copies 1] [--bits 4/4]
        [--own-steps]

Plain vLLM runs in a process of its own first, with as many tokens per step as the dump takes (on an
H100 with SmolLM2 800 k tokens/s, with vLLM's own number 390 to 503 k), the best of three passes,
each on an empty prefix cache. Then, on the dump's own engine, the same requests with
``dspark_skip``: what vLLM's extraction costs when nobody takes the states. Then with codes that are
read and dropped: what coding and the hand-over cost without parts. Then the dump, of
``--copies`` times the rows (each copy begins with a number of its own, so that the prefix cache
does not know it). Prefix caching and chunked prefill are on in all. Writes bench/results/NAME.json.

Last, on the same engine with nothing else to do, the raw states of some of the samples, coded here:
``stored_difference`` is how far what the dump stored at full speed is from them, relative to a
token's states. Batches of other shapes round otherwise in 16 bits; another request's states would
be 1.4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import dspark.cache
from common import write
from dspark.cache.codec.base import Codec, tokens_of
from dspark.cache.records import TokenSample
from dspark.dump.checks.coded import as_stored, by_state
from dspark.dump.config import DumpConfig
from dspark.dump.engines.engine import Captured, Engine, States
from dspark.dump.engines.options import parse_arguments
from dspark.dump.engines.vllm.engine import VllmEngine, raw_bytes, step_tokens
from dspark.dump.engines.vllm.launch import ENVIRONMENT
from dspark.dump.engines.vllm.requests import RequestLoop
from dspark.dump.engines.vllm.spool import SKIP
from dspark.dump.job import load_engine, part_reader, prepare
from dspark.dump.plan import Plan
from dspark.dump.progress import Display
from dspark.dump.run import dump

GROUP = 1000  # rows of a part
PROBED = 48  # samples whose stored states are compared
# of plain prefill; the best counts, since the dump's engine is warm from self-check and calibration
# too
PASSES = 3


def plain(
    target: str,
    prompts: list[list[int]],
    dtype: str,
    seq_length: int,
    step: int | None,
    gpus: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> float:
    """Tokens a second of a vLLM that extracts nothing, on all GPUs or on ``gpus``; in this
    process.
    """
    from vllm import LLM, SamplingParams

    gpus = min(torch.cuda.device_count(), gpus or 1024)
    options: dict[str, Any] = {"tensor_parallel_size": gpus} if gpus else {"enforce_eager": True}
    if step is not None:
        options["max_num_batched_tokens"] = step
    options |= more or {}
    llm = LLM(
        model=target,
        dtype=dtype,
        max_model_len=seq_length + 1,
        skip_tokenizer_init=True,
        seed=0,
        **options,
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    best = 0.0
    for _ in range(PASSES):
        empty_cache(llm)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        best = max(best, sum(map(len, prompts)) / (time.perf_counter() - began))
    return best


class Uncached:
    """Loads the engine, its prefix cache emptied before the dump: self-check and calibration have
    run many of these few rows already.

    ``extraction``: tokens per second of the samples through that engine when their states are not
    taken.
    """

    def __init__(self, samples: list[TokenSample], codec: Codec) -> None:
        self.prompts, self.codec = [s.input_ids.tolist() for s in samples], codec
        self.samples, self.extraction, self.handed = samples, 0.0, 0.0
        self.probe = dict(list(enumerate(samples))[:: -(-len(samples) // PROBED)])
        self.raw: dict[int, States] = {}

    def __call__(self, plan: Plan, batch_tokens: int | None) -> Engine:
        engine = load_engine(plan, batch_tokens)
        assert isinstance(engine, VllmEngine)
        self.extraction = max(self.skipped(engine) for _ in range(PASSES))
        self.handed = max(self.handed_over(engine) for _ in range(PASSES))
        stream = engine.stream

        def from_nothing(*args: Any) -> Iterator[Captured]:  # the self-check's, then the dump's
            empty_cache(engine.llm)
            yield from stream(*args)

        engine.stream = from_nothing  # type: ignore[method-assign]
        close = engine.close

        def looked_at() -> None:
            if sys.exc_info()[0] is None:
                empty_cache(engine.llm)
                states = engine.capture(list(self.probe.values()))
                self.raw = {list(self.probe)[i]: s for i, s in states}
            close()

        engine.close = looked_at  # type: ignore[method-assign]
        return engine

    def difference(self, store: Path) -> dict[str, float]:
        """Of the stored states of a token, aux and last, from those of ``raw`` as the store's
        codecs code them: the largest, and the mean.
        """
        cache = dspark.cache.open(store)
        embedding = cache.target.embed_tokens if cache.codec.needs_tokens else None
        found = []
        for i, states in self.raw.items():
            stored = cache.read(i)
            assert stored.tokens.row == self.probe[i].row
            tokens = None if embedding is None else tokens_of([stored.tokens], embedding)
            mine = as_stored(cache.codec, States(*(x.cpu() for x in states)), tokens)
            for kept, want in zip(cache.decoded(stored), mine, strict=True):
                found.append(by_state(kept, want).flatten())
        every = torch.cat(found)
        return {
            "largest": float(every.max()),
            "mean": float(every.mean()),
            "samples": len(self.raw),
        }

    def handed_over(self, engine: VllmEngine) -> float:
        """Tokens per second of ``engine`` alone, its codes read and dropped."""
        empty_cache(engine.llm)
        groups = (self.samples[i : i + GROUP] for i in range(0, len(self.samples), GROUP))
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as reader:
            taken = [reader.submit(taken_of, c) for c in engine.stream(groups, self.codec)]
        for one in taken:
            one.result()
        return sum(map(len, self.prompts)) / (time.perf_counter() - began)

    def skipped(self, engine: VllmEngine) -> float:
        from vllm import SamplingParams

        empty_cache(engine.llm)
        loop: RequestLoop[int] = RequestLoop(engine.llm, engine.room(self.codec))
        began, coming = time.perf_counter(), deque(enumerate(self.prompts))
        while coming or not loop.empty:
            while coming and loop.fits(len(coming[0][1])):
                i, prompt = coming.popleft()
                params = SamplingParams(
                    max_tokens=1,
                    temperature=0.0,
                    detokenize=False,
                    extra_args={"kv_transfer_params": {SKIP: True}},
                )
                loop.add(i, prompt, len(prompt), params)
            loop.step()
        return sum(map(len, self.prompts)) / (time.perf_counter() - began)


def taken_of(captured: Captured) -> None:
    """Wait for the codes, and drop them."""
    assert callable(captured.states)
    captured.states()


def steps_of(plan: Plan) -> int | None:
    """Tokens of a step of the dump's engine where they are not vLLM's own."""
    if not torch.cuda.device_count():
        return None
    return step_tokens(raw_bytes(plan.shapes, plan.layers, plan.dtype))


def empty_cache(llm: Any) -> None:
    if not llm.reset_prefix_cache():
        raise SystemExit("vLLM did not empty its prefix cache")


def copied(data: str, rows: int, copies: int, out: Path) -> str:
    """The first ``rows`` rows of ``data``, ``copies`` times; the first message of each copy begins
    with its number.
    """
    lines = Path(data).read_text().splitlines()[:rows]
    with open(out, "w") as file:
        for copy in range(copies):
            for line in lines:
                row = json.loads(line)
                message = next(v for k, v in row.items() if k in ("messages", "conversations"))[0]
                key = "content" if "content" in message else "value"
                message[key] = f"({copy}) {message[key]}"
                file.write(json.dumps(row) + "\n")
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--bits", default="4/4")
    parser.add_argument(
        "--own-steps",
        action="store_true",
        help="plain vLLM with its own tokens per step, not the dump's",
    )
    parser.add_argument("--name", default="dump_vllm")
    parser.add_argument("--plain", help="internal: file of prompts")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--step", type=int, help="internal: tokens of a step")
    parser.add_argument("--gpus", type=int, help="internal: for plain vLLM")
    parser.add_argument("--engine-arg", action="append", default=[])
    args = parser.parse_args()
    aux_bits, last_bits = map(int, args.bits.split("/"))
    if args.plain:
        given = json.loads(Path(args.plain).read_text())
        print(
            json.dumps(
                plain(
                    args.target,
                    given["prompts"],
                    given["dtype"],
                    args.seq_length,
                    args.step,
                    args.gpus,
                    dict(parse_arguments(tuple(args.engine_arg))),
                )
            )
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = copied(args.data, args.rows, args.copies, Path(scratch) / "rows.jsonl")
        config = DumpConfig(
            model=args.target,
            data=data,
            output=Path(scratch) / "hs.zarr",
            engine="vllm",
            aux_bits=aux_bits,
            last_bits=last_bits,
            seq_length=args.seq_length,
            data_parallel_size=1,
            engine_arg=tuple(args.engine_arg),
        )
        job = prepare(config)
        parts = part_reader(job, lambda line: None).parts({})
        samples = [s for p in parts for s in p.samples if s.row < args.rows]
        engine = Uncached(samples, config.make_codec())
        asked = Path(scratch) / "prompts.json"
        asked.write_text(json.dumps({"prompts": engine.prompts, "dtype": job.plan.dtype}))
        call = [
            sys.executable,
            __file__,
            "--target",
            args.target,
            "--data",
            args.data,
            "--plain",
            str(asked),
        ]
        step = None if args.own_steps else steps_of(job.plan)
        done = subprocess.run(
            call + (["--step", str(step)] if step else []),
            stdout=subprocess.PIPE, text=True, check=True, env={**ENVIRONMENT, **os.environ},
        )  # fmt: skip
        bare = float(done.stdout.strip().splitlines()[-1])
        about = {
            "rows": args.rows,
            "copies": args.copies,
            "target": Path(args.target).name,
            "dtype": job.plan.dtype,
        }
        results = {
            "engine": "vllm",
            "aux_bits": aux_bits,
            "last_bits": last_bits,
            "prefill_tokens_per_s": bare,
            "plain_step_tokens": step,
        }
        # After every stage, so that a run that is cut short leaves what it measured.
        write(args.name, about, results, show=False)
        report = dump(config, Display(), engine)
        rate = report["new_tokens"] / report["capture_seconds"]
        results |= {
            "tokens_per_s": rate,
            "ratio": rate / bare,
            "extraction_tokens_per_s": engine.extraction,
            "handed_over_tokens_per_s": engine.handed,
            "tokens": report["new_tokens"],
            "seconds": report["capture_seconds"],
            "stages_s": report["stages"],
        }
        write(args.name, about, results, show=False)
        results["stored_difference"] = engine.difference(config.output)
        write(args.name, about, results)


if __name__ == "__main__":
    main()
