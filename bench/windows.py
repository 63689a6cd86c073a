"""Sliding windows and YaRN at rows of 16,384 tokens: step time and memory, and the walk by position
in the document.

    python bench/windows.py --step [--shape qwen3-4b] [--out FOLDER]
    python bench/windows.py --walk --model DIR --data FILE.jsonl[.gz] --out FOLDER
        [--documents 128] [--steps 400] [--budget 180]

``--step``: random states, one document per row, 512 anchors; forward, objective and backward,
compiled, as bench/step.py. One model takes every variant in turn; windows share a compilation.
``--walk``: the corpus' conversations strung to documents of 16,384 tokens, dumped by the product
from the target with YaRN (factor 2, for SmolLM2 is made for 8,192 positions); per variant a
training from the same weights on the same rows, then greedy walk and walk at temperature 1 at every
anchor of held-out documents, by the anchor's position. Writes FOLDER/windows_step.json and
FOLDER/windows_walk.json after every variant.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import step as bench_step
import torch
from feed import config
from learn_lab import Lab
from learn_variants import Variant

from common import PUBLISHED_LOSS, RESULTS, write
from dspark.train.data import anchors as rules
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel
from dspark.train.draft.sight import SLIDING
from dspark.train.evaluate import batch_alphas, judged
from dspark.train.objective.config import ObjectiveConfig
from dspark.train.objective.walk import KINDS, visits
from dspark.train.run.setup import prepare

EDGES = (0, 512, 2048, 4096, 8192, 16_384)
TOKENS = 16_384


def variants(yarn: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> what of a DraftConfig it changes. Full attention last but for YaRN, which runs its
    compilation.
    """
    return {
        "full": {},
        "yarn": {"rope_scaling": yarn},
        "window-2048": {"sliding_window": 2048},
        "window-512": {"sliding_window": 512},
        "window-2048+yarn": {"sliding_window": 2048, "rope_scaling": yarn},
    }


def become(model: DraftModel, plain: DraftConfig, changes: dict[str, Any]) -> None:
    """Let ``model`` have layers of another sight and other RoPE tables: no weight depends on
    either.
    """
    kinds = (SLIDING,) * plain.num_layers if "sliding_window" in changes else ()
    model.config = dataclasses.replace(plain, layer_types=kinds, **changes)
    model.look()


def step_times(args: argparse.Namespace) -> None:
    s = dataclasses.replace(bench_step.SHAPES[args.shape], tokens=args.tokens)
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    model, rows = bench_step.one_model(s, args, dtype)
    plain, found = model.config, list[dict[str, Any]]()
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": plain.max_position_embeddings,
    }
    for name, changes in variants(yarn).items():
        become(model, plain, changes)
        found.append({"name": name, **bench_step.ours(s, args, model, rows)})
        print(found[-1], file=sys.stderr, flush=True)
        write(
            "windows_step",
            {"sizes": vars(s), "repeat": args.repeat, "loss": dataclasses.asdict(args.loss)},
            found,
            args.out,
            show=False,
        )
    base = found[0]["ms"]
    print(
        "\n".join(
            f"{r['name']:18} {r['ms']:7.1f} ms ({r['ms'] / base:.2f}) forward "
            f"{r['forward_ms']:.1f} "
            f"backward {r['backward_ms']:.1f} peak {r['peak_gb']:.1f} GB"
            for r in found
        )
    )


# The walk


def long_documents(args: argparse.Namespace) -> tuple[Path, Path]:
    """The target that takes twice its positions, and the data file of its documents."""
    target, data = args.out / "target", args.out / "documents.jsonl"
    if data.exists():
        return target, data
    from transformers import AutoTokenizer

    shutil.copytree(args.model, target, dirs_exist_ok=True)
    own = json.loads((target / "config.json").read_text())
    longest, theta = (
        own["max_position_embeddings"],
        own.get("rope_theta") or own["rope_parameters"]["rope_theta"],
    )
    yarn = {
        "rope_type": "yarn",
        "factor": args.tokens / longest,
        "original_max_position_embeddings": longest,
    }
    own = {k: v for k, v in own.items() if k != "rope_scaling"} | {
        "max_position_embeddings": args.tokens
    }
    (target / "config.json").write_text(
        json.dumps(own | {"rope_parameters": yarn | {"rope_theta": theta}})
    )
    tokenizer = AutoTokenizer.from_pretrained(target)
    opener = gzip.open if str(args.data).endswith(".gz") else open
    with opener(args.data, "rt") as lines:
        chats = [json.loads(line)["messages"] for line in lines]
    draw = np.random.default_rng(0).permutation(len(chats))
    counts = [
        len(ids) + 16
        for ids in tokenizer([" ".join(m["content"] for m in chat) for chat in chats])["input_ids"]
    ]
    documents, current, size = list[list[dict[str, str]]](), list[dict[str, str]](), 64
    for i in draw:
        turns = [m for m in chats[i] if m["role"] in ("user", "assistant")]
        if size + counts[i] > args.tokens:
            documents.append(current)
            current, size = [], 64
        if len(documents) == args.documents:
            break
        if [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2) and turns:
            current, size = current + turns, size + counts[i]
    data.write_text("".join(json.dumps({"messages": d}) + "\n" for d in documents if d))
    return target, data


