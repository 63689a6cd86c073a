"""From the command to the first optimizer step: the draft compiled whole, in parts or not at all,
with torch's cache empty and then filled.

python bench/start.py --store hs.zarr [--cases whole,parts] [--train "..."]

Each case is a process of its own (``dspark-train --dry-run``). Writes NAME.json to ``--results``
after every one: seconds to the first step, and ms of a step after that.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from common import RESULTS, reported, write

CASES = {"whole": "whole", "parts": "parts", "eager": "--no-compile"}
# In a child: the command with the draft compiled as one, or layer by layer, whatever the strategy.
CHILD = """
import json, sys
from dspark.train.cli import config_of
from dspark.train.run import setup
kind, words = sys.argv[1], sys.argv[2:]
compiled = setup.compile_draft
setup.compile_draft = lambda model, *, in_parts: compiled(model, in_parts=kind == "parts")
from dspark.train.dry import dry_run
print(json.dumps(dry_run(config_of(words), say=lambda text: print(text, file=sys.stderr))))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--cases", default=",".join(CASES), help="[%(default)s]")
    parser.add_argument("--train", default="", help="flags of dspark-train")
    parser.add_argument("--name", default="start")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for case in args.cases.split(","):
        flag = CASES[case]
        with tempfile.TemporaryDirectory() as cache:
            env = {
                "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
                "TRITON_CACHE_DIR": f"{cache}/triton",
            }
            more = [flag] if flag.startswith("--") else []
            words = [
                "--cache",
                str(args.store),
                "--output",
                "unused",
                *shlex.split(args.train),
                *more,
            ]
            for state in ("empty", "filled"):
                found = reported(["-c", CHILD, case, *words], env=env)
                keys = ("first_step_seconds", "start_seconds", "step_ms", "wall_seconds", "peak_gb")
                rows.append({"compiled": case, "cache": state, **{k: found[k] for k in keys}})
                print(rows[-1], file=sys.stderr, flush=True)
                write(args.name, {"train": args.train}, rows, args.results, show=False)
    write(args.name, {"train": args.train}, rows, args.results)


if __name__ == "__main__":
    main()
