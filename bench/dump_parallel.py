"""Several vLLM engines into one store against one engine, and against plain prefill: rate, and what
differs.

    python bench/dump_parallel.py --target DIR --data FILE.jsonl [--rows 1500] [--copies 4]
        [--sizes 1,2] [--codec NAME]

On two GPUs, ``--sizes 1,2`` compares one engine on one GPU with two on two (issue: >= 1.9 times).
On one GPU, size 2 runs two engines there, for targets so small that Python limits one. Each size is
a whole ``dspark-dump`` of its own; the first size runs alone, and again (``noise``), so that an
engine's own run-to-run noise is known. That and plain prefill run on GPUs that the second size
leaves free, if there are two. Ids, masks and order must be equal in all stores; ``difference`` is
that of states, relative to a token's state. Later dumps take the first one's calibration; all take
``--calibration``'s, if given. Writes bench/results/NAME.json after every run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dump_vllm import copied, steps_of

import dspark.cache
from common import write
from dspark.cache.files.layout import CALIBRATION
from dspark.dump.checks.coded import by_state
from dspark.dump.config import DumpConfig
from dspark.dump.job import part_reader, prepare


def command(args: argparse.Namespace, data: str, output: Path, size: int) -> list[str]:
    """One dump with ``size`` engines of one GPU each."""
    parallel = (
        []
        if args.engine != "vllm"
        else ["--data-parallel-size", str(size), "--tensor-parallel-size", "1"]
    )
    codec = ["--codec", args.codec] if args.codec else []
    return [
        sys.executable,
        "-m",
        "dspark.dump",
        "--model",
        args.target,
        "--data",
        data,
        "--output",
        str(output),
        "--engine",
        args.engine,
        "--seq-length",
        str(args.seq_length),
        "--json",
        *parallel,
        *codec,
        *(f"--engine-arg={a}" for a in args.engine_arg),
    ]


def figures(size: int, printed: str, wall: float) -> dict[str, Any]:
    """What a dump says in ``--json``."""
    report: dict[str, Any] = json.loads(printed)
    return {
        "engines": size,
        "tokens_per_s": report["new_tokens"] / report["capture_seconds"],
        "tokens": report["new_tokens"],
        "seconds": report["capture_seconds"],
        "wall_seconds": round(wall, 1),
        "stages_s": report["stages"],
    }


def plan_of(manifest: Any) -> Any:
    """The plan without what a codec learnt from the states: those differ in their last bits."""
    plan = manifest.plan()
    return plan | {"codec": plan["codec"]["name"]}


def difference(one: Path, other: Path) -> dict[str, float]:
    """Of stored states of two dumps; raises where ids, masks or order differ."""
    a, b = dspark.cache.open(one), dspark.cache.open(other)
    assert len(a) == len(b)
    assert a.manifest.layers == b.manifest.layers
    assert plan_of(a.manifest) == plan_of(b.manifest), "plans differ"
    found = []
    for i in range(0, len(a), max(len(a) // 500, 1)):
        x, y = a[i], b[i]
        assert np.array_equal(x.input_ids, y.input_ids), f"sample {i}: ids differ"
        assert np.array_equal(x.loss_mask, y.loss_mask), f"sample {i}: masks differ"
        found.append(by_state(torch.from_numpy(x.aux), torch.from_numpy(y.aux)).flatten())
    every = torch.cat(found)
    return {"largest": float(every.max()), "mean": float(every.mean())}


def plain_command(args: argparse.Namespace, data: str, scratch: Path) -> list[str]:
    """Plain prefill of the first copy's rows by a vLLM on one GPU that extracts nothing."""
    job = prepare(
        DumpConfig(
            model=args.target,
            data=data,
            output=scratch / "p.zarr",
            engine="vllm",
            seq_length=args.seq_length,
            data_parallel_size=1,
            tensor_parallel_size=1,
        )
    )
    parts = part_reader(job, lambda line: None).parts({})
    prompts = [s.input_ids.tolist() for p in parts for s in p.samples if s.row < args.rows]
    asked = scratch / "prompts.json"
    asked.write_text(json.dumps({"prompts": prompts, "dtype": job.plan.dtype}))
    step = steps_of(job.plan)
    return [
        sys.executable,
        str(Path(__file__).with_name("dump_vllm.py")),
        "--target",
        args.target,
        "--data",
        args.data,
        "--plain",
        str(asked),
        "--gpus",
        "1",
        "--seq-length",
        str(args.seq_length),
        *([] if step is None else ["--step", str(step)]),
        *(f"--engine-arg={a}" for a in args.engine_arg),
    ]


