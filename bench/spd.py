"""An SPD head from store to figures: dump with the ends of three stages, train, decode one prompt
of each SPEED-Bench category, lossless.

    python bench/spd.py --model DIR --data FILE.jsonl --out FOLDER [--rows 1200] [--seconds 25]
        [--max-tokens 32] [--stages 3]

``--prompts`` is SPEED-Bench's ``qualitative.jsonl`` or, by default, a stand-in of our own words
with a row per category and one placeholder, which is left out. Decoding runs in float32, so that
lossless means every token. ``score`` replays the same schedule over held-out answers of the store.
The last lines are the figures by both definitions of acceptance. OUT/spd.json holds everything.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from drafters import Training, dump_store

from common import command, write

STAND_IN = Path(__file__).parent / "speed_bench_stand_in.jsonl"
FIGURES = (
    "stages",
    "steps",
    "tokens",
    "acceptance_rate",
    "equivalent_accept_length",
    "equivalent_accept_length_drafted",
    "equivalent_accept_length_se",
    "theoretical_gain",
    "theoretical_gain_pooled",
    "draft_acceptance",
    "drafts_judged",
    "drafts_accepted",
    "lossless",
    "compared",
)


def decode(args: argparse.Namespace, draft: Path) -> dict[str, Any]:
    from dspark.tools.judge.evaluating import EvalConfig, evaluate

    config = EvalConfig(
        model=args.model,
        draft=str(draft),
        data=str(args.prompts),
        max_tokens=args.max_tokens,
        per_source=1,
        dtype="float32",
        device=args.device,
    )
    return evaluate(config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--prompts", type=Path, default=STAND_IN)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--codec", default="rotated-4-4")
    parser.add_argument("--seconds", type=float, default=25, help="of training")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument(
        "--train", default="--workers 3 --lr 5e-4", help="more flags of dspark-train"
    )
    parser.add_argument(
        "--score", action="store_true", help="also replay the store's held-out answers"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.types, args.own = "spd", {"spd": ""}
    began, store, result = time.perf_counter(), args.out / "spd.zarr", dict[str, Any]()

    def keep(name: str, value: Any) -> None:
        result[name] = value
        config = {
            k: str(v) for k, v in vars(args).items() if k not in ("model", "data", "out", "own")
        }
        write("spd", config, result, args.out, show=False)
        print(f"[{time.perf_counter() - began:6.1f} s] {name}: {json.dumps(value)}", flush=True)

    keep("dump", dump_store(args, store))
    training = Training("spd", args, store, args.prompts)
    training.time()
    training.train()
    keep("train", training.row)
    found = decode(args, args.out / "spd")
    keep(
        "eval",
        {k: found[k] for k in FIGURES}
        | {"per_source": found["per_source"], "diverged": found["diverged"]},
    )
    if args.score:
        flags = (
            "--cache",
            store,
            "--draft",
            args.out / "spd",
            "--split",
            "validation",
            "--device",
            args.device,
        )
        scored = command("tools", "score", *flags)
        keep(
            "score",
            {k: v for k, v in scored.items() if k in FIGURES or k in ("kl_loss", "accept_rate")},
        )
    said = result["eval"]
    print(
        f"draft acceptance {said['draft_acceptance']:.4f} ({said['drafts_accepted']} of "
        f"{said['drafts_judged']} judged drafts)\n"
        f"acceptance rate {said['acceptance_rate']:.4f} tokens per step; EAL "
        f"{said['equivalent_accept_length']:.4f}, "
        f"{said['equivalent_accept_length_drafted']:.4f} without the prefill's tokens\n"
        f"theoretical gain {said['theoretical_gain']:.4f} (pooled "
        f"{said['theoretical_gain_pooled']:.4f}); lossless: {said['lossless']} "
        f"on {said['compared']} prompts"
    )


if __name__ == "__main__":
    main()
