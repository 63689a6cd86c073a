"""The same ratio with real vLLM: its plain prefill (no extraction, no connector) against a whole
dump through our connector.

    python bench/dump_vllm.py --target DIR --data FILE.jsonl [--rows 24] [--copies 1] [--bits 4/4]
        [--codec NAME] [--own-steps] [--data-parallel-size 1] [--scratch DIR]
        [--prefill RATE] [--whole] [--passes 3]

Plain vLLM runs in a process of its own first, with as many tokens per step as the dump takes (on an
H100 with SmolLM2 800 k tokens/s, with vLLM's own number 390 to 503 k), the best of three passes,
each on an empty prefix cache. Then, on the dump's own engine, the same requests with
``dspark_skip``: what vLLM's extraction costs when nobody takes the states. Then with codes that are
read and dropped: what coding and the hand-over cost without parts. Then the dump, of
``--copies`` times the rows (each copy begins with a number of its own, so that the prefix cache
does not know it). Prefix caching and chunked prefill are on in all. Writes bench/results/NAME.json.

``--data-parallel-size``: engines of the dump; with one GPU they share it. Engines in other
processes, as several are, cannot be told to skip, so the extraction is left out. ``--scratch``: the
folder of the store. ``--prefill``: tokens per second of plain vLLM, measured before on this
machine. ``--whole``: every stage runs all copies; by default those before the dump run the first
alone, so their beginning and end weigh more than the dump's. ``processor_s``: see dump_threads.py.

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
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from dump_threads import Usage

import dspark.cache
from common import write
from dspark.cache.codec.base import Codec, tokens_of
from dspark.cache.records import TokenSample
from dspark.dump import run
from dspark.dump.checks.coded import as_stored, by_state
from dspark.dump.config import DumpConfig
from dspark.dump.engines.engine import Captured, Engine, States
from dspark.dump.engines.options import parse_arguments
from dspark.dump.engines.vllm.engine import VllmEngine, raw_bytes, step_tokens
from dspark.dump.engines.vllm.launch import ENVIRONMENT
from dspark.dump.engines.vllm.replicas import Replicas
from dspark.dump.engines.vllm.requests import RequestLoop
from dspark.dump.engines.vllm.spool import SKIP
from dspark.dump.job import load_engine, part_reader, prepare
from dspark.dump.plan import Plan
from dspark.dump.progress import Display

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
    passes: int = PASSES,
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
    for _ in range(passes):
        empty_cache(llm)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        best = max(best, sum(map(len, prompts)) / (time.perf_counter() - began))
    return best


class Uncached:
    """Loads the engine, its prefix cache emptied before the dump: self-check and calibration have
    run many of these few rows already.

    ``extraction``: tokens per second of the samples through that engine when their states are not
    taken; None where it is not in this process.
    """

    def __init__(self, samples: list[TokenSample], codec: Codec, passes: int = PASSES) -> None:
        self.passes = passes
        self.prompts, self.codec = [s.input_ids.tolist() for s in samples], codec
        self.samples, self.handed = samples, 0.0
        self.extraction: float | None = None
        self.probe = dict(list(enumerate(samples))[:: -(-len(samples) // PROBED)])
        self.raw: dict[int, States] = {}

    def __call__(self, plan: Plan, batch_tokens: int | None) -> Engine:
        engine = load_engine(plan, batch_tokens)
        assert isinstance(engine, VllmEngine | Replicas)
        if isinstance(engine, VllmEngine):
            self.extraction = max(self.skipped(engine) for _ in range(self.passes))
        if not self.codec.needs_calibration:
            self.handed = max(self.handed_over(engine) for _ in range(self.passes))
        stream = engine.stream

        def from_nothing(groups: Any, codec: Codec) -> Iterator[Captured]:
            """The self-check's, then the dump's."""
            engine.forget()
            self.codec = codec
            yield from stream(groups, codec)

        engine.stream = from_nothing  # type: ignore[method-assign]
        close = engine.close

        def looked_at() -> None:
            if sys.exc_info()[0] is None:
                engine.forget()
                states = engine.capture(list(self.probe.values()))
                self.raw = {list(self.probe)[i]: s for i, s in states}
                engine.stream = stream  # type: ignore[method-assign]
                if not self.handed:  # only the dump has learnt this codec
                    self.handed = max(self.handed_over(engine) for _ in range(self.passes))
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

    def handed_over(self, engine: VllmEngine | Replicas) -> float:
        """Tokens per second of ``engine`` alone, its codes read and dropped."""
        engine.forget()
        groups = (self.samples[i : i + GROUP] for i in range(0, len(self.samples), GROUP))
        began = time.perf_counter()
        with ExitStack() as stack:
            readers: defaultdict[int, ThreadPoolExecutor] = defaultdict(
                lambda: stack.enter_context(ThreadPoolExecutor(1))
            )
            taken = [
                readers[c.engine].submit(taken_of, c) for c in engine.stream(groups, self.codec)
            ]
        for one in taken:
            one.result()
        return sum(map(len, self.prompts)) / (time.perf_counter() - began)

    def skipped(self, engine: VllmEngine) -> float:
        from vllm import SamplingParams

        engine.forget()
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


def watched(config: DumpConfig, engine: Uncached) -> tuple[dict[str, Any], Usage]:
    """The dump's report, and what its processes used between its first row and its last part."""
    used, write_parts = Usage(), run.write_parts

    def watch(*args: Any, **options: Any) -> run.Written:
        with used:
            return write_parts(*args, **options)

    with patch.object(run, "write_parts", watch):
        return run.dump(config, Display(), engine), used


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


