"""A small GLM MoE DSA through real vLLM on one and two GPUs: its states beside transformers', and
with our capture off.

    python bench/vllm_glm.py --target DIR [--cases tp1,tp2,tp2-plain,tp2-partial]
        [--seconds 180] [--engine-arg KEY=VALUE ...]

``--target`` is made by ``bench/shapes.py --kind glm-dsa``. Each case is an engine of its own, in a
process of its own. On each pair of GPUs runs one case at a time, in the order asked for, and each
has ``--seconds`` of its own. Differences are relative to a token's state in transformers' float32
run of the same bfloat16 weights; ``transformers`` is its bfloat16 run, the noise that any engine
has. ``tp2-plain``: vLLM's own states, as they come without our capture; what it says when it fails
is the result. ``tp2-partial``: so, but with the last layer's state from us, without which some
versions do not start.

bench/results/NAME.json is written at every stage of every case: which stages it reached and when,
how it ended, the end of its log. Where the limit stopped it, also which processes ran then and
with how much CPU time (a compiler is named there), and their stacks. SIGTERM (``timeout``) ends the
cases that run, and their results are written.

Any target will do. vLLM's V2 model runner on a CPU: a tiny Qwen3, ``--cases tp1 --dtype float32``,
VLLM_USE_V2_MODEL_RUNNER=1, TRITON_INTERPRET=1, TRITON_DEFAULT_BACKEND=cpu, and
tests/vllm_cpu/triton_interpreter first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from limited import Ended, run, stage

from common import write
from dspark.cache.errors import DsparkError
from dspark.cache.records import KEY_BYTES, TokenSample, last_rows
from dspark.dump.checks.states import check, probe_samples
from dspark.dump.engines.hf import TransformersEngine
from dspark.dump.engines.options import EngineOptions, parse_arguments
from dspark.dump.engines.vllm import engine as vllm_engine
from dspark.dump.engines.vllm.launch import Split
from dspark.dump.target.config import load_target

CASES = {"tp1": 1, "tp2": 2, "tp2-plain": 2, "tp2-partial": 2}
LENGTHS = (37, 300, 64, 129, 500, 16, 257, 90)


def samples(vocab: int) -> list[TokenSample]:
    rng = np.random.default_rng(0)
    return [
        TokenSample(
            i, bytes(KEY_BYTES), rng.integers(0, vocab, n, dtype=np.int32), np.arange(n) >= n // 3
        )
        for i, n in enumerate(LENGTHS)
    ]


def stacked(engine: Any, asked: list[TokenSample]) -> list[torch.Tensor]:
    """By sample: every layer's states at the stored positions, and the last, [rows, L + 1, H]
    float32.
    """
    out: dict[int, torch.Tensor] = {}
    for i, states in engine.capture(asked):
        rows = torch.from_numpy(last_rows(asked[i].loss_mask)).nonzero()[:, 0].to(states.aux.device)
        out[i] = (
            torch.cat([states.aux.index_select(0, rows), states.last[:, None]], 1).float().cpu()
        )
    return [out[i] for i in range(len(asked))]


def gaps(got: list[torch.Tensor], want: list[torch.Tensor]) -> dict[str, list[float]]:
    """By layer (the last one at the end): the median, the 99th percentile and the largest over
    tokens.
    """
    each = torch.cat(
        [
            (g - w).norm(dim=-1) / w.norm(dim=-1).clamp(min=1e-6)
            for g, w in zip(got, want, strict=True)
        ]
    )
    named = {
        "median": each.median(0).values,
        "p99": each.quantile(0.99, dim=0),
        "largest": each.amax(0),
    }
    return {name: [round(float(x), 5) for x in values] for name, values in named.items()}


def one(args: argparse.Namespace, case: str) -> None:
    """A case's process: states to --out, or what the engine said."""
    stage("config")
    ranks = CASES[case]
    target = load_target(args.target)
    asked = samples(target.shapes.vocab_size)
    own = vllm_engine.capture_arguments
    if case.endswith("plain"):
        vllm_engine.capture_arguments = lambda found: {}
    elif case.endswith("partial"):
        vllm_engine.capture_arguments = lambda found: partial(own(found))
    of = layers(target.shapes.num_layers)
    said: list[str] = []
    found: dict[str, Any] = {"said": said}
    engine = None
    try:
        stage("engine: weights, warm-up, first kernels")
        engine = vllm_engine.VllmEngine.load(
            args.target, target.shapes, of, dtype=args.dtype, seq_length=max(LENGTHS) + 4,
            spool=Path(args.out).with_suffix(".spool"), batch_tokens=4096,
            options=EngineOptions(arguments=parse_arguments(tuple(args.engine_arg))),
            split=Split(1, ranks if torch.cuda.is_available() else 0, ranks), say=said.append,
        )  # fmt: skip
        stage("states")
        torch.save(stacked(engine, asked), Path(args.out).with_suffix(".pt"))
        stage("self-check")
        try:
            agreement, _ = check(engine, probe_samples(asked), engine.frozen(), args.dtype, of)
            found["self_check"] = f"passed at {agreement.agree:.2%} of {agreement.positions}"
        except DsparkError as error:
            found["self_check"] = str(error)
    except DsparkError as error:
        found["error"] = str(error)
    finally:
        stage("close")
        if engine is not None:
            engine.close()
    Path(args.out).write_text(json.dumps(found))
    stage("end")


