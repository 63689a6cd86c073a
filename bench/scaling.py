"""The same training on 1, 2, ... processes by each strategy: are the loss curves one, and how many
tokens per second.

python bench/scaling.py --work DIR [--shape qwen3-4b] [--gpus 1,2] [--steps 34] [--cache STORE]
[--train "--rows-per-step 16"] python bench/scaling.py --work DIR --gpus 2 --strategies
ddp,zero,fsdp2 four runs: one process, and each on two python bench/scaling.py --work DIR --gpus 2
--strategies apart,zero apart: on each GPU a training by itself, all at once python bench/scaling.py
--work DIR --shape tiny --device cpu a dry run through gloo

Without ``--cache`` a store of random states of the shape is written first. Each run is a
``torchrun`` of its own; its first rows, which compile, are left out of the speed. Its last
window of steps is profiled (``bench/scaling_profile.py``) and left out too. ``--before FILE``: one
process's figures from an earlier call on the same machine, so that they are not measured twice.
Writes bench/results/scaling.json: a row a run, with ``gpus``, ``strategy``, ``tokens_per_s``,
``speedup``,
``curve_difference`` (largest relative difference of a logged loss from one process's),
``windows_ms`` (a step's, by logged window), ``peak_gb`` (of the rank with the largest; GPUs only),
``profile`` (of the rank whose communication took least, it waited for no other; it says where in a
step the GPU has nothing to do) and ``hours``, what ``--samples`` of ``--mean-tokens`` take for
``--epochs`` at that speed.

``apart`` is the most that this host can give: each training has a rank's rows per step and nothing
to send. What it falls short of N times is slower GPUs (a step of several lasts as long as the
slowest one's) and the host; what a strategy falls short of it is the strategy's.

python bench/scaling.py --row-ms 250 --update-ms 15 --parameters 2.3e9 hours on 1, 2, 4, 8 GPUs from
a measured step; runs nothing
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, write
from dspark.cache.codec import registry
from dspark.cache.codec.base import to_numpy
from dspark.cache.files.calibration import codec_info
from dspark.cache.manifest import DumpInfo, Manifest, SourceInfo, TargetInfo, TokenizerInfo
from dspark.cache.records import CodedSample, TokenSample, last_rows
from dspark.cache.settings import rotated_name
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.writer import StoreWriter
from dspark.train.run.metrics_file import read_metrics

# Target: hidden size, intermediate, layers, heads, key heads, head size, vocabulary. Draft:
# recipe's flags.
SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "tiny": (
        (64, 96, 6, 4, 2, 16, 997),
        "--num-layers 2 --block-size 4 --max-anchors 24 --markov-rank 16 --total-seq-len 512",
    ),
    "smollm2": (
        (576, 1536, 30, 9, 3, 64, 49_152),
        "--num-layers 3 --max-anchors 512 --total-seq-len 4096",
    ),
    "qwen3-4b": (
        (2560, 9728, 36, 32, 8, 128, 151_936),
        "--num-layers 5 --max-anchors 512 --total-seq-len 4096",
    ),
    "glm-5.2": (
        (6144, 12_288, 78, 64, 64, 128, 154_880),
        "--num-layers 5 --block-size 8 --max-anchors 1024 --total-seq-len 4096",
    ),
}
STRATEGIES = ("ddp", "zero", "fsdp2")
APART = "apart"
LAYERS = 5
BITS = 4


def manifest(shape: tuple[int, ...], tokens: int) -> Manifest:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocab = shape
    config = {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    }
    target = TargetInfo(
        id="random/states",
        revision=None,
        config=config,
        hidden_size=hidden,
        vocab_size=vocab,
        num_layers=layers,
        mask_token_id=vocab - 1,
        eos_token_ids=[2],
        weights_sha256="",
    )
    dump = DumpInfo(
        engine="random",
        engine_version="0",
        dtype="bfloat16",
        seq_length=tokens,
        min_supervised=2,
        assistant_pattern=None,
        mask_rule="given",
        block_rows=4,
    )
    return Manifest(
        target=target,
        layers=[i * (layers - 1) // LAYERS for i in range(LAYERS)],
        codec=codec_info(registry.make(rotated_name(BITS, BITS))),
        tokenizer=TokenizerInfo(sha256=None, chat_template_sha256=None),
        sources=[SourceInfo(id="random", sha256="0", limit=None)],
        dump=dump,
    )


def write_store(path: Path, shape: tuple[int, ...], samples: int, tokens: int) -> None:
    """``samples`` samples of ``tokens`` random tokens; two thirds supervised; one draw of states,
    turned, serves all.
    """
    m, hidden, vocab = manifest(shape, tokens), shape[0], shape[-1]
    g, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    aux = torch.randn(tokens, LAYERS, hidden, generator=g).to(device)
    embed = torch.randn(vocab, hidden, generator=g).bfloat16() * (3 / hidden**0.5)
    codec = registry.make(rotated_name(BITS, BITS))
    with StoreWriter.create(
        path, m, FrozenTarget(embed, torch.ones(hidden).bfloat16(), embed, True), {}
    ) as writer:
        for at in range(0, samples, 4):
            part = []
            for row in range(at, min(at + 4, samples)):
                mask = np.arange(tokens) >= tokens // 3
                key = rng.integers(0, 256, 16, dtype=np.uint8).tobytes()
                sample = TokenSample(
                    row, key, rng.integers(3, vocab - 1, tokens).astype(np.int32), mask
                )
                last = aux.roll(row, 0)[: int(last_rows(mask).sum()), 0]
                part.append(CodedSample(sample, to_numpy(codec.encode(aux.roll(row, 0), last))))
            writer.commit(
                at // 4, part, writer.block(at // 4, at, at + len(part), dropped={}, truncated=0)
            )
        writer.finish()


def command(
    args: argparse.Namespace, output: Path, strategy: str, processes: int, rows: int
) -> list[str]:
    """A training of ``rows`` rows per step into ``output``."""
    for old in (output, output.with_suffix(".profile")):
        shutil.rmtree(old, ignore_errors=True)
    flags = [
        "--cache",
        args.cache,
        "--output",
        output,
        "--device",
        args.device,
        "--max-steps",
        args.steps,
        "--log-every",
        args.log_every,
        "--val-fraction",
        0,
        "--checkpoint-freq",
        1e6,
        "--no-tensorboard",
        "--recipe",
        "none",
        *shlex.split(SHAPES[args.shape][1]),
        "--rows-per-step",
        rows,
        *shlex.split(args.train),
    ]
    launcher, chosen = [], []
    if strategy in STRATEGIES:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        chosen = ["--strategy", strategy]
    profiled = [Path(__file__).with_name("scaling_profile.py"), output.with_suffix(".profile")]
    program = [*profiled, args.steps - args.log_every, args.steps]
    if args.whole and strategy in ("ddp", "zero"):
        program.append("whole")
    return [sys.executable, *launcher, *map(str, program), *chosen, *map(str, flags)]


def run(args: argparse.Namespace, gpus: int, strategy: str) -> dict[str, Any]:
    """One training, or for ``apart`` one on each GPU; curve and speed."""
    started = time.perf_counter()
    # The same processes' share of the cores for every run, so that more processes are not also more
    # threads.
    threads = os.environ.get(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(args.gpus)))
    )
    outputs = [
        args.work / f"{strategy}-{gpus}-{i}" for i in range(gpus if strategy == APART else 1)
    ]
    running = []
    for i, output in enumerate(outputs):
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        if strategy == APART:
            env["CUDA_VISIBLE_DEVICES"] = str(i)
        words = command(args, output, strategy, gpus, args.rows_per_step // len(outputs))
        running.append(subprocess.Popen(words, env=env))
    for process in running:
        if process.wait():
            raise SystemExit(f"{strategy} on {gpus}: exit code {process.returncode}")
    metrics = [[row for _, row in read_metrics(output)] for output in outputs]
    profiles = [
        json.loads(file.read_text())
        for output in outputs
        for file in sorted(output.with_suffix(".profile").glob("*.json"))
    ]
    # The last row's window is profiled and ends with the export; the first ones compile.
    steady = [[r for r in rows if "tokens_per_second" in r][2:-1] or rows[-1:] for rows in metrics]
    speeds = [statistics.median(r["tokens_per_second"] for r in rows) for rows in steady]
    return {
        "gpus": gpus,
        "strategy": strategy,
        "tokens_per_s": sum(speeds),
        "by_gpu": speeds,
        "step_ms": statistics.median(r["step_ms"] for r in steady[0]),
        "windows_ms": [round(r["step_ms"], 2) for r in steady[0]],
        "data_wait_fraction": statistics.median(r["data_wait_fraction"] for r in steady[0]),
        "peak_gb": metrics[0][-1].get("peak_gb"),
        "seconds": time.perf_counter() - started,
        "loss": [r["loss"] for r in metrics[0]],
        "grad_norm": [r["grad_norm"] for r in metrics[0]],
        "profile": min(profiles, key=lambda p: p["communication"]),
    }


def hours(tokens_per_s: float, samples: int, mean_tokens: float, epochs: float) -> float:
    """Hours that ``samples`` x ``epochs`` take at ``tokens_per_s``."""
    return samples * mean_tokens * epochs / tokens_per_s / 3600


def from_one_gpu(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a row's and an update's measured milliseconds on one GPU give on 1, 2, 4 and 8, by
    calculation.

    A step is its rows shared out, one ring all-reduce of float32 gradients at ``--bus-gb-s``, none
    of it hidden behind the backward pass (so the truth is a little better), and one update.
    """
    out = []
    for gpus in (1, 2, 4, 8):
        rows = -(-args.rows_per_step // gpus)
        exchanged = 2 * (gpus - 1) / gpus * 4 * args.parameters
        ms = rows * args.row_ms + args.update_ms + exchanged / (args.bus_gb_s * 1e6)
        speed = args.rows_per_step * args.row_tokens / ms * 1000
        out.append(
            {
                "gpus": gpus,
                "strategy": "ddp",
                "tokens_per_s": speed,
                "step_ms": ms,
                "measured": False,
                "hours": hours(speed, args.samples, args.mean_tokens, args.epochs),
            }
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder for the store and the drafts")
    parser.add_argument("--shape", default="qwen3-4b", choices=SHAPES)
    parser.add_argument(
        "--cache", type=Path, help="a store of the shape's target instead of random states"
    )
    parser.add_argument(
        "--gpus", default="1,2", type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="also: apart")
    parser.add_argument(
        "--whole",
        action="store_true",
        help="ddp and zero: compile the draft as one, so that nothing is sent while it computes",
    )
    parser.add_argument("--before", type=Path, help="results with one process's figures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=34)
    parser.add_argument("--log-every", type=int, default=8, help="steps of a timed window")
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32, help="rows of random states in the store")
    parser.add_argument("--train", default="", help="more flags of dspark-train")
    parser.add_argument("--samples", type=int, default=500_000)
    parser.add_argument("--mean-tokens", type=float, default=1000.0)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument(
        "--row-ms", type=float, help="measured: one row's forward, objective and backward"
    )
    parser.add_argument("--update-ms", type=float, default=0.0, help="measured: one optimizer step")
    parser.add_argument("--row-tokens", type=int, default=4096)
    parser.add_argument(
        "--parameters",
        type=float,
        default=0.6e9,
        help="trained; their float32 gradients are exchanged",
    )
    parser.add_argument(
        "--bus-gb-s", type=float, default=200.0, help="of an all-reduce, as nccl-tests counts"
    )
    parser.add_argument("--name", default="scaling")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.row_ms:
        print(json.dumps(from_one_gpu(args)))
        return
    if args.work is None:
        parser.error("--work is needed to run anything")
    shape = SHAPES[args.shape][0]
    if args.cache is None:
        args.cache = args.work / f"random-{args.shape}.zarr"
        if not args.cache.exists():
            write_store(args.cache, shape, args.rows, 512 if args.shape == "tiny" else 4096)
    results: list[dict[str, Any]] = []
    if args.before:
        results += [r for r in json.loads(args.before.read_text())["results"] if r["gpus"] == 1][:1]
    runs = [] if results else [(1, "one")]
    for strategy in filter(None, args.strategies.split(",")):
        runs += [(n, strategy) for n in args.gpus if n > 1 or strategy == "fsdp2"]
    config = {
        k: str(v) for k, v in vars(args).items() if k not in ("work", "results", "cache", "before")
    }
    for gpus, strategy in runs:
        r = run(args, gpus, strategy)
        results.append(r)
        one = results[0]
        r["speedup"] = r["tokens_per_s"] / one["tokens_per_s"]
        r["measured"] = True
        if strategy != APART:  # whose steps have fewer rows
            differences = [abs(a - b) / abs(b) for a, b in zip(r["loss"], one["loss"], strict=True)]
            r["curve_difference"] = max(differences)
        r["hours"] = hours(r["tokens_per_s"], args.samples, args.mean_tokens, args.epochs)
        # After every run, so that one that is cut short leaves what it measured.
        write(args.name, config, results, args.results, show=(gpus, strategy) == runs[-1])


if __name__ == "__main__":
    main()
