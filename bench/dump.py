"""How fast is a dump against the target alone? Prefill without hooks, then stage by stage, then the
whole dump, in one process on the same engine.

    python bench/dump.py --target DIR --data FILE.jsonl [--codecs rotated-4-4,lossless]
        [--output FOLDER] [--rows N] [--parts 4]

Stages, over the first parts of the corpus: ``prefill`` (the decoder, nothing kept), ``gather`` (+
states of the wanted layers and rows), ``encode`` (+ codes), ``copy`` (+ codes on the host). The
dump is ``dspark.dump.run.dump`` over all rows: tokenising, capture, encoding, compression,
checksums, fsync.
Prefill is measured again after it. Writes bench/results/dump.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dspark.cache
from common import write
from dspark.cache.codec.base import Codec, tokens_of
from dspark.cache.codec.registry import make
from dspark.cache.records import TokenSample
from dspark.dump import committing
from dspark.dump.config import DumpConfig
from dspark.dump.engines.engine import States
from dspark.dump.engines.hf import TransformersEngine, batches
from dspark.dump.job import load_engine, part_reader, prepare
from dspark.dump.progress import Display
from dspark.dump.run import dump

Parts = list[list[TokenSample]]


def timed(work: Callable[[], None]) -> float:
    """Seconds of ``work`` and of what it launched."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def prefill(engine: TransformersEngine, parts: Parts) -> None:
    for samples in parts:
        for members in batches([len(s.input_ids) for s in samples], engine.batch_tokens):
            engine.forward([samples[i] for i in members])


def capture(engine: TransformersEngine, parts: Parts, codec: Codec | None, copy: bool) -> None:
    """Without a codec nothing is coded. All in one thread and stream: what each stage costs when
    nothing runs beside it.
    """
    embedding = engine.frozen().embed_tokens
    for captured in engine.stream(parts, codec or make("lossless")):
        assert isinstance(captured.states, States)
        if codec is None:
            continue
        known = None
        if codec.needs_tokens:
            known = tokens_of([parts[captured.group][i] for i in captured.members], embedding)
        with torch.inference_mode():
            for tensor in codec.encode(*captured.states, known).values():
                if copy:
                    tensor.to("cpu", non_blocking=True)


class Kept:
    """The engine, not closed between dumps."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.name, self.version, self.groups_at_once = (
            engine.name,
            engine.version,
            engine.groups_at_once,
        )
        self.frozen, self.capture, self.stream, self.predict = (
            engine.frozen, engine.capture, engine.stream, engine.predict,
        )  # fmt: skip

    def close(self) -> None:
        """Later."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--codecs", default="rotated-4-4,lossless", help="names, commas between them"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the stores  [default: a temporary one]"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the stores in --output, CODEC.zarr each"
    )
    parser.add_argument("--rows", type=int, help="rows to a dump  [default: all]")
    parser.add_argument(
        "--parts", type=int, default=4, help="parts that the stages are measured on"
    )
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument(
        "--turn",
        type=float,
        default=committing.SWITCH,
        help="seconds that a thread may keep Python's lock",
    )
    parser.add_argument("--name", default="dump", help="results file")
    args = parser.parse_args()
    committing.SWITCH = args.turn
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    if args.keep and not args.output:
        parser.error("--keep needs --output")
    folder = (
        args.output if args.keep else Path(tempfile.mkdtemp(dir=args.output, prefix="bench-dump-"))
    )
    try:
        results = measure(args, folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | {
        "target": Path(args.target).name, "data": Path(args.data).name,
    }  # fmt: skip
    write(args.name, config, results)


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One entry per codec."""
    out = []
    engine: TransformersEngine | None = None
    for name in args.codecs.split(","):
        config = DumpConfig(
            model=args.target,
            data=args.data,
            output=folder / f"{name}.zarr",
            engine="transformers",
            codec=name,
            limit=args.rows,
            workers=args.workers,
            batch_tokens=args.batch_tokens,
        )
        if engine is None:
            loaded = load_engine(prepare(config).plan, args.batch_tokens)
            assert isinstance(loaded, TransformersEngine)
            engine = loaded
        out.append(measure_setting(config, engine, args.parts))
        print(json.dumps(out[-1]), file=sys.stderr, flush=True)
        write(args.name, {"target": Path(args.target).name, "rows": args.rows}, out)
        if not args.keep:
            shutil.rmtree(config.output)
    return out


def measure_setting(config: DumpConfig, engine: TransformersEngine, count: int) -> dict[str, Any]:
    """Stages over the first ``count`` parts, the dump of ``config`` over all rows, and prefill once
    more.
    """
    job = prepare(config)
    reader = part_reader(job, lambda line: None)
    parts = [
        part.samples
        for _, part in zip(range(count), reader.parts({}), strict=False)
        if part.samples
    ]
    tokens = sum(len(s.input_ids) for p in parts for s in p)
    capture(engine, parts[:1], None, False)  # warm
    seconds = {
        "prefill": timed(lambda: prefill(engine, parts)),
        "gather": timed(lambda: capture(engine, parts, None, False)),
    }
    report = dump(config, Display(), lambda plan, n: Kept(engine))
    codec = dspark.cache.open(config.output).codec  # as it has learnt
    capture(engine, parts[:1], codec, True)
    seconds["encode"] = timed(lambda: capture(engine, parts, codec, False))
    seconds["copy"] = timed(lambda: capture(engine, parts, codec, True))
    again = timed(lambda: prefill(engine, parts))
    rate = report["new_tokens"] / report["capture_seconds"]
    bare = tokens / min(seconds["prefill"], again)
    size = sum(p.stat().st_size for p in config.output.rglob("*") if p.is_file())
    return {
        "engine": "transformers",
        "codec": codec.name,
        "tokens_per_s": rate,
        "prefill_tokens_per_s": bare,
        "ratio": rate / bare,
        "prefill_again_tokens_per_s": tokens / again,
        "tokens": report["new_tokens"],
        "seconds": report["capture_seconds"],
        "all_seconds": report["seconds"],
        "bytes_on_disk": size,
        "stage_tokens_per_s": {k: tokens / v for k, v in seconds.items()},
        "stages_s": report["stages"],
        "batch_tokens": engine.batch_tokens,
        "part_tokens": job.plan.part_tokens,
        "workers": job.plan.workers,
        "dtype": job.plan.dtype,
    }


if __name__ == "__main__":
    main()