def start(call: list[str], gpus: Sequence[int] = ()) -> subprocess.Popen[str]:
    """``gpus``: those it may use, of the ones that this process may; none: all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else list(map(str, range(torch.cuda.device_count())))
    chosen = {"CUDA_VISIBLE_DEVICES": ",".join(names[i] for i in gpus)} if gpus else {}
    env = os.environ | chosen
    return subprocess.Popen(
        call, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


@contextlib.contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """End it with what it has started, engines that outlive their parent among them, if what is
    done meanwhile fails or is interrupted.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def ended(process: subprocess.Popen[str]) -> str:
    with ending(process):
        printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, process.args))}: exit code {process.returncode}")  # type: ignore[arg-type]
    return printed


def rate(printed: str) -> float:
    """The last line that is a number: vLLM writes its farewell to stdout too."""
    for line in reversed(printed.splitlines()):
        with contextlib.suppress(ValueError):
            return float(line)
    raise SystemExit(f"plain prefill printed no rate:\n{printed[-2000:]}")


class Compared:
    """Dumps of the same rows, each against the first, whose calibration (if any) all others
    take.
    """

    def __init__(self, args: argparse.Namespace, data: str, scratch: Path) -> None:
        self.args, self.data, self.scratch = args, data, scratch
        self.first: Path | None = None
        self.learnt: Path | None = args.calibration

    def dump(self, size: int, gpus: Sequence[int] = (), name: str = "") -> dict[str, Any]:
        output = self.scratch / f"{name or size}.zarr"
        call = command(self.args, self.data, output, size)
        if self.learnt is not None:
            call += ["--calibration", str(self.learnt)]
        began = time.monotonic()
        found = figures(size, ended(start(call, gpus)), time.monotonic() - began)
        if self.first is None:
            self.first = output
            if self.learnt is None and (learnt := output / CALIBRATION).exists():
                self.learnt = learnt
        else:
            found["difference"] = difference(self.first, output)
            shutil.rmtree(output)
        return found

    def noise(self, gpus: list[int]) -> dict[str, Any]:
        """The first dump again, for its states, not for its rate, and plain prefill: at the same
        time if there are two GPUs.
        """
        if self.args.engine != "vllm":
            return {"noise": self.dump(1, name="again")}
        plain = plain_command(self.args, self.data, self.scratch)
        if len(gpus) < 2:
            again = self.dump(1, name="again")
            return {"noise": again, "prefill_tokens_per_s": rate(ended(start(plain)))}
        running = start(plain, gpus[-1:])
        with ending(running):
            again = self.dump(1, gpus[:1], name="again")
        return {"noise": again, "prefill_tokens_per_s": rate(ended(running))}


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
    parser.add_argument("--codec", help="a codec by name; left out: the dump's default")
    parser.add_argument(
        "--engine", default="vllm", help="transformers: a dry run without parallelism"
    )
    parser.add_argument("--engine-arg", action="append", default=[])
    parser.add_argument("--calibration", type=Path, help="what an earlier dump's codec learnt")
    parser.add_argument("--scratch", type=Path, help="where stores are written and deleted again")
    parser.add_argument("--name", default="dump_parallel")
    args = parser.parse_args()
    sizes = [int(n) for n in args.sizes.split(",")]
    gpus = torch.cuda.device_count()
    results: dict[str, Any] = {"runs": []}
    about = {
        "target": Path(args.target).name, "rows": args.rows, "copies": args.copies, "gpus": gpus,
        "codec": args.codec or "default", "engine_arguments": args.engine_arg,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        scratch = Path(folder)
        data = copied(args.data, args.rows, args.copies, scratch / "rows.jsonl")
        compared = Compared(args, data, scratch)
        once, *more = sizes
        results["runs"].append(compared.dump(once))
        write(args.name, about, results, show=False)
        spare = list(range(max(more[:1], default=0), gpus))
        for size in more:
            if len(spare) < 2 or "noise" in results:
                found = compared.dump(size)
            else:  # on GPUs that this size leaves free
                with ThreadPoolExecutor(1) as beside:
                    noise = beside.submit(compared.noise, spare)
                    found = compared.dump(size, range(size))
                    results |= noise.result()
            found["times_one_engine"] = found["tokens_per_s"] / results["runs"][0]["tokens_per_s"]
            results["runs"].append(found)
            write(args.name, about, results, show=False)
        if "noise" not in results:
            results |= compared.noise(list(range(gpus)))
            write(args.name, about, results, show=False)
        for found in results["runs"]:
            if "prefill_tokens_per_s" in results:
                found["ratio_to_prefill"] = found["tokens_per_s"] / results["prefill_tokens_per_s"]
        write(args.name, about, results)


if __name__ == "__main__":
    main()
