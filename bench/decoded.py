"""Real decoding of held-out prompts with several drafts: paired differences per prompt, and the
walk against decoding's accepted length.

    python bench/decoded.py --model TARGET --store 4-4.zarr --data chats.jsonl --learn DIR
        --drafts kept-0,wsd-0,cosine-0,steps-320-0,steps-160-0,steps-80-0 --work DIR
        [--base cosine-0] [--per-source 50] [--max-tokens 96] [--processes 12] [--seconds 140]

``DIR`` and the names are those of bench/learn.py --keep, whose results also hold each draft's walk.
Prompts are rows of the store's validation split, as many of each source. Each of ``--processes``
takes its share of them and decodes a prompt with every draft, greedily in float32, one sequence at
a time (``tools.decode``, which ``dspark-tools eval`` runs), before it takes the next, so that a run
cut short is paired. The first prompt of each process is also decoded by the target alone. After
``--seconds`` no prompt is begun.

Writes NAME.json to ``--results``: per draft accepted length (1 + accepted / blocks) with its
standard error, and the mean paired difference per prompt to ``--base`` with a 95 % interval, in all
and by source; the least-squares line of accepted length on walk; what differed from the target.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, write

Row = dict[str, Any]
FRACTION = 0.05  # held out, dspark-train's default


def chosen(store: Path, data: Path, per_source: int) -> list[Row]:
    """Rows of ``data`` whose conversation the store's training split lacks, at most ``per_source``
    of each source, sources in turns.
    """
    import dspark.cache
    from dspark.train.data.stream import split

    index = dspark.cache.open(str(store)).index
    _, held_out = split(index["sample_key"], FRACTION)
    wanted = {int(row) for row in index["sample_row"][held_out]}
    opened = gzip.open if data.suffix == ".gz" else open
    by: dict[str, list[Row]] = {}
    with opened(data, "rt") as lines:
        for number, line in enumerate(lines):
            if number in wanted:
                row = json.loads(line)
                by.setdefault(str(row.get("source")), []).append(row)
    return [rows[i] for i in range(per_source) for rows in by.values() if i < len(rows)]


def worker(args: argparse.Namespace) -> None:
    """Decode the prompts of one file with every draft, a JSON line per answer."""
    from dspark.dump.target.config import load_target
    from dspark.tools.decode.decode import outcome_of
    from dspark.tools.decode.prompts import read_prompts
    from dspark.tools.decode.target import Target, greedy_alone, load_model
    from dspark.train.draft.folder import load_draft

    started, target = time.perf_counter(), load_target(args.model)
    prompts = read_prompts(
        args.worker, target.tokenizer, vocab_size=target.shapes.vocab_size, room=None
    )
    model = load_model(args.model, args.device, "float32")
    stop = target.eos_token_ids
    folders = {name: args.learn / "drafts" / name for name in args.drafts}
    drafts: dict[str, Any] = {}
    with Target(model, ()) as bare:
        for name, folder in folders.items():
            drafts[name] = (
                load_draft(folder, bare.frozen, dtype=model.dtype).to(model.device).eval()
            )
    layers = {draft.config.target_layer_ids for draft in drafts.values()}
    if len(layers) > 1:
        raise SystemExit(f"the drafts read different layers: {sorted(layers)}")
    with (
        Target(model, next(iter(layers))) as taps,
        args.worker.with_suffix(".out").open("w") as out,
    ):
        for number, prompt in enumerate(prompts):
            if time.perf_counter() - started > args.seconds:
                break
            alone = None
            for name, draft in drafts.items():
                found = outcome_of(
                    taps, draft, prompt.ids, max_tokens=args.max_tokens, stop_ids=stop
                )
                if number == 0 and alone is None:
                    limit = args.max_tokens
                    alone = greedy_alone(model, prompt.ids, max_tokens=limit, stop_ids=stop)
                row = {
                    "draft": name,
                    "where": f"{args.worker.name}:{number}",
                    "source": prompt.source,
                    "tokens": len(found.tokens),
                    "blocks": found.drafts,
                    "accepted": sum(found.accepted_at),
                    "seconds": found.seconds,
                    "same": None if alone is None else alone == found.tokens,
                }
                out.write(json.dumps(row) + "\n")
            out.flush()


def decode(args: argparse.Namespace) -> list[Row]:
    """Every answer of every process. One that fails is told, and the others count."""
    prompts = chosen(args.store, args.data, args.per_source)
    args.work.mkdir(parents=True, exist_ok=True)
    files, calls = [], []
    for i in range(args.processes):
        own = prompts[i :: args.processes]
        if not own:
            continue
        path = args.work / f"prompts-{i}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
        path.with_suffix(".out").unlink(missing_ok=True)
        words = ["--worker", path, "--model", args.model, "--learn", args.learn]
        words += ["--drafts", ",".join(args.drafts), "--device", args.device]
        words += ["--max-tokens", args.max_tokens, "--seconds", args.seconds]
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with path.with_suffix(".log").open("w") as log:
            call = [sys.executable, __file__, *map(str, words)]
            calls.append(subprocess.Popen(call, stdout=log, stderr=log, env=env))
        files.append(path)
    rows = []
    for path, call in zip(files, calls, strict=True):
        if call.wait():
            print(f"{path}: exited {call.returncode}", file=sys.stderr)
            print(path.with_suffix(".log").read_text()[-1500:], file=sys.stderr)
        out = path.with_suffix(".out")
        # a prompt counts once every draft has decoded it
        some = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        whole = {w for w, n in Counter(r["where"] for r in some).items() if n == len(args.drafts)}
        rows += [row for row in some if row["where"] in whole]
    return rows


def interval(values: list[float]) -> Row:
    """Mean, and 95 % of the normal distribution of means."""
    mean = statistics.mean(values)
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half, "prompts": len(values)}


def compared(rows: list[Row], base: str) -> list[Row]:
    """A row per draft. Prompts whose answer ended before a block are left out of all."""
    from dspark.tools.decode.outcome import ratio_error

    blocks = {(r["draft"], r["where"]): r for r in rows}
    used = [w for w in dict.fromkeys(r["where"] for r in rows) if blocks[base, w]["blocks"]]
    out = []
    for name in dict.fromkeys(r["draft"] for r in rows):
        own = [blocks[name, w] for w in used]
        theirs = [blocks[base, w] for w in used]
        length = [1 + r["accepted"] / r["blocks"] for r in own]
        apart = [x - 1 - r["accepted"] / r["blocks"] for x, r in zip(length, theirs, strict=True)]
        sources = sorted({str(r["source"]) for r in own})
        accepted, count = [r["accepted"] for r in own], [r["blocks"] for r in own]
        total = 1 + sum(accepted) / sum(count)
        before = 1 + sum(r["accepted"] for r in theirs) / sum(r["blocks"] for r in theirs)
        out.append({
            "draft": name,
            "prompts": len(own),
            "tokens": sum(r["tokens"] for r in own),
            "blocks": sum(count),
            "accepted_length": total,
            "accepted_length_se": ratio_error(accepted, count),
            "change": total / before - 1,
            "paired": interval(apart),
            "by_source": {
                s: interval([x for x, r in zip(apart, own, strict=True) if str(r["source"]) == s])
                | {"accepted_length": 1 + sum(r["accepted"] for r in own if str(r["source"]) == s)
                   / sum(r["blocks"] for r in own if str(r["source"]) == s)}
                for s in sources
            },
            "compared_with_target": sum(r["same"] is not None for r in own),
            "same_as_target": sum(r["same"] is True for r in own),
        })  # fmt: skip
    return out


def line(walks: list[float], lengths: list[float]) -> Row:
    """Least squares of ``lengths`` on ``walks``, and how far each is from its walk."""
    slope, at = np.polyfit(walks, lengths, 1) if len(walks) > 1 else (float("nan"), float("nan"))
    residual = [y - slope * x - at for x, y in zip(walks, lengths, strict=True)]
    ratio = [y / x - 1 for x, y in zip(walks, lengths, strict=True)]
    return {
        "drafts": len(walks),
        "slope": float(slope),
        "intercept": float(at),
        "residual_rms": float(np.sqrt(np.mean(np.square(residual)))),
        "length_over_walk_mean": float(np.mean(ratio)),
        "length_over_walk_rms": float(np.sqrt(np.mean(np.square(ratio)))),
        "correlation": float(np.corrcoef(walks, lengths)[0, 1]) if len(walks) > 1 else None,
    }


def table(rows: list[Row], fit: Row | None) -> str:
    """Markdown: one row per draft, a line for the walk."""
    lines = [
        "| draft | walk | accepted length | change | paired difference, 95 % | prompts |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        walk, apart = row.get("walk"), row["paired"]
        error = row["accepted_length_se"] or float("nan")
        lines.append(
            f"| {row['draft']} | {'' if walk is None else f'{walk:.3f}'} "
            f"| {row['accepted_length']:.3f} ± {error:.3f} | {100 * row['change']:+.1f} % "
            f"| {apart['mean']:+.3f} ({apart['low']:+.3f} to {apart['high']:+.3f}) "
            f"| {row['prompts']} |"
        )
        by = ", ".join(f"{s} {x['accepted_length']:.2f}" for s, x in row["by_source"].items())
        lines.append(f"| | | {by} | | | |")
    if fit:
        lines += [
            "",
            f"accepted length = {fit['slope']:.3f} walk {fit['intercept']:+.3f} over "
            f"{fit['drafts']} drafts, residual {fit['residual_rms']:.3f}; accepted length over "
            f"walk {100 * fit['length_over_walk_mean']:+.1f} % on average",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--learn", type=Path, required=True, help="--out of bench/learn.py")
    parser.add_argument("--drafts", type=lambda text: text.split(","), required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--base", help="what the others are compared with  [the last draft]")
    parser.add_argument("--per-source", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="decoded")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    missing = [name for name in args.drafts if not (args.learn / "drafts" / name).is_dir()]
    if missing and not args.worker:
        print(f"not there, left out: {', '.join(missing)}", file=sys.stderr)
        args.drafts = [name for name in args.drafts if name not in missing]
    if args.worker:
        worker(args)
        return
    if not args.drafts or None in (args.store, args.data, args.work):
        parser.error("needs a draft that is there, and --store, --data and --work")
    started, base = time.perf_counter(), args.base or args.drafts[-1]
    if base not in args.drafts:
        parser.error(f"--base {base} is not one of {', '.join(args.drafts)}")
    answers = decode(args)
    if not answers:
        raise SystemExit("no prompt was decoded with every draft")
    rows = compared(answers, base)
    for row in rows:
        told = args.learn / "board" / f"{row['draft']}.json"
        row["walk"] = json.loads(told.read_text())["walk"] if told.exists() else None
    known = [(row["walk"], row["accepted_length"]) for row in rows if row["walk"] is not None]
    fit = line(*map(list, zip(*known, strict=True))) if known else None
    hidden = ("model", "store", "data", "learn", "work", "results", "worker")
    said = {k: str(v) for k, v in vars(args).items() if k not in hidden}
    result = {"drafts": rows, "walk": fit, "seconds": time.perf_counter() - started}
    write(args.name, said, result | {"answers": answers}, args.results, show=False)
    print(table(rows, fit))
    print(f"{len(answers)} answers in {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
