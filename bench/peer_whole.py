"""DeepSpec's own cache writer and its own trainer, each as its script in a process of its own.

    python bench/peer_whole.py --deepspec CHECKOUT --model TARGET --store ours.zarr
        --data chats.jsonl --work DIR --output DRAFT [--steps 400] [--batch 32] [--anchors 64]
        [--lr 1e-3] [--no-compile]

Rows are those of ``--data`` that our store does not hold out, under its own key ``conversations``.
A chat without a system message gets the one that the target's template would add, because its
parser would add another. Then ``scripts/data/prepare_target_cache.py`` and ``train.py`` run on one
GPU with ``--opts`` alone: nothing of it is changed. Its layers, blocks, heads and loss are its
defaults, which are ours; depth, layers read, mask token and steps are what ours has.
``--anchors`` are of a sample, of which ``--batch`` make a step.

Its last checkpoint becomes a draft folder that ``dspark-tools score`` reads. Prints one JSON
object: cache_seconds, train_seconds, bytes (of its cache), samples, steps. Where its training
failed, the next call finds its cache, and trains alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import site
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from feed import config

from dspark.train.draft.saved.folder import save_draft
from dspark.train.run import folder
from dspark.train.run.setup import Run, prepare

CONFIG = "config/dspark/dspark_qwen3_4b.py"
PORT = "29571"


def system_of(model: str) -> str | None:
    """The system message that the target's template adds to a chat that has none."""
    from dspark.dump.target.config import load_tokenizer

    tokenizer = load_tokenizer(model)
    chat = [{"role": "user", "content": "?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    head, start, rest = text.partition("<|im_start|>system\n")
    return rest.partition("<|im_end|>")[0] if start and not head else None


def conversations(run: Run, data: Path, out: Path, system: str | None) -> int:
    """Write the rows of ``data`` that our training reads in its form; their number."""
    from dspark.train.data.stream import split

    index = run.cache.index
    train, _ = split(index["sample_key"], run.config.val_fraction)
    wanted = {int(row) for row in index["sample_row"][train]}
    opened = gzip.open if data.suffix == ".gz" else open
    count = 0
    with opened(data, "rt") as lines, out.open("w") as written:
        for number, line in enumerate(lines):
            if number not in wanted:
                continue
            chat = json.loads(line)["messages"]
            if system is not None and chat[0]["role"] != "system":
                chat = [{"role": "system", "content": system}, *chat]
            written.write(json.dumps({"conversations": chat}) + "\n")
            count += 1
    return count


def script(args: argparse.Namespace, name: str, opts: dict[str, object], *more: object) -> float:
    """Run one of its scripts; seconds."""
    flags = [f"--opts={key}={value}" for key, value in opts.items()]
    call = [sys.executable, name, "--config", CONFIG, *flags, *map(str, more)]
    home = args.work / "home"
    home.mkdir(parents=True, exist_ok=True)
    env = {"HOME": str(home.absolute()), "RANK": "0", "WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    env |= {"PYTHONUSERBASE": site.getuserbase()}  # packages there go with HOME otherwise
    paths = [str(args.deepspec.absolute()), *filter(None, [os.environ.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths)}
    started = time.perf_counter()
    with (args.work / "peer.log").open("a") as log:
        log.write(shlex.join(call) + "\n")
        log.flush()
        done = subprocess.run(
            call, cwd=args.deepspec, env=os.environ | env, stdout=log, stderr=log, check=False
        )
    if done.returncode:
        text = (args.work / "peer.log").read_text()[-3000:]
        raise SystemExit(f"{name} exited {done.returncode}: {text}")
    return time.perf_counter() - started


def adopt(run: Run, checkpoint: Path, output: Path) -> None:
    """Write its checkpoint as a draft folder of ours."""
    from safetensors.torch import load_file

    theirs: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        theirs |= load_file(path)
    wanted = {name for name, _ in run.model.trained()}
    if missing := wanted - theirs.keys():
        raise SystemExit(f"{checkpoint} lacks {', '.join(sorted(missing)[:5])}")
    run.model.load_state_dict({n: theirs[n].float() for n in wanted}, strict=False)
    save_draft(output, run.model)


def whole(args: argparse.Namespace) -> dict[str, Any]:
    """Cache, training, draft."""
    words = f"{args.train} --output {shlex.quote(str(args.output))}"
    settings = config(args.store, words)
    shutil.rmtree(args.output, ignore_errors=True)
    folder.claim(args.output, settings, resume=False, overwrite=True)
    run = prepare(settings)
    folder.begin(args.output, run, resume=False, overwrite=True)
    args.work.mkdir(parents=True, exist_ok=True)
    cache, data = (args.work.absolute() / name for name in ("peer_cache", "peer.jsonl"))
    shutil.rmtree(args.work / "home", ignore_errors=True)
    draft, target = run.model.config, str(Path(args.model).absolute())
    opts: dict[str, object] = {
        "model.target_model_name_or_path": target,
        "model.target_layer_ids": list(draft.target_layer_ids),
        "model.num_draft_layers": draft.num_layers,
        "model.mask_token_id": draft.mask_token_id,
        "model.block_size": draft.block_size,
        "model.markov_rank": draft.markov_rank,
        "model.num_anchors": args.anchors,
        "data.num_workers": args.workers,
        "data.max_length": 4096,
    }
    told = args.work / "peer_cache.json"
    if not told.exists():
        shutil.rmtree(cache, ignore_errors=True)
        samples = conversations(run, args.data, data, system_of(args.model))
        flags = ("--train-data-path", data, "--output-dir", cache)
        wrote = script(args, "scripts/data/prepare_target_cache.py", opts, *flags)
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        found = {"cache_seconds": wrote, "bytes": size, "samples": samples}
        told.write_text(json.dumps(found) + "\n")
    cached: dict[str, Any] = json.loads(told.read_text())
    more = {
        "data.target_cache_path": cache,
        "train.lr": args.lr,
        "train.local_batch_size": args.batch,
        "train.global_batch_size": args.batch,
        "train.max_train_steps": args.steps,
        "train.torch_compile": args.compile,
        "logging.checkpointing_steps": 10**9,
    }
    took = script(args, "train.py", opts | more)
    (latest,) = (args.work / "home" / "checkpoints").glob("*/*/step_latest")
    adopt(run, latest, args.output)
    told.unlink()
    shutil.rmtree(cache)
    return cached | {"train_seconds": took, "steps": args.steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspec", required=True, type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--anchors", type=int, default=64, help="of a sample")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--train", default="", help="flags of dspark-train that size the draft")
    print(json.dumps(whole(parser.parse_args())))


if __name__ == "__main__":
    main()
