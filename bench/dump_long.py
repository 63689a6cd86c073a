"""Does a long dump stay flat? Memory over a corpus of 20,000 rows, the progress line, and tokens
per second by batch size.

    python bench/dump_long.py [--rows 20000]

A tiny random target on the CPU, so what is measured is the machinery around a target. Writes
bench/results/dump_long.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import write
from dspark.dump.config import DumpConfig
from dspark.dump.progress import Display
from dspark.dump.run import dump
from dump_targets import chat, save_target
from words import WORDS


def corpus(path: Path, rows: int) -> Path:
    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(3, most))))

    with open(path, "w") as file:
        for _ in range(rows):
            file.write(json.dumps(chat(f"u: {words(12)}", f"a: {words(20)}")) + "\n")
    return path


class Memory:
    """Resident megabytes of this process, every ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(seconds,), daemon=True)

    def _run(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append(pages * resource.getpagesize() / 1e6)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        target = save_target(folder / "tiny", layers=4)
        data = corpus(folder / "rows.jsonl", args.rows)
        config = DumpConfig(
            model=str(target),
            data=str(data),
            output=folder / "hs.zarr",
            aux_bits=4,
            last_bits=4,
            part_tokens=16384,
        )
        began = time.monotonic()
        with Memory(1.0) as memory:
            report = dump(config, Display())
        quarter = max(len(memory.samples) // 4, 1)
        quarters = [
            round(max(memory.samples[i * quarter : (i + 1) * quarter] or [0.0])) for i in range(4)
        ]
        log = (folder / "hs.zarr.log").read_text().splitlines()
        rates: dict[str, float] = {}
        for tokens in (256, 1024, 2048, 8192):
            other = dataclasses.replace(
                config,
                output=folder / f"{tokens}.zarr",
                batch_tokens=tokens,
                limit=2000,
                part_tokens=32768,
            )
            some = dump(other, Display())
            rates[str(tokens)] = some["new_tokens"] / max(some["capture_seconds"], 1e-3)
        results: dict[str, Any] = {
            "rows": report["rows_read"],
            "tokens": report["tokens"],
            "parts": report["parts"],
            "seconds": round(time.monotonic() - began, 1),
            "tokens_per_s": report["new_tokens"] / report["capture_seconds"],
            "stages_s": report["stages"],
            "peak_mb_by_quarter": quarters,
            "progress_line": next(line for line in reversed(log) if " part " in line).split(
                " INFO "
            )[-1],
            "tokens_per_s_by_batch_tokens": rates,
        }
    write(
        "dump_long",
        {"rows": args.rows, "target": "tiny random Qwen3, 4 layers, hidden 64"},
        results,
    )


if __name__ == "__main__":
    main()
