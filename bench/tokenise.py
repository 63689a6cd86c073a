"""How fast do rows become samples? Tokens per second of one process on plain chats, and seconds for
chats of very many turns.

    python bench/tokenise.py --target DIR --data FILE.jsonl [--rows 2000] [--rounds 6]
        [--old FOLDER]

``--old``: a folder whose ``dspark`` is an earlier checkout, measured by turns with this one. Of the
rounds the fastest counts, by the process's own time: what else the machine does makes a round
slower, never faster. Writes bench/results/tokenise.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

TURNS = (200, 1600, 20_000)
LENGTHS = (4096, 1 << 20)


def maker(target: str, seq_length: int) -> Any:
    """Of whichever checkout is on the path."""
    from transformers import AutoTokenizer

    try:
        from dspark.dump.corpus.masks import SampleMaker
    except ImportError:
        from dspark.dump.tokens import SampleMaker  # type: ignore[import-not-found, no-redef]
    tokenizer = AutoTokenizer.from_pretrained(target)
    return SampleMaker(
        tokenizer,
        tokenised=False,
        vocab_size=len(tokenizer) + 1000,
        seq_length=seq_length,
        min_supervised=2,
    )


def tokens_of(made: Any) -> int:
    """Tokens of a row's samples, which were at most one once."""
    samples = made.samples if hasattr(made, "samples") else [made.sample] if made.sample else []
    return sum(len(s.input_ids) for s in samples)


def chats(target: str, data: str, count: int) -> dict[str, float]:
    """Tokens, and tokens per second, of the first ``count`` rows of ``data``."""
    try:
        from dspark.dump.corpus.sources import open_corpus
    except ImportError:
        from dspark.dump.corpus import open_corpus  # type: ignore[attr-defined, no-redef]
    make = maker(target, 4096).make
    rows = list(islice(open_corpus(data).rows(), count))
    for row in rows[:50]:
        make(row)
    began = time.process_time()
    tokens = sum(tokens_of(make(row)) for row in rows)
    return {"tokens": tokens, "tokens_per_s": round(tokens / (time.process_time() - began))}


def long_chats(target: str) -> list[dict[str, float]]:
    """Seconds for one chat of each number of turns."""
    from dspark.dump.corpus.rows import row_of

    out = []
    for seq_length in LENGTHS:
        make = maker(target, seq_length).make
        for turns in TURNS:
            said = [
                ("user", f"what follows {n}?") if k == 0 else ("assistant", f"{n + 1} does.")
                for n in range(turns)
                for k in (0, 1)
            ]
            row = row_of(
                0, "f:1", {"messages": [{"role": role, "content": text} for role, text in said]}
            )
            began = time.process_time()
            tokens = tokens_of(make(row))
            seconds = time.process_time() - began
            out.append(
                {
                    "turns": turns,
                    "seq_length": seq_length,
                    "tokens": tokens,
                    "seconds": round(seconds, 3),
                }
            )
            print(out[-1], file=sys.stderr)
    return out


def child(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One round of ``chats`` in a process of its own, with the ``dspark`` in ``folder``."""
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}, {str(Path(__file__).parent)!r}]; import "
        "json, tokenise; "
    )
    code += f"print(json.dumps(tokenise.chats({args.target!r}, {args.data!r}, {args.rows})))"
    env = os.environ | {
        "PYTHONPATH": str(folder),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    out: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--old", type=Path)
    args = parser.parse_args()
    import dspark
    from common import write

    here = Path(dspark.__file__).parents[1]
    folders = {"new": here} | ({"old": args.old} if args.old else {})
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for n in range(args.rounds):
        for name, folder in folders.items():
            rounds[name].append(child(args, folder))
            print(f"round {n}: {name}: {rounds[name][-1]}", file=sys.stderr)
    best = {name: max(found, key=lambda r: r["tokens_per_s"]) for name, found in rounds.items()}
    results = {"tokenise": {"best": best, "rounds": rounds, "long_chats": long_chats(args.target)}}
    print(json.dumps(best))
    write("tokenise", {"rows": args.rows, "rounds": args.rounds}, results)


if __name__ == "__main__":
    main()
