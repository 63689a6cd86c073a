"""Does the trainer's number foretell the server's? One draft, the same prompts: score, our decoder,
real vLLM. Writes bench/results/NAME.json.

python bench/serve.py --model TARGET --draft DRAFT --data chat.jsonl[.gz] --work DIR [--held-out
0.05 --per-source 25] [--cache STORE]
                      [--engines transformers,vllm] [--alone 20] [--max-tokens 64] [--temperatures
                      0,1]

Stages keep their reports in --work and are not run again, so the engines may run on different
machines (copy DIR between them).

What is compared, and why numbers that look alike are not the same one:

- ``score``: teacher-forced on the store's text, every anchor once, expected acceptance at
  temperature 1 (needs --cache).
- ``probe``: teacher-forced on the answers that eval wrote. ``anchors`` averages over every
  position, as score does; ``walk`` only over those where decoding starts a block. A block that
  fails is short, so more blocks start in hard places: walk <= anchors, on the same text.
- ``eval`` by each engine: real decoding. Its greedy length must equal the walk on its own answers,
  exactly but for the answers' ends.

``agree`` holds the paired difference of the engines, prompt by prompt, with its standard error.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from common import RESULTS, command, write
from dspark.tools.decode.outcome import ratio_error


def select(data: Path, share: float, per_source: int, out: Path) -> Counter[str]:
    """``per_source`` prompts of each source out of those that dspark-train --val-fraction ``share``
    holds out (by prompt hash), each once.
    """
    from dspark.dump.corpus.masks import sample_key

    seen: Counter[str] = Counter()
    keys, rows = set[bytes](), list[str]()
    with gzip.open(data, "rt") if data.suffix == ".gz" else data.open() as file:
        for line in file:
            row = json.loads(line)
            messages = row["messages"]
            key = sample_key(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
            source = str(row.get("source", "all"))
            held_out = share == 0 or int.from_bytes(key[:8], "big") / 2.0**64 < share
            if held_out and key not in keys and seen[source] < per_source:
                keys.add(key)
                seen[source] += 1
                rows.append(line if line.endswith("\n") else line + "\n")
    out.write_text("".join(rows))
    return seen


def staged(path: Path, make: Any) -> dict[str, Any]:
    """The report in ``path``; made first if it is not there."""
    if not path.is_file():
        path.write_text(json.dumps(make()))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def answers_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def probed(model: str, draft: str, answers: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """Teacher-forced lengths on answers that eval wrote; a mean over all anchors and over the walk,
    each with its error by prompt.
    """
    from dspark.tools.check.probe import answer_of, probe
    from dspark.tools.decode.target import DecodingTarget, load_model
    from dspark.train.draft.saved.folder import load_config, load_draft

    loaded = load_model(model, device, "auto")
    sums: dict[str, list[tuple[float, float]]] = {
        "anchors_greedy": [],
        "anchors_expected": [],
        "walk_greedy": [],
    }
    with DecodingTarget(loaded, load_config(draft).target_layer_ids) as target:
        ready = load_draft(draft, target.frozen, dtype=loaded.dtype).to(loaded.device).eval()
        for row in answers:
            found = probe(ready, answer_of(target, row["input_ids"], row["tokens"]))
            if found is None:
                continue
            walk = found.walk()
            sums["anchors_greedy"].append((float(found.lengths().sum()), found.hit.shape[0]))
            sums["anchors_expected"].append(
                (float(found.expected_lengths().sum()), found.hit.shape[0])
            )
            sums["walk_greedy"].append((float(sum(walk)), len(walk)))
    return {
        name: {
            "mean": sum(s for s, _ in p) / sum(n for _, n in p),
            "se": ratio_error([s for s, _ in p], [n for _, n in p]),
        }
        for name, p in sums.items()
    }


def agreement(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean accepted lengths of two engines on the same prompts and their difference in standard
    errors, paired by prompt.
    """
    counts = [[(sum(r["accepted_at"]), r["drafts"]) for r in rows] for rows in (a, b)]
    lengths = [1 + sum(t for t, _ in c) / sum(d for _, d in c) for c in counts]
    # Linearised: each prompt's part in the difference of the two ratios.
    drafts = [sum(d for _, d in c) for c in counts]
    parts = [
        (ta - (lengths[0] - 1) * da) / drafts[0] - (tb - (lengths[1] - 1) * db) / drafts[1]
        for (ta, da), (tb, db) in zip(*counts, strict=True)
    ]
    n = len(parts)
    error = (sum(p * p for p in parts) * n / (n - 1)) ** 0.5
    difference = lengths[0] - lengths[1]
    return {
        "prompts": n,
        "lengths": lengths,
        "difference": difference,
        "se": error,
        "within_2_se": abs(difference) <= 2 * error + 1e-9,
        "same_answers": sum(x["tokens"] == y["tokens"] for x, y in zip(a, b, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument(
        "--held-out", type=float, default=0.0, help="the training's --val-fraction; 0 = any row"
    )
    parser.add_argument("--per-source", type=int, default=25)
    parser.add_argument(
        "--cache", help="a store of the same target and layers, for score on its held-out samples"
    )
    parser.add_argument(
        "--score-anchors", type=int, default=0, help="anchors per row of score; 0 = all"
    )
    parser.add_argument("--engines", default="transformers,vllm")
    parser.add_argument("--temperatures", default="0")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--alone",
        type=int,
        default=20,
        help="prompts also decoded by the target alone (the slow half)",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--name", default="serve")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prompts = args.work / "prompts.jsonl"
    if not prompts.is_file():
        select(args.data, args.held_out, args.per_source, prompts)
    results: dict[str, Any] = {"eval": {}, "probe": {}, "agree": {}}
    if args.cache or (args.work / "score.json").is_file():
        score = [
            "--cache",
            args.cache,
            "--draft",
            args.draft,
            "--split",
            "validation",
            "--max-anchors",
            args.score_anchors,
        ]
        results["score"] = staged(
            args.work / "score.json",
            lambda: command("tools", "score", *score, "--device", args.device),
        )
    for temperature in args.temperatures.split(","):
        written: dict[str, list[dict[str, Any]]] = {}
        for engine in args.engines.split(","):
            name = f"{engine}-t{temperature}"
            answers = args.work / f"{name}.answers.jsonl"
            flags = [
                "eval",
                "--engine",
                engine,
                "--model",
                args.model,
                "--draft",
                args.draft,
                "--data",
                prompts,
                "--max-tokens",
                args.max_tokens,
                "--alone",
                args.alone,
                "--temperature",
                temperature,
                "--answers",
                answers,
                "--device",
                args.device,
                "--dtype",
                args.dtype,
            ]
            results["eval"][name] = staged(
                args.work / f"{name}.json", lambda flags=flags: command("tools", *flags)
            )
            written[engine] = answers_of(answers)
            if engine == "transformers":
                results["probe"][name] = staged(
                    args.work / f"{name}.probe.json",
                    lambda rows=written[engine]: probed(args.model, args.draft, rows, args.device),
                )
        if len(written) == 2:
            results["agree"][f"t{temperature}"] = agreement(*written.values())
    kept = (
        "held_out",
        "per_source",
        "engines",
        "temperatures",
        "max_tokens",
        "alone",
        "dtype",
        "score_anchors",
    )
    write(args.name, {k: getattr(args, k) for k in kept}, results, args.results)


if __name__ == "__main__":
    main()