def partial(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same override, by ``vllm_glm_plain``."""
    return arguments | {
        "model_class_overrides": {
            name: f"vllm_glm_plain:{name}" for name in arguments["model_class_overrides"]
        }
    }


def layers(num_layers: int) -> list[int]:
    """Outputs of all decoder layers but the last."""
    return list(range(num_layers - 1))


class Record:
    """The results so far, in the file at every change."""

    def __init__(self, name: str, about: dict[str, Any]) -> None:
        self.name, self.about = name, about
        self.results: dict[str, Any] = {}
        self._lock = threading.Lock()

    def put(self, case: str, **found: Any) -> None:
        with self._lock:
            self.results.setdefault(case, {}).update(found)
            write(self.name, self.about, self.results, show=False)

    def hear(self, case: str, begun: dict[str, Any]) -> None:
        print(f"{case}: {begun['second']:.0f} s: {begun['stage']}", file=sys.stderr, flush=True)
        with self._lock:
            stages = self.results.setdefault(case, {}).setdefault("stages", [])
            stages.append(begun)
            write(self.name, self.about, self.results, show=False)


def reference(args: argparse.Namespace, record: Record) -> list[torch.Tensor]:
    """transformers' float32 states; those in ``--dtype`` are measured against them."""
    target = load_target(args.target)
    asked = samples(target.shapes.vocab_size)
    runs = {}
    for dtype in ("float32", args.dtype):
        engine = TransformersEngine.load(
            args.target,
            target.shapes,
            layers(target.shapes.num_layers),
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=dtype,
            batch_tokens=512,
        )
        runs[dtype] = stacked(engine, asked)
        del engine
    record.put("transformers", **gaps(runs[args.dtype], runs["float32"]))
    return runs["float32"]


def lanes(gpus: int) -> list[str | None]:
    """The GPUs of each case that may run at the same time: a pair each; None: whatever is there."""
    if gpus < 4:
        return [None]
    return [f"{i},{i + 1}" for i in range(0, gpus - 1, 2)]


def in_order(
    args: argparse.Namespace, cases: Sequence[str], folder: Path, record: Record, want: Any
) -> None:
    """Every case, as many at a time as there are pairs of GPUs."""
    free = lanes(torch.cuda.device_count())
    lock = threading.Lock()

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())

    def single(case: str) -> None:
        if stop.is_set():
            record.put(case, ended="not begun")
            return
        with lock:
            gpus = free.pop()
        out = folder / f"{case}.json"
        call = [__file__, "--target", args.target, "--dtype", args.dtype, "--case", case]
        call += ["--out", str(out), *(f"--engine-arg={a}" for a in args.engine_arg)]
        env = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        ended = run(
            call,
            out.with_suffix(".log"),
            args.seconds,
            env=env,
            stop=stop,
            hear=lambda begun: record.hear(case, begun),
        )
        record.put(case, **outcome(ended, out, want))
        print(f"{case}: {ended.words}", file=sys.stderr, flush=True)
        with lock:
            free.append(gpus)

    with ThreadPoolExecutor(len(free)) as pool:
        list(pool.map(single, cases))


def outcome(ended: Ended, out: Path, want: list[torch.Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    found |= {"ended": ended.words, "stages": ended.stages, "log": ended.log}
    if ended.stood:
        found |= {"stood": ended.stood, "stacks": ended.stacks}
    states = out.with_suffix(".pt")
    if states.is_file() and ended.code is not None:
        found["difference"] = gaps(torch.load(states), want)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--cases", default="tp1,tp2,tp2-plain,tp2-partial", help="in this order")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine-arg", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=180, help="limit of each case")
    parser.add_argument("--name", default="vllm_glm")
    parser.add_argument("--case", choices=CASES, help="internal")
    parser.add_argument("--out", help="internal")
    args = parser.parse_args()
    if args.case:
        one(args, args.case)
        return
    about = {
        "layers": layers(load_target(args.target).shapes.num_layers),
        "tokens": sum(LENGTHS),
        "dtype": args.dtype,
        "gpus": torch.cuda.device_count(),
        "seconds": args.seconds,
    }
    record = Record(args.name, about)
    with tempfile.TemporaryDirectory() as folder:
        want = reference(args, record)
        in_order(args, args.cases.split(","), Path(folder), record, want)
    write(args.name, about, record.results)


if __name__ == "__main__":
    main()
