"""What a row costs EAGLE-3 and P-EAGLE in training, beside DSpark: operations, floating-point
operations, bytes and seconds, forward and backward.

    python bench/unrolled.py [--types dspark,eagle3,peagle] [--anchors 512] [--device cpu]
        [--compile] [--name unrolled]

SmolLM2-135M's shapes with random weights, one packed row of documents of about ``--document``
tokens, everything supervised. "Operations" are those that torch dispatches and that move data
(views are not counted): on a GPU about a kernel each, unless a compiler joins them. Bytes are those
of their inputs and outputs. The network (to the states of its slots) and the objective (from there)
are counted apart. Writes bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common import RESULTS, write
from dspark.cache.target.frozen import FrozenTarget
from dspark.train.config import TrainConfig
from dspark.train.data import anchors as rules
from dspark.train.data.batch import Batch
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.model import DraftModel
from dspark.train.draft.types import drafter
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import Denominators

LAYERS = {"dspark": (1, 8, 14, 20, 27), "dflash": (1, 8, 14, 20, 27)}
TARGET = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 1e5,
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Operations that move data, and the bytes of what they take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            if any(all(x is not y for y in given) or len(given) > 1 for x in made):
                self.operations += 1
                self.bytes += sum(x.numel() * x.element_size() for x in (*given, *made))
        return out


def row(args: argparse.Namespace, layers: int) -> Batch:
    lengths = np.full(args.length // args.document, args.document)
    doc = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    total = len(doc)
    mask = np.concatenate([np.arange(n) > n // 4 for n in lengths])
    eligible = rules.eligible(mask, doc)
    places = np.flatnonzero(eligible)
    chosen = np.random.default_rng(0).choice(places, min(args.anchors, len(places)), replace=False)
    g = torch.Generator().manual_seed(1)
    return Batch.build(
        input_ids=torch.randint(0, args.vocab, (total,), generator=g).numpy(),
        loss_mask=mask,
        doc=doc,
        aux=torch.randn(total, layers, TARGET["hidden_size"], generator=g),
        last=torch.randn(int(eligible.sum()), TARGET["hidden_size"], generator=g),
        anchors=np.sort(chosen),
        block_size=args.steps,
    )


def model_of(kind: str, args: argparse.Namespace) -> DraftModel:
    torch.manual_seed(0)
    config = DraftConfig.sized_for(
        TARGET | {"vocab_size": args.vocab},
        target_layer_ids=LAYERS.get(kind, (1, 14, 27)),
        mask_token_id=0,
        speculator_type=kind,
        num_layers=5 if kind in LAYERS else 1,
        block_size=args.steps,
    )
    size = TARGET["hidden_size"]
    embed = torch.randn(args.vocab, size) * 0.05
    return drafter(kind).network(config, FrozenTarget(embed, torch.ones(size), embed, True), None)


def measured(work: Callable[[], Any], repeats: int, counts: bool) -> dict[str, float]:
    """Of ``work`` once counted, if it ``counts``, and ``repeats`` times timed; the least time."""
    work()
    out: dict[str, float] = {}
    if counts:
        with Counted() as counted:
            work()
        with FlopCounterMode(display=False) as flops:
            work()
        out |= {"operations": counted.operations, "gigabytes": counted.bytes / 1e9}
        out["gigaflop"] = flops.get_total_flops() / 1e9
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return out | {"ms": 1e3 * min(times)}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def case(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = model_of(kind, args).to(args.device, dtype)
    batch = row(args, len(model.config.target_layer_ids)).to(args.device, dtype)
    backend: Any = "flex" if args.device == "cuda" else "sdpa"
    if args.compile:
        model.compile(dynamic=False)
    # Flex attention and compiled graphs are no operations that torch dispatches one by one.
    counts = args.device == "cpu" and not args.compile
    out: dict[str, Any] = {"type": kind, "slots": int(batch.counted.sum())}

    def network() -> None:
        states = model(batch, model.plan(batch, backend))
        sum(x.float().sum() for x in (states.h, states.z) if x is not None).backward()
        model.zero_grad(set_to_none=True)

    out["network"] = measured(network, args.repeats, counts)
    settings = TrainConfig(cache="", **({"speculator_type": kind} | dict(drafter(kind).defaults)))
    with torch.no_grad():
        states = model(batch, model.plan(batch, backend))
    slots = drafter(kind).slots(batch, states, settings.decay)
    slots.h.requires_grad_()
    config = drafter(kind).objective(settings)

    def judge() -> None:
        objective(slots, model.frozen_head, config, Denominators(1.0, 1.0, 1.0)).loss.backward()

    out["objective"] = measured(judge, args.repeats, counts)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default="dspark,eagle3,peagle")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--document", type=int, default=288)
    parser.add_argument("--anchors", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--vocab", type=int, default=4096, help="SmolLM2's is 49152")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--name", default="unrolled")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for kind in args.types.split(","):
        rows.append(case(kind, args))
        print(rows[-1], flush=True)
    config = {k: v for k, v in vars(args).items() if k not in ("results", "name")}
    write(args.name, config, rows, args.results, show=False)


if __name__ == "__main__":
    main()
