"""What rows cost the process that launches a dump's kernels: milliseconds of processor per 1,000
rows, by thread, until their parts are ready to be written.

    python bench/dump_rows.py --target DIR --data FILE.jsonl [--rows 8000] [--workers 1]
        [--name dump_rows]

``here``: rows are read and hashed in this process and exchanged with processes that tokenise.
``apart``: a process of their own does it. ``a part``: what that process sends of one, pickled, in
MB and ms. Writes bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import write
from dspark.dump.config import DumpConfig
from dspark.dump.corpus.ahead import ahead
from dspark.dump.corpus.reading import RowsProcess
from dspark.dump.corpus.tokenise import Tokenisers
from dspark.dump.job import Job, prepare, sources_reader


def spent() -> dict[str, float]:
    """Milliseconds of processor of every thread so far, by name."""
    out: dict[str, float] = {}
    for thread in threading.enumerate():
        with suppress(FileNotFoundError):  # it has just ended
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
            out[thread.name] = out.get(thread.name, 0.0) + int(text.split()[0]) / 1e6
    return out


def measured(job: Job, make: Tokenisers | RowsProcess) -> dict[str, Any]:
    make.wait_until_started()
    before, began = spent(), time.perf_counter()
    rows = tokens = 0
    last: dict[str, float] = {}
    with ahead(sources_reader(job, lambda line: None, make).parts({}), 1) as parts:
        for part in parts:
            rows += part.row_stop - part.row_start
            tokens += part.tokens
            last |= spent()
    seconds = time.perf_counter() - began
    make.close()
    return {
        "rows": rows,
        "tokens_per_s": round(tokens / seconds),
        "ms_per_1000_rows": {
            name: round((ms - before.get(name, 0.0)) * 1000 / rows, 2)
            for name, ms in sorted(last.items())
            if ms - before.get(name, 0.0) > 1
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--name", default="dump_rows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(
            DumpConfig(
                model=args.target,
                data=args.data,
                output=Path(folder) / "hs.zarr",
                engine="transformers",
                codec="rotated-4-4",
                limit=args.rows,
                part_tokens=262144,
            )
        )
        results: dict[str, Any] = {
            "apart": measured(job, RowsProcess(job.maker, args.workers)),
            "here": measured(job, Tokenisers(job.maker, args.workers)),
        }
        part = next(iter(sources_reader(job, lambda line: None).parts({})))
        began = time.perf_counter()
        size = len(pickle.dumps(part))
        results["a part"] = {"MB": size / 1e6, "ms": (time.perf_counter() - began) * 1e3}
    write(args.name, {"rows": args.rows, "workers": args.workers, "cores": os.cpu_count()}, results)


if __name__ == "__main__":
    main()
