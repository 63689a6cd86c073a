"""Real decoding of held-out prompts with several drafts: paired differences per prompt, and the
walk against decoding's accepted length.

    python bench/decoded.py --model TARGET --store 4-4.zarr --data chats.jsonl --learn DIR
        --drafts kept-0,wsd-0,cosine-0,steps-320-0,steps-160-0,steps-80-0 --work DIR
        [--base cosine-0] [--core kept-0,cosine-0 --whole 60] [--gpus 0,1] [--per-source 50]
        [--max-tokens 96] [--processes 12] [--seconds 140]

``DIR`` and the names are those of bench/learn.py --keep, whose results also hold each draft's walk.
Prompts are rows of the store's validation split, as many of each source. Each of ``--processes``
takes its share of them and decodes a prompt with every draft, greedily in float32, one sequence at
a time (``tools.decode``, which ``dspark-tools eval`` runs), before it takes the next, so that a run
cut short is paired. With ``--core``, only the first ``--whole`` prompts are decoded with the other
drafts too: they are for the walk's line. The first prompt of each process is also decoded by the
target alone. After ``--seconds`` no prompt is begun; a later call with the same ``--work`` decodes
what is left.

The answers to the prompts that all drafts have decoded, which are the target's own, are then dumped
as rows of tokens, and each draft's walk is computed over that store (``tools.judge.score``): what
training can tell of a store, beside what decoding the same answers accepted.

Writes NAME.json to ``--results``: per draft accepted length (1 + accepted / blocks) with its
standard error, and the mean paired difference per prompt to ``--base`` with a 95 % interval, in all
and by source; the least-squares lines of accepted length on the walk of bench/learn.py's held-out
rows, and on that of the answers; what differed from the target.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, command, write

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
    from dspark.tools.decode.target import DecodingTarget, greedy_alone, load_model
    from dspark.train.draft.saved.folder import load_draft

    started, target = time.perf_counter(), load_target(args.model)
    prompts = read_prompts(
        args.worker, target.tokenizer, vocab_size=target.shapes.vocab_size, room=None
    )
    tasks = json.loads(args.worker.with_suffix(".tasks").read_text())
    model = load_model(args.model, args.device, "float32")
    stop = target.eos_token_ids
    folders = {name: args.learn / "drafts" / name for name in args.drafts}
    drafts: dict[str, Any] = {}
    with DecodingTarget(model, ()) as bare:
        for name, folder in folders.items():
            drafts[name] = (
                load_draft(folder, bare.frozen, dtype=model.dtype).to(model.device).eval()
            )
    layers = {draft.config.target_layer_ids for draft in drafts.values()}
    if len(layers) > 1:
        raise SystemExit(f"the drafts read different layers: {sorted(layers)}")
    limit = args.max_tokens
    with (
        DecodingTarget(model, next(iter(layers))) as taps,
        args.worker.with_suffix(".out").open("a") as out,
    ):
        alone = greedy_alone(model, prompts[0].ids, max_tokens=limit, stop_ids=stop)
        for number, (prompt, (where, names)) in enumerate(zip(prompts, tasks, strict=True)):
            if time.perf_counter() - started > args.seconds:
                break
            for name in names:
                found = outcome_of(taps, drafts[name], prompt.ids, max_tokens=limit, stop_ids=stop)
                row = {
                    "draft": name,
                    "where": where,
                    "source": prompt.source,
                    "tokens": len(found.tokens),
                    "blocks": found.drafts,
                    "accepted": sum(found.accepted_at),
                    "seconds": found.seconds,
                    "same": alone == found.tokens if number == 0 else None,
                }
                if name == names[0]:
                    row |= {"prompt": list(prompt.ids), "answer": found.tokens}
                out.write(json.dumps(row) + "\n")
            out.flush()


def answered(work: Path) -> dict[tuple[str, str], Row]:
    """The answers there are, by draft and prompt."""
    lines = [line for path in work.glob("*.out") for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    return {(row["draft"], row["where"]): row for row in rows}


def decode(args: argparse.Namespace) -> list[Row]:
    """Every answer of every process. One that fails is told, and the others count."""
    args.work.mkdir(parents=True, exist_ok=True)
    done, tasks = answered(args.work), []
    prompts = chosen(args.store, args.data, args.per_source)
    for at, prompt in enumerate(prompts):
        names = [d for d in args.drafts if at < args.whole or d in args.core]
        names = [name for name in names if (name, str(at)) not in done]
        tasks += [(prompt, (str(at), names))] if names else []
    calls = []
    for i in range(args.processes):
        own = tasks[i :: args.processes]
        if not own:
            continue
        path = args.work / f"{time.time_ns()}-{i}.jsonl"
        path.write_text("".join(json.dumps(prompt) + "\n" for prompt, _ in own))
        path.with_suffix(".tasks").write_text(json.dumps([task for _, task in own]))
        words = ["--worker", path, "--model", args.model, "--learn", args.learn]
        words += ["--drafts", ",".join(args.drafts), "--device", args.device]
        words += ["--max-tokens", args.max_tokens, "--seconds", args.seconds]
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if args.gpus:
            env["CUDA_VISIBLE_DEVICES"] = args.gpus[i % len(args.gpus)]
        with path.with_suffix(".log").open("w") as log:
            call = [sys.executable, __file__, *map(str, words)]
            calls.append((path, subprocess.Popen(call, stdout=log, stderr=log, env=env)))
    for path, running in calls:
        if running.wait():
            print(f"{path}: exited {running.returncode}", file=sys.stderr)
            print(path.with_suffix(".log").read_text()[-1500:], file=sys.stderr)
    # a prompt counts once every draft of the core has decoded it
    found = answered(args.work)
    whole = {w for _, w in found if all((name, w) in found for name in args.core)}
    return [row for (_, where), row in found.items() if where in whole]


def interval(values: list[float]) -> Row:
    """Mean, and 95 % of the normal distribution of means."""
    mean = statistics.mean(values)
    half = 1.96 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half, "prompts": len(values)}


def compared(rows: list[Row], base: str) -> list[Row]:
    """A row per draft, over the prompts that it and ``base`` have decoded. Prompts whose answer
    ended before a block are left out of all.
    """
    from dspark.tools.decode.outcome import ratio_error

    blocks = {(r["draft"], r["where"]): r for r in rows}
    begun = [w for w in dict.fromkeys(r["where"] for r in rows) if blocks[base, w]["blocks"]]
    out = []
    for name in dict.fromkeys(r["draft"] for r in rows):
        used = [w for w in begun if (name, w) in blocks]
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


def walked(args: argparse.Namespace, rows: list[Row], layers: Sequence[int]) -> list[Row]:
    """Per draft the walk over a store of the answers in ``rows``, with 16-bit states of ``layers``,
    and what decoding accepted there: tokens per block, the first of an answer and what a last block
    drafted beyond its end not counted, as the walk counts. Answers of one token have no block.
    """
    import dspark.cache
    from dspark.tools.judge.score import score

    texts = {r["where"]: (r["prompt"], r["answer"]) for r in rows if "answer" in r}
    texts = {where: text for where, text in texts.items() if len(text[1]) > 1}
    if not texts:
        return []
    data, store = args.work / "answers.jsonl", args.work / "answers.zarr"
    made = [
        {"input_ids": p + a, "loss_mask": [0] * len(p) + [1] * len(a)} for p, a in texts.values()
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in made))
    command(
        "dump", "--model", args.model, "--data", data, "--output", store, "--overwrite",
        "--codec", "lossless", "--dtype", "float32", "--layers", ",".join(map(str, layers)),
        "--device", args.device, "--max-dropped", 0, log=args.work / "answers.log",
    )  # fmt: skip
    cache, out = dspark.cache.open(str(store)), []
    for name in dict.fromkeys(row["draft"] for row in rows):
        own = [r for r in rows if r["draft"] == name and r["where"] in texts]
        tokens, blocks = sum(r["tokens"] - 1 for r in own), sum(r["blocks"] for r in own)
        told = score(cache, str(args.learn / "drafts" / name), device=args.device)
        out.append({
            "draft": name,
            "prompts": len(own),
            "walk": told["walk_greedy"],
            "tokens_per_block": tokens / blocks,
            "accepted_length": 1 + sum(r["accepted"] for r in own) / blocks,
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
            f"{fit['drafts']} drafts on {fit.get('prompts')} prompts, residual "
            f"{fit['residual_rms']:.3f}; accepted length over walk "
            f"{100 * fit['length_over_walk_mean']:+.1f} % on average",
        ]
    return "\n".join(lines)


def own_table(rows: list[Row], fit: Row) -> str:
    """Markdown: the walk over the target's answers beside decoding."""
    lines = [
        f"Over the target's {rows[0]['prompts']} answers to the prompts that all drafts decoded:",
        "",
        "| draft | walk | tokens per block within the answers | accepted length |",
        "|---|---|---|---|",
        *(
            f"| {r['draft']} | {r['walk']:.4f} | {r['tokens_per_block']:.4f} "
            f"| {r['accepted_length']:.4f} |"
            for r in rows
        ),
        "",
        f"tokens per block = {fit['slope']:.4f} walk {fit['intercept']:+.4f}, residual "
        f"{fit['residual_rms']:.4f}",
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
    parser.add_argument("--core", type=lambda text: text.split(","), help="drafts  [all]")
    parser.add_argument("--whole", type=int, default=60, help="prompts for the others too")
    parser.add_argument("--gpus", type=lambda text: text.split(","), help="shared in turns")
    parser.add_argument("--per-source", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=140)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", default="decoded")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.drafts = list(dict.fromkeys(args.drafts))
    missing = [name for name in args.drafts if not (args.learn / "drafts" / name).is_dir()]
    if missing and not args.worker:
        print(f"not there, left out: {', '.join(missing)}", file=sys.stderr)
        args.drafts = [name for name in args.drafts if name not in missing]
    if args.worker:
        worker(args)
        return
    import dspark.cache

    if not args.drafts or None in (args.store, args.data, args.work):
        parser.error("needs a draft that is there, and --store, --data and --work")
    started, base = time.perf_counter(), args.base or args.drafts[-1]
    if base not in args.drafts:
        parser.error(f"--base {base} is not one of {', '.join(args.drafts)}")
    args.core = [name for name in args.core or args.drafts if name in args.drafts]
    args.core = list(dict.fromkeys([*args.core, base]))
    answers = decode(args)
    if not answers:
        raise SystemExit("no prompt was decoded with every draft")
    rows = compared(answers, base)
    by = {(row["draft"], row["where"]) for row in answers}
    common = [r for r in answers if all((name, r["where"]) in by for name in args.drafts)]
    alike = {row["draft"]: row for row in compared(common, base)}
    known = []
    for row in rows:
        told = args.learn / "board" / f"{row['draft']}.json"
        row["walk"] = json.loads(told.read_text())["walk"] if told.exists() else None
        if row["walk"] is not None and row["draft"] in alike:
            known.append((row["walk"], alike[row["draft"]]["accepted_length"]))
    fit = line(*map(list, zip(*known, strict=True))) if known else None
    if fit:
        fit["prompts"] = next(iter(alike.values()))["prompts"]
    own = walked(args, common, dspark.cache.open(str(args.store)).manifest.layers)
    own_fit = line([r["walk"] for r in own], [r["tokens_per_block"] for r in own]) if own else None
    answers = [{k: v for k, v in r.items() if k not in ("prompt", "answer")} for r in answers]
    hidden = ("model", "store", "data", "learn", "work", "results", "worker")
    said = {k: str(v) for k, v in vars(args).items() if k not in hidden}
    result = {"drafts": rows, "walk": fit, "answers_walked": own, "answers_walk": own_fit}
    result["seconds"] = time.perf_counter() - started
    write(args.name, said, result | {"answers": answers}, args.results, show=False)
    print(table(rows, fit))
    if own_fit:
        print(f"\n{own_table(own, own_fit)}")
    print(f"{len(answers)} answers in {result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