def walk_by_position(lab: Lab) -> dict[str, Any]:
    """Tokens over expected blocks, of the anchors in each stretch of positions."""
    run = lab.run
    tokens, blocks = np.zeros(len(EDGES) - 1), np.zeros((len(KINDS), len(EDGES) - 1))
    for held in lab.held_out:
        batch = held.place(run)
        every = np.flatnonzero(rules.eligible(held.host.loss_mask.numpy(), held.host.doc.numpy()))
        some, parts = run.config.max_anchors, []
        for at in range(0, every.size, some):
            part = batch.with_anchors(
                held.host, every[at : at + some], some if run.stream.pad else 0
            )
            parts.append(
                batch_alphas(
                    run.model, part, *judged(run.model, part, run.config.decay, run.compute.backend)
                )
            )
        alpha = torch.cat(parts, 1).double().numpy()
        place = np.digitize(held.host.position.numpy()[every], EDGES[1:-1])
        tokens += np.bincount(place, minlength=len(tokens))
        for kind in range(len(KINDS)):
            blocks[kind] += np.bincount(place, visits(alpha[kind], every), minlength=len(tokens))
    names = [f"{a}-{b}" for a, b in itertools.pairwise(EDGES)]
    out: dict[str, Any] = {"tokens": dict(zip(names, tokens.tolist(), strict=True))}
    for name, kind in (("walk", "greedy"), ("walk_sampled", "sampled")):
        own = blocks[KINDS.index(kind)]
        out[f"{name}_by_position"] = {
            n: t / b if b else None for n, t, b in zip(names, tokens, own, strict=True)
        }
        out[name] = float(tokens.sum() / own.sum())
    return out


def walks(args: argparse.Namespace) -> None:
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    target, data = long_documents(args)
    store = args.out / "long.zarr"
    if not (store / "index").exists():
        call = [
            "-m",
            "dspark.dump",
            "--model",
            str(target),
            "--data",
            str(data),
            "--output",
            str(store),
            "--codec",
            "rotated-4-4",
        ]
        call += [
            "--seq-length",
            str(args.tokens),
            "--turns",
            "whole",
            *(["--resume"] if store.exists() else []),
        ]
        subprocess.run([sys.executable, *call, *args.dump.split()], check=True, stdout=sys.stderr)
    say("dumped")
    run = prepare(config(store, args.train))
    lab, plain = Lab(run, args.documents), run.model.config
    lab.wait()
    yarn = json.loads((target / "config.json").read_text())["rope_parameters"]
    yarn = {k: v for k, v in yarn.items() if k != "rope_theta"}
    say(f"{len(lab.rows)} rows, {len(lab.held_out)} held out")
    found: list[dict[str, Any]] = []
    longest = 0.0
    for name, changes in variants(yarn).items():
        began = time.perf_counter()
        if began - started + longest > args.budget:
            say(f"no time for {name}")
            continue
        become(run.model, plain, changes)
        lab.reset(args.seed)
        usual = Variant.parse("base", "", run)
        seconds = lab.train(usual, args.seed, args.steps, args.steps)
        found.append(
            {
                "name": name,
                "seed": args.seed,
                "steps": args.steps,
                "step_ms": 1e3 * seconds / args.steps,
                **walk_by_position(lab),
            }
        )
        longest = max(longest, time.perf_counter() - began)
        say(json.dumps(found[-1]))
        write(
            "windows_walk",
            {"steps": args.steps, "documents": args.documents, "train": args.train},
            found,
            args.out,
            show=False,
        )
    for row in found:
        print(
            f"{row['name']:18} walk {row['walk']:.3f}  "
            + "  ".join(f"{k} {v:.3f}" for k, v in row["walk_by_position"].items() if v)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--walk", action="store_true")
    parser.add_argument("--shape", choices=bench_step.SHAPES, default="qwen3-4b")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument(
        "--loss-fn",
        dest="loss",
        type=ObjectiveConfig.from_json,
        default=PUBLISHED_LOSS,
        help="of --step  [DeepSpec's]",
    )
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--budget",
        type=float,
        default=180,
        help="seconds; no variant is begun that would not end within",
    )
    parser.add_argument("--dump", default="", help="more flags of dspark-dump")
    parser.add_argument(
        "--train", default="--recipe SmolLM2-135M --no-tensorboard --val-rows 8 --val-fraction 0.07"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step:
        step_times(args)
    if args.walk:
        walks(args)


if __name__ == "__main__":
    main()