def prefill(
    args: argparse.Namespace, prompts: list[list[int]], dtype: str, step: int | None, scratch: Path
) -> float:
    """Tokens per second of plain vLLM, in a process of its own."""
    asked = scratch / "prompts.json"
    asked.write_text(json.dumps({"prompts": prompts, "dtype": dtype}))
    call = [sys.executable, __file__, "--target", args.target, "--data", args.data]
    call += ["--plain", str(asked), "--seq-length", str(args.seq_length)]
    call += ["--passes", str(args.passes)]
    done = subprocess.run(
        call + (["--step", str(step)] if step else []),
        stdout=subprocess.PIPE, text=True, check=True, env={**ENVIRONMENT, **os.environ},
    )  # fmt: skip
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--bits", help="of a rotated codec; 4/4 if no --codec is given")
    parser.add_argument("--codec")
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--scratch")
    parser.add_argument("--prefill", type=float)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--passes", type=int, default=PASSES)
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
    if args.bits and args.codec:
        parser.error("give --bits or --codec, not both")
    bits = args.bits or (None if args.codec else "4/4")
    aux_bits, last_bits = map(int, bits.split("/")) if bits else (None, None)
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
                    args.passes,
                )
            )
        )
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        data = copied(args.data, args.rows, args.copies, Path(scratch) / "rows.jsonl")
        config = DumpConfig(
            model=args.target,
            data=data,
            output=Path(scratch) / "hs.zarr",
            engine="vllm",
            aux_bits=aux_bits,
            last_bits=last_bits,
            codec=args.codec,
            seq_length=args.seq_length,
            data_parallel_size=args.data_parallel_size,
            tensor_parallel_size=1 if args.data_parallel_size > 1 else None,
            engine_arg=tuple(args.engine_arg),
        )
        job = prepare(config)
        rows = args.rows * (args.copies if args.whole else 1)
        samples: list[TokenSample] = []
        for part in part_reader(job, lambda line: None).parts({}):
            samples += [s for s in part.samples if s.row < rows]
            if part.samples and part.samples[-1].row >= rows:
                break  # those of the other copies are the dump's
        engine = Uncached(samples, config.make_codec(), args.passes)
        step = None if args.own_steps else steps_of(job.plan)
        bare = args.prefill or prefill(args, engine.prompts, job.plan.dtype, step, Path(scratch))
        about = {
            "rows": args.rows,
            "copies": args.copies,
            "target": Path(args.target).name,
            "dtype": job.plan.dtype,
            "codec": config.codec_name,
            "engines": args.data_parallel_size,
            "scratch": args.scratch,
            "engine_arg": args.engine_arg,
            "seq_length": args.seq_length,
            "whole": args.whole,
        }
        results: dict[str, Any] = {
            "engine": "vllm",
            "aux_bits": aux_bits,
            "last_bits": last_bits,
            "prefill_tokens_per_s": bare,
            "plain_step_tokens": step,
        }
        # After every stage, so that a run that is cut short leaves what it measured.
        write(args.name, about, results, show=False)
        report, used = watched(config, engine)
        rate = report["new_tokens"] / report["capture_seconds"]
        results |= {
            "tokens_per_s": rate,
            "ratio": rate / bare,
            "extraction_tokens_per_s": engine.extraction,
            "handed_over_tokens_per_s": engine.handed,
            "tokens": report["new_tokens"],
            "seconds": report["capture_seconds"],
            "stages_s": report["stages"],
            "processor_s": used.seconds,
        }
        write(args.name, about, results, show=False)
        results["stored_difference"] = engine.difference(config.output)
        write(args.name, about, results)


if __name__ == "__main__":
    main()
