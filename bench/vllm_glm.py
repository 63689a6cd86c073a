"""A small GLM MoE DSA through real vLLM on one and two GPUs: its states beside transformers', and
with our capture off.

    python bench/vllm_glm.py --target DIR [--cases tp1,tp2,tp2-plain,tp2-partial]
        [--engine-arg KEY=VALUE ...]

``--target`` is made by ``bench/shapes.py --kind glm-dsa``. Each case is an engine of its own, in a
process of its own, all at the same time. Differences are relative to a token's state in
transformers' float32 run of the same bfloat16 weights;
``transformers`` is its bfloat16 run, the noise that any engine has. ``tp2-plain``: vLLM's own
states, as they come without our capture; what it says when it fails is the result. ``tp2-partial``:
so, but with the last layer's state from us, without which some versions do not start. Writes
bench/results/NAME.json after every case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    ranks = CASES[case]
    target = load_target(args.target)
    asked = samples(target.shapes.vocab_size)
    own = vllm_engine.capture_arguments
    if case.endswith("plain"):
        vllm_engine.capture_arguments = lambda found: {}
    elif case.endswith("partial"):
        vllm_engine.capture_arguments = lambda found: partial(own(found))
    of = layers(target.shapes.num_layers)
    began = time.monotonic()
    said: list[str] = []
    found: dict[str, Any] = {"case": case}
    engine = None
    try:
        engine = vllm_engine.VllmEngine.load(
            args.target, target.shapes, of, dtype=args.dtype, seq_length=max(LENGTHS) + 4,
            spool=Path(args.out).with_suffix(".spool"), batch_tokens=4096,
            options=EngineOptions(arguments=parse_arguments(tuple(args.engine_arg))),
            split=Split(1, ranks if torch.cuda.is_available() else 0, ranks), say=said.append,
        )  # fmt: skip
        found["start_seconds"] = round(time.monotonic() - began, 1)
        got = stacked(engine, asked)
        torch.save(got, Path(args.out).with_suffix(".pt"))
        try:
            agreement, _ = check(engine, probe_samples(asked), engine.frozen(), args.dtype, of)
            found["self_check"] = f"passed at {agreement.agree:.2%} of {agreement.positions}"
        except DsparkError as error:
            found["self_check"] = str(error)
    except DsparkError as error:
        found["error"] = str(error)
    finally:
        if engine is not None:
            engine.close()
    found["said"] = said
    found["seconds"] = round(time.monotonic() - began, 1)
    Path(args.out).write_text(json.dumps(found))


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--cases", default="tp1,tp2,tp2-plain,tp2-partial")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engine-arg", action="append", default=[])
    parser.add_argument("--seconds", type=float, default=240, help="limit of a case")
    parser.add_argument("--name", default="vllm_glm")
    parser.add_argument("--case", help="internal")
    parser.add_argument("--out", help="internal")
    args = parser.parse_args()
    if args.case:
        one(args, args.case)
        return
    cases = args.cases.split(",")
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for case in cases:
            out = Path(folder) / f"{case}.json"
            more = [f"--engine-arg={a}" for a in args.engine_arg]
            call = [
                sys.executable,
                __file__,
                "--target",
                args.target,
                "--dtype",
                args.dtype,
                "--case",
                case,
                "--out",
                str(out),
                *more,
            ]
            with open(out.with_suffix(".log"), "w") as log:
                children[case] = (out, subprocess.Popen(call, stdout=log, stderr=log))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        target = load_target(args.target)
        asked = samples(target.shapes.vocab_size)
        runs = {}
        for dtype in ("float32", args.dtype):
            reference = TransformersEngine.load(
                args.target,
                target.shapes,
                layers(target.shapes.num_layers),
                device=device,
                dtype=dtype,
                batch_tokens=512,
            )
            runs[dtype] = stacked(reference, asked)
            del reference
        results: dict[str, Any] = {"transformers": gaps(runs[args.dtype], runs["float32"])}
        about = {
            "layers": layers(target.shapes.num_layers),
            "tokens": sum(LENGTHS),
            "dtype": args.dtype,
            "gpus": torch.cuda.device_count(),
        }
        until = time.monotonic() + args.seconds
        for case, (out, child) in children.items():
            try:
                child.wait(max(until - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                child.terminate()
            said = out.with_suffix(".log").read_text()
            results[case] = (
                json.loads(out.read_text())
                if out.is_file()
                else {"error": f"no result; exit code {child.poll()}"}
            )
            if out.with_suffix(".pt").is_file():
                results[case]["difference"] = gaps(
                    torch.load(out.with_suffix(".pt")), runs["float32"]
                )
            if "error" in results[case]:
                results[case]["log"] = said[-3000:]
            write(args.name, about, results, show=False)
        write(args.name, about, results)


if __name__ == "__main__":
    main()
